//! What was committed is there again, and what is broken is restored from an export.

use std::io::Write as _;
use std::path::PathBuf;

use super::*;
use crate::catalogue::command::{Command, State};
use crate::catalogue::objects::Settings;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("meshwork-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn empty() -> Catalogue {
    let settings = Settings {
        trust_domain: "corp.example.com".parse().unwrap(),
        dns_suffix: "mesh.internal".to_owned(),
        vip4_range: "252.64.0.0/12".to_owned(),
        vip6_range: "fd6d:6573:6800::/64".to_owned(),
        addresses: Vec::new(),
        bundle: 1,
    };
    Catalogue::new(1, settings)
}

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

fn commit(store: &mut Store, state: &mut State, command: &Command) {
    let base = state.catalogue.revision;
    let (_, ops) = state.apply(command, base + 1, 1).unwrap();
    store.commit(base, &state.catalogue.meta(), &ops).unwrap();
}

#[test]
fn what_was_committed_is_there_again() {
    let dir = Dir::new("store");
    let mut store = Store::create(&dir.0, &empty()).unwrap();
    let mut state = State::new(empty()).unwrap();
    for n in 0..50 {
        commit(&mut store, &mut state, &service(n));
    }
    let stale = store.commit(3, &state.catalogue.meta(), &[]);
    assert!(matches!(stale, Err(StoreError::Raced { found: 50, .. })));
    drop(store);
    let opened = Store::open(&dir.0, 2).unwrap();
    assert_eq!(opened.lost, None);
    assert_eq!(opened.catalogue.items(), state.catalogue.items());
    assert_eq!(opened.catalogue.services.len(), 50);
}

#[test]
fn a_second_control_on_one_store_is_refused_and_breaks_nothing() {
    let dir = Dir::new("store-busy");
    let store = Store::create(&dir.0, &empty()).unwrap();
    export::write(&dir.0, &empty()).unwrap();
    let second = Store::open(&dir.0, 2);
    assert!(matches!(second, Err(StoreError::Busy { .. })), "{second:?}");
    drop(store);
    assert_eq!(Store::open(&dir.0, 2).unwrap().lost, None);
}

#[test]
fn a_broken_store_is_restored_from_the_newest_whole_export() {
    let dir = Dir::new("store-broken");
    let mut store = Store::create(&dir.0, &empty()).unwrap();
    let mut state = State::new(empty()).unwrap();
    commit(&mut store, &mut state, &service(0));
    export::write(&dir.0, &state.catalogue).unwrap();
    let exported = state.catalogue.services.clone();
    commit(&mut store, &mut state, &service(1));
    export::write(&dir.0, &state.catalogue).unwrap();
    drop(store);
    // The newest export is cut short, and the store's pages are overwritten.
    let newest = fs::read_dir(dir.0.join("exports")).unwrap();
    let newest = newest.map(|e| e.unwrap().path()).max().unwrap();
    let whole = fs::read(&newest).unwrap();
    fs::write(&newest, &whole[..whole.len() - 40]).unwrap();
    for entry in fs::read_dir(dir.0.join(DIRECTORY)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let size = fs::metadata(&path).unwrap().len();
            let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all(&vec![0xa5; usize::try_from(size).unwrap()])
                .unwrap();
        }
    }
    let opened = Store::open(&dir.0, 99).unwrap();
    let lost = opened.lost.unwrap();
    assert!(lost.contains("revision 1"), "{lost}");
    assert_eq!(opened.catalogue.epoch, 99);
    assert_eq!(opened.catalogue.services, exported);
    drop(opened.store);
    let again = Store::open(&dir.0, 100).unwrap();
    assert_eq!((again.lost, again.catalogue.epoch), (None, 99));
}

#[test]
fn without_store_and_export_it_is_said_what_to_do() {
    let dir = Dir::new("store-none");
    let error = Store::open(&dir.0, 1).unwrap_err().to_string();
    assert!(error.contains("mesh-control init"), "{error}");
}

#[test]
fn exports_are_few_and_a_changed_one_is_noticed() {
    let dir = Dir::new("exports");
    for revision in 0..export::KEPT + 3 {
        let mut catalogue = empty();
        catalogue.revision = revision as u64;
        export::write(&dir.0, &catalogue).unwrap();
    }
    let (_, newest) = export::newest(&dir.0).unwrap();
    assert_eq!(newest.revision, export::KEPT as u64 + 2);
    assert_eq!(export::last(&dir.0), Some((1, newest.revision)));
    let count = fs::read_dir(dir.0.join("exports")).unwrap().count();
    assert_eq!(count, export::KEPT);
    let text = export::render(&empty()).unwrap();
    assert!(export::parse(&text).is_ok());
    let changed = text.replace("corp.example.com", "evil.example.com");
    assert!(export::parse(&changed).unwrap_err().contains("checksum"));
    for end in 0..text.len() - 1 {
        assert!(export::parse(&text[..end]).is_err(), "cut at {end}");
    }
}
