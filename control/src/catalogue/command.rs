//! What can be asked of the catalogue, and the one way from one moment of it to the next. Nothing here does
//! I/O: random ids, hashes and the time come with the command.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use mesh_api::resource::Resource;
use mesh_core::names::{Account, HostUid, Label, Network, ServiceName};
use mesh_core::revocation::Revocation;
use mesh_core::vip::Allocator;

use super::draft::{Draft, Op};
use super::objects::{Digest, Host, PolicyKey, Revoked, Scope, Workload};
use super::warnings::PlaintextCaller;
use super::{Catalogue, host, policy, service, token, warnings};
use crate::refusal::Refusal;

/// A change that somebody asks for.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    CreateToken(NewToken),
    RevokeToken {
        id: String,
        /// All that joined with it too.
        hosts: bool,
    },
    Join(Box<Join>),
    /// A session began: what the host says of itself.
    Hello {
        uid: HostUid,
        version: String,
        address: Option<IpAddr>,
        mesh_port: Option<u16>,
    },
    /// The whole of what a host serves.
    Report {
        uid: HostUid,
        workloads: Vec<Workload>,
    },
    Lease {
        uid: HostUid,
        live: bool,
    },
    /// A host has the roots of this bundle on disk and in use.
    Acked {
        uid: HostUid,
        bundle: u64,
    },
    /// Control reached a host's agent where the host says it is.
    Proven {
        uid: HostUid,
        address: IpAddr,
        mesh_port: u16,
    },
    /// Control did not find a host's agent where the host says it is, more than once.
    Doubted {
        uid: HostUid,
        address: IpAddr,
        mesh_port: u16,
    },
    RemoveHost {
        name: Label,
    },
    RevokeWorkload {
        account: Account,
        host: Label,
    },
    /// This catalogue takes the place of a newer one, which had revoked this.
    Restore {
        revoked: Vec<Arc<Revoked>>,
    },
    /// Revocations whose signatures are ours, of which this epoch may not know.
    MergeRevocations(Vec<Revocation>),
    /// All or nothing.
    Apply {
        resources: Vec<Resource>,
        dry_run: bool,
        /// For warnings: who may be cut off.
        plaintext: BTreeSet<PlaintextCaller>,
    },
    DeleteService {
        name: ServiceName,
    },
    DeletePolicy {
        key: PolicyKey,
    },
}

#[derive(Clone, Debug)]
pub(crate) struct NewToken {
    pub id: String,
    pub name: String,
    pub secret: Digest,
    pub scope: Scope,
    pub uses: u32,
    pub replace: bool,
    pub expires_s: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Join {
    pub token: String,
    pub secret: Digest,
    pub key: Digest,
    /// For a host that is new.
    pub uid: HostUid,
    pub host_name: Label,
    pub network: Option<Network>,
    pub address: IpAddr,
    pub mesh_port: u16,
    pub version: String,
}

/// What came of a command.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Done,
    Joined(Arc<Host>),
    Applied(Vec<Applied>),
    /// How many tokens could have been used.
    Restored {
        tokens: usize,
    },
}

/// What `apply` did with one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Applied {
    pub object: String,
    pub action: Action,
    pub message: Option<String>,
    /// What it says that has no effect, as far as is known.
    pub warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Created,
    Configured,
    Unchanged,
}

impl Action {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
        }
    }
}

impl Command {
    /// What is done, for audit and log.
    pub(crate) const fn action(&self) -> &'static str {
        match self {
            Self::CreateToken(_) => "create token",
            Self::RevokeToken { .. } => "revoke token",
            Self::Join(_) => "join",
            Self::Hello { .. } => "update host",
            Self::Report { .. } => "report",
            Self::Lease { live: true, .. } => "lease live",
            Self::Lease { live: false, .. } => "lease stale",
            Self::Acked { .. } => "acknowledge bundle",
            Self::Proven { .. } => "prove address",
            Self::Doubted { .. } => "doubt address",
            Self::RemoveHost { .. } => "remove host",
            Self::RevokeWorkload { .. } => "revoke workload",
            Self::Restore { .. } => "restore",
            Self::MergeRevocations(_) => "merge revocations",
            Self::Apply { dry_run: true, .. } => "apply (dry run)",
            Self::Apply { .. } => "apply",
            Self::DeleteService { .. } => "delete service",
            Self::DeletePolicy { .. } => "delete policy",
        }
    }

    /// What it is done to, for audit and log.
    pub(crate) fn object(&self, catalogue: &Catalogue) -> String {
        match self {
            Self::CreateToken(new) => format!("token/{}", new.id),
            Self::RevokeToken { id, .. } => format!("token/{id}"),
            Self::Join(join) => format!("host/{}", join.host_name),
            Self::Hello { uid, .. }
            | Self::Report { uid, .. }
            | Self::Lease { uid, .. }
            | Self::Acked { uid, .. }
            | Self::Proven { uid, .. }
            | Self::Doubted { uid, .. } => catalogue.host_label(uid),
            Self::RemoveHost { name } => format!("host/{name}"),
            Self::RevokeWorkload { account, host } => format!("workload/{account} of host/{host}"),
            Self::Restore { revoked } => format!("{} revocations", revoked.len()),
            Self::MergeRevocations(known) => format!("{} revocations", known.len()),
            Self::Apply { resources, .. } => match resources.as_slice() {
                [one] => one.object(),
                all => format!("{} resources", all.len()),
            },
            Self::DeleteService { name } => format!("service/{name}"),
            Self::DeletePolicy { key } => super::items::policy_key(key),
        }
    }
}

/// The writer's own: the newest catalogue and the allocator that goes with it.
#[derive(Debug)]
pub(crate) struct State {
    pub catalogue: Catalogue,
    vips: Allocator,
}

impl State {
    pub(crate) fn new(catalogue: Catalogue) -> Result<Self, String> {
        let vips = catalogue.allocator()?;
        Ok(Self { catalogue, vips })
    }

    /// Carries out a command as part of the commit that will have `revision`. A refused one changes nothing.
    pub(crate) fn apply(
        &mut self,
        command: &Command,
        revision: u64,
        now_s: u64,
    ) -> Result<(Outcome, Vec<Op>), Refusal> {
        // Of the commands that can fail after they allotted an address, and of those that only try.
        let undo = matches!(command, Command::Apply { .. }).then(|| self.vips.clone());
        let mut draft = Draft::new(&self.catalogue, revision, &mut self.vips, now_s);
        let outcome = reduce(&mut draft, command);
        let dry_run = matches!(command, Command::Apply { dry_run: true, .. });
        let (next, ops) = draft.finish();
        if (dry_run || outcome.is_err())
            && let Some(vips) = undo
        {
            self.vips = vips;
        }
        let outcome = outcome?;
        if dry_run {
            return Ok((outcome, Vec::new()));
        }
        self.catalogue = next;
        Ok((outcome, ops))
    }
}

fn reduce(draft: &mut Draft<'_>, command: &Command) -> Result<Outcome, Refusal> {
    match command {
        Command::CreateToken(new) => token::create(draft, new),
        Command::RevokeToken { id, hosts } => token::revoke(draft, id, *hosts),
        Command::Join(join) => host::join(draft, join),
        Command::Hello {
            uid,
            version,
            address,
            mesh_port,
        } => host::hello(draft, uid, version, *address, *mesh_port),
        Command::Report { uid, workloads } => host::report(draft, uid, workloads),
        Command::Lease { uid, live } => host::lease(draft, uid, *live),
        Command::Acked { uid, bundle } => host::acked(draft, uid, *bundle),
        Command::Proven {
            uid,
            address,
            mesh_port,
        } => host::judged(draft, uid, (*address, *mesh_port), true),
        Command::Doubted {
            uid,
            address,
            mesh_port,
        } => host::judged(draft, uid, (*address, *mesh_port), false),
        Command::RemoveHost { name } => host::remove(draft, name),
        Command::RevokeWorkload { account, host } => host::revoke_workload(draft, account, host),
        Command::Restore { revoked } => {
            for one in revoked {
                draft.revoke_as(one);
            }
            let tokens = token::revoke_usable(draft);
            Ok(Outcome::Restored { tokens })
        }
        Command::MergeRevocations(known) => host::merge(draft, known),
        Command::Apply {
            resources,
            plaintext,
            ..
        } => {
            let before = (!plaintext.is_empty()).then(|| draft.next.clone());
            let applied = resources.iter().map(|resource| match resource {
                Resource::Service(object) => service::apply(draft, object),
                Resource::Policy(object) => policy::apply(draft, object),
            });
            let mut applied = applied.collect::<Result<Vec<Applied>, _>>()?;
            let cut = before.map_or_else(Vec::new, |before| {
                warnings::cut_off(&before, &draft.next, plaintext)
            });
            // Last: a policy may stand before its service.
            for (one, resource) in applied.iter_mut().zip(resources) {
                one.warnings = warnings::of(&draft.next, resource);
                one.warnings.extend(warnings::of_cut_off(resource, &cut));
            }
            Ok(Outcome::Applied(applied))
        }
        Command::DeleteService { name } => service::delete(draft, name),
        Command::DeletePolicy { key } => policy::delete(draft, key),
    }
}
