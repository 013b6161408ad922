//! `meshctl get`: objects as tables, JSON or YAML.

use http::Method;
use serde_json::Value;

use super::find::{self, Wanted};
use super::{NO_NAMESPACE, items, text};
use crate::args::{Get, Kind};
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;
use crate::table::Table;

/// Shows all namespaces.
const ALL: &str = "all";

pub(crate) async fn run(client: &Client, mut get: Get) -> Result<(), Failure> {
    if let Some(name) = bare_name(&get) {
        let wanted = Wanted {
            operation: "get",
            kind: word(get.kind),
            name,
        };
        get.namespace = find::namespace(client, wanted).await?;
    }
    let path = path(&get)?;
    let object = match &get.name {
        Some(name) => format!("{} {name}", word(get.kind)),
        None => word(get.kind).to_owned(),
    };
    let ask = Ask {
        operation: "get",
        object: &object,
        method: Method::GET,
        path: &path,
        body: None,
    };
    let answer = client.json(&ask).await?;
    output::show(&answer, get.output, |value| {
        // One object comes alone; a table is a list all the same.
        let list = match get.name {
            Some(_) => Value::Array(vec![value.clone()]),
            None => value.clone(),
        };
        table(get.kind, &list)
    })
}

/// The name, if it must be looked for in all namespaces.
fn bare_name(get: &Get) -> Option<&str> {
    let name = get.name.as_deref()?;
    let spaced = !matches!(get.kind, Kind::Hosts | Kind::Revocations | Kind::Audit);
    (spaced && get.namespace == ALL && !name.contains('/')).then_some(name)
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Services => "services",
        Kind::Workloads => "workloads",
        Kind::Hosts => "hosts",
        Kind::Policies => "policies",
        Kind::Revocations => "revocations",
        Kind::Audit => "audit",
    }
}

fn path(get: &Get) -> Result<String, Failure> {
    let kind = word(get.kind);
    let Some(name) = &get.name else {
        let mut query = Vec::new();
        if get.namespace != ALL
            && !matches!(get.kind, Kind::Hosts | Kind::Revocations | Kind::Audit)
        {
            query.push(format!("namespace={}", get.namespace));
        }
        if get.kind == Kind::Audit {
            query.push(format!("limit={}", get.limit));
        }
        let mark = if query.is_empty() { "" } else { "?" };
        return Ok(format!("/v1/{kind}{mark}{}", query.join("&")));
    };
    let (namespace, name) = match name.split_once('/') {
        Some(("", name)) => (NO_NAMESPACE, name),
        Some(pair) => pair,
        None => match get.kind {
            Kind::Audit => {
                return Err(Failure::usage(
                    "get",
                    "one audit entry",
                    "entries have no names",
                    "use `meshctl get audit --limit N`",
                ));
            }
            Kind::Hosts | Kind::Revocations => (NO_NAMESPACE, name.as_str()),
            _ => (get.namespace.as_str(), name.as_str()),
        },
    };
    Ok(format!("/v1/{kind}/{namespace}/{name}"))
}

fn table(kind: Kind, list: &Value) -> String {
    match kind {
        Kind::Services => services(list),
        Kind::Workloads => workloads(list),
        Kind::Hosts => hosts(list),
        Kind::Policies => policies(list),
        Kind::Revocations => revocations(list),
        Kind::Audit => audit(list),
    }
}

fn services(list: &Value) -> String {
    let mut table = Table::new(&[
        "NAMESPACE",
        "NAME",
        "VIP4",
        "VIP6",
        "PORTS",
        "TRANSPORT",
        "ENDPOINTS",
        "SOURCE",
        "NOTE",
    ]);
    for service in items(list) {
        let ports = service.pointer("/spec/ports").and_then(Value::as_array);
        let ports: Vec<String> = ports.into_iter().flatten().map(port).collect();
        let transport = service.pointer("/metadata/annotations/meshwork.io~1transport");
        table.row(vec![
            text(service, "/metadata/namespace"),
            text(service, "/metadata/name"),
            text(service, "/status/vip4"),
            text(service, "/status/vip6"),
            ports.join(","),
            transport.map_or_else(|| "permissive".to_owned(), super::plain),
            endpoints(service),
            text(service, "/status/source"),
            unencrypted(service),
        ]);
    }
    table.render()
}

fn port(port: &Value) -> String {
    match port.get("appProtocol").and_then(Value::as_str) {
        Some(protocol) => format!("{}/{protocol}", text(port, "/port")),
        None => text(port, "/port"),
    }
}

/// Where calls go on without encryption: `plaintext beyond host-1: 10.9.0.5:5432`.
fn unencrypted(service: &Value) -> String {
    let conditions = service
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    let is = |c: &&Value| text(c, "/type") == "Encrypted" && text(c, "/status") == "False";
    let found = conditions.into_iter().flatten().filter(is);
    found
        .map(|c| text(c, "/message"))
        .collect::<Vec<_>>()
        .join("; ")
}

/// How many endpoints answer, of how many.
fn endpoints(service: &Value) -> String {
    let endpoints = service
        .pointer("/status/endpoints")
        .and_then(Value::as_array);
    let endpoints = endpoints.map_or(&[][..], Vec::as_slice);
    let healthy = endpoints
        .iter()
        .filter(|e| text(e, "/state") == "healthy")
        .count();
    format!("{healthy}/{}", endpoints.len())
}

fn workloads(list: &Value) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "HOST", "SERVICES", "IDENTITY"]);
    for workload in items(list) {
        table.row(vec![
            text(workload, "/metadata/namespace"),
            text(workload, "/metadata/name"),
            text(workload, "/spec/host"),
            text(workload, "/spec/services"),
            text(workload, "/spec/identity"),
        ]);
    }
    table.render()
}

fn hosts(list: &Value) -> String {
    let mut table = Table::new(&[
        "NAME", "ADDRESS", "NETWORK", "LEASE", "SINCE", "VERSION", "BUNDLE", "PROBLEMS", "UID",
    ]);
    for host in items(list) {
        let problems = host.pointer("/status/problems").and_then(Value::as_array);
        table.row(vec![
            text(host, "/metadata/name"),
            text(host, "/spec/address"),
            text(host, "/spec/network"),
            text(host, "/status/lease"),
            text(host, "/status/since"),
            text(host, "/status/version"),
            text(host, "/status/acknowledged/bundle"),
            problems.map_or(0, Vec::len).to_string(),
            text(host, "/spec/uid"),
        ]);
    }
    table.render()
}

fn policies(list: &Value) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "SERVICE", "ENFORCE", "RULES"]);
    for policy in items(list) {
        let rules = policy.pointer("/spec/rules").and_then(Value::as_array);
        let names: Vec<String> = rules
            .into_iter()
            .flatten()
            .map(|r| text(r, "/name"))
            .collect();
        let enforce = text(policy, "/spec/enforce");
        table.row(vec![
            text(policy, "/metadata/namespace"),
            text(policy, "/metadata/name"),
            text(policy, "/spec/service"),
            if enforce.is_empty() {
                "on".to_owned()
            } else {
                enforce
            },
            names.join(","),
        ]);
    }
    table.render()
}

fn revocations(list: &Value) -> String {
    let mut table = Table::new(&["TIME", "HOST", "ACCOUNT", "ACKNOWLEDGED", "UID"]);
    for revocation in items(list) {
        let account = text(revocation, "/spec/account");
        let of = |pointer| text(revocation, pointer);
        table.row(vec![
            of("/metadata/creationTimestamp"),
            of("/spec/host"),
            if account.is_empty() {
                "all".to_owned()
            } else {
                account
            },
            format!("{}/{}", of("/status/acknowledged"), of("/status/hosts")),
            of("/spec/uid"),
        ]);
    }
    table.render()
}

fn audit(list: &Value) -> String {
    let mut table = Table::new(&[
        "TIME", "WHO", "FROM", "ACTION", "OBJECT", "OUTCOME", "REASON",
    ]);
    for entry in items(list) {
        table.row(vec![
            text(entry, "/time"),
            text(entry, "/who"),
            text(entry, "/from"),
            text(entry, "/action"),
            text(entry, "/object"),
            text(entry, "/outcome"),
            text(entry, "/reason"),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use serde_json::json;

    use super::*;
    use crate::args::{Args, Command};

    fn path_of(words: &[&str]) -> String {
        let args = Args::try_parse_from(["meshctl", "get"].iter().chain(words)).unwrap();
        match args.command {
            Command::Get(get) => path(&get).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn objects_are_found_where_they_live() {
        for (words, expected) in [
            (&["services"][..], "/v1/services"),
            (&["services", "-n", "shop"], "/v1/services?namespace=shop"),
            (&["services", "web", "-n", "shop"], "/v1/services/shop/web"),
            (&["services", "shop/web"], "/v1/services/shop/web"),
            (&["hosts", "vm-1"], "/v1/hosts/-/vm-1"),
            (&["policies", "/everyone"], "/v1/policies/-/everyone"),
            (&["policies", "p", "-n", "shop"], "/v1/policies/shop/p"),
            (&["audit", "--limit", "5"], "/v1/audit?limit=5"),
        ] {
            assert_eq!(path_of(words), expected);
        }
    }

    #[test]
    fn a_service_is_one_line() {
        let list = json!([{
            "metadata": {"namespace": "shop", "name": "web",
                "annotations": {"meshwork.io/transport": "strict"}},
            "spec": {"ports": [{"port": 80, "appProtocol": "http"}, {"port": 81}]},
            "status": {"vip4": "252.64.0.2", "vip6": "fd6d::2", "source": "host/vm-1",
                "conditions": [{"type": "Encrypted", "status": "False", "message": "plaintext beyond vm-1: 10.9.0.5:80"}],
                "endpoints": [{"state": "healthy"}, {"state": "stale"}]}
        }]);
        let text = table(Kind::Services, &list);
        let line: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        let expected = [
            "shop",
            "web",
            "252.64.0.2",
            "fd6d::2",
            "80/http,81",
            "strict",
            "1/2",
            "host/vm-1",
            "plaintext",
            "beyond",
            "vm-1:",
            "10.9.0.5:80",
        ];
        assert_eq!(line, expected);
    }
}
