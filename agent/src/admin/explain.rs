//! Gathers what this host knows of a destination. Control is asked what the policies say, since only called agents
//! have them.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use mesh_api::proto;
use mesh_api::proto::mesh_client::MeshClient;
use mesh_core::identity::{Identity, SpiffeId};
use mesh_core::names::{Account, ServiceName};
use mesh_core::service::Endpoint;
use mesh_core::session::Phase;
use mesh_runtime::admin::Answer;

use super::Sources;
use crate::explain::{CALLERS_MAX, CallerFacts, ENDPOINTS_MAX, Explanation, find, foretell, read};
use crate::leaves::now_ms;
use crate::probe::{Probed, probe_all};
use crate::view::View;

/// How long control may take to say what the policies decide.
const DECISION_MAX: Duration = Duration::from_secs(3);

impl Sources {
    pub(super) async fn explain(&self, query: &str) -> Answer {
        let of = |name: &str| {
            let mut fields = query.split('&').filter_map(|field| field.split_once('='));
            fields.find(|(key, _)| *key == name).map(|(_, value)| value)
        };
        match self.explained(of("to").unwrap_or_default(), of("as")).await {
            Ok(explanation) => Answer::json(&explanation),
            Err(message) => Answer::error(StatusCode::BAD_REQUEST, &message),
        }
    }

    async fn explained(&self, to: &str, caller: Option<&str>) -> Result<Explanation, String> {
        let view = Arc::clone(&self.view.borrow());
        let suffix = view.host.dns_suffix.clone();
        let destination = read(to, &suffix)?;
        let session = Arc::clone(&self.session.borrow());
        let mut explanation = Explanation {
            destination: to.to_owned(),
            stale_s: (session.phase != Phase::Live)
                .then(|| now_ms().saturating_sub(session.heard_ms) / 1000),
            ..Explanation::default()
        };
        let is_vip = |ip| view.host.vips.contains(ip);
        let index = view.index.as_deref();
        let found = find(&destination, index, is_vip, &view.reals, &suffix);
        let (facts, service) = match found {
            Ok(found) => found,
            Err(outcome) => {
                explanation.problem = Some(outcome);
                return Ok(explanation);
            }
        };
        let (port, real) = (facts.port, facts.real);
        explanation.service = Some(facts);
        let callers = callers(&view, caller)?;
        explanation.more_callers = callers.len().saturating_sub(CALLERS_MAX);
        let callers: Vec<Identity> = callers.into_iter().take(CALLERS_MAX).collect();
        let endpoints = self.endpoints(&service).await;
        let known = endpoints.is_some();
        let endpoints = endpoints.unwrap_or_default();
        let (here, elsewhere): (Vec<&Endpoint>, Vec<&Endpoint>) = endpoints
            .iter()
            .filter(|e| real.is_none_or(|address| e.address == address))
            .partition(|e| e.network == view.host.network);
        explanation.elsewhere = elsewhere.len();
        explanation.more_endpoints = here.len().saturating_sub(ENDPOINTS_MAX);
        let here: Vec<Endpoint> = here.into_iter().take(ENDPOINTS_MAX).cloned().collect();
        let now_s = i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
        let leaf = callers.iter().find_map(|caller| view.leaves.of(caller));
        explanation.endpoints = match leaf {
            Some(leaf) => probe_all(leaf, &here).await,
            None => here.iter().map(Probed::unasked).collect(),
        };
        let decisions = self.decisions(&service, port, &callers).await;
        explanation.callers = callers
            .iter()
            .enumerate()
            .map(|(at, identity)| {
                let decision = decisions.as_ref().and_then(|d| d.get(at));
                let mut caller = CallerFacts {
                    identity: self.id(identity).to_string(),
                    left_s: view.leaves.of(identity).map(|l| l.not_after_s - now_s),
                    decision: decision.map(|d| d.outcome.clone()),
                    rule: decision.map(|d| d.rule.clone()).unwrap_or_default(),
                    outcome: crate::explain::Outcome::default(),
                };
                caller.outcome = foretell(&caller, &explanation.endpoints, known);
                caller
            })
            .collect();
        Ok(explanation)
    }

    fn id(&self, identity: &Identity) -> SpiffeId {
        SpiffeId {
            trust_domain: self.membership.host.trust_domain.clone(),
            identity: identity.clone(),
        }
    }

    /// The endpoints of a service, asked for as at its first use.
    async fn endpoints(&self, service: &ServiceName) -> Option<Arc<Vec<Endpoint>>> {
        let mut reader = self.view.clone();
        {
            let view = reader.borrow();
            if let Some(known) = view.endpoints.get(service) {
                return Some(Arc::clone(known));
            }
            // Full: others wait for the same owner, and the answer comes later than we wait.
            let asked = self.wants.try_send(service.clone());
            if !view.live || asked.is_err() {
                return None;
            }
        }
        let answer = reader.wait_for(|view| view.is_settled(service));
        let answer = tokio::time::timeout(self.config.data().hold, answer).await;
        answer.ok()?.ok()?.endpoints.get(service).cloned()
    }

    /// What control says of each caller; `None`: it could not be asked.
    async fn decisions(
        &self,
        service: &ServiceName,
        port: u16,
        callers: &[Identity],
    ) -> Option<Vec<proto::Decision>> {
        let channel = self.channel.borrow().clone()?;
        let callers = callers.iter().map(|caller| self.id(caller).to_string());
        let request = proto::ExplainRequest {
            service: Some(proto::ServiceRef {
                namespace: service.namespace.to_string(),
                name: service.name.to_string(),
            }),
            port: port.into(),
            callers: callers.collect(),
        };
        let mut client = MeshClient::new(channel);
        let answer = tokio::time::timeout(DECISION_MAX, client.explain(request)).await;
        match answer {
            Ok(Ok(response)) => Some(response.into_inner().decisions),
            Ok(Err(status)) => {
                log::debug!("control does not explain: {}", status.message());
                None
            }
            Err(_) => None,
        }
    }
}

/// Who is explained: the workload that was named, `host`, or all of this host.
fn callers(view: &View, named: Option<&str>) -> Result<Vec<Identity>, String> {
    let host = Identity::Host(view.host.name.clone());
    let accounts = view.workloads.workloads.iter().map(|w| &w.account);
    match named {
        None => {
            let workloads = accounts.cloned().map(Identity::Workload);
            Ok(workloads.chain([host]).collect())
        }
        Some("host") => Ok(vec![host]),
        Some(text) => {
            let account = Account::parse(text).map_err(|e| e.to_string())?;
            let mut accounts = accounts;
            if accounts.any(|own| *own == account) {
                return Ok(vec![Identity::Workload(account)]);
            }
            Err(format!(
                "{account} is no workload of this host; see `mesh-agent status`, or use `--as host` for all other programs"
            ))
        }
    }
}
