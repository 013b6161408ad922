//! Each direction of a connection ends on its own, whoever ends first.

use meshwork_tests::agent::Owner;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::Pair;

/// Ends its direction at once, or after four bytes of the caller, then takes what comes and writes down its digest.
const SERVER: &str = "\
import hashlib, os, socket, threading
def serve(c, port, first):
    try:
        early = c.recv(first, socket.MSG_WAITALL) if first else b''
        c.sendall(b'that is all' * 50000)
        c.shutdown(socket.SHUT_WR)
        digest = hashlib.sha256(early)
        while True:
            data = c.recv(65536)
            if not data: break
            digest.update(data)
        with open(os.environ['TAKEN'] + str(port), 'a') as f: f.write(digest.hexdigest() + '\\n')
    except OSError: pass
    c.close()
def listen(port, first):
    s = socket.create_server(('0.0.0.0', port))
    while True: threading.Thread(target=serve, args=(s.accept()[0], port, first), daemon=True).start()
for port in (9001, 9002, 9003): threading.Thread(target=listen, args=(port, port % 2 * 4)).start()
listen(9000, 0)
";

/// Says four bytes, hears the server's end, and only then sends the rest.
const CLIENT: &str = "\
import hashlib, os, socket, sys
c = socket.create_connection(('sink.shop.mesh.internal', int(os.environ['PORT'])), 20)
c.settimeout(20)
data = b'\\0\\1\\2\\3' + os.urandom(3000000)
c.sendall(data[:4])
got = b''
while True:
    part = c.recv(65536)
    if not part: break
    got += part
assert got == b'that is all' * 50000, len(got)
c.sendall(data[4:1000000])
c.sendall(data[1000000:])
c.shutdown(socket.SHUT_WR)
print(hashlib.sha256(data).hexdigest())
";

#[test]
fn a_server_that_ends_first_still_takes_all_that_comes() {
    let pair = Pair::new("a_server_that_ends_first");
    let host = &pair.server.host;
    let taken = host.dir().join("taken-");
    let server = host
        .python("sink", SERVER)
        .env("TAKEN", &taken.display().to_string());
    let _server = server.cgroup("sink").spawn("sink");
    let ports = [(9000, "tcp"), (9001, "tcp"), (9002, "auto"), (9003, "auto")];
    for (port, _) in ports {
        host.wait_listening(port, SOON);
    }
    let sink = Owner::Cgroup("sink".to_owned());
    pair.server.serve("sink", &sink, &ports);
    pair.control.wait_endpoints("shop/sink", 1);
    pair.wait_name("sink");
    for (port, protocol) in ports {
        let client = pair
            .client
            .host
            .python("client", CLIENT)
            .env("PORT", &port.to_string());
        let digest = client.cgroup("client").ok();
        let taken = format!("{}{port}", taken.display());
        wait_until(
            &format!("all bytes to arrive at {port}, {protocol}"),
            SOON,
            || {
                // The health check's connections are in it, too.
                let text = std::fs::read_to_string(&taken).unwrap_or_default();
                check(text.contains(digest.trim()), text)
            },
        );
    }
}
