//! What both agents do with an HTTP/1.1 message: read its head, measure its body, pass its bytes on unchanged.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt::Display;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, ready};

use mesh_core::http1::{self, Body};
use mesh_core::reason::Reason;
use mesh_runtime::mux::{MuxStream, StreamError};
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::Instant;

use crate::limits::Limit;
use crate::relay::Activity;

/// Bytes that one read takes: as many as a stream has credit for soon, so that bulk costs few system calls.
const READ_LEN: usize = 64 * 1024;

thread_local! {
    /// What sockets are read into before it is known how much there is: a connection that waits holds no buffer.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_LEN]);
}

/// Bytes of unfinished heads that one thread holds: a thousand heads that come slowly and are as long as may be.
const HEADS_MAX: usize = 64 * 1024 * 1024;

/// What a buffer keeps that waits for the next message: most heads fit.
const KEPT_LEN: usize = 2048;

/// Empties a buffer. What waits for its next message holds little.
pub(crate) fn forget(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT_LEN {
        *buffer = Vec::new();
    } else {
        buffer.clear();
    }
}

/// Counts the bytes of heads that have begun and are not whole. A head that comes at once is never counted.
///
/// Each sender, be it a caller or an app, may have as much as is left for all others: one that begins a thousand heads
/// leaves half of the bound, and whoever comes next finds room.
#[derive(Debug, Default)]
pub(crate) struct Heads {
    held: Cell<usize>,
    /// By sender, those with unfinished heads only.
    shares: RefCell<HashMap<String, usize>>,
}

/// Whose heads they are: the name of an identity, by which a caller and an app are told apart.
#[derive(Clone, Copy)]
pub(crate) struct Sender<'a> {
    pub(crate) heads: &'a Rc<Heads>,
    pub(crate) name: &'a dyn Display,
}

/// What one unfinished head has of the bound.
#[derive(Default)]
pub(crate) struct Unfinished {
    /// Whose it is, once it counts.
    of: Option<(Rc<Heads>, String)>,
    bytes: usize,
}

impl Unfinished {
    /// The head has so many bytes now; it is of the same sender always. False: that is more than there may be.
    pub(crate) fn note(&mut self, sender: Sender<'_>, bytes: usize) -> bool {
        if bytes == self.bytes {
            return true;
        }
        self.of
            .get_or_insert_with(|| (Rc::clone(sender.heads), sender.name.to_string()));
        self.set(bytes)
    }

    fn set(&mut self, bytes: usize) -> bool {
        let Some((heads, name)) = &self.of else {
            return true;
        };
        let mut shares = heads.shares.borrow_mut();
        let share = shares.entry(name.clone()).or_default();
        *share = *share - self.bytes + bytes;
        heads.held.set(heads.held.get() - self.bytes + bytes);
        self.bytes = bytes;
        let fits = *share <= HEADS_MAX.saturating_sub(heads.held.get());
        if *share == 0 {
            shares.remove(name);
        }
        fits
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.set(0);
    }
}

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

impl Broken {
    /// The same when the program has had the request: nothing may be tried elsewhere any more.
    pub(crate) fn behind_request(self) -> Self {
        match self {
            Self::Malformed(Reason::Overloaded) => Self::Malformed(Reason::HeadDropped),
            other => other,
        }
    }
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
        let read = poll_fn(|cx| {
            SCRATCH.with_borrow_mut(|scratch| {
                let mut read = ReadBuf::new(scratch);
                ready!(Pin::new(&mut *self).poll_read(cx, &mut read))?;
                buffer.extend_from_slice(read.filled());
                Poll::Ready(Ok(read.filled().len()))
            })
        });
        Ok(read.await.map_err(StreamError::Local)?)
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

/// Reads until `parse` finds a whole head at the start of `buffer`; while it is not whole it counts as its sender's.
/// `None`: the source ended before its first byte.
pub(crate) async fn read_head<T>(
    source: &mut impl Source,
    buffer: &mut Vec<u8>,
    activity: &Activity,
    sender: Sender<'_>,
    (max, parse): (usize, impl Fn(&[u8]) -> Result<Option<T>, Reason>),
) -> Result<Option<T>, Broken> {
    let mut seen = 0;
    let mut until = None;
    let mut unfinished = Unfinished::default();
    loop {
        // What comes at once is mostly whole.
        let look = seen == 0 || buffer.len() >= max || http1::is_decided(buffer, seen);
        if look
            && !buffer.is_empty()
            && let Some(head) = parse(buffer).map_err(Broken::Malformed)?
        {
            return Ok(Some(head));
        }
        seen = buffer.len();
        let bytes = if seen == 0 {
            forget(buffer);
            source.take(buffer).await?
        } else {
            if !unfinished.note(sender, seen) {
                activity.ran_out(Limit::Heads);
                return Err(Broken::Malformed(Reason::Overloaded));
            }
            // Only a head that comes in pieces costs a timer.
            let until = *until.get_or_insert_with(|| Instant::now() + activity.head_timeout());
            let read = tokio::time::timeout_at(until, source.take(buffer)).await;
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
    fn what_breaks_behind_a_request_is_tried_nowhere_else() {
        let broken = Broken::Malformed(Reason::Overloaded).behind_request();
        assert!(matches!(broken, Broken::Malformed(reason) if !reason.is_retryable()));
    }

    #[test]
    fn unfinished_heads_are_bounded_and_one_sender_leaves_room_for_others() {
        const LONG: usize = 64 * 1024;
        let heads = Rc::new(Heads::default());
        let of = |name| Sender {
            heads: &heads,
            name,
        };
        let one = of(&"one");
        let mut all = Vec::new();
        for _ in 0..1000 {
            let mut head = Unfinished::default();
            if head.note(one, LONG) {
                all.push(head);
            }
        }
        assert_eq!(
            all.len() * LONG,
            HEADS_MAX / 2,
            "it leaves as much as it has"
        );
        let others = [of(&"two"), of(&"three"), of(&"four")];
        let mut begun: [Unfinished; 3] = Default::default();
        for (head, of) in begun.iter_mut().zip(others) {
            assert!(head.note(of, LONG), "each other has some");
        }
        let [first, ..] = &mut begun;
        assert!(
            !first.note(others[0], HEADS_MAX / 2),
            "all together have a bound"
        );
        assert!(
            first.note(others[0], 100),
            "what grew too large may be less again"
        );
        assert_eq!(heads.shares.borrow().len(), 4);
        drop((all, begun));
        assert_eq!((heads.held.get(), heads.shares.borrow().len()), (0, 0));
    }
}
