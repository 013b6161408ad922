//! The handshake of a mesh connection: rustls does it, on buffers of ours, and then gives the keys to
//! [`super::stream::TlsStream`].

use std::io;
use std::sync::{Arc, OnceLock};

use rustls::client::UnbufferedClientConnection;
use rustls::server::{ClientHello, ResolvesServerCert, UnbufferedServerConnection};
use rustls::sign::CertifiedKey;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, Error, ExtractedSecrets, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::record::RECORD_MAX;
use super::stream::{Keys, TlsStream};

/// A handshake's unread bytes: its largest message is a chain of certificates.
const INPUT_MAX: usize = 64 * 1024;
/// One read of it.
const READ_LEN: usize = 4096;

/// A connection whose both sides have shown who they are.
#[derive(Debug)]
pub struct Handshaken {
    /// What carries bytes from now on.
    pub stream: TlsStream,
    /// What the peer showed, verified; `None` if it showed nothing.
    pub peer: Option<CertificateDer<'static>>,
    /// The SNI, at a server.
    pub server_name: Option<String>,
}

/// Makes a TLS connection as its client. `config` must be one of [`super::client_config`] for the mesh port, whose
/// keys may be taken from rustls.
///
/// # Errors
/// Of the socket; or what rustls says, within an [`io::Error`].
pub async fn connect(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: TcpStream,
) -> io::Result<Handshaken> {
    let mut connection = UnbufferedClientConnection::new(config, name).map_err(broken)?;
    let mut wire = Wire::new(socket);
    wire.shake(&mut connection).await?;
    let peer = connection.peer_certificates().and_then(first);
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(broken)?;
    let stream = wire.into_stream(secrets, Keys::Client(rest))?;
    Ok(Handshaken {
        stream,
        peer,
        server_name: None,
    })
}

/// Takes a TLS connection as its server, with a `config` of [`super::server_config`] for the mesh port.
///
/// # Errors
/// Of the socket; or what rustls says, within an [`io::Error`].
pub async fn accept(config: &ServerConfig, socket: TcpStream) -> io::Result<Handshaken> {
    let noted = Arc::new(NotesName {
        resolver: Arc::clone(&config.cert_resolver),
        name: OnceLock::new(),
    });
    let mut config = config.clone();
    config.cert_resolver = Arc::<NotesName>::clone(&noted);
    let mut connection = UnbufferedServerConnection::new(Arc::new(config)).map_err(broken)?;
    let mut wire = Wire::new(socket);
    wire.shake(&mut connection).await?;
    let peer = connection.peer_certificates().and_then(first);
    let (secrets, rest) = connection
        .dangerous_into_kernel_connection()
        .map_err(broken)?;
    let stream = wire.into_stream(secrets, Keys::Server(rest))?;
    Ok(Handshaken {
        stream,
        peer,
        server_name: noted.name.get().cloned(),
    })
}

fn first(chain: &[CertificateDer<'static>]) -> Option<CertificateDer<'static>> {
    chain.first().cloned()
}

pub(super) fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Keeps the SNI, which rustls' connection without buffers does not tell.
#[derive(Debug)]
struct NotesName {
    resolver: Arc<dyn ResolvesServerCert>,
    name: OnceLock<String>,
}

impl ResolvesServerCert for NotesName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            self.name.get_or_init(|| name.to_owned());
        }
        self.resolver.resolve(hello)
    }
}

/// The socket with what was read and not used, and what is to be written.
struct Wire {
    socket: TcpStream,
    input: Vec<u8>,
    output: Output,
}

#[derive(Default)]
struct Output {
    wire: Vec<u8>,
    /// Application data of the peer that came right behind its handshake.
    early: Vec<u8>,
}

/// What the handshake wants next.
enum Want {
    Again,
    Write,
    Read,
    Nothing,
}

/// What one step used up of the input, and what is next.
type Step = (usize, Result<Want, Error>);

/// Does what rustls asks for, as far as it needs no socket.
fn act<D>(status: UnbufferedStatus<'_, '_, D>, output: &mut Output) -> Step {
    let UnbufferedStatus { discard, state } = status;
    let want = state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut data) => {
            let at = output.wire.len();
            output.wire.resize(at + RECORD_MAX, 0);
            let encoded = data.encode(&mut output.wire[at..]);
            let bytes = encoded.map_err(|error| Error::General(error.to_string()))?;
            output.wire.truncate(at + bytes);
            Ok(Want::Again)
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Want::Write)
        }
        ConnectionState::BlockedHandshake => Ok(Want::Read),
        ConnectionState::ReadTraffic(mut data) => {
            while let Some(record) = data.next_record() {
                output.early.extend_from_slice(record?.payload);
            }
            Ok(Want::Again)
        }
        ConnectionState::WriteTraffic(_) => Ok(Want::Nothing),
        _ => Err(Error::HandshakeNotComplete),
    });
    (discard, want)
}

/// A side of a handshake.
trait Handshake {
    fn step(&mut self, input: &mut [u8], output: &mut Output) -> Step;
    /// Whether the next step only gives out what is ready for the peer.
    fn has_output(&self) -> bool;
}

impl Handshake for UnbufferedClientConnection {
    fn step(&mut self, input: &mut [u8], output: &mut Output) -> Step {
        act(self.process_tls_records(input), output)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

impl Handshake for UnbufferedServerConnection {
    fn step(&mut self, input: &mut [u8], output: &mut Output) -> Step {
        act(self.process_tls_records(input), output)
    }

    fn has_output(&self) -> bool {
        self.wants_write()
    }
}

impl Wire {
    fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Output::default(),
        }
    }

    /// Runs a handshake to its end. The peer is told why it failed.
    async fn shake(&mut self, connection: &mut impl Handshake) -> io::Result<()> {
        loop {
            let (used, want) = connection.step(&mut self.input, &mut self.output);
            self.input.drain(..used);
            match want {
                Ok(Want::Again) => (),
                Ok(Want::Write) => self.write().await?,
                Ok(Want::Read) => self.read().await?,
                Ok(Want::Nothing) => return self.write().await,
                Err(error) => {
                    // Whether the alert arrives changes nothing here. Beyond it, a connection that failed must
                    // not be stepped.
                    while connection.has_output()
                        && let (used, Ok(Want::Again)) =
                            connection.step(&mut self.input, &mut self.output)
                    {
                        self.input.drain(..used);
                    }
                    let _ = self.write().await;
                    return Err(broken(error));
                }
            }
        }
    }

    async fn write(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.output.wire).await?;
        self.output.wire.clear();
        Ok(())
    }

    async fn read(&mut self) -> io::Result<()> {
        if self.input.len() >= INPUT_MAX {
            return Err(broken(Error::PeerSentOversizedRecord));
        }
        self.input.reserve(READ_LEN);
        let mut limited = bytes::BufMut::limit(&mut self.input, READ_LEN);
        if self.socket.read_buf(&mut limited).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn into_stream(self, secrets: ExtractedSecrets, keys: Keys) -> io::Result<TlsStream> {
        TlsStream::new(self.socket, secrets, keys, self.input, self.output.early).map_err(broken)
    }
}
