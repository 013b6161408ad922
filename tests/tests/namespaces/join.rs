//! Joining when things go wrong in the middle.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};

use meshwork_tests::agent::Agent;
use meshwork_tests::control::Control;
use meshwork_tests::site::Site;
use meshwork_tests::wait::{SOON, check, wait_until};

/// Control commits the join and its answer is lost: the same host joins again with the same token, although that
/// was good for one use, and becomes the same host.
#[test]
fn a_join_whose_answer_was_lost_is_repeated_to_the_same_end() {
    let site = Site::new("a_join_whose_answer_was_lost");
    let control = Control::start(&site);
    let host = site.host("vm1");
    let listener = host.inside(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let through = listener.local_addr().unwrap();
    let token = control.token(&format!("--namespace shop --address {through}"));
    let mut agent = Agent::new(&host);
    let (lossy, ending) = (AtomicBool::new(true), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let to: SocketAddr = control.address().parse().unwrap();
        let carrier = Carrier {
            to,
            lossy: &lossy,
            ending: &ending,
        };
        let inside = &host;
        scope.spawn(move || inside.inside(|| carrier.run(&listener)));
        let joining = Agent::new(&host);
        let (lost, whole) = (token.clone(), &token);
        let first = scope.spawn(move || joining.join(&lost));
        let uid = wait_until("control to know the host", SOON, || uid_of(&control, "vm1"));
        let output = first.join().unwrap();
        assert!(!output.status.success(), "it had an answer: {output}");
        lossy.store(false, Ordering::SeqCst);
        agent.join(whole).ok();
        assert_eq!(uid_of(&control, "vm1"), Ok(uid));
        agent.start();
        agent.stop();
        ending.store(true, Ordering::SeqCst);
        host.inside(|| drop(TcpStream::connect(through)));
    });
    // Another host does not get in by it.
    let before = control.refused("token_used");
    let direct = token_through(&token, &control.address());
    let other = Agent::new(&site.host("vm2")).join(&direct);
    assert!(
        !other.status.success() && other.stderr.contains("token_used"),
        "{other}"
    );
    assert_eq!(control.refused("token_used") - before, 1.0);
}

/// The same token with another address of control.
fn token_through(token: &str, address: &str) -> String {
    let mut token = mesh_api::token::JoinToken::parse(token).unwrap();
    token.addresses = vec![address.to_owned()];
    token.reveal()
}

fn uid_of(control: &Control, name: &str) -> Result<String, String> {
    let hosts = control.get("hosts");
    let host = hosts.iter().find(|h| h["metadata"]["name"] == name);
    let uid = host.and_then(|h| h["spec"]["uid"].as_str());
    uid.map(str::to_owned).ok_or_else(|| format!("{hosts:?}"))
}

/// Carries connections to `to`. While it is lossy, what the server says after the client's second flight (which
/// holds its request) is swallowed.
#[derive(Clone, Copy)]
struct Carrier<'a> {
    to: SocketAddr,
    lossy: &'a AtomicBool,
    ending: &'a AtomicBool,
}

impl Carrier<'_> {
    fn run(self, listener: &TcpListener) {
        std::thread::scope(|scope| {
            loop {
                let (client, _) = listener.accept().unwrap();
                if self.ending.load(Ordering::SeqCst) {
                    return;
                }
                let swallow = self.lossy.load(Ordering::SeqCst);
                let server = TcpStream::connect(self.to).unwrap();
                scope.spawn(move || one(&client, &server, swallow));
            }
        });
    }
}

/// Both directions of one connection, until one ends.
fn one(client: &TcpStream, server: &TcpStream, swallow: bool) {
    let answered = AtomicBool::new(false);
    let asked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pump(server, client, |_| {
                answered.store(true, Ordering::SeqCst);
                !(swallow && asked.load(Ordering::SeqCst))
            });
        });
        pump(client, server, |_| {
            // Whatever comes after the server's first flight is the client's second.
            asked.fetch_or(answered.load(Ordering::SeqCst), Ordering::SeqCst);
            true
        });
    });
}

/// Copies until the end of either; `passes` says whether a piece is handed on.
fn pump(from: &TcpStream, to: &TcpStream, mut passes: impl FnMut(&[u8]) -> bool) {
    from.set_read_timeout(Some(SOON)).unwrap();
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = (&*from).read(&mut buffer) {
        if passes(&buffer[..count]) && (&*to).write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    drop(to.shutdown(std::net::Shutdown::Both));
    drop(from.shutdown(std::net::Shutdown::Both));
}

#[test]
fn a_host_name_in_use_is_refused_unless_the_token_says_replace() {
    let site = Site::new("a_host_name_in_use");
    let control = Control::start(&site);
    let first = control.join(
        &site.host("vm1"),
        &meshwork_tests::control::TokenOptions::default(),
    );
    let second = Agent::new(&site.host("other"));
    let join = |token: &str| {
        let address = second.host.v4();
        second.command(&format!("join {token} --host-name vm1 --address {address}"))
    };
    let before = control.refused("host_name_taken");
    let refused = join(&control.token("--namespace shop"));
    assert!(
        !refused.status.success() && refused.stderr.contains("host_name_taken"),
        "{refused}"
    );
    assert_eq!(control.refused("host_name_taken") - before, 1.0);
    let uid = uid_of(&control, "vm1").unwrap();
    join(&control.token("--namespace shop --replace")).ok();
    assert_ne!(uid_of(&control, "vm1").unwrap(), uid);
    wait_until("the old host to be told that it is out", SOON, || {
        let status = first.command("status");
        let text = format!("{}{}{}", status.stdout, status.stderr, first.log());
        check(text.contains("host_revoked"), text)
    });
}

#[test]
fn an_unknown_key_of_the_configuration_is_refused_with_its_line() {
    let site = Site::new("an_unknown_key");
    let host = site.host("a");
    let agent = Agent::new(&host);
    agent.configure("levle = \"debug\"\n");
    let output = agent.command("run");
    assert!(!output.status.success(), "{output}");
    let text = std::fs::read_to_string(agent.config()).unwrap();
    let line = text
        .lines()
        .position(|line| line.contains("levle"))
        .unwrap()
        + 1;
    assert!(output.stderr.contains("levle"), "{output}");
    assert!(
        output.stderr.contains(&line.to_string()),
        "no line {line}: {output}"
    );
    let file = host.dir().join("control.toml");
    std::fs::write(&file, "[leaves]\nworkload_days = 2\n").unwrap();
    let control = meshwork_tests::binary("mesh-control").display().to_string();
    let output = host.run(&format!("{control} run --config {}", file.display()));
    assert!(!output.status.success(), "{output}");
    assert!(output.stderr.contains("workload_days"), "{output}");
}
