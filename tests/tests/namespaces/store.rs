//! What control has acknowledged is there after a crash.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use meshwork_tests::control::Control;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

/// Crashes, each at another moment of the writing.
const CRASHES: u32 = 6;
/// Acknowledged writes before each crash, at least.
const WRITES: usize = 12;
const WRITERS: u32 = 3;

#[test]
fn no_acknowledged_write_is_lost_by_kill_9() {
    let site = Site::new("no_acknowledged_write_is_lost");
    let mut control = Control::start(&site);
    let number = AtomicU32::new(0);
    let acknowledged = Mutex::new(Vec::new());
    for crash in 0..CRASHES {
        let ending = AtomicBool::new(false);
        let before = acknowledged.lock().unwrap().len();
        let process = control.take();
        std::thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| {
                    while !ending.load(Ordering::SeqCst) {
                        let name = format!("p{}", number.fetch_add(1, Ordering::SeqCst));
                        if write(&control, &name) {
                            acknowledged.lock().unwrap().push(name);
                        }
                    }
                });
            }
            wait_until("writes to be acknowledged", SOON, || {
                let count = acknowledged.lock().unwrap().len() - before;
                check(WRITES + crash as usize <= count, format!("{count} writes"))
            });
            // In the middle of the next ones.
            process.kill9();
            ending.store(true, Ordering::SeqCst);
        });
        control.run();
        let there = control.get("policies -n shop");
        let there: Vec<&str> = there
            .iter()
            .filter_map(|p| p["metadata"]["name"].as_str())
            .collect();
        let expected = acknowledged.lock().unwrap();
        let lost: Vec<&String> = expected
            .iter()
            .filter(|n| !there.contains(&n.as_str()))
            .collect();
        assert!(
            lost.is_empty(),
            "crash {crash}: {lost:?} of {} are lost",
            expected.len()
        );
    }
    let log = control.take();
    assert!(
        !log.log().contains("corrupt"),
        "the store was not whole: {}",
        log.log()
    );
}

fn write(control: &Control, name: &str) -> bool {
    let file = control.host.dir().join(format!("{name}.yaml"));
    let yaml = format!(
        "apiVersion: meshwork.io/v1alpha1\nkind: Policy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{rules: [{{name: r, from: [{{identity: shop/a}}]}}]}}\n"
    );
    std::fs::write(&file, yaml).unwrap();
    control
        .meshctl(&format!("apply -f {}", file.display()))
        .status
        .success()
}

#[test]
fn a_backup_holds_what_is_there_and_no_key() {
    let site = Site::new("a_backup_holds_what_is_there");
    let control = Control::start(&site);
    assert!(write(&control, "kept"));
    let file = control.host.dir().join("backup");
    control
        .meshctl(&format!("backup --out {}", file.display()))
        .ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("kept"), "{text}");
    assert!(!text.contains("PRIVATE KEY"), "the CA's key is in it");
    let again = control.meshctl(&format!("backup --out {}", file.display()));
    assert_eq!(again.code(), 2, "it overwrote a file: {again}");
}

#[test]
fn a_restored_backup_is_what_was_there_then() {
    let site = Site::new("a_restored_backup");
    let mut control = Control::start(&site);
    assert!(write(&control, "before"));
    let file = control.host.dir().join("backup");
    control
        .meshctl(&format!("backup --out {}", file.display()))
        .ok();
    assert!(write(&control, "after"));
    let epoch = |control: &Control| {
        let status = control.meshctl("status -o json").ok();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        status["epoch"].to_string()
    };
    let first = epoch(&control);
    control.stop();
    let restore = |more: &str| {
        control.host.run(&format!(
            "{} restore {} --state-dir {} {more}",
            meshwork_tests::binary("mesh-control").display(),
            file.display(),
            control.state_dir().display()
        ))
    };
    let refused = restore("");
    assert!(
        !refused.status.success(),
        "it replaced a store without a word: {refused}"
    );
    restore("--force").ok();
    control.run();
    let policies = control.get("policies -n shop");
    let names: Vec<&str> = policies
        .iter()
        .filter_map(|p| p["metadata"]["name"].as_str())
        .collect();
    assert_eq!(names, ["before"]);
    assert_ne!(
        epoch(&control),
        first,
        "agents could not tell that history was changed"
    );
}

#[test]
fn meshctl_says_whose_fault_it_is_by_its_exit_code() {
    let site = Site::new("meshctl_says_whose_fault_it_is");
    let mut control = Control::start(&site);
    let missing = control.meshctl("get services nothing");
    assert_eq!(missing.code(), 1, "{missing}");
    assert!(missing.stderr.contains("not_found"), "{missing}");
    let wrong =
        control.apply("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {prts: []}\n");
    assert_eq!(wrong.code(), 2, "{wrong}");
    assert!(wrong.stderr.contains("prts"), "{wrong}");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
                   spec: {ports: [{port: 80, appProtocol: http}]}\n";
    let file = control.host.dir().join("service.yaml");
    std::fs::write(&file, service).unwrap();
    let dry = control
        .meshctl(&format!("apply --dry-run -f {}", file.display()))
        .ok();
    assert!(dry.contains("created (dry run)"), "{dry}");
    assert_eq!(
        control.meshctl("get services shop/web").code(),
        1,
        "the dry run made it"
    );
    assert!(control.apply(service).ok().contains("created"));
    assert!(control.apply(service).ok().contains("unchanged"));
    control.meshctl("delete service web -n shop").ok();
    control.stop();
    let gone = control.meshctl("status");
    assert_eq!(gone.code(), 3, "{gone}");
}
