//! What would happen to a call: `mesh-agent explain <destination>`. The worker gathers (`admin/explain.rs`), [`foretell`]
//! concludes, and the command shows it in one screen.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use mesh_core::names::ServiceName;
use mesh_core::reason::Reason;
use mesh_core::service::Index;
use serde::{Deserialize, Serialize};

use crate::Mistyped;
use crate::probe::Probed;
use crate::reals::Reals;
use crate::status;

/// Callers that the page shows without `--as`: it is one screen.
pub(crate) const CALLERS_MAX: usize = 8;
/// Endpoints that are asked and shown.
pub(crate) const ENDPOINTS_MAX: usize = 12;
/// Longest destination: a DNS name with a port, and what is typed around it.
const DESTINATION_MAX: usize = 300;

/// What the worker found out about a destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Explanation {
    /// As it was asked.
    pub(crate) destination: String,
    /// `None`: the destination is not of the mesh.
    pub(crate) service: Option<ServiceFacts>,
    /// Why there is nothing to say of endpoints and callers: the code of a reason, and words.
    pub(crate) problem: Option<Outcome>,
    pub(crate) endpoints: Vec<Probed>,
    /// Endpoints that are in other networks, and those that are too many to be shown.
    pub(crate) elsewhere: usize,
    pub(crate) more_endpoints: usize,
    pub(crate) callers: Vec<CallerFacts>,
    pub(crate) more_callers: usize,
    /// Seconds since control was heard; `None`: the session is live.
    pub(crate) stale_s: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServiceFacts {
    pub(crate) name: String,
    pub(crate) dns_name: String,
    pub(crate) vip4: String,
    pub(crate) vip6: String,
    pub(crate) port: u16,
    pub(crate) protocol: String,
    pub(crate) transport: String,
    /// The address of the one host that is called, where it is dialled itself.
    pub(crate) real: Option<IpAddr>,
}

/// One who may call from this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CallerFacts {
    /// SPIFFE id.
    pub(crate) identity: String,
    /// Life of its certificate that is left, seconds; `None`: it has none.
    pub(crate) left_s: Option<i64>,
    /// What the policies say: allowed, audited, denied; `None`: control could not be asked.
    pub(crate) decision: Option<String>,
    /// `policy/rule`, or the policies that decided.
    pub(crate) rule: String,
    pub(crate) outcome: Outcome,
}

/// What would happen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// The code of the reason of a refusal; `None`: the call is carried.
    pub(crate) reason: Option<String>,
    pub(crate) text: String,
}

impl Outcome {
    pub(crate) fn refused(reason: Reason) -> Self {
        Self {
            reason: Some(reason.code().to_owned()),
            text: reason.text().to_owned(),
        }
    }
}

/// What somebody typed, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    Service {
        name: ServiceName,
        port: Option<u16>,
    },
    Address {
        ip: IpAddr,
        port: Option<u16>,
    },
    /// Of no mesh service: a name that goes where it went without the mesh.
    Elsewhere,
}

/// Reads `web.shop.mesh.internal:80`, `shop/web`, `252.64.0.2:80`, `http://web.shop.mesh.internal/x` and the like.
pub(crate) fn read(text: &str, suffix: &str) -> Result<Destination, String> {
    if text.is_empty() || text.len() > DESTINATION_MAX {
        return Err("name a destination, e.g. web.shop.mesh.internal:80".to_owned());
    }
    let (scheme_port, rest) = match text.split_once("://") {
        Some(("http" | "ws" | "grpc", rest)) => (Some(80), rest),
        Some(("https" | "wss", rest)) => (Some(443), rest),
        Some((scheme, _)) => return Err(format!("`{scheme}` is no scheme that is known here")),
        None => (None, text),
    };
    let rest = match scheme_port {
        Some(_) => rest.split(['/', '?']).next().unwrap_or_default(),
        None => rest,
    };
    if let Ok(address) = rest.parse::<SocketAddr>() {
        let (ip, port) = (address.ip().to_canonical(), Some(address.port()));
        return Ok(Destination::Address { ip, port });
    }
    let bare = rest.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        let ip = ip.to_canonical();
        return Ok(Destination::Address {
            ip,
            port: scheme_port,
        });
    }
    let (name, port) = match rest.rsplit_once(':') {
        None => (rest, scheme_port),
        Some((name, port)) => {
            let number = port.parse::<u16>().ok().filter(|port| *port != 0);
            let number = number.ok_or_else(|| format!("`{port}` is no port; use 1 to 65535"))?;
            (name, Some(number))
        }
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    if name.contains('/') {
        let name = ServiceName::parse(&name).map_err(|e| e.to_string())?;
        return Ok(Destination::Service { name, port });
    }
    let Some(labels) = name
        .strip_suffix(suffix)
        .and_then(|name| name.strip_suffix('.'))
    else {
        return Ok(Destination::Elsewhere);
    };
    let (service, namespace) = labels
        .split_once('.')
        .ok_or_else(|| format!("names of the mesh are <service>.<namespace>.{suffix}"))?;
    let name = ServiceName {
        namespace: namespace
            .parse()
            .map_err(|e: mesh_core::names::NameError| e.to_string())?,
        name: service
            .parse()
            .map_err(|e: mesh_core::names::NameError| e.to_string())?,
    };
    Ok(Destination::Service { name, port })
}

/// The service that a destination is of. `Err`: none of the mesh, and why.
pub(crate) fn find(
    destination: &Destination,
    index: Option<&Index>,
    is_vip: impl Fn(IpAddr) -> bool,
    reals: &Reals,
    suffix: &str,
) -> Result<(ServiceFacts, ServiceName), Outcome> {
    let past = |text: &str| Outcome {
        reason: None,
        text: text.to_owned(),
    };
    let real_of = |ip: IpAddr, port: Option<u16>| reals.get(&SocketAddr::new(ip, port?));
    let mut real = None;
    let (service, port) = match destination {
        Destination::Elsewhere => {
            return Err(past(
                "it is no name of the mesh: it is resolved and reached as without the mesh, in plaintext and without identity",
            ));
        }
        Destination::Address { ip, port } if !is_vip(*ip) => {
            let Some(name) = real_of(*ip, *port) else {
                return Err(past(
                    "it is no virtual address of the mesh, nor a real one that is captured: the host's own routes decide, in plaintext and without identity",
                ));
            };
            real = Some(*ip);
            (index.and_then(|i| i.get(name)), *port)
        }
        Destination::Address { ip, port } => (index.and_then(|i| i.by_address(*ip)), *port),
        Destination::Service { name, port } => (index.and_then(|i| i.get(name)), *port),
    };
    let Some(service) = service else {
        return Err(Outcome::refused(Reason::NoSuchService));
    };
    let found = match port {
        Some(number) => service.port(number),
        None => service.ports.first(),
    };
    let Some(port) = found else {
        let known: Vec<String> = service.ports.iter().map(|p| p.number.to_string()).collect();
        return Err(Outcome {
            reason: Some(Reason::NoSuchPort.code().to_owned()),
            text: format!("{} has the ports {}", service.name, known.join(", ")),
        });
    };
    let facts = ServiceFacts {
        name: service.name.to_string(),
        dns_name: format!("{}.{}.{suffix}", service.name.name, service.name.namespace),
        vip4: service.vip.v4.to_string(),
        vip6: service.vip.v6.to_string(),
        port: port.number,
        protocol: port.protocol.to_string(),
        transport: service.transport.to_string(),
        real,
    };
    Ok((facts, service.name.clone()))
}

/// What would happen to a call of `caller`, as far as this host can know. `endpoints`: those of this network, asked.
pub(crate) fn foretell(caller: &CallerFacts, endpoints: &[Probed], known: bool) -> Outcome {
    if caller.left_s.is_none_or(|left| left <= 0) {
        return Outcome::refused(Reason::NoIdentity);
    }
    if !known {
        return Outcome::refused(Reason::EndpointsUnknown);
    }
    if endpoints.is_empty() {
        return Outcome::refused(Reason::NoEndpoints);
    }
    let answering = endpoints.iter().filter(|e| e.took_ms.is_some()).count();
    if answering == 0 {
        let code = endpoints.iter().find_map(|e| e.reason.clone());
        let reason = Reason::ALL
            .iter()
            .find(|reason| Some(reason.code()) == code.as_deref());
        return Outcome::refused(reason.copied().unwrap_or(Reason::PeerUnreachable));
    }
    let carried = format!(
        "carried by mTLS to {answering} of {} endpoints",
        endpoints.len()
    );
    match caller.decision.as_deref() {
        Some("denied") => Outcome::refused(Reason::NotAllowed),
        Some("audited") => Outcome {
            reason: None,
            text: format!("{carried}; no rule allows it and `enforce: audit` lets it pass"),
        },
        Some(_) => Outcome {
            reason: None,
            text: carried,
        },
        None => Outcome {
            reason: None,
            text: format!("{carried}, if the called agent allows it: control could not be asked"),
        },
    }
}

impl Explanation {
    /// Whether every caller that was asked about gets through.
    pub(crate) fn is_carried(&self) -> bool {
        self.problem.as_ref().is_none_or(|p| p.reason.is_none())
            && self.callers.iter().all(|c| c.outcome.reason.is_none())
    }

    /// The page for people.
    pub(crate) fn render(&self) -> String {
        let mut page = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "destination  {}", self.destination)?;
        if let Some(service) = &self.service {
            writeln!(
                page,
                "service      {} ({}) at {} and {}",
                service.name, service.dns_name, service.vip4, service.vip6
            )?;
            writeln!(
                page,
                "port         {}, {}; transport {}",
                service.port, service.protocol, service.transport
            )?;
        }
        if let Some(real) = self.service.as_ref().and_then(|service| service.real) {
            writeln!(
                page,
                "captured     at the real address {real}: only that host is called"
            )?;
        }
        if let Some(seconds) = self.stale_s {
            let ago = status::span(i64::try_from(seconds).unwrap_or(i64::MAX));
            writeln!(
                page,
                "control      NOT REACHED; what is known here is {ago} old"
            )?;
        }
        if let Some(problem) = &self.problem {
            return writeln!(page, "outcome      {}", problem.words());
        }
        if self.endpoints.is_empty() {
            writeln!(page, "endpoints    none that this host can reach")?;
        }
        for (line, endpoint) in self.endpoints.iter().enumerate() {
            let title = if line == 0 { "endpoints" } else { "" };
            let answer = match (endpoint.took_ms, &endpoint.reason) {
                (Some(ms), _) => format!("answers in {ms} ms"),
                (None, Some(reason)) => reason.clone(),
                (None, None) => "not asked: no certificate to ask with".to_owned(),
            };
            writeln!(
                page,
                "{title:<12} {} as {}, {}; {answer}",
                endpoint.address, endpoint.account, endpoint.health
            )?;
        }
        if self.more_endpoints > 0 {
            writeln!(page, "             and {} more", self.more_endpoints)?;
        }
        if self.elsewhere > 0 {
            let count = self.elsewhere;
            writeln!(
                page,
                "             and {count} in other networks, which are not reached"
            )?;
        }
        writeln!(page)?;
        let mut rows = vec![["CALLER", "CERTIFICATE", "DECISION", "OUTCOME"].map(str::to_owned)];
        for caller in &self.callers {
            let decision = match &caller.decision {
                None => "not known".to_owned(),
                Some(decision) => format!("{decision} by {}", caller.rule),
            };
            rows.push([
                caller.identity.clone(),
                match caller.left_s {
                    None => "none".to_owned(),
                    Some(..=0) => "EXPIRED".to_owned(),
                    Some(left) => format!("{} left", status::span(left)),
                },
                decision,
                caller.outcome.words(),
            ]);
        }
        status::table(page, &rows)?;
        if self.more_callers > 0 {
            let count = self.more_callers;
            writeln!(page, "and {count} more workloads; name one with --as")?;
        }
        Ok(())
    }
}

impl Outcome {
    fn words(&self) -> String {
        match &self.reason {
            Some(reason) => format!("refused, {reason}: {}", self.text),
            None => self.text.clone(),
        }
    }
}

/// Asks the running agent.
pub(crate) fn ask(
    socket: &Path,
    destination: &str,
    caller: Option<&str>,
) -> anyhow::Result<Option<Explanation>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".:/_-[]".contains(c);
    for text in [Some(destination), caller].into_iter().flatten() {
        if text.len() > DESTINATION_MAX || !text.chars().all(plain) {
            let message = format!(
                "`{text}` is no destination or identity; write it like web.shop.mesh.internal:80"
            );
            return Err(Mistyped(message).into());
        }
    }
    let mut path = format!("/explain?to={destination}");
    if let Some(caller) = caller {
        path += &format!("&as={caller}");
    }
    status::ask(socket, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUFFIX: &str = "mesh.internal";

    fn service(name: &str, port: Option<u16>) -> Destination {
        let name = ServiceName::parse(name).unwrap();
        Destination::Service { name, port }
    }

    #[test]
    fn destinations_are_read_as_people_write_them() {
        for (text, expected) in [
            ("web.shop.mesh.internal", service("shop/web", None)),
            ("web.shop.mesh.internal.:81", service("shop/web", Some(81))),
            ("WEB.shop.mesh.internal", service("shop/web", None)),
            (
                "http://web.shop.mesh.internal/a/b",
                service("shop/web", Some(80)),
            ),
            (
                "https://web.shop.mesh.internal",
                service("shop/web", Some(443)),
            ),
            ("shop/web", service("shop/web", None)),
            ("shop/web:5432", service("shop/web", Some(5432))),
            ("example.com", Destination::Elsewhere),
            ("xmesh.internal", Destination::Elsewhere),
        ] {
            assert_eq!(read(text, SUFFIX).as_ref(), Ok(&expected), "{text}");
        }
        for (text, ip, port) in [
            ("252.64.0.2:80", "252.64.0.2", Some(80)),
            ("252.64.0.2", "252.64.0.2", None),
            ("[fd6d::2]:80", "fd6d::2", Some(80)),
            ("fd6d::2", "fd6d::2", None),
            ("http://[fd6d::2]/", "fd6d::2", Some(80)),
            ("::ffff:252.64.0.2", "252.64.0.2", None),
        ] {
            let ip = ip.parse().unwrap();
            assert_eq!(
                read(text, SUFFIX),
                Ok(Destination::Address { ip, port }),
                "{text}"
            );
        }
        for bad in [
            "",
            "web.shop.mesh.internal:0",
            "web.mesh.internal",
            "a/b/c",
            "ftp://x/",
        ] {
            assert!(read(bad, SUFFIX).is_err(), "{bad}");
        }
    }

    fn caller(left_s: Option<i64>, decision: Option<&str>) -> CallerFacts {
        CallerFacts {
            left_s,
            decision: decision.map(str::to_owned),
            ..CallerFacts::default()
        }
    }

    fn endpoint(took_ms: Option<u64>) -> Probed {
        Probed {
            took_ms,
            reason: took_ms.is_none().then(|| "peer_identity".to_owned()),
            ..Probed::default()
        }
    }

    #[test]
    fn each_outcome_has_the_reason_that_a_call_would_have() {
        let good = [endpoint(Some(1)), endpoint(None)];
        let reason = |caller: &CallerFacts, endpoints: &[Probed], known| {
            foretell(caller, endpoints, known).reason
        };
        let code = |reason: Reason| Some(reason.code().to_owned());
        let fine = caller(Some(9), Some("allowed"));
        assert_eq!(reason(&fine, &good, true), None);
        assert_eq!(
            reason(&caller(None, Some("allowed")), &good, true),
            code(Reason::NoIdentity)
        );
        assert_eq!(
            reason(&caller(Some(0), Some("allowed")), &good, true),
            code(Reason::NoIdentity)
        );
        assert_eq!(
            reason(&caller(Some(9), Some("denied")), &good, true),
            code(Reason::NotAllowed)
        );
        assert_eq!(reason(&fine, &[], false), code(Reason::EndpointsUnknown));
        assert_eq!(reason(&fine, &[], true), code(Reason::NoEndpoints));
        assert_eq!(
            reason(&fine, &[endpoint(None)], true),
            code(Reason::PeerIdentity)
        );
        let audited = foretell(&caller(Some(9), Some("audited")), &good, true);
        assert!(audited.text.contains("audit"), "{audited:?}");
        let unknown = foretell(&caller(Some(9), None), &good, true);
        assert!(unknown.text.contains("could not be asked"), "{unknown:?}");
    }
}
