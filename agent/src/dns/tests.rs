//! The responder on real sockets, with servers of our own as upstreams.

use super::*;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::Ordering;

use mesh_core::names::ServiceName;
use mesh_core::service::{Service, Transport, Vip};

const WAIT: Duration = Duration::from_secs(20);
const WEB: &[u8] =
    b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03web\x04shop\x04mesh\x08internal\0\0\x01\0\x01";
/// Not a DNS message beyond its question: it must pass unchanged all the same.
const FOREIGN: &[u8] =
    b"\x43\x21\x01\0\0\x01\0\0\0\0\0\x01\x07example\x03com\0\0\x01\0\x01\xff\xfe\xfd";

#[tokio::test]
async fn mesh_names_are_answered_by_udp_and_tcp() {
    let dns = Running::start(vec![]);
    let answer = dns.ask_udp(WEB).await;
    assert_eq!(answer[answer.len() - 4..], [252, 64, 0, 2]);
    assert_eq!(dns.ask_tcp(WEB).await, answer);
    assert_eq!(dns.counters.answered.load(Ordering::Relaxed), 2);
    dns.stop().await;
}

#[tokio::test]
async fn a_dead_server_is_passed_over_and_bytes_stay_unchanged() {
    let upstream = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (_held, dead) = refusing_address().await;
    let dns = Running::start(vec![dead, upstream.local_addr().unwrap()]);
    let server = async {
        let mut seen = vec![0; MESSAGE_MAX];
        let (length, agent) = upstream.recv_from(&mut seen).await.unwrap();
        assert_eq!(&seen[..length], FOREIGN);
        let mut answer = response(FOREIGN);
        answer[2] |= 0x02; // Truncated: passed on as it is.
        let mut forged = answer.clone();
        forged[0] ^= 1;
        upstream.send_to(&forged, agent).await.unwrap();
        upstream.send_to(&answer, agent).await.unwrap();
        answer
    };
    let (sent, got) = tokio::join!(server, dns.ask_udp(FOREIGN));
    assert_eq!(sent, got);
    assert_eq!(dns.counters.forwarded.load(Ordering::Relaxed), 1);
    assert_eq!(dns.counters.upstream_failed.load(Ordering::Relaxed), 0);
    dns.stop().await;
}

#[tokio::test]
async fn tcp_is_forwarded_by_tcp() {
    let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let dns = Running::start(vec![upstream.local_addr().unwrap()]);
    let server = async {
        let (mut stream, _) = upstream.accept().await.unwrap();
        let seen = forward::read_message(&mut stream).await.unwrap();
        assert_eq!(seen, FOREIGN);
        let mut answer = response(FOREIGN);
        answer.resize(30_000, 7);
        forward::write_message(&mut stream, &answer).await.unwrap();
        answer
    };
    let (sent, got) = tokio::join!(server, dns.ask_tcp(FOREIGN));
    assert_eq!(sent, got);
    dns.stop().await;
}

#[tokio::test]
async fn without_a_server_the_client_is_told_to_try_the_next() {
    let (_held, dead) = refusing_address().await;
    let dns = Running::start(vec![dead]);
    let answer = dns.ask_udp(FOREIGN).await;
    assert_eq!(answer[..2], FOREIGN[..2]);
    assert_eq!(answer[3] & 0x0f, 2, "SERVFAIL");
    assert_eq!(dns.counters.upstream_failed.load(Ordering::Relaxed), 1);
    dns.stop().await;
}

struct Running {
    udp: SocketAddr,
    tcp: SocketAddr,
    counters: Arc<Counters>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<io::Result<()>>,
}

impl Running {
    fn start(upstreams: Vec<SocketAddr>) -> Self {
        let local = (IpAddr::from(Ipv4Addr::LOCALHOST), 0);
        let udp = std::net::UdpSocket::bind(local).unwrap();
        let tcp = std::net::TcpListener::bind(local).unwrap();
        let (udp_address, tcp_address) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let mut index = Index::default();
        index.insert(Service {
            name: ServiceName::parse("shop/web").unwrap(),
            vip: Vip {
                v4: [252, 64, 0, 2].into(),
                v6: "fd6d:6573:6800::2".parse().unwrap(),
            },
            ports: vec![],
            transport: Transport::default(),
            plaintext_from: vec![],
            capture: mesh_core::service::Capture::Vip,
        });
        let index = Arc::new(index);
        let config = Config {
            suffix: "mesh.internal".to_owned(),
            ranges: VipRanges::default(),
            upstreams,
        };
        let dns = Dns::new(config, Box::new(move || Some(Arc::clone(&index)))).unwrap();
        let counters = dns.counters();
        let stop = CancellationToken::new();
        let sockets = Sockets {
            udp: vec![udp],
            tcp: vec![tcp],
        };
        Self {
            udp: udp_address,
            tcp: tcp_address,
            counters,
            task: tokio::spawn(dns.run(
                sockets,
                crate::handing::Hander::new().watching(),
                stop.clone(),
            )),
            stop,
        }
    }

    async fn ask_udp(&self, query: &[u8]) -> Vec<u8> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        socket.send_to(query, self.udp).await.unwrap();
        let mut answer = vec![0; MESSAGE_MAX];
        let length = timeout(WAIT, socket.recv(&mut answer)).await.unwrap();
        answer.truncate(length.unwrap());
        answer
    }

    async fn ask_tcp(&self, query: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.tcp).await.unwrap();
        forward::write_message(&mut stream, query).await.unwrap();
        let answer = timeout(WAIT, forward::read_message(&mut stream)).await;
        answer.unwrap().unwrap()
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(WAIT, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// An address that refuses as long as the socket is held: it takes packets of another peer only.
async fn refusing_address() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    socket.connect((Ipv4Addr::LOCALHOST, 9)).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

fn response(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer
}
