//! One connection to control: TCP, TLS as this host's agent, gRPC over it, and the Sync stream.
//!
//! Everything that happens on it goes to the owner of the session as an [`Event`], with the attempt that it belongs to.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use mesh_api::proto::from_control::Message;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::{proto, sync};
use mesh_core::reason::Reason;
use mesh_core::session::{Attempt, Lost};
use mesh_runtime::tls::verify::handshake_reason;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// ALPN of gRPC.
pub(crate) const ALPN_H2: &[u8] = b"h2";
/// Until TCP and TLS stand, each. Below the time after which the session gives an attempt up, so that the cause is
/// known then.
const STEP_MAX: Duration = Duration::from_secs(6);
/// Messages on their way to control: more than the session ever has to say at once.
const OUTGOING_MAX: usize = 64;
/// The header in which control says the reason of a refusal.
const REASON_HEADER: &str = "x-meshwork-reason";

/// The connection of an attempt, as the owner of the session holds it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) attempt: Attempt,
    task: AbortHandle,
    pub(super) outgoing: Option<mpsc::Sender<proto::FromAgent>>,
    pub(super) channel: Option<Channel>,
}

impl Connection {
    pub(super) const fn of(attempt: Attempt, task: AbortHandle) -> Self {
        Self {
            attempt,
            task,
            outgoing: None,
            channel: None,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What happened on the connection of an attempt.
#[derive(Debug)]
pub(super) enum Event {
    Connected {
        outgoing: mpsc::Sender<proto::FromAgent>,
        channel: Channel,
        /// Of this host, on the way to control.
        from: Option<IpAddr>,
    },
    Message(Box<Message>),
    /// A new credential in the place of one that ended. Nothing follows on this connection.
    Rejoined(Vec<Bytes>),
    Lost(Ended),
}

/// Why it ended, for people and for the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) why: Lost,
    /// The reason code, where control gave one.
    pub(crate) reason: Option<String>,
    pub(crate) text: String,
}

impl Ended {
    fn broken(text: String) -> Self {
        Self {
            why: Lost::Broken,
            reason: None,
            text,
        }
    }
}

/// Runs one connection; the last event is [`Event::Lost`].
pub(super) async fn run(
    attempt: Attempt,
    address: String,
    tls: Arc<ClientConfig>,
    events: mpsc::Sender<(Attempt, Event)>,
) {
    let ended = match connect(&address, tls).await {
        Ok((channel, from)) => converse(attempt, channel, from, &events).await,
        Err(ended) => ended,
    };
    // Fails when the session is gone; then nobody wants to know.
    let _ = events.send((attempt, Event::Lost(ended))).await;
}

/// The way to control, and the address of this host on it.
pub(super) async fn connect(
    address: &str,
    tls: Arc<ClientConfig>,
) -> Result<(Channel, Option<IpAddr>), Ended> {
    let stream = dial(address, tls).await;
    let stream = stream.map_err(|error| Ended::broken(error.text))?;
    let from = own_address(&stream);
    let channel = channel(stream).await.map_err(Ended::broken)?;
    Ok((channel, from))
}

/// Where this host is reached by whoever is reached this way. A way that does not leave the host says nothing.
pub(crate) fn own_address(stream: &TlsStream<TcpStream>) -> Option<IpAddr> {
    let local = stream.get_ref().0.local_addr().ok()?;
    Some(local.ip().to_canonical()).filter(|ip| !ip.is_loopback())
}

async fn converse(
    attempt: Attempt,
    channel: Channel,
    from: Option<IpAddr>,
    events: &mpsc::Sender<(Attempt, Event)>,
) -> Ended {
    let (outgoing, waiting) = mpsc::channel(OUTGOING_MAX);
    let connected = Event::Connected {
        outgoing,
        channel: channel.clone(),
        from,
    };
    if events.send((attempt, connected)).await.is_err() {
        return Ended::broken("the agent stops".to_owned());
    }
    let mut client = MeshClient::new(channel)
        .max_decoding_message_size(sync::MESSAGE_MAX)
        .max_encoding_message_size(sync::MESSAGE_MAX);
    let mut incoming = match client.sync(ReceiverStream::new(waiting)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return ended(&status),
    };
    loop {
        match incoming.message().await {
            Ok(Some(proto::FromControl { message })) => {
                // A kind that only a newer control knows is none to us.
                if let Some(message) = message {
                    let event = Event::Message(Box::new(message));
                    if events.send((attempt, event)).await.is_err() {
                        return Ended::broken("the agent stops".to_owned());
                    }
                }
            }
            Ok(None) => return Ended::broken("control ended the session".to_owned()),
            Err(status) => return ended(&status),
        }
    }
}

/// Why control was not reached.
#[derive(Debug)]
pub(crate) struct DialError {
    /// What failed, and what to do.
    pub(crate) text: String,
    /// Where something answered that is not the control which was wanted.
    pub(crate) handshake: Option<Reason>,
}

impl From<String> for DialError {
    fn from(text: String) -> Self {
        Self {
            text,
            handshake: None,
        }
    }
}

/// TCP and TLS to `host:port`.
pub(crate) async fn dial(
    address: &str,
    tls: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, DialError> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| format!("`{address}` is no address of a control: write host:port"))?;
    let found = within(STEP_MAX, tokio::net::lookup_host(address)).await;
    let found: Vec<_> = found
        .map_err(|error| {
            format!("the name `{host}` of control can not be looked up: {error}; is it right, and does this host's resolver know it?")
        })?
        .collect();
    let tcp = within(STEP_MAX, TcpStream::connect(&found[..])).await;
    let tcp = tcp.map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::ConnectionRefused => "; does mesh-control run there, and at this port?",
            io::ErrorKind::TimedOut
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable => {
                "; is the address right, and no firewall between?"
            }
            _ => "",
        };
        format!("cannot reach control at {address}: {error}{advice}")
    })?;
    // Beats are small and must not wait for each other. Fails only on a connection that is gone.
    let _ = tcp.set_nodelay(true);
    let connecting = TlsConnector::from(tls).connect(name, tcp);
    within(STEP_MAX, connecting).await.map_err(|error| {
        let reason = handshake_reason(&error);
        let cause = match reason {
            Reason::PeerHandshake | Reason::PeerUnreachable | Reason::Timeout => error.to_string(),
            // The library's words for what our own verifier said help nobody.
            _ => reason.text().to_owned(),
        };
        DialError {
            text: format!("the TLS handshake with control at {address} failed ({reason}): {cause}"),
            handshake: Some(reason),
        }
    })
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} s", limit.as_secs()),
        )),
    }
}

/// gRPC over a TLS connection that stands. It is not dialled again when that is lost.
pub(crate) async fn channel(stream: TlsStream<TcpStream>) -> Result<Channel, String> {
    let once = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_| {
        let stream = once.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the connection is gone");
        std::future::ready(stream.ok_or_else(gone))
    });
    Endpoint::from_static("http://control")
        .connect_with_connector(connector)
        .await
        .map_err(|error| format!("control does not speak gRPC: {error}"))
}

/// The reason code of a refusal, where control gave one.
pub(crate) fn reason_of(status: &Status) -> Option<String> {
    let value = status.metadata().get(REASON_HEADER)?.to_str().ok()?;
    Some(sync::printable(value))
}

pub(super) fn ended(status: &Status) -> Ended {
    // Refusals that repeating does not lift; all else is control's or the network's trouble.
    let refused = matches!(
        status.code(),
        Code::Unauthenticated
            | Code::PermissionDenied
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unimplemented
    );
    let reason = reason_of(status);
    let text = match status.message() {
        "" => status.code().description().to_owned(),
        text => sync::printable(text),
    };
    Ended {
        why: if refused { Lost::Refused } else { Lost::Broken },
        reason,
        text,
    }
}
