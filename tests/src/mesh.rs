//! Peers that a mesh port must refuse: clients with certificates crafted from the site's own CA, or another.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use mesh_api::frame;
use mesh_core::reason::Reason;
use mesh_core::stream::{Frame, Limits};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

/// How long the peer may take to say no.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const DAY: time::Duration = time::Duration::DAY;

/// An issuing authority with its chain.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
}

/// What a client shows.
#[derive(Debug)]
pub struct Credential {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

/// RFC 7468.
fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = (0..text.len())
        .step_by(64)
        .map(|at| &text[at..text.len().min(at + 64)])
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}

impl Authority {
    /// The issuing authority of a control, from the files of its `ca/` directory.
    #[track_caller]
    pub fn of_control(state_dir: &Path) -> Self {
        let ca = state_dir.join("ca");
        let read = |name: &str| {
            let path = ca.join(name);
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let key = KeyPair::from_pem(&read("issuer.key")).expect("the issuer's key");
        let pem = read("issuer.pem");
        let der = pem_to_der(&pem);
        let issuer = Issuer::from_ca_cert_pem(&pem, key).expect("the issuer's certificate");
        Self {
            issuer,
            chain: vec![der],
        }
    }

    /// An authority that nobody knows, of the same trust domain.
    #[track_caller]
    pub fn foreign(trust_domain: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "not the root you know");
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))];
        let certificate = params.self_signed(&key).expect("a root");
        let chain = vec![certificate.der().clone()];
        Self {
            issuer: Issuer::new(params, key),
            chain,
        }
    }

    /// The certificate that signs; of a foreign authority it is its root.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.chain[0]
    }

    /// A leaf for these URIs, valid `from` and `until` so many days from now.
    #[track_caller]
    pub fn leaf(&self, uris: &[&str], days: (i64, i64), host_uid: Option<&str>) -> Credential {
        let key = KeyPair::generate().expect("a key");
        self.leaf_of(&key, uris, days, host_uid)
    }

    /// The credential for control that an agent had so many days ago, as it is on its disk after it was off since.
    #[track_caller]
    pub fn age_agent(&self, state_dir: &Path, uri: &str, days: (i64, i64), host_uid: &str) {
        let key = fs::read_to_string(state_dir.join("agent.key")).expect("the agent's key");
        let key = KeyPair::from_pem(&key).expect("the agent's key");
        let aged = self.leaf_of(&key, &[uri], days, Some(host_uid));
        fs::write(state_dir.join("agent.crt"), aged.chain_pem()).expect("its chain");
    }

    fn leaf_of(
        &self,
        key: &KeyPair,
        uris: &[&str],
        days: (i64, i64),
        host_uid: Option<&str>,
    ) -> Credential {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(uid) = host_uid {
            // serialNumber of the subject: the host that the leaf comes from.
            let oid = DnType::CustomDnType(vec![2, 5, 4, 5]);
            params.distinguished_name.push(oid, uid);
        }
        params.subject_alt_names = uris.iter().map(|text| uri(text)).collect();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now + DAY * i32::try_from(days.0).expect("days");
        params.not_after = now + DAY * i32::try_from(days.1).expect("days");
        let certificate = params.signed_by(key, &self.issuer).expect("a leaf");
        let mut chain = vec![certificate.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Credential {
            chain,
            key: key.serialize_der(),
        }
    }
}

impl Credential {
    /// Puts it into an agent's state directory in the place of the leaf `name`: `namespace.account`.
    #[track_caller]
    pub fn replace_leaf(&self, state_dir: &Path, name: &str) {
        for (extension, text) in [
            ("crt", self.chain_pem()),
            ("key", pem("PRIVATE KEY", &self.key)),
        ] {
            let path = state_dir.join("leaves").join(format!("{name}.{extension}"));
            assert!(path.exists(), "{} is not there", path.display());
            fs::write(path, text).expect("a leaf");
        }
    }

    fn chain_pem(&self) -> String {
        let chain = self.chain.iter();
        chain.map(|der| pem("CERTIFICATE", der)).collect()
    }

    /// The credential for control of an agent, from its state directory.
    #[track_caller]
    pub fn of_agent(state_dir: &Path) -> Self {
        Self::of_files(state_dir, "agent")
    }

    /// The leaf `name`, `namespace.account`, of an agent, from its state directory.
    #[track_caller]
    pub fn of_leaf(state_dir: &Path, name: &str) -> Self {
        Self::of_files(&state_dir.join("leaves"), name)
    }

    #[track_caller]
    fn of_files(dir: &Path, name: &str) -> Self {
        use rustls_pki_types::pem::PemObject as _;
        let read = |extension: &str| {
            let path = dir.join(format!("{name}.{extension}"));
            fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let chain = CertificateDer::pem_slice_iter(&read("crt"))
            .collect::<Result<_, _>>()
            .expect("a chain");
        let key = PrivateKeyDer::from_pem_slice(&read("key")).expect("a key");
        Self {
            chain,
            key: key.secret_der().to_vec(),
        }
    }
}

type Tls = rustls::StreamOwned<ClientConnection, TcpStream>;

/// A connection to a mesh port whose handshake is still to be done. It believes every server.
#[track_caller]
fn offer(port: SocketAddr, sni: &str, credential: Option<&Credential>) -> Tls {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match credential {
        Some(credential) => {
            let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(credential.key.clone()));
            let chain = credential.chain.clone();
            builder
                .with_client_auth_cert(chain, key)
                .expect("a credential")
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![mesh_runtime::tls::ALPN_MESH.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::try_from(sni.to_owned()).expect("a server name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let tcp = TcpStream::connect_timeout(&port, ANSWER_MAX).expect("the mesh port listens");
    tcp.set_read_timeout(Some(ANSWER_MAX)).expect("a timeout");
    rustls::StreamOwned::new(connection, tcp)
}

/// Offers a TLS 1.3 connection to a mesh port and returns how it ended, once the peer has ended it.
#[track_caller]
pub fn knock(port: SocketAddr, sni: &str, credential: Option<&Credential>) -> String {
    let mut tls = offer(port, sni, credential);
    let mut byte = [0; 1];
    match tls.flush().and_then(|()| tls.read(&mut byte)) {
        Ok(0) => "closed".to_owned(),
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Opens one stream with this header, as a peer that may write what it likes. `None`: it was taken; else why not.
#[track_caller]
pub fn open_stream(
    port: SocketAddr,
    sni: &str,
    credential: &Credential,
    header: &[u8],
) -> Option<Reason> {
    let mut tls = open(port, sni, credential, header, &[], false);
    loop {
        match answer(&mut tls) {
            Answer::Accepted => return None,
            Answer::Reset(reason) => return Some(reason),
            Answer::Data(..) | Answer::Other => {}
        }
    }
}

/// Opens a stream, begins to say this on it and goes no further. Why it was reset; `None`: it was ended.
#[track_caller]
pub fn begin_on_stream(
    port: SocketAddr,
    sni: &str,
    credential: &Credential,
    header: &[u8],
    bytes: &[u8],
) -> Option<Reason> {
    let mut tls = open(port, sni, credential, header, bytes, false);
    loop {
        match answer(&mut tls) {
            Answer::Reset(reason) => return Some(reason),
            Answer::Data(_, true) => return None,
            Answer::Accepted | Answer::Data(..) | Answer::Other => {}
        }
    }
}

/// Greets and asks by pings without reading one answer, until the peer ends the connection.
#[track_caller]
pub fn ask_without_reading(port: SocketAddr, sni: &str, credential: &Credential) {
    // More than all buffers on the way take the answers of.
    const MOST: usize = 64 << 20;
    let mut tls = greet(port, sni, credential);
    let mut pings = Vec::new();
    (0..1000).for_each(|nonce| frame::encode(&Frame::Ping { nonce }, &mut pings));
    let ended = (0..MOST / pings.len()).any(|_| tls.write_all(&pings).is_err());
    assert!(ended, "nobody minds {MOST} bytes of pings without a reader");
}

/// What a peer says in its hello that it is ready to bear.
#[track_caller]
pub fn announced(port: SocketAddr, sni: &str, credential: &Credential) -> Limits {
    let mut tls = greet(port, sni, credential);
    loop {
        let limits = heard(&mut tls, |frame| match frame {
            Frame::Hello { limits, .. } => Some(limits),
            _ => None,
        });
        if let Some(limits) = limits {
            return limits;
        }
    }
}

/// Begins so many streams, on as many connections as they need, and says this on each. Why the first was reset.
#[track_caller]
pub fn begin_streams(
    port: SocketAddr,
    sni: &str,
    credential: &Credential,
    header: &[u8],
    bytes: &[u8],
    count: usize,
) -> Reason {
    // What a connection takes before it gives back credit.
    let each = Limits::DEFAULT.connection_credit as usize / bytes.len() - 1;
    let mut connections = Vec::new();
    for _ in 0..count.div_ceil(each) {
        let mut tls = open(port, sni, credential, header, bytes, false);
        let mut out = Vec::new();
        for stream in (1..each as u32).map(|number| STREAM + 2 * number) {
            frame::encode(&Frame::Open { stream, header }, &mut out);
            let end = false;
            let data = bytes;
            frame::encode(&Frame::Data { stream, data, end }, &mut out);
        }
        tls.write_all(&out).expect("a peer that reads");
        connections.push(tls);
    }
    let last = connections.last_mut().expect("a connection");
    loop {
        let reset = heard(last, |frame| match frame {
            Frame::Reset { reason, .. } | Frame::GoAway { reason, .. } => Some(reason),
            _ => None,
        });
        if let Some(reason) = reset {
            return reason;
        }
    }
}

/// Connections that stay open, with their streams.
#[derive(Debug)]
pub struct Greedy(Vec<Tls>);

impl Greedy {
    /// Opens connections with a stream each until one is refused; how many were not, and why that was.
    #[track_caller]
    pub fn connections(
        port: SocketAddr,
        sni: &str,
        credential: &Credential,
        header: &[u8],
    ) -> (Self, usize, Reason) {
        let mut kept = Vec::new();
        loop {
            let mut tls = open(port, sni, credential, header, &[], false);
            let reason = taken(&mut tls, STREAM);
            kept.push(tls);
            if let Err(reason) = reason {
                let open = kept.len() - 1;
                return (Self(kept), open, reason);
            }
        }
    }

    /// The same with streams of one connection.
    #[track_caller]
    pub fn streams(
        port: SocketAddr,
        sni: &str,
        credential: &Credential,
        header: &[u8],
    ) -> (Self, usize, Reason) {
        let mut tls = greet(port, sni, credential);
        for open in 0.. {
            let stream = STREAM + 2 * open;
            let mut out = Vec::new();
            frame::encode(&Frame::Open { stream, header }, &mut out);
            tls.write_all(&out).expect("a peer that reads");
            if let Err(reason) = taken(&mut tls, stream) {
                return (Self(vec![tls]), open as usize, reason);
            }
        }
        unreachable!("streams have an end")
    }

    /// Closes them all.
    pub fn leave(self) {
        drop(self.0);
    }
}

/// Waits until a stream was taken, or refused.
fn taken(tls: &mut Tls, ours: u32) -> Result<(), Reason> {
    loop {
        let said = heard(tls, |frame| match frame {
            Frame::Accepted { stream } if stream == ours => Some(Ok(())),
            Frame::Reset { stream, reason, .. } if stream == ours => Some(Err(reason)),
            Frame::GoAway { reason, .. } => Some(Err(reason)),
            _ => None,
        });
        if let Some(said) = said {
            return said;
        }
    }
}

/// Sends these bytes on a stream and its end; returns what came back, or why it was reset before its end.
#[track_caller]
pub fn send_on_stream(
    port: SocketAddr,
    sni: &str,
    credential: &Credential,
    header: &[u8],
    bytes: &[u8],
) -> Result<Vec<u8>, Reason> {
    let mut tls = open(port, sni, credential, header, bytes, true);
    let mut all = Vec::new();
    loop {
        match answer(&mut tls) {
            Answer::Data(bytes, end) => {
                all.extend(bytes);
                if end {
                    return Ok(all);
                }
            }
            Answer::Reset(reason) => return Err(reason),
            Answer::Accepted | Answer::Other => {}
        }
    }
}

/// What a peer says of our stream.
enum Answer {
    Accepted,
    /// Whether they are the last.
    Data(Vec<u8>, bool),
    Reset(Reason),
    Other,
}

const STREAM: u32 = 1;

/// A connection on which our hello is said.
#[track_caller]
fn greet(port: SocketAddr, sni: &str, credential: &Credential) -> Tls {
    let mut tls = offer(port, sni, Some(credential));
    let mut out = Vec::new();
    let limits = Limits::DEFAULT;
    let version = mesh_core::stream::VERSION;
    frame::encode(&Frame::Hello { version, limits }, &mut out);
    tls.write_all(&out).expect("a handshake");
    tls
}

/// Greets, opens a stream, sends `bytes` on it, if there are any; `end`: they are all.
fn open(
    port: SocketAddr,
    sni: &str,
    credential: &Credential,
    header: &[u8],
    bytes: &[u8],
    end: bool,
) -> Tls {
    let mut tls = greet(port, sni, credential);
    let mut out = Vec::new();
    let stream = STREAM;
    frame::encode(&Frame::Open { stream, header }, &mut out);
    if !bytes.is_empty() {
        let data = Frame::Data {
            stream,
            data: bytes,
            end,
        };
        frame::encode(&data, &mut out);
    }
    tls.write_all(&out).expect("a handshake");
    tls
}

fn heard<T>(tls: &mut Tls, read: impl FnOnce(Frame<'_>) -> T) -> T {
    let mut prefix = [0; frame::PREFIX_LEN];
    tls.read_exact(&mut prefix).expect("a frame");
    let prefix = frame::Prefix::decode(prefix, Limits::DEFAULT.max_frame).expect("a frame of ours");
    let mut payload = vec![0; prefix.length];
    tls.read_exact(&mut payload).expect("its payload");
    read(prefix.frame(&payload).expect("a frame of ours"))
}

fn answer(tls: &mut Tls) -> Answer {
    heard(tls, |frame| match frame {
        Frame::Accepted { stream: STREAM } => Answer::Accepted,
        Frame::Data {
            stream: STREAM,
            data,
            end,
        } => Answer::Data(data.to_vec(), end),
        Frame::Reset {
            stream: STREAM,
            reason,
            ..
        }
        | Frame::GoAway { reason, .. } => Answer::Reset(reason),
        _ => Answer::Other,
    })
}

/// Sends bytes that are not TLS and returns when the peer has ended the connection.
#[track_caller]
pub fn knock_plaintext(port: SocketAddr, bytes: &[u8]) {
    let mut tcp = TcpStream::connect_timeout(&port, ANSWER_MAX).expect("the mesh port listens");
    tcp.set_read_timeout(Some(ANSWER_MAX)).expect("a timeout");
    tcp.write_all(bytes).expect("the first bytes");
    let mut rest = Vec::new();
    // A reset is as good an end as a close; a timeout is not.
    if let Err(error) = tcp.read_to_end(&mut rest) {
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::WouldBlock,
            "it was kept open"
        );
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("a URI in ASCII"))
}

fn pem_to_der(pem: &str) -> CertificateDer<'static> {
    use rustls_pki_types::pem::PemObject as _;
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate in PEM")
}

/// These clients are judged; they judge nobody.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA256,
        ]
    }
}
