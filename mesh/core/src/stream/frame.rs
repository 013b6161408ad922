//! What passes between two stream layers, and what follows from it.

use super::Limits;
use crate::reason::Reason;

/// What passes between two stream layers. Data and headers are borrowed from the shell's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    Hello {
        version: u8,
        limits: Limits,
    },
    Open {
        stream: u32,
        header: &'a [u8],
    },
    /// The called app took the connection.
    Accepted {
        stream: u32,
    },
    Data {
        stream: u32,
        data: &'a [u8],
        end: bool,
    },
    Reset {
        stream: u32,
        reason: Reason,
        /// The app's own code, which only [`Reason::StreamReset`] has.
        code: u32,
    },
    /// Stream 0 is the connection.
    Credit {
        stream: u32,
        bytes: u32,
    },
    Ping {
        nonce: u64,
    },
    Pong {
        nonce: u64,
    },
    /// No stream above `last` was or will be looked at.
    GoAway {
        last: u32,
        reason: Reason,
    },
}

/// What the shell must do because of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing.
    None,
    /// The peer's limits are known: streams may be opened.
    Ready,
    /// A new stream; its header is in the frame.
    Opened {
        stream: u32,
    },
    Accepted {
        stream: u32,
    },
    /// Keep the frame's data for the stream's reader, then its end.
    Data {
        stream: u32,
        end: bool,
    },
    /// The stream is over at once; what was not read is void.
    Reset {
        stream: u32,
        reason: Reason,
        code: u32,
    },
    /// The stream may have become able to send.
    Writable {
        stream: u32,
    },
    /// All streams may have become able to send.
    AllWritable,
    Pong {
        nonce: u64,
    },
    /// Open no new stream here; those of ours above `last` were not looked at.
    GoAway {
        last: u32,
        reason: Reason,
    },
}

/// How a peer broke the rules: the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("the first frame is not a hello, or a second hello came")]
    Hello,
    #[error("frame version {0} is not known")]
    Version(u8),
    #[error("the announced limits are not sane")]
    Limits,
    #[error("stream {0} was opened out of order or with the wrong parity")]
    OpenOrder(u32),
    #[error("more streams are open than were allowed")]
    TooManyStreams,
    #[error("a frame for stream {0}, which was never opened")]
    NeverOpened(u32),
    #[error("data on stream {0} after its end")]
    AfterEnd(u32),
    #[error("more data than credit on stream {0}")]
    StreamCredit(u32),
    #[error("more data than the connection's credit")]
    ConnectionCredit,
    #[error("credit beyond all bounds")]
    CreditOverflow,
    #[error("more control frames are asked for than are read")]
    ControlFlood,
}

/// Why a stream can not be opened now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("the peer's limits are not known yet")]
    NotReady,
    #[error("the peer allows no more streams")]
    TooMany,
    #[error("the connection is going away")]
    GoingAway,
}
