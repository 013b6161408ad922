//! The one writer of the catalogue. It takes all commands that wait, carries them out in their order, makes
//! them durable with one flush, publishes the result, and answers; nobody is answered before.

use std::sync::Arc;

use mesh_core::reason::Reason;
use tokio::sync::{mpsc, oneshot, watch};

use crate::audit::{Actor, Audit};
use crate::catalogue::Catalogue;
use crate::catalogue::command::{Command, Outcome, State};
use crate::clock;
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::store::{Store, StoreError};

/// Commands that wait. Who finds it full waits: sessions and calls are bounded themselves.
const QUEUE: usize = 1024;
/// Most commands of one commit: bounds how long the first of them waits for the last.
const GROUP_MAX: usize = 256;

#[derive(Debug)]
struct Job {
    command: Command,
    actor: Actor,
    answer: oneshot::Sender<Result<Outcome, Refusal>>,
}

/// The way to the writer, for all who ask.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Job>,
    catalogue: watch::Receiver<Arc<Catalogue>>,
}

/// The writer's other end.
#[derive(Debug)]
pub(crate) struct WriterLoop {
    jobs: mpsc::Receiver<Job>,
    published: watch::Sender<Arc<Catalogue>>,
    state: State,
    store: Store,
    audit: Arc<Audit>,
    metrics: Arc<Metrics>,
}

impl Writer {
    pub(crate) fn new(
        store: Store,
        catalogue: Catalogue,
        audit: Arc<Audit>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, WriterLoop), String> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let state = State::new(catalogue)?;
        let (published, receiver) = watch::channel(Arc::new(state.catalogue.clone()));
        let writer = Self {
            queue,
            catalogue: receiver,
        };
        let writer_loop = WriterLoop {
            jobs,
            published,
            state,
            store,
            audit,
            metrics,
        };
        Ok((writer, writer_loop))
    }

    /// The newest catalogue.
    pub(crate) fn now(&self) -> Arc<Catalogue> {
        Arc::clone(&self.catalogue.borrow())
    }

    /// To be told of each next one.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Catalogue>> {
        self.catalogue.clone()
    }

    /// Asks for a change. When it returns, the change is durable and published, or refused.
    pub(crate) async fn ask(&self, actor: Actor, command: Command) -> Result<Outcome, Refusal> {
        let (answer, answered) = oneshot::channel();
        let job = Job {
            command,
            actor,
            answer,
        };
        // Fails only when the writer ended, and then the daemon is ending.
        self.queue
            .send(job)
            .await
            .map_err(|_| Refusal::internal())?;
        answered.await.map_err(|_| Refusal::internal())?
    }
}

impl WriterLoop {
    /// Runs until every [`Writer`] is dropped; a store that does not commit ends it.
    pub(crate) fn run(&mut self) -> Result<(), StoreError> {
        let mut group = Vec::new();
        while let Some(first) = self.jobs.blocking_recv() {
            group.push(first);
            while group.len() < GROUP_MAX
                && let Ok(next) = self.jobs.try_recv()
            {
                group.push(next);
            }
            self.commit(&mut group)?;
        }
        Ok(())
    }

    fn commit(&mut self, group: &mut Vec<Job>) -> Result<(), StoreError> {
        let base = self.state.catalogue.revision;
        let now_s = clock::now_s();
        let mut ops = Vec::new();
        let mut done = Vec::with_capacity(group.len());
        for job in group.drain(..) {
            let object = job.command.object(&self.state.catalogue);
            let result = self.state.apply(&job.command, base + 1, now_s);
            let changed = result.as_ref().is_ok_and(|(_, ops)| !ops.is_empty());
            let result = result.map(|(outcome, mut new)| {
                ops.append(&mut new);
                outcome
            });
            done.push((job, object, result, changed));
        }
        if !ops.is_empty() {
            let meta = self.state.catalogue.meta();
            if let Err(error) = self.store.commit(base, &meta, &ops) {
                let why = format!("control can not keep it and ends: {error}");
                for (job, ..) in done {
                    let refusal = Refusal::new(Reason::Internal, why.clone());
                    // Who asked may be gone.
                    let _ = job.answer.send(Err(refusal));
                }
                return Err(error);
            }
            self.metrics.commits.inc();
            self.metrics
                .store_bytes
                .set(self.store.size().cast_signed());
            let catalogue = Arc::new(self.state.catalogue.clone());
            self.published.send_replace(catalogue);
        }
        for (job, object, result, changed) in done {
            self.note(&job, &object, result.as_ref().err(), changed);
            // Who asked may be gone; what was done is done.
            let _ = job.answer.send(result);
        }
        Ok(())
    }

    fn note(&self, job: &Job, object: &str, refusal: Option<&Refusal>, changed: bool) {
        let revision = self.state.catalogue.revision;
        let action = job.command.action();
        let reason = refusal.map(|r| r.reason);
        if refusal.is_none() && !changed {
            return;
        }
        let written = self
            .audit
            .append(&job.actor, action, object, reason, revision);
        if let Some(refusal) = refusal {
            self.metrics.refused(refusal.reason);
            if written {
                let (who, reason) = (job.actor.who.as_str(), refusal.reason.code());
                log::warn!(action, object, who, reason; "refused: {refusal}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::objects::Settings;

    fn service(n: usize) -> Command {
        let text = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: s{n}, namespace: shop}}, spec: {{ports: [{{port: 80}}]}}}}"
        );
        Command::Apply {
            resources: mesh_api::resource::parse_all(&text).unwrap(),
            dry_run: false,
            plaintext: std::collections::BTreeSet::new(),
        }
    }

    #[test]
    fn who_waits_together_is_committed_together_and_what_was_answered_is_stored() {
        const ASKED: usize = 200;
        let state = std::env::temp_dir().join(format!("meshwork-writer-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&state));
        std::fs::create_dir_all(&state).unwrap();
        let settings = Settings {
            trust_domain: "corp.example.com".parse().unwrap(),
            dns_suffix: "mesh.internal".to_owned(),
            vip4_range: "252.64.0.0/12".to_owned(),
            vip6_range: "fd6d:6573:6800::/64".to_owned(),
            addresses: Vec::new(),
            bundle: 1,
        };
        let catalogue = Catalogue::new(1, settings);
        let store = Store::create(&state, &catalogue).unwrap();
        let audit = Arc::new(Audit::open(&state).unwrap());
        let metrics = Metrics::new();
        let (writer, mut writer_loop) =
            Writer::new(store, catalogue, Arc::clone(&audit), Arc::clone(&metrics)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let thread = runtime.block_on(async {
            let asked: Vec<_> = (0..ASKED)
                .map(|n| {
                    let writer = writer.clone();
                    // The last one twice: the second time nothing changes.
                    let command = service(n.min(ASKED - 2));
                    tokio::spawn(async move { writer.ask(Actor::control(), command).await })
                })
                .collect();
            // All wait in the queue before the writer looks at it.
            tokio::task::yield_now().await;
            let thread = std::thread::spawn(move || writer_loop.run());
            for one in asked {
                one.await.unwrap().unwrap();
            }
            thread
        });
        let published = writer.now();
        assert_eq!(published.services.len(), ASKED - 1);
        assert!(metrics.commits.get() < ASKED as u64 / 2);
        assert_eq!(audit.tail(ASKED).unwrap().len(), ASKED - 1);
        drop((writer, runtime));
        thread.join().unwrap().unwrap();
        let opened = Store::open(&state, 2).unwrap();
        assert_eq!(opened.catalogue.items(), published.items());
        drop(opened);
        std::fs::remove_dir_all(&state).unwrap();
    }
}
