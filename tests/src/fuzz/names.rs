//! What the agent answers to questions for names, by its own file: no other knows the DNS library.

#[path = "../../../agent/src/dns/answer.rs"]
mod answer;
#[expect(dead_code, reason = "what is forwarded is counted by the agent only")]
#[path = "../../../agent/src/dns/counters.rs"]
mod counters;

use std::sync::LazyLock;

use mesh_core::names::ServiceName;
use mesh_core::service::{Capture, Index, Service, Transport, Vip};
use mesh_core::vip::VipRanges;

use answer::{Decision, Zone, server_failure};
use counters::Counters;

const HEADER: usize = 12;
const LENGTH_MAX: usize = 65_535;
/// What an answer may be larger than its question: else forged questions would make us somebody's weapon.
const MORE_MAX: usize = 100;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;

static INDEX: LazyLock<Index> = LazyLock::new(|| {
    let mut index = Index::default();
    index.insert(Service {
        name: ServiceName::parse("shop/web").expect("a name"),
        vip: Vip {
            v4: [252, 64, 0, 2].into(),
            v6: "fd6d:6573:6800::2".parse().expect("an address"),
        },
        ports: vec![],
        transport: Transport::default(),
        plaintext_from: vec![],
        capture: Capture::default(),
    });
    index
});

/// A packet at the agent's port for names. Returns how many answers it got.
pub fn dns(packet: &[u8]) -> usize {
    let zone = Zone::new("mesh.internal", VipRanges::default()).expect("a suffix");
    let said =
        [None, Some(&*INDEX)].map(
            |index| match zone.decide(packet, index, &Counters::default()) {
                Decision::Answer(answer) => {
                    let code = code_of(packet, &answer);
                    assert!(
                        index.is_some() || code != NO_SUCH_NAME,
                        "nothing is known yet, and a name is said to be missing"
                    );
                    1
                }
                Decision::Forward => {
                    assert!(!is_ours(packet), "a name of the mesh leaves the host");
                    0
                }
                Decision::Drop => 0,
            },
        );
    if let Some(answer) = server_failure(packet) {
        assert_eq!(code_of(packet, &answer), SERVER_FAILURE);
    }
    said.iter().sum()
}

/// Checks that an answer is one to this packet, to the byte where that can be seen; its code.
fn code_of(packet: &[u8], answer: &[u8]) -> u8 {
    assert!((HEADER..=LENGTH_MAX).contains(&answer.len()));
    assert!(answer.len() <= packet.len() + MORE_MAX, "an amplifier");
    assert_eq!(answer[..2], packet[..2], "another id");
    assert_eq!(answer[2] & 0x80, 0x80, "no answer");
    assert_eq!(answer[2] & 0x78, packet[2] & 0x78, "another operation");
    if answer[4..6] == [0, 1]
        && let Some((_, end)) = question(packet)
    {
        assert_eq!(answer.get(HEADER..end), packet.get(HEADER..end));
    }
    answer[3] & 0x0f
}

/// Whether a packet asks, in plain words, for a name under the suffix.
fn is_ours(packet: &[u8]) -> bool {
    let asks = packet.len() > HEADER && packet[2] & 0x80 == 0 && packet[4..6] == [0, 1];
    let name = question(packet).filter(|_| asks).map(|(name, _)| name);
    name.is_some_and(|name| {
        let name: Vec<String> = name
            .iter()
            .map(|label| String::from_utf8_lossy(label).to_lowercase())
            .collect();
        name.ends_with(&["mesh".to_owned(), "internal".to_owned()])
    })
}

/// The labels of the first question, and where it ends; `None` unless it stands there whole and without pointers.
fn question(packet: &[u8]) -> Option<(Vec<&[u8]>, usize)> {
    let mut labels = Vec::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*packet.get(at)?);
        at += 1;
        match length {
            0 => break,
            1..=63 => labels.push(packet.get(at..at + length)?),
            _ => return None,
        }
        at += length;
    }
    let end = at + 4;
    (end <= packet.len() && at - HEADER <= 255).then_some((labels, end))
}
