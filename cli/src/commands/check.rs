//! `meshctl check`: what is wrong in the mesh, as control sees it, and with the way to control.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Method;
use mesh_api::check::{Check, Checks};
use mesh_runtime::clock::now_ms;
use serde_json::Value;

use crate::args::Format;
use crate::client::{Ask, Client};
use crate::failure::Failure;
use crate::output;

/// Between two rounds of `--wait`.
const ROUND: Duration = Duration::from_secs(1);
/// A difference of clocks that is worth a look, and one at which certificates are judged wrongly.
const OFFSET_WARN: Duration = Duration::from_secs(5);
const OFFSET_FAIL: Duration = Duration::from_secs(60);

/// Checks once, or until nothing fails or `wait` is over.
pub(crate) async fn run(
    client: &Client,
    wait: Option<Duration>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let end = Instant::now() + wait.unwrap_or_default();
    let (checks, code) = loop {
        let (checks, code) = match ask(client).await {
            Ok(checks) if checks.is_failed() => (checks, ExitCode::FAILURE),
            Ok(checks) => break (checks, ExitCode::SUCCESS),
            Err(failure) if failure.is_unreachable() => (unreached(&failure), failure.exit_code()),
            Err(failure) => return Err(failure),
        };
        if end <= Instant::now() {
            break (checks, code);
        }
        tokio::time::sleep(ROUND.min(end.saturating_duration_since(Instant::now()))).await;
    };
    let value = serde_json::to_value(&checks).unwrap_or_default();
    output::show(&value, format, |_| checks.render())?;
    Ok(code)
}

async fn ask(client: &Client) -> Result<Checks, Failure> {
    let answer = client
        .json(&Ask {
            operation: "get",
            object: "the checks of control",
            method: Method::GET,
            path: "/v1/check",
            body: None,
        })
        .await?;
    let of_control: Checks = serde_json::from_value(answer.clone()).map_err(|error| {
        Failure::unreachable(
            "control",
            format!("its answer can not be read: {error}"),
            "see whether meshctl and mesh-control are of the same or the next minor version",
        )
    })?;
    let mut checks = vec![control(&answer), clock(&answer, now_ms())];
    checks.extend(of_control.checks);
    Ok(Checks { checks })
}

fn unreached(failure: &Failure) -> Checks {
    let remedy = "see whether mesh-control runs and whether the context file names its address";
    Checks {
        checks: vec![Check::failed("control", failure.to_string(), remedy)],
    }
}

fn control(answer: &Value) -> Check {
    const NAME: &str = "control";
    let own = env!("CARGO_PKG_VERSION");
    let version = super::text(answer, "/version");
    let minor = |version: &str| {
        version
            .splitn(3, '.')
            .take(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    if minor(&version) == minor(own) {
        return Check::ok(NAME, format!("answers, version {version}"));
    }
    let found = format!("control has version {version}, this meshctl {own}");
    Check::warning(NAME, found, "use the meshctl of control's version")
}

/// This machine's clock against control's.
fn clock(answer: &Value, now_ms: u64) -> Check {
    const NAME: &str = "clock";
    let Some(theirs) = answer.get("timeMs").and_then(Value::as_u64) else {
        return Check::skipped(NAME, "control did not tell its time");
    };
    let offset = Duration::from_millis(now_ms.abs_diff(theirs));
    let way = if now_ms < theirs {
        "behind"
    } else {
        "ahead of"
    };
    let found = format!(
        "this machine is {:.1} s {way} control",
        offset.as_secs_f64()
    );
    let remedy = "keep the clocks of all machines by NTP (chrony, systemd-timesyncd): certificates are judged by them";
    if offset < OFFSET_WARN {
        Check::ok(NAME, found)
    } else if offset < OFFSET_FAIL {
        Check::warning(NAME, found, remedy)
    } else {
        Check::failed(NAME, found, remedy)
    }
}

#[cfg(test)]
mod tests {
    use mesh_api::check::Verdict;
    use serde_json::json;

    use super::*;

    #[test]
    fn clocks_that_differ_are_said() {
        let now = 1_000_000;
        for (theirs, expected) in [
            (now, Verdict::Ok),
            (now + 6_000, Verdict::Warning),
            (now - 6_000, Verdict::Warning),
            (now + 61_000, Verdict::Failed),
        ] {
            let check = clock(&json!({"timeMs": theirs}), now);
            assert_eq!(check.verdict, expected, "{check:?}");
        }
        assert_eq!(clock(&json!({}), now).verdict, Verdict::Skipped);
    }

    #[test]
    fn another_version_is_said() {
        let own = json!({"version": env!("CARGO_PKG_VERSION")});
        assert_eq!(control(&own).verdict, Verdict::Ok);
        assert_eq!(
            control(&json!({"version": "99.1.0"})).verdict,
            Verdict::Warning
        );
    }
}
