//! What a DNS packet is answered with, decided from its bytes and the index alone. The only file that knows
//! the DNS library.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use mesh_core::names::{Label, ServiceName};
use mesh_core::service::Index;
use mesh_core::vip::VipRanges;

use super::counters::{Counters, count};

/// How long an answer may be kept, in seconds, also a negative one: a new service is found soon.
const TTL_S: u32 = 5;
/// Largest UDP payload that we say we take, in bytes: what passes any path unfragmented (DNS flag day 2020).
const UDP_PAYLOAD: u16 = 1232;
/// Records that a query may have behind its question: EDNS, and a signature that we do not check.
const EXTRA_RECORDS_MAX: u16 = 2;

/// What to do with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Answer(Vec<u8>),
    /// Not ours: hand it on, byte for byte.
    Forward,
    /// Not a query; an answer could only do harm.
    Drop,
}

/// The suffix can not be used.
#[derive(Debug, thiserror::Error)]
#[error("`{suffix}` is not a DNS suffix; set a name like mesh.internal at `mesh-control init`")]
pub(crate) struct ZoneError {
    suffix: String,
    #[source]
    source: hickory_proto::ProtoError,
}

/// The names we answer for: all under the suffix, and the reverse names of virtual addresses.
#[derive(Debug)]
pub(super) struct Zone {
    apex: Name,
    ranges: VipRanges,
}

/// Where a name of ours lies.
enum Place {
    Apex,
    /// A namespace: has no records, but may have names below it.
    Namespace(Label),
    Service(ServiceName),
    Address(IpAddr),
    /// Under the suffix, where nothing can be.
    Nowhere,
}

struct Question {
    header: Header,
    query: Query,
    edns: Option<Edns>,
}

impl Zone {
    pub(super) fn new(suffix: &str, ranges: VipRanges) -> Result<Self, ZoneError> {
        let refused = |source| ZoneError {
            suffix: suffix.to_owned(),
            source,
        };
        let mut apex = Name::from_ascii(suffix.trim_end_matches('.')).map_err(refused)?;
        apex.set_fqdn(true);
        if apex.is_root() {
            return Err(refused("it is empty".into()));
        }
        Ok(Self { apex, ranges })
    }

    /// Decides about one packet. `index` is `None` until one was ever loaded.
    pub(super) fn decide(
        &self,
        packet: &[u8],
        index: Option<&Index>,
        counters: &Counters,
    ) -> Decision {
        let mut decoder = BinDecoder::new(packet);
        let Ok(header) = Header::read(&mut decoder) else {
            count(&counters.malformed);
            return Decision::Drop;
        };
        if header.metadata.message_type == MessageType::Response {
            count(&counters.malformed);
            return Decision::Drop;
        }
        // RFC 9619: a query has one question. One without any (a cookie's) is for the upstream.
        if header.counts.queries == 0 {
            return Decision::Forward;
        }
        let query = match Query::read(&mut decoder) {
            Ok(query) if header.counts.queries == 1 => query,
            Ok(_) | Err(_) => {
                count(&counters.malformed);
                return refusal(&header, None, ResponseCode::FormErr);
            }
        };
        let Some(place) = self.place(query.name()) else {
            return Decision::Forward;
        };
        if header.metadata.op_code != OpCode::Query {
            return refusal(&header, Some(query), ResponseCode::NotImp);
        }
        let Some(edns) = read_extras(&header, &mut decoder) else {
            count(&counters.malformed);
            return refusal(&header, Some(query), ResponseCode::FormErr);
        };
        let question = Question {
            header,
            query,
            edns,
        };
        self.answer(&question, &place, index, counters)
    }

    fn answer(
        &self,
        question: &Question,
        place: &Place,
        index: Option<&Index>,
        counters: &Counters,
    ) -> Decision {
        if question.edns.as_ref().is_some_and(|e| e.version() > 0) {
            return question.reply(ResponseCode::BADVERS, vec![], None);
        }
        let class = question.query.query_class();
        if !matches!(class, DNSClass::IN | DNSClass::ANY) {
            return question.reply(ResponseCode::Refused, vec![], None);
        }
        let Some(index) = index else {
            count(&counters.no_index);
            return question.reply(ResponseCode::ServFail, vec![], None);
        };
        let Some(data) = self.records(place, question.query.query_type(), index) else {
            count(&counters.no_such_name);
            return question.reply(
                ResponseCode::NXDomain,
                vec![],
                Some(self.soa(place, question)),
            );
        };
        count(&counters.answered);
        // The name as it was asked, in its case: some resolvers check that (0x20).
        let name = question.query.name();
        let answers: Vec<Record> = data
            .into_iter()
            .map(|data| Record::from_rdata(name.clone(), TTL_S, data))
            .collect();
        let soa = answers.is_empty().then(|| self.soa(place, question));
        question.reply(ResponseCode::NoError, answers, soa)
    }

    /// The records of a name; `None` if there is no such name.
    fn records(&self, place: &Place, kind: RecordType, index: &Index) -> Option<Vec<RData>> {
        let wants = |other| kind == other || kind == RecordType::ANY;
        let mut data = Vec::new();
        match place {
            Place::Service(name) => {
                let vip = index.get(name)?.vip;
                if wants(RecordType::A) {
                    data.push(RData::A(A(vip.v4)));
                }
                if wants(RecordType::AAAA) {
                    data.push(RData::AAAA(AAAA(vip.v6)));
                }
            }
            Place::Address(address) => {
                let service = index.by_address(*address)?;
                if wants(RecordType::PTR) {
                    data.push(RData::PTR(PTR(self.name_of(&service.name)?)));
                }
            }
            Place::Apex => {
                if wants(RecordType::SOA) {
                    data.push(RData::SOA(self.authority()));
                }
            }
            Place::Namespace(namespace) => {
                let mut services = index.services();
                services.find(|service| service.name.namespace == *namespace)?;
            }
            Place::Nowhere => return None,
        }
        Some(data)
    }

    /// `None` if the name is not ours.
    fn place(&self, name: &Name) -> Option<Place> {
        if let Some(address) = reverse_address(name) {
            return self
                .ranges
                .contains(address)
                .then_some(Place::Address(address));
        }
        if !self.apex.zone_of(name) {
            return None;
        }
        let below = usize::from(name.num_labels() - self.apex.num_labels());
        let labels: Vec<Option<Label>> = name.iter().take(below).map(label).collect();
        Some(match labels.as_slice() {
            [] => Place::Apex,
            [Some(namespace)] => Place::Namespace(namespace.clone()),
            [Some(name), Some(namespace)] => Place::Service(ServiceName {
                namespace: namespace.clone(),
                name: name.clone(),
            }),
            _ => Place::Nowhere,
        })
    }

    fn name_of(&self, service: &ServiceName) -> Option<Name> {
        let labels = [service.name.as_str(), service.namespace.as_str()];
        let relative = Name::from_labels(labels.map(str::as_bytes)).ok()?;
        relative.append_domain(&self.apex).ok()
    }

    /// RFC 2308 §3: a negative answer carries the zone's SOA, which says how long it may be kept.
    fn soa(&self, place: &Place, question: &Question) -> Record {
        let owner = match place {
            Place::Address(_) => question.query.name().base_name(),
            _ => self.apex.clone(),
        };
        Record::from_rdata(owner, TTL_S, RData::SOA(self.authority()))
    }

    fn authority(&self) -> SOA {
        let apex = self.apex.clone();
        // Nobody transfers this zone: only the last value, the negative TTL, is used by anyone.
        SOA::new(apex.clone(), apex, 1, 3600, 600, 86_400, TTL_S)
    }
}

impl Question {
    fn reply(&self, code: ResponseCode, answers: Vec<Record>, soa: Option<Record>) -> Decision {
        let mut message = response(&self.header, code);
        message.metadata.authoritative =
            matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
        message.add_query(self.query.clone());
        message.insert_answers(answers);
        message.insert_authorities(soa.into_iter().collect());
        if self.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_PAYLOAD);
            message.set_edns(edns);
        }
        encode(&message)
    }
}

/// SERVFAIL to `query`, which makes a stub resolver try its next server at once.
pub(super) fn server_failure(query: &[u8]) -> Option<Vec<u8>> {
    let mut decoder = BinDecoder::new(query);
    let header = Header::read(&mut decoder).ok()?;
    let question = Query::read(&mut decoder).ok();
    match refusal(&header, question, ResponseCode::ServFail) {
        Decision::Answer(answer) => Some(answer),
        Decision::Forward | Decision::Drop => None,
    }
}

fn refusal(header: &Header, query: Option<Query>, code: ResponseCode) -> Decision {
    let mut message = response(header, code);
    message.add_queries(query);
    encode(&message)
}

fn response(header: &Header, code: ResponseCode) -> Message {
    let request = &header.metadata;
    let mut message = Message::response(request.id, request.op_code);
    message.metadata.recursion_desired = request.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.checking_disabled = request.checking_disabled;
    message.metadata.response_code = code;
    message
}

fn encode(message: &Message) -> Decision {
    message.to_vec().map_or(Decision::Drop, Decision::Answer)
}

/// What stands behind the question: at most EDNS matters. `None` if it can not be read.
fn read_extras(header: &Header, decoder: &mut BinDecoder<'_>) -> Option<Option<Edns>> {
    let counts = &header.counts;
    if counts.answers != 0 || counts.authorities != 0 || EXTRA_RECORDS_MAX < counts.additionals {
        return None;
    }
    let records = Message::read_records(decoder, counts.additionals.into(), true, OpCode::Query);
    records.ok().map(|(_, edns, _)| edns)
}

/// The address whose reverse name this is, if it is a whole one.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let network = name.parse_arpa_name().ok()?;
    (network.prefix_len() == network.max_prefix_len()).then(|| network.addr())
}

fn label(bytes: &[u8]) -> Option<Label> {
    let text = std::str::from_utf8(bytes).ok()?;
    text.to_ascii_lowercase().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::rng::Rng;
    use mesh_core::service::{Service, Transport, Vip};

    #[test]
    fn a_service_has_its_two_addresses() {
        let a = ask("web.shop.mesh.internal.", RecordType::A);
        assert_eq!(a.metadata.response_code, ResponseCode::NoError);
        assert!(a.metadata.authoritative && a.metadata.recursion_available);
        assert_eq!(data(&a), ["252.64.0.2"]);
        assert_eq!(a.answers[0].ttl, TTL_S);
        let aaaa = ask("web.shop.mesh.internal.", RecordType::AAAA);
        assert_eq!(data(&aaaa), ["fd6d:6573:6800::2"]);
    }

    #[test]
    fn the_case_of_the_question_is_kept() {
        let answer = ask("WeB.sHop.MESH.internal.", RecordType::A);
        assert_eq!(data(&answer), ["252.64.0.2"]);
        assert_eq!(answer.answers[0].name.to_ascii(), "WeB.sHop.MESH.internal.");
        assert_eq!(
            answer.queries[0].name().to_ascii(),
            "WeB.sHop.MESH.internal."
        );
    }

    #[test]
    fn what_is_not_there_is_denied_with_its_authority() {
        use ResponseCode as Code;
        for (name, kind, code) in [
            ("web.shop.mesh.internal.", RecordType::MX, Code::NoError),
            ("web.shop.mesh.internal.", RecordType::HTTPS, Code::NoError),
            ("shop.mesh.internal.", RecordType::A, Code::NoError),
            ("mesh.internal.", RecordType::A, Code::NoError),
            ("db.shop.mesh.internal.", RecordType::A, Code::NXDomain),
            ("other.mesh.internal.", RecordType::A, Code::NXDomain),
            ("x.web.shop.mesh.internal.", RecordType::A, Code::NXDomain),
            ("_tcp.shop.mesh.internal.", RecordType::SRV, Code::NXDomain),
            ("3.0.64.252.in-addr.arpa.", RecordType::PTR, Code::NXDomain),
        ] {
            let answer = ask(name, kind);
            assert_eq!(answer.metadata.response_code, code, "{name} {kind}");
            assert!(answer.answers.is_empty(), "{name} {kind}");
            assert_eq!(answer.authorities.len(), 1, "{name} {kind}");
            assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
        }
    }

    #[test]
    fn virtual_addresses_have_reverse_names() {
        for name in [
            "2.0.64.252.in-addr.arpa.".to_owned(),
            Name::from(IpAddr::from(vip().v6)).to_ascii(),
        ] {
            let answer = ask(&name, RecordType::PTR);
            assert_eq!(data(&answer), ["web.shop.mesh.internal."], "{name}");
        }
    }

    #[test]
    fn other_names_are_handed_on() {
        for name in [
            "example.com.",
            "mesh.internal.example.com.",
            "xmesh.internal.",
            "internal.",
            ".",
            "1.0.0.10.in-addr.arpa.",
            "64.252.in-addr.arpa.",
        ] {
            assert_eq!(
                decide(&query(name, RecordType::A)),
                Decision::Forward,
                "{name}"
            );
        }
        // Without a question, as a cookie's query.
        let message = Message::new(1, MessageType::Query, OpCode::Query);
        assert_eq!(decide(&message.to_vec().unwrap()), Decision::Forward);
    }

    #[test]
    fn before_an_index_was_loaded_nothing_is_said_to_be_missing() {
        let zone = zone();
        let counters = Counters::default();
        let decision = zone.decide(
            &query("db.shop.mesh.internal.", RecordType::A),
            None,
            &counters,
        );
        assert_eq!(
            read(decision).metadata.response_code,
            ResponseCode::ServFail
        );
    }

    #[test]
    fn edns_is_answered_and_other_versions_are_named() {
        let mut message =
            Message::from_vec(&query("web.shop.mesh.internal.", RecordType::A)).unwrap();
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        message.set_edns(edns.clone());
        let answer = read(decide(&message.to_vec().unwrap()));
        assert_eq!(answer.edns.unwrap().max_payload(), UDP_PAYLOAD);
        assert_eq!(answer.answers.len(), 1);
        edns.set_version(1);
        message.set_edns(edns);
        let answer = read(decide(&message.to_vec().unwrap()));
        // 16 is BADVERS here and BADSIG elsewhere (RFC 6895 §2.3).
        assert_eq!(u16::from(answer.metadata.response_code), 16);
    }

    #[test]
    fn changes_of_our_names_are_not_taken() {
        let mut packet = query("web.shop.mesh.internal.", RecordType::SOA);
        packet[2] |= 5 << 3; // UPDATE
        let answer = read(decide(&packet));
        assert_eq!(answer.metadata.response_code, ResponseCode::NotImp);
    }

    #[test]
    fn answers_and_fragments_get_no_answer() {
        let mut packet = query("web.shop.mesh.internal.", RecordType::A);
        for length in 0..12 {
            assert_eq!(decide(&packet[..length]), Decision::Drop);
        }
        packet[2] |= 0x80;
        assert_eq!(decide(&packet), Decision::Drop);
    }

    #[test]
    fn a_name_that_points_at_itself_is_malformed() {
        let mut packet = query(".", RecordType::A);
        packet.truncate(12);
        packet.extend([0xc0, 12, 0, 1, 0, 1]);
        let answer = read(decide(&packet));
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
    }

    /// The goal: no bytes bring the responder down or make its answer much larger than the question. Method:
    /// seeded damage to a real query.
    #[test]
    fn hostile_bytes_do_no_harm() {
        let good = query("web.shop.mesh.internal.", RecordType::A);
        for seed in 0..20_000 {
            let mut rng = Rng::new(seed);
            let mut packet = good.clone();
            for _ in 0..rng.below(8) {
                let at = rng.below(packet.len() as u64) as usize;
                packet[at] = rng.next_u64() as u8;
            }
            packet.truncate(rng.below(packet.len() as u64 + 1) as usize);
            packet.extend((0..rng.below(20)).map(|_| rng.next_u64() as u8));
            if let Decision::Answer(answer) = decide(&packet) {
                assert!(answer.len() <= packet.len() + 100, "seed {seed}");
                assert_eq!(answer[..2], packet[..2], "seed {seed}: another id");
            }
            server_failure(&packet);
        }
    }

    fn zone() -> Zone {
        Zone::new("mesh.internal", VipRanges::default()).unwrap()
    }

    fn vip() -> Vip {
        Vip {
            v4: [252, 64, 0, 2].into(),
            v6: "fd6d:6573:6800::2".parse().unwrap(),
        }
    }

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn decide(packet: &[u8]) -> Decision {
        let mut index = Index::default();
        index.insert(Service {
            name: ServiceName::parse("shop/web").unwrap(),
            vip: vip(),
            ports: vec![],
            transport: Transport::default(),
            plaintext_from: vec![],
            capture: mesh_core::service::Capture::Vip,
        });
        zone().decide(packet, Some(&index), &Counters::default())
    }

    fn read(decision: Decision) -> Message {
        let Decision::Answer(answer) = decision else {
            panic!("{decision:?}");
        };
        Message::from_vec(&answer).unwrap()
    }

    fn ask(name: &str, kind: RecordType) -> Message {
        let answer = read(decide(&query(name, kind)));
        assert_eq!(answer.metadata.id, 7);
        answer
    }

    fn data(message: &Message) -> Vec<String> {
        message.answers.iter().map(|r| r.data.to_string()).collect()
    }
}
