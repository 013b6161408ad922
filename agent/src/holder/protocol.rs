//! What holder and worker say to each other: frames of JSON on a unix stream socket, descriptors beside them.
//!
//! A frame is its length (four bytes, network order) and one message. Descriptors travel with the first byte of
//! their frame, and a reader never reads past the end of a frame, so they can not be taken for another frame's.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bypass::Bypass;
use crate::capture::CgroupRef;
use crate::capture::door::Seen;
use crate::capture::real::Real;
use crate::capture::rules::Shed;

/// 4,095 workloads with their cgroups take about 600 KB, 16,384 address ranges of doors 800 KB, 4,096 real addresses
/// 330 KB. The file that keeps the last two has the same bound.
pub(crate) const FRAME_MAX: usize = 2 * 1024 * 1024;
/// The kernel takes 253; fewer keep a frame's buffers small.
pub(crate) const DESCRIPTORS_MAX: usize = 64;
/// A worker that takes nothing for so long hangs.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_secs(5);
const LENGTH_BYTES: usize = 4;

/// What the worker wants the kernel to know. The whole of it, each time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Desired {
    /// Grows with each message of one worker; the answer names it.
    pub(crate) generation: u64,
    pub(crate) workloads: Vec<DesiredWorkload>,
    /// The ports at which plaintext callers are looked for, each once. `None`: it is not known; what stands stays.
    pub(crate) doors: Option<Vec<DesiredDoor>>,
    /// Ports of no door among `doors`, of which it is not known now what their services say: theirs stays.
    pub(crate) kept_doors: Vec<u16>,
    /// Where calls to real addresses are taken over, each once. `None`: it is not known; what stands stays.
    pub(crate) reals: Option<Vec<Real>>,
    /// The ranges that the worker reckons with; they must be those the holder runs with.
    pub(crate) vip4: String,
    pub(crate) vip6: String,
}

/// One workload and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DesiredWorkload {
    /// 1 to 4095. A number that was given up should rest: packets on their way carry it.
    pub(crate) number: u16,
    /// What the number stands for, for the worker that comes after this one: connections wait in the listener's queue
    /// meanwhile, and must be read as the same workload's.
    pub(crate) label: String,
    pub(crate) cgroups: Vec<CgroupRef>,
    pub(crate) uids: Vec<u32>,
    /// Of its containers on the bridges that the settings name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) addresses: Vec<IpAddr>,
    /// User 0 may be among `uids`: the services file names it.
    #[serde(default)]
    pub(crate) root: bool,
}

/// What becomes of plaintext callers of one port. Ranges are `address/prefix`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DesiredDoor {
    pub(crate) port: u16,
    pub(crate) open: Vec<String>,
    pub(crate) audited: Vec<String>,
    /// Where transport is `strict`: who is excepted.
    pub(crate) strict: Option<Vec<String>>,
}

/// Worker to holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToHolder {
    Desired(Desired),
    /// What has become of plaintext callers?
    Look,
    /// Control was reached by a connection that was opened after this generation was applied.
    Reached {
        generation: u64,
    },
    /// A worker that was started to stand by has all that it needs, and takes over when it is told.
    StandsBy,
}

/// Holder to worker, with descriptors.
#[derive(Debug)]
pub(crate) enum FromHolder {
    /// First message: what was bound at the start. One that is to stand by uses it when it hears [`Self::Serve`].
    Sockets { sockets: Sockets, standby: bool },
    /// The worker before this one has let go of everything that only one may do.
    Serve,
    /// Listeners that are new to this worker; number 0 is the common one. A number that comes again replaces the
    /// earlier.
    Listeners(Vec<WorkloadListener>),
    /// The kernel knows exactly this generation's workloads; their listeners were sent before. On `trial` its door is not
    /// confirmed yet: control is to be reached.
    Applied { generation: u64, trial: bool },
    /// Nothing of this generation was applied; what was before goes on.
    Failed { generation: u64, error: String },
    /// Answers [`ToHolder::Look`].
    Looked(Looked),
}

/// How the input door stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Looked {
    pub(crate) seen: Seen,
    pub(crate) shed: Shed,
    pub(crate) arming: Arming,
    /// What other programs took away of link, routes, rules and guard, and was put back, since this holder started.
    pub(crate) repaired: u64,
    /// Workers that others have taken over from, and whose open connections go on.
    pub(crate) draining: usize,
    /// Why the last reload was given up; `None` after one that was not.
    pub(crate) given_up: Option<String>,
    /// The last time that root opened this host to plaintext.
    pub(crate) bypass: Option<Bypass>,
    /// Why something of it can not be done now.
    pub(crate) error: Option<String>,
}

/// Whether the door refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Arming {
    /// For good.
    #[default]
    Armed,
    /// For a short time, unless control is reached.
    Trying,
    /// Control was not reached after a change: nothing is refused but what the guard refuses.
    Disarmed,
}

/// Sockets that all workers share. Each is non-blocking.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) mesh: Vec<TcpListener>,
    pub(crate) dns_udp: Vec<UdpSocket>,
    pub(crate) dns_tcp: Vec<TcpListener>,
}

/// The listening sockets of one workload; a family that the host has not is missing.
#[derive(Debug)]
pub(crate) struct WorkloadListener {
    pub(crate) number: u16,
    pub(crate) label: String,
    pub(crate) v4: Option<TcpListener>,
    pub(crate) v6: Option<TcpListener>,
}

/// [`FromHolder`] as it is written: it counts the descriptors that come with it, in the order of its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Wire {
    Sockets {
        mesh: usize,
        dns_udp: usize,
        dns_tcp: usize,
        standby: bool,
    },
    Serve,
    Listeners {
        workloads: Vec<WireListener>,
    },
    Applied {
        generation: u64,
        trial: bool,
    },
    Failed {
        generation: u64,
        error: String,
    },
    Looked(Looked),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireListener {
    pub(super) number: u16,
    pub(super) label: String,
    pub(super) v4: bool,
    pub(super) v6: bool,
}

impl FromHolder {
    /// Puts message and descriptors together; both must agree.
    pub(super) fn read(frame: Frame) -> io::Result<Self> {
        let wire: Wire = frame.message()?;
        let mut descriptors = frame.descriptors.into_iter();
        let mut next = || {
            descriptors
                .next()
                .ok_or_else(|| malformed("descriptors are missing"))
        };
        let message = match wire {
            Wire::Sockets {
                mesh,
                dns_udp,
                dns_tcp,
                standby,
            } => {
                // What is missing is noticed after at most DESCRIPTORS_MAX.
                let mut tcp = |n| (0..n).map(|_| next().map(TcpListener::from)).collect();
                let mesh: io::Result<Vec<_>> = tcp(mesh);
                let (mesh, dns_tcp) = (mesh?, tcp(dns_tcp)?);
                let udp = (0..dns_udp).map(|_| next().map(UdpSocket::from));
                let sockets = Sockets {
                    mesh,
                    dns_tcp,
                    dns_udp: udp.collect::<io::Result<_>>()?,
                };
                Self::Sockets { sockets, standby }
            }
            Wire::Serve => Self::Serve,
            Wire::Listeners { workloads } => {
                let mut take =
                    |there: bool| there.then(|| next().map(TcpListener::from)).transpose();
                let mut listeners = Vec::with_capacity(workloads.len().min(DESCRIPTORS_MAX));
                for WireListener {
                    number,
                    label,
                    v4,
                    v6,
                } in workloads
                {
                    listeners.push(WorkloadListener {
                        number,
                        label,
                        v4: take(v4)?,
                        v6: take(v6)?,
                    });
                }
                Self::Listeners(listeners)
            }
            Wire::Applied { generation, trial } => Self::Applied { generation, trial },
            Wire::Failed { generation, error } => Self::Failed { generation, error },
            Wire::Looked(looked) => Self::Looked(looked),
        };
        match descriptors.next() {
            None => Ok(message),
            Some(_) => Err(malformed("more descriptors than the message names")),
        }
    }
}

/// A message as bytes of the wire.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len() - LENGTH_BYTES;
    if length > FRAME_MAX {
        return Err(malformed("the message is larger than 2 MiB"));
    }
    let prefix = u32::try_from(length).map_err(io::Error::other)?;
    bytes[..LENGTH_BYTES].copy_from_slice(&prefix.to_be_bytes());
    Ok(bytes)
}

/// Sends a frame and its descriptors. When the socket is full, `wait` is told the deadline and returns when it may be
/// tried again.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    mut wait: impl FnMut(Instant) -> io::Result<()>,
) -> io::Result<()> {
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(malformed("more than 64 descriptors"));
    }
    let bytes = encode(message)?;
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let deadline = Instant::now() + SEND_TIMEOUT;
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if sent == 0 && !raw.is_empty() {
            &control[..]
        } else {
            &[]
        };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let parts = [IoSlice::new(rest)];
        match sendmsg::<()>(socket.as_raw_fd(), &parts, control, flags, None) {
            Ok(count) => sent += count,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(deadline)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until `socket` takes more, and tells whether it has something to read. `TimedOut` after the deadline.
pub(super) fn wait_for_room(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the other side took nothing for 5 s",
        ));
    }
    // Rounded up, so that the last millisecond is not spun through.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
    let mut wanted = [PollFd::new(socket, PollFlags::POLLIN | PollFlags::POLLOUT)];
    match poll(&mut wanted, timeout.unwrap_or(PollTimeout::MAX)) {
        Ok(_) => {
            let [wanted] = wanted;
            let happened = wanted.revents().unwrap_or(PollFlags::empty());
            Ok(happened.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR))
        }
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A whole frame.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) body: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Frame {
    pub(super) fn message<T: DeserializeOwned>(&self) -> io::Result<T> {
        serde_json::from_slice(&self.body).map_err(io::Error::from)
    }
}

/// Puts frames together from what a non-blocking socket has.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    length: [u8; LENGTH_BYTES],
    length_read: usize,
    body: Vec<u8>,
    body_read: usize,
    descriptors: Vec<OwnedFd>,
}

impl FrameReader {
    /// Whether nothing of a frame was read that is not whole yet.
    pub(super) fn is_between_frames(&self) -> bool {
        self.length_read == 0
    }

    /// The next frame; `WouldBlock` if it is not all there yet, `UnexpectedEof` if the other side is gone.
    pub(super) fn read(&mut self, socket: BorrowedFd<'_>) -> io::Result<Frame> {
        while self.length_read < LENGTH_BYTES {
            let start = self.length_read;
            let target = self.length.get_mut(start..).unwrap_or_default();
            self.length_read += receive(socket, target, &mut self.descriptors)?;
            if self.length_read == LENGTH_BYTES {
                let length = u32::from_be_bytes(self.length) as usize;
                if length > FRAME_MAX {
                    return Err(malformed("the message is larger than 2 MiB"));
                }
                self.body = vec![0; length];
                self.body_read = 0;
            }
        }
        while self.body_read < self.body.len() {
            let start = self.body_read;
            let target = self.body.get_mut(start..).unwrap_or_default();
            self.body_read += receive(socket, target, &mut self.descriptors)?;
        }
        self.length_read = 0;
        Ok(Frame {
            body: std::mem::take(&mut self.body),
            descriptors: std::mem::take(&mut self.descriptors),
        })
    }
}

/// One `recvmsg` into `target`, which is not empty.
fn receive(
    socket: BorrowedFd<'_>,
    target: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut parts = [IoSliceMut::new(target)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let truncated = received.flags.contains(MsgFlags::MSG_CTRUNC);
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            descriptors.extend(raw.into_iter().map(own));
        }
    }
    if truncated || descriptors.len() > DESCRIPTORS_MAX {
        return Err(malformed("more than 64 descriptors"));
    }
    match received.bytes {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => Ok(count),
    }
}

#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn own(raw: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

pub(super) fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The descriptors of `sockets` in the order in which [`FromHolder::read`] takes them.
pub(super) fn sockets_message(sockets: &Sockets, standby: bool) -> (Wire, Vec<BorrowedFd<'_>>) {
    let wire = Wire::Sockets {
        mesh: sockets.mesh.len(),
        dns_udp: sockets.dns_udp.len(),
        dns_tcp: sockets.dns_tcp.len(),
        standby,
    };
    let tcp = sockets.mesh.iter().chain(&sockets.dns_tcp).map(AsFd::as_fd);
    let udp = sockets.dns_udp.iter().map(AsFd::as_fd);
    (wire, tcp.chain(udp).collect())
}

/// As many messages as the descriptors of these listeners need.
pub(super) fn listener_messages<'a>(
    listeners: &[&'a WorkloadListener],
) -> Vec<(Wire, Vec<BorrowedFd<'a>>)> {
    listeners
        .chunks(DESCRIPTORS_MAX / 2)
        .map(|chunk| {
            let workloads = chunk
                .iter()
                .map(|l| WireListener {
                    number: l.number,
                    label: l.label.clone(),
                    v4: l.v4.is_some(),
                    v6: l.v6.is_some(),
                })
                .collect();
            let descriptors = chunk
                .iter()
                .flat_map(|l| [l.v4.as_ref(), l.v6.as_ref()])
                .flatten()
                .map(AsFd::as_fd)
                .collect();
            (Wire::Listeners { workloads }, descriptors)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// Sends what fits into the socket.
    fn put(to: &UnixStream, wire: &Wire, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(to.as_fd(), wire, descriptors, |_| {
            Err(io::ErrorKind::WouldBlock.into())
        })
    }

    fn read(reader: &mut FrameReader, socket: &UnixStream) -> io::Result<FromHolder> {
        reader.read(socket.as_fd()).and_then(FromHolder::read)
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sockets = Sockets {
            mesh: vec![listener(), listener()],
            dns_udp: vec![UdpSocket::bind("127.0.0.1:0").unwrap()],
            dns_tcp: vec![listener()],
        };
        let workloads: Vec<_> = (0..40)
            .map(|number| WorkloadListener {
                number,
                label: format!("shop/{number}"),
                v4: Some(listener()),
                v6: (number % 2 == 0).then(listener),
            })
            .collect();
        let (wire, descriptors) = sockets_message(&sockets, true);
        put(&ours, &wire, &descriptors).unwrap();
        let all: Vec<_> = workloads.iter().collect();
        for (wire, descriptors) in listener_messages(&all) {
            put(&ours, &wire, &descriptors).unwrap();
        }
        put(
            &ours,
            &Wire::Applied {
                generation: 7,
                trial: false,
            },
            &[],
        )
        .unwrap();

        let mut reader = FrameReader::default();
        let FromHolder::Sockets { sockets: got, .. } = read(&mut reader, &theirs).unwrap() else {
            panic!("sockets come first");
        };
        let address = |l: &TcpListener| l.local_addr().unwrap();
        assert_eq!(address(&got.mesh[1]), address(&sockets.mesh[1]));
        assert_eq!(address(&got.dns_tcp[0]), address(&sockets.dns_tcp[0]));
        assert_eq!(
            got.dns_udp[0].local_addr().unwrap(),
            sockets.dns_udp[0].local_addr().unwrap()
        );
        let mut received = Vec::new();
        while let FromHolder::Listeners(more) = read(&mut reader, &theirs).unwrap() {
            received.extend(more);
        }
        assert_eq!(received.len(), 40);
        for (got, sent) in received.iter().zip(&workloads) {
            assert_eq!((got.number, &got.label), (sent.number, &sent.label));
            assert_eq!(got.v4.as_ref().map(address), sent.v4.as_ref().map(address));
            assert_eq!(got.v6.as_ref().map(address), sent.v6.as_ref().map(address));
        }
        let error = read(&mut reader, &theirs).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        let error = read(&mut reader, &theirs).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_frame_may_come_byte_by_byte() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let desired = ToHolder::Desired(Desired {
            generation: 3,
            workloads: vec![DesiredWorkload {
                number: 1,
                label: "web".to_owned(),
                cgroups: vec![CgroupRef { id: 9, level: 2 }],
                uids: vec![33],
                addresses: Vec::new(),
                root: false,
            }],
            doors: None,
            kept_doors: vec![],
            reals: None,
            vip4: "252.64.0.0/16".to_owned(),
            vip6: "fd6d::/64".to_owned(),
        });
        let mut reader = FrameReader::default();
        let bytes = encode(&desired).unwrap();
        let (last, start) = bytes.split_last().unwrap();
        for byte in start {
            ours.write_all(&[*byte]).unwrap();
            let error = reader.read(theirs.as_fd()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        ours.write_all(&[*last]).unwrap();
        let frame = reader.read(theirs.as_fd()).unwrap();
        assert_eq!(frame.message::<ToHolder>().unwrap(), desired);
    }

    #[test]
    fn what_is_too_large_or_does_not_agree_is_refused() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&(2 * 1024 * 1024 + 1_u32).to_be_bytes())
            .unwrap();
        let error = FrameReader::default().read(theirs.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(encode(&"x".repeat(FRAME_MAX)).is_err());

        let (ours, theirs) = UnixStream::pair().unwrap();
        let extra = listener();
        let mut reader = FrameReader::default();
        let two = Wire::Sockets {
            mesh: usize::MAX,
            dns_udp: 0,
            dns_tcp: 0,
            standby: false,
        };
        put(&ours, &two, &[extra.as_fd()]).unwrap();
        assert!(read(&mut reader, &theirs).is_err());
        let none = Wire::Applied {
            generation: 1,
            trial: false,
        };
        put(&ours, &none, &[extra.as_fd()]).unwrap();
        assert!(read(&mut reader, &theirs).is_err());
        let many = vec![extra.as_fd(); DESCRIPTORS_MAX + 1];
        assert!(put(&ours, &none, &many).is_err());
        assert!(serde_json::from_str::<ToHolder>(r#"{"desired":{"generation":1}}"#).is_err());
    }
}
