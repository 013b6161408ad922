//! Services: made by their first registration or by `apply`, and owned by whoever made them.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_api::resource::{
    CAPTURE_ANNOTATION, Object, PLAINTEXT_FROM_ANNOTATION, ServiceSpec, TRANSPORT_ANNOTATION,
};
use mesh_core::names::ServiceName;
use mesh_core::reason::Reason;
use mesh_core::service::{Capture, Transport};

use super::SERVICES_MAX;
use super::command::{Action, Applied, Outcome};
use super::draft::Draft;
use super::objects::{Host, Offer, Service, Source, show_ports};
use crate::refusal::Refusal;

/// A host offers a service. Makes it if it is new, changes its ports if the host owns it. Whether the offer is listed is
/// decided afterwards, for all alike.
pub(super) fn register(draft: &mut Draft<'_>, host: &Host, offer: &Offer) {
    let Some(service) = draft.next.services.get(&offer.service).cloned() else {
        // Without an address it is not made; `listing` tells the host.
        drop(make(draft, offer.service.clone(), |service| {
            service.ports.clone_from(&offer.ports);
            service.transport = offer.transport;
            service.source = Source::Host(host.uid.clone());
        }));
        return;
    };
    let Source::Host(owner) = &service.source else {
        return;
    };
    if *owner == host.uid && service.ports != offer.ports {
        let mut next = Service::clone(&service);
        next.ports.clone_from(&offer.ports);
        draft.put_service(next);
    }
}

/// A service whose owner serves it no more, or may not, goes to another host that does, with that one's ports: best to one
/// that has the ports of now.
pub(super) fn pass_on(draft: &mut Draft<'_>, name: &ServiceName) {
    let Some(service) = draft.next.services.get(name).cloned() else {
        return;
    };
    let Source::Host(owner) = &service.source else {
        return;
    };
    let all = &draft.next;
    let serves = |host: &Arc<Host>| all.offer_of(host, name).is_some();
    if all.hosts.get(owner).is_some_and(serves) {
        return;
    }
    let others = all.servers_of(name);
    let others = others.filter_map(|host| Some((host, all.offer_of(host, name)?)));
    let heir = others.min_by_key(|(host, offer)| (offer.ports != service.ports, !host.live));
    if let Some((host, offer)) = heir {
        let mut next = Service::clone(&service);
        next.source = Source::Host(host.uid.clone());
        next.ports.clone_from(&offer.ports);
        draft.put_service(next);
    }
}

fn make(
    draft: &mut Draft<'_>,
    name: ServiceName,
    fill: impl FnOnce(&mut Service),
) -> Result<(), Refusal> {
    if SERVICES_MAX <= draft.next.services.len() {
        let message = format!("there are {SERVICES_MAX} services; delete those that are unused");
        return Err(Refusal::new(Reason::Overloaded, message));
    }
    let vip = draft.allot(&name)?;
    let mut service = Service {
        name,
        vip,
        ports: Vec::new(),
        port_names: BTreeMap::new(),
        transport: Transport::default(),
        plaintext_from: Vec::new(),
        capture: Capture::default(),
        source: Source::Operator,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        created_s: draft.now_s,
        revision: draft.revision,
    };
    fill(&mut service);
    draft.put_service(service);
    Ok(())
}

/// The operator says what a service is. Of one that a host owns only the transport, whom `strict` excepts, and what is
/// captured are the operator's.
pub(super) fn apply(
    draft: &mut Draft<'_>,
    object: &Object<ServiceSpec>,
) -> Result<Applied, Refusal> {
    let declared = object
        .to_core()
        .map_err(|e| Refusal::invalid(e.to_string()))?;
    let label = format!("Service {}", declared.name);
    let mut annotations = object.metadata.annotations.clone();
    let says_transport = annotations.remove(TRANSPORT_ANNOTATION).is_some();
    let says_from = annotations.remove(PLAINTEXT_FROM_ANNOTATION).is_some();
    let says_capture = annotations.remove(CAPTURE_ANNOTATION).is_some();
    let fill = |service: &mut Service| {
        service.ports.clone_from(&declared.ports);
        service.transport = declared.transport;
        service.plaintext_from.clone_from(&declared.plaintext_from);
        service.capture = declared.capture;
        service.source = Source::Operator;
        service.labels.clone_from(&object.metadata.labels);
        service.annotations = annotations;
        let named = object.spec.ports.iter();
        let named = named.filter_map(|p| Some((p.port, p.name.clone()?)));
        service.port_names = named.collect();
    };
    let Some(old) = draft.next.services.get(&declared.name).cloned() else {
        make(draft, declared.name.clone(), fill)?;
        return Ok(applied(label, Action::Created, None));
    };
    let mut next = Service::clone(&old);
    let message = match &old.source {
        Source::Operator => {
            fill(&mut next);
            unlisted(draft, &next)
        }
        Source::Host(owner) if old.ports == declared.ports => {
            if says_transport {
                next.transport = declared.transport;
            }
            if says_transport || says_from {
                next.plaintext_from.clone_from(&declared.plaintext_from);
            }
            if says_capture {
                next.capture = declared.capture;
            }
            let owner = draft.next.host_label(owner);
            Some(format!(
                "owned by {owner}; only its transport, whose plaintext is let in, and what is captured are set here"
            ))
        }
        Source::Host(owner) => {
            let message = format!(
                "{label} is owned by {}, which says ports {}; change them in its services.d, or delete the \
                 service there first",
                draft.next.host_label(owner),
                show_ports(&old.ports)
            );
            return Err(Refusal::new(Reason::Conflict, message));
        }
    };
    if next == *old {
        return Ok(applied(label, Action::Unchanged, None));
    }
    draft.put_service(next);
    Ok(applied(label, Action::Configured, message))
}

/// Why some who serve it are no more listed after the change.
fn unlisted(draft: &Draft<'_>, next: &Service) -> Option<String> {
    let other_ports = |host: &&Arc<Host>| {
        let mut offers = host.offers().filter(|(_, o)| o.service == next.name);
        offers.any(|(_, o)| o.ports != next.ports)
    };
    let count = draft
        .next
        .servers_of(&next.name)
        .filter(other_ports)
        .count();
    (0 < count).then(|| format!("{count} host(s) serve it with other ports and are not listed"))
}

fn applied(object: String, action: Action, message: Option<String>) -> Applied {
    Applied {
        object,
        action,
        message,
        warnings: Vec::new(),
    }
}

/// Deletes a service. While live hosts serve it, it would come back with their next report: that is refused
/// for one that they own, and the operator's passes to the first of them.
pub(super) fn delete(draft: &mut Draft<'_>, name: &ServiceName) -> Result<Outcome, Refusal> {
    let service = draft.next.services.get(name).cloned();
    let service = service.ok_or_else(|| Refusal::not_found(&format!("service {name}")))?;
    let server = draft.next.servers_of(name).find(|host| host.live).cloned();
    match (&service.source, server) {
        (_, None) => draft.remove_service(name),
        (Source::Host(_), Some(server)) => {
            let message = format!(
                "service {name} is served by host {}, which would make it again; remove it from its services.d \
                 first, or remove the host",
                server.name
            );
            return Err(Refusal::new(Reason::Conflict, message));
        }
        (Source::Operator, Some(server)) => {
            let offer = server.offers().find(|(_, o)| o.service == *name);
            let mut next = Service::clone(&service);
            next.source = Source::Host(server.uid.clone());
            next.labels.clear();
            next.annotations.clear();
            next.port_names.clear();
            if let Some((_, offer)) = offer {
                next.ports.clone_from(&offer.ports);
            }
            draft.put_service(next);
        }
    }
    Ok(Outcome::Done)
}
