//! What both agents do with an HTTP/1.1 message: read its head, measure its body, pass its bytes on unchanged.

use mesh_core::http1::Body;
use mesh_core::reason::Reason;
use mesh_runtime::mux::{MuxStream, StreamError};
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::Instant;

use crate::limits::Limit;
use crate::relay::Activity;

/// Bytes that one read takes.
const READ_LEN: usize = 16 * 1024;

/// How an exchange broke, and on which side.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The stream to the other agent.
    Stream(Reason),
    /// The local connection; its peer sees nothing more.
    Local,
    /// What was read breaks the rules of HTTP.
    Malformed(Reason),
    /// The message ended before it was whole.
    Cut,
}

impl From<StreamError> for Broken {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Reset(reason) => Self::Stream(reason),
            StreamError::Local(error) => {
                log::debug!("a local connection broke: {error}");
                Self::Local
            }
        }
    }
}

/// Where bytes come from.
pub(crate) trait Source {
    /// Appends what is there; 0 is the end.
    async fn take(&mut self, buffer: &mut Vec<u8>) -> Result<usize, Broken>;
}

/// Where bytes go.
pub(crate) trait Sink {
    async fn put(&mut self, bytes: &[u8]) -> Result<(), Broken>;
}

impl Source for ReadHalf<'_> {
    async fn take(&mut self, buffer: &mut Vec<u8>) -> Result<usize, Broken> {
        buffer.reserve(READ_LEN);
        let mut limited = bytes::BufMut::limit(buffer, READ_LEN);
        Ok(self
            .read_buf(&mut limited)
            .await
            .map_err(StreamError::Local)?)
    }
}

impl Sink for WriteHalf<'_> {
    async fn put(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        Ok(self.write_all(bytes).await.map_err(StreamError::Local)?)
    }
}

impl Source for &MuxStream {
    async fn take(&mut self, buffer: &mut Vec<u8>) -> Result<usize, Broken> {
        Ok(self.recv(buffer, READ_LEN).await?.unwrap_or(0))
    }
}

impl Sink for &MuxStream {
    async fn put(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        Ok(self.send(bytes).await?)
    }
}

/// Reads until `parse` finds a whole head at the start of `buffer`. `None`: the source ended before its first
/// byte.
pub(crate) async fn read_head<T>(
    source: &mut impl Source,
    buffer: &mut Vec<u8>,
    activity: &Activity,
    (max, parse): (usize, impl Fn(&[u8]) -> Result<Option<T>, Reason>),
) -> Result<Option<T>, Broken> {
    let mut seen = 0;
    let mut until = None;
    loop {
        if worth_parsing(buffer, seen, max)
            && let Some(head) = parse(buffer).map_err(Broken::Malformed)?
        {
            return Ok(Some(head));
        }
        seen = buffer.len();
        let read = source.take(buffer);
        let bytes = if seen == 0 {
            read.await?
        } else {
            // Only a head that comes in pieces costs a timer.
            let until = *until.get_or_insert_with(|| Instant::now() + activity.head_timeout());
            let read = tokio::time::timeout_at(until, read).await;
            read.unwrap_or_else(|_| {
                activity.ran_out(Limit::Head);
                Err(Broken::Malformed(Reason::Timeout))
            })?
        };
        if bytes == 0 {
            return if buffer.is_empty() {
                Ok(None)
            } else {
                Err(Broken::Cut)
            };
        }
        activity.note();
    }
}

/// Whether what came behind `seen` may have completed a head, or spoiled it: each byte is looked at once.
fn worth_parsing(buffer: &[u8], seen: usize, max: usize) -> bool {
    if buffer.len() >= max {
        return true;
    }
    let new = buffer.iter().enumerate().skip(seen);
    new.into_iter().any(|(at, byte)| match byte {
        0 => true,
        b'\n' => at == 0 || buffer[at - 1] != b'\r' || buffer[..at].ends_with(b"\r\n\r"),
        _ => false,
    })
}

/// Passes a body on, what `buffer` already has of it first. What follows the body stays in `buffer`.
pub(crate) async fn pump(
    source: &mut impl Source,
    sink: &mut impl Sink,
    buffer: &mut Vec<u8>,
    body: &mut Body,
    (count, activity): (&Counter, &Activity),
) -> Result<(), Broken> {
    loop {
        if !buffer.is_empty() {
            let bytes = body.advance(buffer).map_err(Broken::Malformed)?;
            sink.put(&buffer[..bytes]).await?;
            count.inc_by(bytes as u64);
            if bytes == buffer.len() {
                buffer.clear();
            } else {
                buffer.drain(..bytes);
            }
        }
        if body.is_done() {
            return Ok(());
        }
        if source.take(buffer).await? == 0 {
            return if body.may_close() {
                Ok(())
            } else {
                Err(Broken::Cut)
            };
        }
        activity.note();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_parsed_when_it_may_be_whole_or_spoiled() {
        for (text, seen, expected) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n", 0, false),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 0, true),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 26, true),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\nbody", 29, false),
            ("GET / HTTP/1.1\n", 0, true),
            ("\n", 0, true),
            ("GET /\0", 0, true),
            ("xxxxxxxxxx", 0, false),
        ] {
            assert_eq!(
                worth_parsing(text.as_bytes(), seen, 100),
                expected,
                "{text:?} from {seen}"
            );
        }
        assert!(worth_parsing(b"xxxxxxxxxx", 10, 10), "too large");
    }
}
