//! Netlink messages and the exchange of them with the kernel. nf_tables, rtnetlink and sock_diag share this framing;
//! each of the three knows only its own attributes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr};

/// The kernel answers within the call that asked; a longer wait means that the answer was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The kernel sends at most 32 KiB in one datagram of a dump, and 16 KiB otherwise.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Bytes of `nlmsghdr`.
const HEADER: usize = 16;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Set by senders on attributes that hold attributes.
const NLA_F_NESTED: u16 = 0x8000;

/// `NLM_F_REPLACE`: an object that exists is overwritten.
pub(super) const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`: an object that exists is an error.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`: an object that is missing is made.
pub(super) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: the object goes to the end of its list.
pub(super) const APPEND: u16 = 0x800;
/// `NLM_F_DUMP`: every object, in many messages.
pub(super) const DUMP: u16 = 0x300;

/// A run of attributes (type, length, value), padded to four bytes each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // Callers keep every attribute under 64 KiB: elements are sent in chunks and names are bounded.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A NUL-terminated string.
    pub(super) fn string(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// A number as nf_tables wants it: network order.
    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn be64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A number as rtnetlink wants it: host order.
    pub(super) fn ne32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(super) fn nest(self, kind: u16, inner: &Self) -> Self {
        self.bytes(kind | NLA_F_NESTED, &inner.0)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One request, without its sequence number, which the connection gives it.
#[derive(Clone, Debug)]
pub(super) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// `header` is the fixed part that stands before the attributes.
    pub(super) fn new(kind: u16, flags: u16, header: &[u8], attributes: &Attributes) -> Self {
        let mut body = header.to_vec();
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend_from_slice(attributes.as_bytes());
        Self { kind, flags, body }
    }

    fn write(&self, sequence: u32, extra_flags: u16, out: &mut Vec<u8>) {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&length.to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&(self.flags | NLM_F_REQUEST | extra_flags).to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&0_u32.to_ne_bytes());
        out.extend_from_slice(&self.body);
        out.resize(out.len().next_multiple_of(4), 0);
    }

    #[cfg(test)]
    pub(super) fn to_bytes(&self, sequence: u32) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(sequence, 0, &mut out);
        out
    }
}

/// What the kernel said to a request.
#[derive(Debug)]
enum Answer<'a> {
    /// An object: type of message and body.
    Object(u16, &'a [u8]),
    /// The end of a dump, or the acknowledgement of a request.
    Done,
    Failed(io::Error),
}

/// An open netlink socket. One thread uses it; requests do not overlap.
pub(super) struct Connection {
    socket: Socket,
    sequence: u32,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Opens and binds a socket of one netlink family.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket2::SockRef::from(&socket.as_fd()).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        // Both only make errors better and smaller: kernels without them work too.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// One that another program opened, of the same family, and used up to this request.
    pub(super) fn handed_over(socket: OwnedFd, sequence: u32) -> Self {
        Self {
            socket: from_owned(socket),
            sequence,
        }
    }

    /// Takes what the kernel answered to requests that nobody waits for any more.
    pub(super) fn forget_answers(&mut self) {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        while matches!(self.socket.recv(&mut buffer, libc::MSG_DONTWAIT), Ok(1..)) {
            buffer.clear();
        }
    }

    /// For the program that takes our place.
    pub(super) fn to_hand_over(&self) -> (BorrowedFd<'_>, u32) {
        (self.socket.as_fd(), self.sequence)
    }

    /// Makes room for one datagram of `bytes`; needs CAP_NET_ADMIN to go over the host's limit.
    pub(super) fn reserve_send(&self, bytes: usize) -> io::Result<()> {
        use nix::sys::socket::{setsockopt, sockopt::SndBufForce};
        setsockopt(&self.socket.as_fd(), SndBufForce, &bytes).map_err(io::Error::from)
    }

    /// Sends one request and waits for its acknowledgement.
    pub(super) fn request(&mut self, message: &Message) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK, |_, _| {})
    }

    /// Sends one request whose answer is objects, one or a dump, and hands each to `each`.
    pub(super) fn query(
        &mut self,
        message: &Message,
        each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        // A dump ends with DONE; a single answer is followed by the acknowledgement that is asked for here.
        let ack = if message.flags & DUMP == DUMP {
            0
        } else {
            NLM_F_ACK
        };
        self.exchange(message, ack, each)
    }

    fn exchange(
        &mut self,
        message: &Message,
        ack: u16,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        let sequence = self.next_sequence();
        let mut out = Vec::with_capacity(HEADER + message.body.len());
        message.write(sequence, ack, &mut out);
        self.socket.send(&out, 0)?;
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            for (answered, answer) in answers(&buffer) {
                // Left over from a request that timed out.
                if answered != sequence {
                    continue;
                }
                match answer {
                    Answer::Object(kind, body) => each(kind, body),
                    Answer::Done => return Ok(()),
                    Answer::Failed(error) => return Err(error),
                }
            }
        }
    }

    /// Sends `messages` as one nf_tables batch: all of them take effect at once, or none.
    pub(super) fn batch(
        &mut self,
        begin: &Message,
        messages: &[Message],
        end: &Message,
    ) -> io::Result<()> {
        let mut out = Vec::new();
        begin.write(self.next_sequence(), 0, &mut out);
        let mut last = 0;
        for (index, message) in messages.iter().enumerate() {
            last = self.next_sequence();
            let ack = if index + 1 == messages.len() {
                NLM_F_ACK
            } else {
                0
            };
            message.write(last, ack, &mut out);
        }
        end.write(self.next_sequence(), 0, &mut out);
        self.socket.send(&out, 0)?;
        let first_error = self.read_batch_answer(last)?;
        first_error.map_or(Ok(()), Err)
    }

    /// Errors come for each message that failed, the acknowledgement only for `last`; the first error is the cause.
    fn read_batch_answer(&mut self, last: u32) -> io::Result<Option<io::Error>> {
        let mut first_error = None;
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let mut flags = 0;
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, flags) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && flags != 0 => {
                    return Ok(first_error);
                }
                Err(error) => return Err(error),
            }
            for (sequence, answer) in answers(&buffer) {
                match answer {
                    Answer::Failed(error) => {
                        first_error.get_or_insert(error);
                        // All errors of a batch are queued before the send returned: take the rest without waiting.
                        flags = libc::MSG_DONTWAIT;
                    }
                    Answer::Done if sequence == last => return Ok(first_error),
                    Answer::Done | Answer::Object(..) => {}
                }
            }
        }
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

#[expect(unsafe_code, reason = "the library takes a number only")]
fn from_owned(socket: OwnedFd) -> Socket {
    // SAFETY: the descriptor is open, and from here on nobody's but the socket's.
    unsafe { Socket::from_raw_fd(socket.into_raw_fd()) }
}

/// Reads the messages of one datagram. What does not parse ends it: the kernel wrote it, so it can only be cut off.
fn answers(datagram: &[u8]) -> impl Iterator<Item = (u32, Answer<'_>)> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = read_u32(rest, 0)? as usize;
        let (kind, flags, sequence) = (read_u16(rest, 4)?, read_u16(rest, 6)?, read_u32(rest, 8)?);
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let answer = match kind {
            NLMSG_DONE => Answer::Done,
            NLMSG_ERROR => match read_u32(body, 0)?.cast_signed() {
                0 => Answer::Done,
                code => Answer::Failed(kernel_error(code.wrapping_neg(), flags, body)),
            },
            _ => Answer::Object(kind, body),
        };
        Some((sequence, answer))
    })
}

/// The error number, with the kernel's own words where it gave some.
fn kernel_error(errno: i32, flags: u16, body: &[u8]) -> io::Error {
    let plain = io::Error::from_raw_os_error(errno);
    if flags & NLM_F_ACK_TLVS == 0 {
        return plain;
    }
    // `nlmsgerr`: the code, then the header of the request, then its body unless it was capped.
    let original = read_u32(body, 4).unwrap_or(0) as usize;
    let skip = if flags & NLM_F_CAPPED == 0 {
        4 + original.max(HEADER).next_multiple_of(4)
    } else {
        4 + HEADER
    };
    let text = attributes(body.get(skip..).unwrap_or_default())
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, value)| String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)));
    match text {
        Some(text) => io::Error::new(
            plain.kind(),
            KernelError {
                errno,
                text: text.into(),
            },
        ),
        None => plain,
    }
}

/// An error number with the kernel's explanation. `errno_of` finds the number again.
#[derive(Debug, thiserror::Error)]
#[error("{text} ({})", io::Error::from_raw_os_error(*errno))]
struct KernelError {
    errno: i32,
    text: String,
}

/// The error number of an answer of the kernel, with or without words.
pub(super) fn errno_of(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        error
            .get_ref()?
            .downcast_ref::<KernelError>()
            .map(|e| e.errno)
    })
}

/// Reads attributes: (type without flags, value).
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(rest, 0)?);
        let kind = read_u16(rest, 2)? & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let inner = Attributes::default().string(1, "mesh").be32(2, 7);
        assert_eq!(
            inner.as_bytes(),
            [
                9, 0, 1, 0, b'm', b'e', b's', b'h', 0, 0, 0, 0, 8, 0, 2, 0, 0, 0, 0, 7
            ]
        );
        let outer = Attributes::default().nest(3, &inner);
        assert_eq!(outer.as_bytes()[..4], [24, 0, 3, 0x80]);
        let read: Vec<_> = attributes(inner.as_bytes()).collect();
        assert_eq!(
            read,
            [(1, b"mesh\0".as_slice()), (2, [0, 0, 0, 7].as_slice())]
        );
    }

    #[test]
    fn a_message_has_its_length_and_sequence() {
        let attributes = Attributes::default().bytes(5, &[1]);
        let bytes = Message::new(0x0a00, CREATE, &[1, 0, 0, 0], &attributes).to_bytes(9);
        assert_eq!(
            bytes,
            [
                28, 0, 0, 0, 0, 0x0a, 1, 4, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 5, 0, 1, 0,
                0, 0
            ]
        );
    }

    #[test]
    fn answers_carry_the_kernels_words_and_survive_truncation() {
        let words = Attributes::default().string(NLMSGERR_ATTR_MSG, "no such table");
        let mut body = (-2_i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        body.extend_from_slice(words.as_bytes());
        let message = Message {
            kind: NLMSG_ERROR,
            flags: NLM_F_CAPPED | NLM_F_ACK_TLVS,
            body,
        };
        let bytes = message.to_bytes(4);
        let mut read = answers(&bytes);
        let Some((4, Answer::Failed(error))) = read.next() else {
            panic!("an error was expected");
        };
        assert_eq!(errno_of(&error), Some(libc::ENOENT));
        assert!(error.to_string().contains("no such table"), "{error}");
        drop(read);
        for cut in 0..bytes.len() {
            assert!(answers(&bytes[..cut]).count() <= 1);
        }
    }
}
