//! `mesh-control init`: a new mesh, made once.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use mesh_api::resource::{CallerSpec, Metadata, OUR_API, Object, PolicySpec, Resource, RuleSpec};
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Label, TrustDomain};
use mesh_runtime::files;
use rcgen::KeyPair;
use serde::Serialize;

use crate::api::is_address;
use crate::ca::{self, Ca, LeafOrder, Origin};
use crate::catalogue::Catalogue;
use crate::catalogue::command::{Command, State};
use crate::catalogue::objects::{Digest, Operator, Settings};
use crate::config::PORT;
use crate::store::Store;
use crate::{clock, export, server_names};

/// Life of the operator's client certificate, in seconds: a year. The bearer token does not end.
const OPERATOR_LIFE_S: u64 = 365 * 24 * 3600;

/// What `init` is told.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub state_dir: PathBuf,
    pub trust_domain: TrustDomain,
    pub dns_suffix: String,
    pub vip4_range: Option<String>,
    pub vip6_range: Option<String>,
    pub addresses: Vec<String>,
    pub origin: Origin,
}

/// The file that makes a person an operator.
#[derive(Serialize)]
struct AdminFile<'a> {
    addresses: &'a [String],
    root: String,
    token: String,
    certificate: String,
    key: String,
}

/// Makes the mesh and returns what to tell the operator.
pub(crate) fn init(plan: &Plan) -> anyhow::Result<String> {
    let state = &plan.state_dir;
    for made in ["ca", "store", "exports", "admin.yaml"] {
        if state.join(made).exists() {
            anyhow::bail!(
                "{} exists: a mesh was made here already; name another --state-dir, or remove it if you are \
                 sure that no host ever joined",
                state.join(made).display()
            );
        }
    }
    let settings = settings(plan)?;
    files::create_private_dir(state)?;
    make(plan, &settings).inspect_err(|_| {
        // None of them was there before; half a mesh would stand in the way of the next attempt.
        for made in ["ca", "store", "exports"] {
            drop(std::fs::remove_dir_all(state.join(made)));
        }
        drop(std::fs::remove_file(state.join("admin.yaml")));
    })
}

fn make(plan: &Plan, settings: &Settings) -> anyhow::Result<String> {
    let state = &plan.state_dir;
    let now_s = clock::now_s();
    let ca = Ca::create(state, &plan.trust_domain, &plan.origin, now_s)?;
    let secret = bearer();
    let catalogue = catalogue(settings, &secret, now_s)?;
    let store = Store::create(state, &catalogue)?;
    export::write(state, &catalogue)?;
    drop(store);
    let admin = admin_file(settings, &ca, secret, now_s)?;
    let path = state.join("admin.yaml");
    files::write_private(&path, serde_norway::to_string(&admin)?.as_bytes())?;
    Ok(told(plan, settings, &ca, &path))
}

fn told(plan: &Plan, settings: &Settings, ca: &Ca, admin: &Path) -> String {
    let pin = ca.pin().map(Digest).map(|pin| pin.to_string());
    let root = match &plan.origin {
        Origin::New => format!(
            "root of 10 years; keep {} offline, control runs without it",
            plan.state_dir.join("ca/root.key").display()
        ),
        Origin::Root { cert, .. } => format!("root {}, its key was not copied", cert.display()),
        Origin::Issuer { cert, .. } => format!("issuer {}", cert.display()),
    };
    format!(
        "made the mesh {}\n\
         \x20 authority   {root}\n\
         \x20 root pin    {}\n\
         \x20 issuer      until {}\n\
         \x20 addresses   {}\n\
         \x20 names       *.{}, at {} and {}\n\
         \x20 policy      everyone: all workloads and hosts of this trust domain may call by mesh name, and anybody\n\
         \x20             in plaintext at a program's own port; narrow it\n\
         \x20 operator    {} (private: it may do everything)\n\
         {}\
         next: mesh-control run --state-dir {}\n\
         then: meshctl --context {} token create --namespace <namespace>\n",
        settings.trust_domain,
        pin.unwrap_or_default(),
        clock::rfc3339(ca.issuer_ends_s()),
        settings.addresses.join(", "),
        settings.dns_suffix,
        settings.vip4_range,
        settings.vip6_range,
        admin.display(),
        address_warning(plan, settings),
        plan.state_dir.display(),
        admin.display(),
    )
}

/// Nobody said where hosts reach control: a name that they can not resolve would show at the first join only.
fn address_warning(plan: &Plan, settings: &Settings) -> String {
    if !plan.addresses.is_empty() {
        return String::new();
    }
    format!(
        "warning: no --address was said, so hosts are told to reach control at {}: it goes into every token and \
         must resolve on every host. Say another for one token with `meshctl token create --address HOST:PORT`; \
         for all, remove {} and run init again with --address\n",
        settings.addresses.join(", "),
        plan.state_dir.display()
    )
}

fn settings(plan: &Plan) -> anyhow::Result<Settings> {
    let standard = mesh_core::vip::VipRanges::default();
    let addresses = if plan.addresses.is_empty() {
        vec![format!("{}:{PORT}", server_names::host_name())]
    } else {
        plan.addresses.clone()
    };
    if let Some(bad) = addresses.iter().find(|a| !is_address(a)) {
        anyhow::bail!("--address {bad} is no address; write it like control.example.com:{PORT}");
    }
    // It has the form of a trust domain: a DNS name.
    let suffix: TrustDomain = plan.dns_suffix.parse()?;
    let range = |said: &Option<String>, standard: mesh_core::policy::Cidr| {
        said.clone().unwrap_or_else(|| standard.to_string())
    };
    let settings = Settings {
        trust_domain: plan.trust_domain.clone(),
        dns_suffix: suffix.to_string(),
        vip4_range: range(&plan.vip4_range, standard.v4()),
        vip6_range: range(&plan.vip6_range, standard.v6()),
        addresses,
        bundle: 1,
    };
    settings.vip_ranges().map_err(anyhow::Error::msg)?;
    Ok(settings)
}

/// The first catalogue: the policy `everyone` and the operator `admin`.
fn catalogue(settings: &Settings, secret: &str, now_s: u64) -> anyhow::Result<Catalogue> {
    let epoch = new_epoch();
    let mut catalogue = Catalogue::new(epoch, settings.clone());
    let name: Label = "admin".parse()?;
    let operator = Operator {
        name: name.clone(),
        secret: Digest::of(secret.as_bytes()),
        created_s: now_s,
    };
    catalogue
        .operators
        .insert(name, std::sync::Arc::new(operator));
    let mut state = State::new(catalogue).map_err(anyhow::Error::msg)?;
    let everyone = Command::Apply {
        resources: vec![Resource::Policy(everyone(&settings.trust_domain))],
        dry_run: false,
        plaintext: BTreeSet::new(),
    };
    state.apply(&everyone, 1, now_s)?;
    Ok(state.catalogue)
}

/// All workloads and hosts of the trust domain, and plaintext from anywhere: nothing breaks at join.
fn everyone(trust_domain: &TrustDomain) -> Object<PolicySpec> {
    let cidr = |text: &str| CallerSpec {
        cidr: Some(text.to_owned()),
        ..CallerSpec::default()
    };
    let own = CallerSpec {
        trust_domain: Some(trust_domain.to_string()),
        ..CallerSpec::default()
    };
    let rule = |name: &str, from| RuleSpec {
        name: name.to_owned(),
        from,
        ports: Vec::new(),
    };
    Object {
        api_version: OUR_API.to_owned(),
        kind: "Policy".to_owned(),
        metadata: Metadata {
            name: "everyone".to_owned(),
            ..Metadata::default()
        },
        spec: PolicySpec {
            rules: vec![
                rule("mesh", vec![own]),
                rule("plaintext", vec![cidr("0.0.0.0/0"), cidr("::/0")]),
            ],
            ..PolicySpec::default()
        },
        status: None,
    }
}

fn admin_file<'a>(
    settings: &'a Settings,
    ca: &Ca,
    secret: String,
    now_s: u64,
) -> anyhow::Result<AdminFile<'a>> {
    let key = KeyPair::generate()?;
    let id = SpiffeId {
        trust_domain: settings.trust_domain.clone(),
        identity: Identity::Operator("admin".parse()?),
    };
    let order = LeafOrder {
        id: &id,
        source: None,
        names: &[],
        life_s: OPERATOR_LIFE_S,
    };
    let chain = ca.sign(&order, &key, now_s)?;
    Ok(AdminFile {
        addresses: &settings.addresses,
        root: ca::to_pem(&ca.root),
        token: secret,
        certificate: chain.iter().map(|der| ca::to_pem(der)).collect(),
        key: key.serialize_pem(),
    })
}

fn bearer() -> String {
    let secret = Digest(ca::random());
    format!("meshop_{secret}")
}

/// An epoch that no other store has; never 0, which is none on the wire.
pub(crate) fn new_epoch() -> u64 {
    (u64::from_be_bytes(ca::random::<8>()) >> 1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_attempt_leaves_nothing_in_the_way_of_the_next() {
        let state = std::env::temp_dir().join(format!("meshwork-init-{}", std::process::id()));
        let mut plan = Plan {
            state_dir: state.clone(),
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: None,
            vip6_range: None,
            addresses: vec!["10.0.0.1:7440".to_owned()],
            origin: Origin::New,
        };
        let wrong = |change: fn(&mut Plan)| {
            let mut wrong = plan.clone();
            change(&mut wrong);
            init(&wrong).unwrap_err().to_string()
        };
        let missing = wrong(|p| {
            p.origin = Origin::Root {
                cert: "/nonexistent".into(),
                key: "/nonexistent".into(),
            };
        });
        assert!(missing.contains("/nonexistent"), "{missing}");
        assert!(wrong(|p| p.vip4_range = Some("10.0.0.1/8".to_owned())).contains("10.0.0.1/8"));
        assert!(wrong(|p| p.addresses = vec!["x".to_owned()]).contains("--address x"));
        plan.vip4_range = Some("10.64.0.0/10".to_owned());
        let told = init(&plan).unwrap();
        assert!(told.contains("next: mesh-control run"), "{told}");
        let again = init(&plan).unwrap_err().to_string();
        assert!(again.contains("made here already"), "{again}");
        std::fs::remove_dir_all(&state).unwrap();
    }
}
