//! Opening the host on purpose: while the set has an element, plaintext passes that door and guard would refuse, and calls
//! to real addresses are not taken over. The element has a lifetime, so that the kernel closes the host again whatever has
//! become of the agent.

use std::io;
use std::time::Duration;

use super::netlink::{Connection, Message, errno_of};
use super::nft::{Meta, R0, Scribe, SetShape, Steps, Type, batch_bounds, elements_of};
use super::rules::TCP;
use super::{CaptureSettings, guard_table};

const BYPASS: &str = "bypass";
/// While one is replaced there are two.
const ELEMENTS_MAX: u32 = 2;

/// The set, in either table. Its elements have lifetimes; the set says none.
pub(super) fn set(scribe: Scribe<'_>, id: u32) -> Message {
    scribe.new_set(SetShape {
        dynamic: Some((0, ELEMENTS_MAX)),
        ..SetShape::plain(BYPASS, id, &[Type::Protocol], None)
    })
}

/// Goes on with TCP while the host is open.
pub(super) fn if_open(steps: Steps) -> Steps {
    steps.meta(Meta::Protocol, R0).only_if_in(BYPASS, R0)
}

/// Goes on while it is not.
pub(super) fn if_closed(steps: Steps) -> Steps {
    steps.meta(Meta::Protocol, R0).only_if_not_in(BYPASS, R0)
}

/// Open for so long from now on, or not at all.
pub(super) fn contents(scribe: Scribe<'_>, left: Option<Duration>) -> Vec<Message> {
    let mut messages = vec![scribe.empty_set(BYPASS)];
    if let Some(left) = left {
        let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        messages.extend(scribe.passing_member(BYPASS, &[TCP], ms.max(1)));
    }
    messages
}

/// Opens or closes what the guard alone holds shut, where no agent runs.
pub(crate) fn open_guard(settings: &CaptureSettings, left: Option<Duration>) -> io::Result<()> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    let (begin, end) = batch_bounds();
    let table = guard_table(settings);
    connection.batch(&begin, &contents(Scribe { table: &table }, left), &end)
}

/// Whether all of our tables that stand are open, or all closed.
pub(crate) fn tables_are(settings: &CaptureSettings, open: bool) -> io::Result<bool> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_NETFILTER)?;
    for table in [settings.table.clone(), guard_table(settings)] {
        let set = Scribe { table: &table }.get_elements(BYPASS);
        let mut elements = 0;
        let asked = connection.query(&set, |_, body| elements += elements_of(body).count());
        match asked {
            Err(error) if errno_of(&error) == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
            Ok(()) if (elements > 0) != open => return Ok(false),
            Ok(()) => {}
        }
    }
    Ok(true)
}
