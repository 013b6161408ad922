//! `mesh-control run`: opens what is stored, binds, serves, and ends in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use http::{Method, StatusCode};
use mesh_runtime::admin::{self, Answer};
use mesh_runtime::notify::{self, Watchdog};
use mesh_runtime::signals;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::api;
use crate::config::Config;
use crate::control::{Control, Opened};
use crate::prover::Prover;
use crate::server::{Bound, Own};
use crate::writer::WriterLoop;
use crate::{expiry, exporter, server_names};

/// How long what is under way may take when control stops: the drain of the port, a commit, an export.
const STOP_MAX: Duration = Duration::from_secs(20);

pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let Opened {
        control,
        writer_loop,
        lease_loop,
    } = Control::open(&config)?;
    let names = server_names::all(&config.names, &config.listen, &control.settings.addresses);
    let own = Arc::new(Own::new(&control, names)?);
    let bound = Bound::bind(Arc::clone(&control), Arc::clone(&own), &config.listen).await?;
    let admin = admin::bind(&config.admin_socket()).with_context(|| {
        format!(
            "cannot bind the admin socket {}; set admin_socket",
            config.admin_socket().display()
        )
    })?;
    let addresses: Vec<String> = bound.addresses().iter().map(ToString::to_string).collect();
    log::info!(
        addresses = addresses.join(","), trust_domain = control.settings.trust_domain.as_str();
        "control serves; hosts run on without it for {} h", control.leaves.autonomy().as_secs() / 3600
    );

    let mut tasks = JoinSet::new();
    let (renewing, its) = (Arc::clone(&control), Arc::clone(&own));
    tasks.spawn(async move {
        its.renew(&renewing).await;
        ended("the renewal")
    });
    let watched = Arc::clone(&control);
    tasks.spawn(async move {
        expiry::watch(watched).await;
        ended("the watch over certificates")
    });
    tasks.spawn(async move {
        lease_loop.run().await;
        ended("the leases")
    });
    let prover = Prover::new(
        Arc::clone(&control),
        Arc::clone(&own),
        bound.trust(),
        !config.prove_addresses,
    );
    tasks.spawn(async move {
        prover.run().await;
        ended("the prover")
    });
    let handler = admin_handler(&control);
    tasks.spawn(async move {
        admin::serve(admin, handler).await;
        ended("the admin socket")
    });
    let writing = spawn_writer(writer_loop)?;
    let mut writing = tokio::spawn(writing);
    let exporting = tokio::spawn(exporter::run(
        config.state_dir.clone(),
        control.writer.watch(),
        control.stopping.clone(),
    ));
    let mut serving = tokio::spawn(bound.run());
    tasks.spawn(async {
        alive().await;
        ended("the watchdog")
    });
    notify::ready();
    let result = tokio::select! {
        // Whatever needs the writer ends with it: its cause is the one to be told.
        biased;
        written = &mut writing => written.map_err(anyhow::Error::from).flatten(),
        signal = signals::shutdown() => signal.context("cannot wait for signals"),
        task = tasks.join_next() => match task {
            Some(Ok(result)) => result,
            Some(Err(panicked)) => Err(panicked.into()),
            None => Ok(()),
        },
        served = &mut serving => {
            served.map_err(anyhow::Error::from).flatten()?;
            anyhow::bail!("the port ended")
        }
    };
    log::info!("control stops");
    notify::stopping();
    control.stopping.cancel();
    control.sessions.close();
    let ending = async {
        let served = serving.await.map_err(anyhow::Error::from).flatten();
        control.sessions.wait().await;
        let exported = exporting.await.map_err(anyhow::Error::from);
        served.and(exported)
    };
    let stopped = timeout(STOP_MAX, ending).await;
    // The socket goes with the daemon, so that nobody takes it for a living one.
    let _ = std::fs::remove_file(config.admin_socket());
    result?;
    stopped.with_context(|| format!("not all ended within {} s", STOP_MAX.as_secs()))?
}

/// Tells the service manager that the runtime still turns.
async fn alive() {
    let mut watchdog = Watchdog::new(Instant::now());
    let Some(every) = watchdog.every() else {
        return std::future::pending().await;
    };
    loop {
        watchdog.alive(Instant::now());
        tokio::time::sleep(every / 2).await;
    }
}

/// A task that should never end did.
fn ended(what: &str) -> anyhow::Result<()> {
    anyhow::bail!("{what} ended")
}

/// The writer blocks on the disk, so it has a thread of its own.
fn spawn_writer(
    mut writer: WriterLoop,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("writer".to_owned())
        .spawn(move || {
            // Before the queue goes, by which others would learn of it.
            let _ = tell.send(writer.run());
            drop(writer);
        })
        .context("cannot start the writer's thread")?;
    Ok(async move {
        match told.await {
            Ok(Ok(())) => anyhow::bail!("the writer ended"),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => anyhow::bail!("the writer panicked"),
        }
    })
}

fn admin_handler(control: &Arc<Control>) -> admin::Handler {
    let control = Arc::clone(control);
    Arc::new(move |method, path| {
        let control = Arc::clone(&control);
        Box::pin(async move { answer(&control, &method, &path) })
    })
}

fn answer(control: &Control, method: &Method, path: &str) -> Answer {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    match (method, path) {
        (&Method::GET, "/health" | "/ready") => Answer::text("ok\n"),
        (&Method::GET, "/metrics") => {
            control
                .metrics
                .held
                .set(control.leases.held().cast_signed());
            control.metrics.lives(&expiry::certificates(control));
            Answer::text(control.metrics.render(&control.writer.now()))
        }
        (&Method::GET, "/state") => Answer::json(&api::status_value(control)),
        (&Method::PUT | &Method::POST, "/log") => {
            match mesh_runtime::log::set_level(query.trim_start_matches("level=")) {
                Ok(()) => Answer::text("ok\n"),
                Err(error) => Answer::error(StatusCode::BAD_REQUEST, &error),
            }
        }
        _ => Answer::error(
            StatusCode::NOT_FOUND,
            "there are /health, /ready, /metrics, /state and PUT /log?level=LEVEL",
        ),
    }
}
