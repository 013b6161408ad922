//! The workloads of this host, from `services.d/*.toml`: one a file.
//!
//! A file that is wrong is reported with its line and what to do, and leaves the others alone; one that was
//! good before keeps its last good version in use. [`Loader`] decides what a state of the directory means;
//! `workloads/watch.rs` notices changes and publishes; `workloads/numbers.rs` gives each workload the number
//! by which the kernel knows it.

mod numbers;
mod watch;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_api::workload_file::{CallAt, FILE_MAX, FileError, HostAddresses, Workload};
use mesh_core::names::Account;
use nix::ifaddrs::getifaddrs;

pub(crate) use numbers::Number;
use numbers::Numbers;
pub(crate) use watch::Watch;

/// Workloads of one host: what a report to control may hold.
pub(crate) const WORKLOADS_MAX: usize = 256;

/// What the directory says, as far as it can be used. Replaced as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkloadSet {
    /// In the order of their files' names.
    pub(crate) workloads: Vec<Arc<Workload>>,
    /// The number of each of them.
    pub(crate) numbers: BTreeMap<Account, Number>,
    /// In the order of their files' names.
    pub(crate) problems: Vec<FileProblem>,
}

impl WorkloadSet {
    pub(crate) fn number(&self, account: &Account) -> Option<Number> {
        self.numbers.get(account).copied()
    }
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileProblem {
    pub(crate) file: PathBuf,
    /// 1-based; 0 where the whole file is meant.
    pub(crate) line: usize,
    pub(crate) message: String,
    pub(crate) remedy: String,
    /// Whether an earlier version of the file is still in use.
    pub(crate) last_good_in_use: bool,
}

impl std::fmt::Display for FileProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line != 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": {}; {}", self.message, self.remedy)?;
        if self.last_good_in_use {
            f.write_str(" (its last good version stays in use)")?;
        }
        Ok(())
    }
}

/// Reads the directory again and again, and remembers what was good.
#[derive(Debug)]
pub(crate) struct Loader {
    directory: PathBuf,
    /// Its addresses are looked up for each reading.
    place: HostAddresses,
    good: BTreeMap<PathBuf, Arc<Workload>>,
    numbers: Numbers,
}

/// One file and what it says now.
struct Candidate {
    file: PathBuf,
    now: Result<Arc<Workload>, FileError>,
}

impl Loader {
    pub(crate) fn new(directory: PathBuf, place: HostAddresses) -> Self {
        Self {
            directory,
            place,
            good: BTreeMap::new(),
            numbers: Numbers::default(),
        }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads all files. A directory that is not there has none; one that can not be read changes nothing but
    /// the problems.
    pub(crate) fn load(&mut self) -> WorkloadSet {
        match self.read_directory() {
            Ok(candidates) => self.judge(candidates),
            Err(error) => {
                let unchanged = self.good.clone().into_iter();
                let mut set = self.judge(
                    unchanged
                        .map(|(file, workload)| Candidate {
                            file,
                            now: Ok(workload),
                        })
                        .collect(),
                );
                set.problems.insert(
                    0,
                    FileProblem::new(&self.directory, &error, !self.good.is_empty()),
                );
                set
            }
        }
    }

    fn read_directory(&self) -> Result<Vec<Candidate>, FileError> {
        let failed = |error: io::Error| unreadable(&error);
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        written_by_few(&fs::metadata(&self.directory).map_err(failed)?)?;
        let mut files = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.path();
            let hidden = file
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !hidden && file.extension().is_some_and(|e| e == "toml") {
                files.push(file);
            }
        }
        files.sort();
        let host = HostAddresses {
            own: own_addresses().map_err(failed)?,
            ..self.place.clone()
        };
        let read = |file: PathBuf| {
            let now = read_file(&host, &file).map(Arc::new);
            Candidate { file, now }
        };
        Ok(files.into_iter().map(read).collect())
    }

    /// Takes the files whose version in force stays first, then edits, then new files, each in the order of their names:
    /// of two that claim an owner or account, the one that had it keeps it.
    fn judge(&mut self, mut candidates: Vec<Candidate>) -> WorkloadSet {
        candidates.sort_by_key(|candidate| {
            match (self.good.get(&candidate.file), &candidate.now) {
                (Some(_), Err(_)) => 0,
                (Some(good), Ok(now)) if good == now => 0,
                (Some(_), Ok(_)) => 1,
                (None, _) => 2,
            }
        });
        let mut taken: Vec<(PathBuf, Arc<Workload>)> = Vec::new();
        let mut problems = Vec::new();
        for Candidate { file, now } in candidates {
            let wanted = now.and_then(|workload| match conflict(&taken, &workload) {
                None => Ok(workload),
                Some(conflict) => Err(conflict),
            });
            let error = match wanted {
                Ok(workload) => {
                    taken.push((file, workload));
                    continue;
                }
                Err(error) => error,
            };
            let last_good = self
                .good
                .get(&file)
                .filter(|workload| conflict(&taken, workload).is_none())
                .cloned();
            problems.push(FileProblem::new(&file, &error, last_good.is_some()));
            taken.extend(last_good.map(|workload| (file, workload)));
        }
        taken.sort_by(|(a, _), (b, _)| a.cmp(b));
        problems.sort_by(|a: &FileProblem, b| a.file.cmp(&b.file));
        self.numbers
            .keep(taken.iter().map(|(_, workload)| &workload.account));
        let mut set = WorkloadSet {
            problems,
            ..WorkloadSet::default()
        };
        for (_, workload) in &taken {
            if let Some(number) = self.numbers.of(&workload.account) {
                set.numbers.insert(workload.account.clone(), number);
                set.workloads.push(Arc::clone(workload));
            }
        }
        self.good = taken.into_iter().collect();
        set
    }
}

impl FileProblem {
    fn new(file: &Path, error: &FileError, last_good_in_use: bool) -> Self {
        Self {
            file: file.to_owned(),
            line: error.line,
            message: error.message.clone(),
            remedy: error.remedy.to_owned(),
            last_good_in_use,
        }
    }
}

fn conflict(taken: &[(PathBuf, Arc<Workload>)], workload: &Workload) -> Option<FileError> {
    let whole_file = |message, remedy| FileError {
        line: 0,
        message,
        remedy,
    };
    for (file, other) in taken {
        let file = file.display();
        let theirs = |at: &CallAt| other.calls.iter().any(|call| call.at == *at);
        if let Some(call) = workload.calls.iter().find(|call| theirs(&call.at)) {
            let message = format!("{} belongs to {file} already", call.at);
            return Some(whole_file(
                message,
                "give each workload ports and sockets of its own",
            ));
        }
        if other.account == workload.account {
            let message = format!("account {} is that of {file} already", other.account);
            let remedy = "give one of the two files another account";
            return Some(whole_file(message, remedy));
        }
        if let Some(owner) = other
            .owner
            .as_ref()
            .filter(|o| workload.owner.as_ref() == Some(o))
        {
            let message = format!("owner {owner} is that of {file} already");
            let remedy = "one owner is one workload: put the services into one file";
            return Some(whole_file(message, remedy));
        }
    }
    (taken.len() == WORKLOADS_MAX).then(|| {
        let message =
            format!("this host has {WORKLOADS_MAX} workloads already, the most there can be");
        whole_file(message, "remove files of workloads that are not needed")
    })
}

/// The addresses of this host's interfaces.
pub(crate) fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let all = getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| a.ip().into());
        v4.or_else(|| address.as_sockaddr_in6().map(|a| a.ip().into()))
    });
    Ok(all.collect())
}

fn read_file(host: &HostAddresses, file: &Path) -> Result<Workload, FileError> {
    let text = read_text(file)?;
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    Workload::parse_on(host, &stem, &text)
}

fn read_text(file: &Path) -> Result<String, FileError> {
    let failed = |error: io::Error| unreadable(&error);
    let file = fs::File::open(file).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    // A named pipe or a device would keep us waiting.
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    written_by_few(&metadata)?;
    let mut text = String::new();
    let mut bounded = file.take(FILE_MAX + 1);
    bounded.read_to_string(&mut text).map_err(failed)?;
    if FILE_MAX < text.len() as u64 {
        let message = format!("it has more than {FILE_MAX} bytes");
        return Err(failed(io::Error::other(message)));
    }
    Ok(text)
}

/// Refuses what others than root and the agent's user can write: who writes it gives identities to programs.
fn written_by_few(metadata: &fs::Metadata) -> Result<(), FileError> {
    const OTHERS_WRITE: u32 = 0o022;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let message = if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
        format!("it belongs to user {owner}, who could give any program any identity of this host")
    } else if mode & OTHERS_WRITE != 0 {
        format!(
            "others than its owner can write it (mode {mode:04o}) and give any program any identity of this host"
        )
    } else {
        return Ok(());
    };
    Err(FileError {
        line: 0,
        message,
        remedy: "look who wrote it and what, then `chown root` and `chmod go-w` it",
    })
}

fn unreadable(error: &io::Error) -> FileError {
    FileError {
        line: 0,
        message: format!("it can not be read: {error}"),
        remedy: "make it a UTF-8 text file that the agent may read",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::watch::tests::{Directory, file};

    #[test]
    fn good_files_are_taken_and_a_bad_one_leaves_them_alone() {
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        directory.write(
            "b.toml",
            "namespace = \"shop\"\n[owner]\nunti = \"b.service\"\n",
        );
        directory.write("c.toml", &file("c.service"));
        directory.write(".hidden.toml", "nonsense");
        directory.write("d.toml.dpkg-new", "nonsense");
        let set = directory.loader().load();
        assert_eq!(accounts(&set), ["shop/a", "shop/c"]);
        let [problem] = &set.problems[..] else {
            panic!("{:?}", set.problems);
        };
        assert_eq!(problem.file, directory.path.join("b.toml"));
        assert_eq!(problem.line, 3);
        assert!(!problem.remedy.is_empty() && !problem.last_good_in_use);
        assert!(problem.to_string().contains("b.toml:3: "));
    }

    #[test]
    fn a_broken_edit_keeps_the_last_good_version() {
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        let mut loader = directory.loader();
        let before = loader.load();
        directory.write("a.toml", "nonsense");
        for _ in 0..2 {
            let set = loader.load();
            assert_eq!(set.workloads, before.workloads);
            assert!(set.problems[0].last_good_in_use);
            assert!(set.problems[0].to_string().ends_with("stays in use)"));
        }
        directory.remove("a.toml");
        assert_eq!(loader.load(), WorkloadSet::default());
        directory.write("a.toml", "nonsense");
        assert!(loader.load().workloads.is_empty(), "removed is removed");
    }

    #[test]
    fn two_files_of_one_owner_or_account_name_each_other() {
        let same_owner = file("a.service");
        let same_account = format!("account = \"a\"\n{}", file("b.service"));
        for second in [same_owner, same_account] {
            let directory = Directory::new();
            directory.write("a.toml", &file("a.service"));
            directory.write("b.toml", &second);
            let set = directory.loader().load();
            assert_eq!(accounts(&set), ["shop/a"]);
            assert_eq!(set.problems[0].file, directory.path.join("b.toml"));
            assert!(set.problems[0].message.contains("a.toml"));
        }
    }

    #[test]
    fn fronts_have_no_owner_and_go_beyond_the_host_only() {
        let front = |endpoint: &str| {
            format!(
                "namespace = \"shop\"\n[[service]]\nports = [{{ port = 5432 }}]\nendpoints = [\"{endpoint}\"]\n"
            )
        };
        let directory = Directory::new();
        directory.write("a.toml", &front("192.0.2.5:5432"));
        directory.write("b.toml", &front("192.0.2.5:5432"));
        directory.write("c.toml", &front("252.64.0.2:5432"));
        let set = directory.loader().load();
        assert_eq!(accounts(&set), ["shop/a", "shop/b"]);
        let [problem] = &set.problems[..] else {
            panic!("{:?}", set.problems);
        };
        assert!(problem.to_string().contains("c.toml:4: "), "{problem}");
        assert!(problem.message.contains("virtual address"), "{problem}");
        let own = own_addresses().unwrap();
        assert!(own.iter().any(IpAddr::is_loopback), "{own:?}");
    }

    #[test]
    fn an_edit_that_conflicts_keeps_its_last_good_version_too() {
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        directory.write("b.toml", &file("b.service"));
        let mut loader = directory.loader();
        let before = loader.load();
        directory.write("b.toml", &file("a.service"));
        let set = loader.load();
        assert_eq!(set.workloads, before.workloads);
        assert!(set.problems[0].last_good_in_use);
        directory.write("b.toml", &file("c.service"));
        assert_eq!(loader.load().problems, []);
    }

    #[test]
    fn a_new_file_takes_nothing_from_one_in_force() {
        let directory = Directory::new();
        directory.write("b.toml", &file("b.service"));
        let mut loader = directory.loader();
        let before = loader.load();
        // Its name comes first, its claim does not.
        directory.write("a.toml", &file("b.service"));
        for broken in [false, true] {
            if broken {
                directory.write("b.toml", "nonsense");
            }
            let set = loader.load();
            assert_eq!(set.workloads, before.workloads);
            assert_eq!(set.problems[0].file, directory.path.join("a.toml"));
            assert_eq!(set.problems.len(), 1 + usize::from(broken));
        }
        directory.remove("b.toml");
        assert_eq!(accounts(&loader.load()), ["shop/a"]);
    }

    #[test]
    fn what_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        directory.write("b.toml", &file("b.service"));
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        for bad in [0o664, 0o646, 0o666] {
            mode(&directory.path.join("a.toml"), bad);
            let set = directory.loader().load();
            assert_eq!(accounts(&set), ["shop/b"]);
            let problem = set.problems[0].to_string();
            assert!(
                problem.contains(&format!(
                    "a.toml: others than its owner can write it (mode {bad:04o})"
                )),
                "{problem}"
            );
        }
        mode(&directory.path.join("a.toml"), 0o600);
        let mut loader = directory.loader();
        assert_eq!(accounts(&loader.load()), ["shop/a", "shop/b"]);
        // What was good before somebody opened the directory stays; what came since is not even read.
        mode(&directory.path, 0o1777);
        directory.write("c.toml", &file("c.service"));
        let set = loader.load();
        assert_eq!(accounts(&set), ["shop/a", "shop/b"]);
        assert_eq!(set.problems[0].file, directory.path);
        assert!(set.problems[0].last_good_in_use);
        assert_eq!(accounts(&directory.loader().load()), [""; 0]);
        mode(&directory.path, 0o755);
        assert_eq!(accounts(&loader.load()), ["shop/a", "shop/b", "shop/c"]);
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        let own = nix::unistd::geteuid().as_raw();
        let directory = Directory::new();
        directory.write("a.toml", &file("a.service"));
        let written = fs::metadata(directory.path.join("a.toml")).unwrap();
        assert_eq!(written_by_few(&written), Ok(()));
        // Only root can give a file away.
        if own == 0 {
            std::os::unix::fs::chown(directory.path.join("a.toml"), Some(65534), None).unwrap();
            let set = directory.loader().load();
            assert_eq!(accounts(&set), [""; 0]);
            assert!(
                set.problems[0].message.contains("belongs to user 65534"),
                "{set:?}"
            );
        }
    }

    #[test]
    fn numbers_stay() {
        let directory = Directory::new();
        directory.write("b.toml", &file("b.service"));
        let mut loader = directory.loader();
        let first = loader.load();
        directory.write("a.toml", &file("a.service"));
        let second = loader.load();
        let b = Account::parse("shop/b").unwrap();
        let number = first.number(&b).unwrap();
        assert_eq!(second.number(&b), Some(number));
        let numbers: std::collections::BTreeSet<_> = second.numbers.values().collect();
        assert_eq!(numbers.len(), 2);
    }

    #[test]
    fn what_is_no_small_text_file_is_a_problem() {
        let directory = Directory::new();
        fs::create_dir(directory.path.join("a.toml")).unwrap();
        directory.write("b.toml", &"#".repeat(FILE_MAX as usize + 1));
        fs::write(directory.path.join("c.toml"), [0xff, 0xfe]).unwrap();
        let set = directory.loader().load();
        assert_eq!(set.problems.len(), 3, "{:?}", set.problems);
    }

    #[test]
    fn workloads_are_bounded() {
        let directory = Directory::new();
        for n in 0..=WORKLOADS_MAX {
            directory.write(&format!("w{n:03}.toml"), &file(&format!("w{n}.service")));
        }
        let set = directory.loader().load();
        assert_eq!(set.workloads.len(), WORKLOADS_MAX);
        assert_eq!(set.problems[0].file, directory.path.join("w256.toml"));
    }

    fn accounts(set: &WorkloadSet) -> Vec<String> {
        set.workloads
            .iter()
            .map(|w| w.account.to_string())
            .collect()
    }
}
