//! The least that a program in the way of bytes can do: two threads a connection, each of which reads and writes. No TLS,
//! no HTTP, no event loop. What a pair of these costs is no pair of proxies' to save.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

const BUFFER_LEN: usize = 64 * 1024;
const STACK_LEN: usize = 64 * 1024;

/// Relays each connection to `listen` to a connection to `to`, for ever.
pub(super) fn run(listen: SocketAddr, to: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(listen)?;
    loop {
        let (near, _) = listener.accept()?;
        let far = TcpStream::connect(to)?;
        for (from, to) in [(&near, &far), (&far, &near)] {
            from.set_nodelay(true)?;
            let (from, to) = (from.try_clone()?, to.try_clone()?);
            thread::Builder::new()
                .stack_size(STACK_LEN)
                .spawn(move || pass(from, to))?;
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; BUFFER_LEN];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    // The other direction's thread meets the end by itself.
    let _ = to.shutdown(Shutdown::Write);
}
