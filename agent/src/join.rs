//! Joining a mesh: a token and a key of our own become a host's membership.
//!
//! The key is on disk before control is asked, and control takes the same key for the same host: a join whose answer was
//! lost is repeated by the same command. `agent.json` is written last and is the commit; a join that is refused leaves
//! the host as it was. What follows on a host with systemd is in `join/serve.rs`.

mod serve;

pub(crate) use serve::{lacking, servable, serve};

use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use mesh_api::proto;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_api::sync::{self, MeshSettings};
use mesh_api::token::{JoinToken, TOKEN_MAX};
use mesh_core::names::{HostUid, Label, TrustDomain};
use mesh_core::reason::Reason;
use mesh_runtime::tls::leaf::spki_sha256;
use mesh_runtime::tls::pin::PinVerifier;
use mesh_runtime::tls::pinned_client_config;
use mesh_runtime::tls::trust::TrustStore;
use mesh_runtime::tls::verify::{Accept, Verifier, unix_now};
use rustls::ClientConfig;
use tonic::{Code, Status};

use crate::Mistyped;
use crate::capture;
use crate::config::Config;
use crate::control::{ALPN_H2, DialError, channel, dial, own_address, reason_of};
use crate::keys;
use crate::leaves::now_ms;
use crate::state::{Kept, Membership, Pair, State};
use crate::view::HostFacts;

/// A difference of clocks that an operator should hear of: certificates are backdated by some minutes.
const SKEW_MAX_MS: u64 = 60_000;
/// How long control may take to enrol a host.
const CALL_MAX: std::time::Duration = std::time::Duration::from_secs(30);

/// In which systemd may pass the token, as to an image at its first boot.
const CREDENTIAL: &str = "mesh.join-token";

/// What the command line says.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) token: String,
    pub(crate) address: Option<String>,
    pub(crate) network: Option<String>,
    pub(crate) host_name: Option<String>,
}

/// What to tell the operator.
#[derive(Debug)]
pub(crate) enum Joined {
    New {
        membership: Membership,
        skewed: bool,
    },
    Already(Membership),
}

/// How a call ended that brought no membership.
enum Failed {
    /// Control said no: nothing was changed there, and the same again will be refused too.
    Refused(anyhow::Error),
    /// It was never asked.
    Unreached(anyhow::Error),
    /// It may have said yes: the answer was lost.
    Unknown(anyhow::Error),
}

/// Reads the token of the command line; `-` reads it from stdin, and none from the credential that systemd passes.
pub(crate) fn read_token(argument: Option<&str>) -> anyhow::Result<String> {
    let bounded = |from: &mut dyn std::io::Read| {
        let mut text = String::new();
        let read = from.take(TOKEN_MAX as u64 + 1).read_to_string(&mut text);
        read.map(|_| text)
    };
    match argument {
        Some("-") => bounded(&mut std::io::stdin()).context("cannot read the token from stdin"),
        Some(token) => Ok(token.to_owned()),
        None => {
            let none = || {
                Mistyped(format!(
                    "no token: name it, or pass it as MESH_JOIN_TOKEN, or as the systemd credential {CREDENTIAL}"
                ))
            };
            let dir = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(none)?;
            let path = std::path::Path::new(&dir).join(CREDENTIAL);
            let mut file = match std::fs::File::open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(none().into());
                }
                file => file.with_context(|| format!("cannot open {}", path.display()))?,
            };
            bounded(&mut file).with_context(|| format!("cannot read {}", path.display()))
        }
    }
}

/// Joins, or says that it was done before.
pub(crate) async fn join(config: &Config, request: &Request) -> anyhow::Result<Joined> {
    let token = JoinToken::parse(&request.token)
        .context(Mistyped(format!("refused ({})", Reason::TokenMalformed)))?;
    let host_name = match &request.host_name {
        Some(name) => name
            .parse::<Label>()
            .context(Mistyped("--host-name can not be used".to_owned()))?,
        None => own_name()?,
    };
    let state = State::new(&config.state_dir);
    state.check_owner()?;
    if let Some(membership) = state.membership()? {
        ensure!(
            membership.token_id == token.id,
            "this host is in the mesh {} already, as {}, by another token; `mesh-agent leave` first",
            membership.host.trust_domain,
            membership.host.name
        );
        return again(&state, membership, request.address.as_deref());
    }
    let made_dir = state.create()?;
    let kept = state.agent_key()?;
    let new_key = kept.is_none();
    let key = match kept {
        Some(key) => key,
        None => {
            let key = keys::generate()?;
            state.set_agent_key(&key)?;
            key
        }
    };
    let wire = proto::JoinRequest {
        token_id: token.id.clone(),
        token_secret: token.secret_text(),
        csr: keys::request(&key, None)?.into(),
        host_name: host_name.to_string(),
        network: request.network.clone().unwrap_or_default(),
        address: request.address.clone().unwrap_or_default(),
        mesh_port: config.mesh.listen_port.into(),
        version: mesh_runtime::version().to_owned(),
    };
    let answer = match ask(&token, &wire).await {
        Ok(answer) => answer,
        Err(Failed::Unknown(error)) => {
            return Err(error.context("the join may have been taken; run the same command again"));
        }
        Err(Failed::Refused(error) | Failed::Unreached(error)) => {
            if new_key {
                state.remove_agent_key();
            }
            if made_dir {
                // Stays where somebody put something else into it.
                let _ = std::fs::remove_dir(state.root());
            }
            return Err(error);
        }
    };
    let skewed = now_ms().abs_diff(answer.response.control_time_ms) > SKEW_MAX_MS;
    // Where an address was said, or was another to control than to the host, the host can not tell where it goes.
    let moves = request.address.is_none() && answer.is_direct();
    let membership = commit(&state, &token, key, moves, &answer.response)
        .context("control's answer can not be used; nothing was joined")?;
    // Files of workloads go there next. Where it can not be made the agent waits for it.
    let mut directory = std::fs::DirBuilder::new();
    let made = directory
        .recursive(true)
        .mode(0o755)
        .create(&config.services_dir);
    if let Err(error) = made {
        log::warn!("cannot make {}: {error}", config.services_dir.display());
    }
    Ok(Joined::New { membership, skewed })
}

/// A member stays what it is, but for the address that its operator says anew.
fn again(
    state: &State,
    mut membership: Membership,
    address: Option<&str>,
) -> anyhow::Result<Joined> {
    let Some(address) = address else {
        return Ok(Joined::Already(membership));
    };
    let said: IpAddr = address
        .parse()
        .context("--address is no IP address; write it like 10.0.0.1")?;
    let said = said.to_canonical().to_string();
    if membership.moves || membership.address != said {
        membership.address = said;
        membership.moves = false;
        state.set_membership(&membership)?;
    }
    Ok(Joined::Already(membership))
}

/// What control said, and the address of this host on the way to it.
struct Answer {
    response: proto::JoinResponse,
    from: Option<IpAddr>,
}

impl Answer {
    /// Peers are told the address that this host has itself: nothing between translates.
    fn is_direct(&self) -> bool {
        self.from
            .is_some_and(|from| self.response.address.parse() == Ok(from))
    }
}

/// Asks each address of the token in turn, until one answers.
async fn ask(token: &JoinToken, request: &proto::JoinRequest) -> Result<Answer, Failed> {
    let tls = pinned_client_config(PinVerifier::new(token.pins.clone()), &[ALPN_H2])
        .map_err(|e| Failed::Unreached(e.into()))?;
    let tls = Arc::new(tls);
    let mut failures: Vec<String> = Vec::new();
    let mut lost = false;
    for address in &token.addresses {
        match ask_one(address, &tls, request).await {
            Ok(answer) => return Ok(answer),
            Err(Failed::Refused(error)) => return Err(Failed::Refused(error)),
            Err(Failed::Unreached(error)) => failures.push(error.to_string()),
            Err(Failed::Unknown(error)) => {
                lost = true;
                failures.push(error.to_string());
            }
        }
    }
    let error = anyhow::anyhow!("{}", failures.join("; "));
    Err(if lost {
        Failed::Unknown(error)
    } else {
        Failed::Unreached(error)
    })
}

async fn ask_one(
    address: &str,
    tls: &Arc<ClientConfig>,
    request: &proto::JoinRequest,
) -> Result<Answer, Failed> {
    let unreached = |text: String| Failed::Unreached(anyhow::anyhow!(text));
    let stream = dial(address, Arc::clone(tls)).await;
    let stream = stream.map_err(|error| unreached(not_control(address, error)))?;
    let from = own_address(&stream);
    let channel = channel(stream).await.map_err(unreached)?;
    let mut client = MeshClient::new(channel).max_decoding_message_size(sync::MESSAGE_MAX);
    match tokio::time::timeout(CALL_MAX, client.join(request.clone())).await {
        Ok(Ok(response)) => Ok(Answer {
            response: response.into_inner(),
            from,
        }),
        Ok(Err(status)) => Err(judge(address, &status)),
        Err(_) => Err(Failed::Unknown(anyhow::anyhow!(
            "control at {address} did not answer within {} s",
            CALL_MAX.as_secs()
        ))),
    }
}

/// What answered in the place of the control that made the token.
fn not_control(address: &str, error: DialError) -> String {
    match error.handshake {
        Some(Reason::UntrustedIssuer | Reason::UnknownTrustDomain) => format!(
            "the server at {address} is not the control that made this token: it is of another mesh, or was set up anew; \
             make a new token there ({})",
            Reason::UntrustedIssuer
        ),
        Some(
            Reason::NotTls
            | Reason::PeerHandshake
            | Reason::PeerUnreachable
            | Reason::CertificateMalformed
            | Reason::IdentityKind,
        ) => format!(
            "something else than mesh-control answers at {address}; is the token's address right? ({})",
            error.text
        ),
        _ => error.text,
    }
}

fn judge(address: &str, status: &Status) -> Failed {
    let message = sync::printable(status.message());
    let Some(code) = reason_of(status) else {
        return Failed::Unknown(anyhow::anyhow!(
            "the call to control at {address} broke: {message}"
        ));
    };
    // Control's message is the reason's text, or a more exact one.
    let error = anyhow::anyhow!("control refused the join ({code}): {message}");
    match status.code() {
        // Its own trouble: it may have come after the commit.
        Code::Internal | Code::Unavailable | Code::Unknown => Failed::Unknown(error),
        _ => Failed::Refused(error),
    }
}

/// Checks all of the answer, then writes it.
fn commit(
    state: &State,
    token: &JoinToken,
    key: String,
    moves: bool,
    response: &proto::JoinResponse,
) -> anyhow::Result<Membership> {
    let membership = membership(token, moves, response)?;
    let bundle = response.bundle.as_ref().context("it has no roots")?;
    let pair = Pair {
        key,
        chain: keys::chain_to_pem(&response.certificate_chain)?,
    };
    check_trust(&membership, token, bundle, &pair)?;
    state.forget_mesh()?;
    state.set_agent_chain(&pair.chain)?;
    state.keep(Kept::Bundle, bundle)?;
    state.set_membership(&membership)?;
    Ok(membership)
}

fn membership(
    token: &JoinToken,
    moves: bool,
    response: &proto::JoinResponse,
) -> anyhow::Result<Membership> {
    let mesh = response
        .mesh
        .as_ref()
        .context("it has no settings of the mesh")?;
    let mesh = MeshSettings::try_from(mesh)?;
    // What the kernel is told later must be fit for it: better to hear it now.
    capture::VipRanges::new(&mesh.vips.v4().to_string(), &mesh.vips.v6().to_string())?;
    Ok(Membership {
        host: HostFacts {
            uid: response.host_uid.parse::<HostUid>()?,
            name: response.host_name.parse()?,
            trust_domain: response.trust_domain.parse::<TrustDomain>()?,
            network: response.network.parse()?,
            vips: mesh.vips,
            dns_suffix: mesh.dns_suffix,
        },
        address: sync::printable(&response.address),
        moves,
        control: token.addresses.clone(),
        token_id: token.id.clone(),
    })
}

/// The roots must be those that the token pins, and the chain must end in them and be for our key.
fn check_trust(
    membership: &Membership,
    token: &JoinToken,
    bundle: &proto::TrustBundle,
    pair: &Pair,
) -> anyhow::Result<()> {
    let own = &membership.host.trust_domain;
    let domains = bundle.domains.iter();
    let mut roots = domains
        .filter(|d| d.trust_domain == own.as_str())
        .flat_map(|d| &d.roots);
    let pinned = roots.any(|root| spki_sha256(root).is_ok_and(|pin| token.pins.contains(&pin)));
    ensure!(
        pinned,
        "none of its roots of {own} is one that the token pins"
    );
    let trust = TrustStore::from_bundle(bundle)?.shared();
    let (key, facts) = keys::read(pair)?;
    ensure!(
        facts.id == membership.agent_id(),
        "its certificate is for {}, not for {}",
        facts.id,
        membership.agent_id()
    );
    let (Some(leaf), chain) = (key.cert.first(), key.cert.get(1..).unwrap_or_default()) else {
        bail!("it has no certificate");
    };
    Verifier::new(trust, Accept::AgentsAndOperators(own.clone()))
        .judge(leaf, chain, None, unix_now())
        .map_err(|reason| anyhow::anyhow!("its certificate is {reason}: {}", reason.text()))?;
    Ok(())
}

/// The host's own name, as far as it is one of the mesh.
fn own_name() -> anyhow::Result<Label> {
    let name = nix::sys::utsname::uname().context("cannot ask for the host's name")?;
    let name = name.nodename().to_string_lossy().to_ascii_lowercase();
    let first = name.split('.').next().unwrap_or_default();
    first
        .parse()
        .with_context(|| format!("the host's name `{name}` can not be used; say --host-name"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{Scratch, membership as member};

    fn request(token: &str) -> Request {
        Request {
            token: token.to_owned(),
            address: None,
            network: None,
            host_name: Some("vm-1".to_owned()),
        }
    }

    /// Of a control at a port that nobody listens on.
    fn token(id: &str) -> JoinToken {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = unused.local_addr().unwrap().to_string();
        JoinToken {
            addresses: vec![address],
            pins: vec![[7; 32]],
            id: id.to_owned(),
            secret: [9; 32],
        }
    }

    fn config(state: &State) -> Config {
        Config {
            state_dir: state.root().to_owned(),
            ..Config::default()
        }
    }

    #[tokio::test]
    async fn a_token_that_is_none_is_named_by_its_reason() {
        let Scratch(state) = &Scratch::new();
        let error = join(&config(state), &request("hello")).await.unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("token_malformed") && text.contains("mesh1_"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn joining_twice_is_harmless_and_another_mesh_needs_a_leave() {
        let Scratch(state) = &Scratch::new();
        state.set_membership(&member()).unwrap();
        let again = request(&token(&member().token_id).reveal());
        let joined = join(&config(state), &again).await.unwrap();
        assert!(matches!(joined, Joined::Already(m) if m == member()));
        let there = Request {
            address: Some("10.0.0.7".to_owned()),
            ..again
        };
        join(&config(state), &there).await.unwrap();
        let moved = state.membership().unwrap().unwrap();
        assert_eq!((moved.address.as_str(), moved.moves), ("10.0.0.7", false));
        let nowhere = Request {
            address: Some("there".to_owned()),
            ..there
        };
        let error = join(&config(state), &nowhere).await.unwrap_err();
        assert!(error.to_string().contains("--address"), "{error}");
        state.set_membership(&member()).unwrap();
        let other = request(&token("t-2").reveal());
        let error = join(&config(state), &other).await.unwrap_err().to_string();
        assert!(error.contains("mesh-agent leave"), "{error}");
        assert_eq!(state.membership().unwrap(), Some(member()));
    }

    #[tokio::test]
    async fn a_join_that_reached_nobody_leaves_the_host_as_it_was() {
        let scratch = Scratch::new();
        let state = State::new(&scratch.0.root().join("new"));
        let text = token("t-1").reveal();
        let error = join(&config(&state), &request(&text)).await.unwrap_err();
        assert!(
            error.to_string().contains("cannot reach control"),
            "{error}"
        );
        assert!(!state.root().exists());
        // The key of a join whose answer was lost stays.
        state.create().unwrap();
        state.set_agent_key("of before").unwrap();
        assert!(join(&config(&state), &request(&text)).await.is_err());
        assert_eq!(state.agent_key().unwrap().as_deref(), Some("of before"));
    }

    #[test]
    fn only_a_refusal_by_reason_is_final() {
        let mut status = Status::new(Code::Unauthenticated, "no");
        assert!(matches!(judge("a", &status), Failed::Unknown(_)));
        let code = tonic::metadata::MetadataValue::from_static("token_used");
        status
            .metadata_mut()
            .insert("x-meshwork-reason", code.clone());
        let Failed::Refused(error) = judge("a", &status) else {
            panic!("it is final");
        };
        assert!(error.to_string().contains("token_used"), "{error}");
        let mut status = Status::new(Code::Internal, "no");
        status.metadata_mut().insert("x-meshwork-reason", code);
        assert!(matches!(judge("a", &status), Failed::Unknown(_)));
    }

    #[test]
    fn an_answer_with_roots_that_the_token_does_not_pin_is_refused() {
        let Scratch(state) = &Scratch::new();
        let pair =
            keys::tests::pair("spiffe://corp.example.com/agent/00000000000000000000000000000000");
        let (key, _) = keys::read(&pair).unwrap();
        let der = key.cert[0].as_ref().to_vec();
        let response = proto::JoinResponse {
            host_uid: "0".repeat(32),
            host_name: "vm-1".to_owned(),
            trust_domain: "corp.example.com".to_owned(),
            certificate_chain: vec![der.clone().into()],
            bundle: Some(proto::TrustBundle {
                number: 1,
                domains: vec![proto::TrustDomainRoots {
                    trust_domain: "corp.example.com".to_owned(),
                    roots: vec![der.into()],
                }],
            }),
            mesh: Some(proto::MeshSettings {
                dns_suffix: "mesh.internal".to_owned(),
                vip4_range: "252.64.0.0/12".to_owned(),
                vip6_range: "fd6d:6573:6800::/64".to_owned(),
            }),
            network: "default".to_owned(),
            address: "10.0.0.1".to_owned(),
            control_time_ms: 0,
        };
        let error = commit(state, &token("t-1"), pair.key, true, &response).unwrap_err();
        assert!(error.to_string().contains("pins"), "{error}");
        assert_eq!(state.membership().unwrap(), None);
    }
}
