//! What is on the wire between two hosts.

use std::time::Duration;

use meshwork_tests::host::Host;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::{Pair, mesh_name};

const SECRET: &str = "the-secret-of-this-call";
const ANSWER: &str = "the-secret-of-this-answer";

struct Capture {
    process: Process,
    file: std::path::PathBuf,
}

impl Capture {
    fn start(host: &Host, name: &str) -> Self {
        let file = host.dir().join(format!("{name}.pcap"));
        let line = format!("exec tcpdump -i eth0 -U -s 0 -Z root -w {}", file.display());
        let process = host.cmd(&line).spawn(name);
        wait_until("tcpdump to listen", SOON, || {
            let log = process.log();
            check(log.contains("listening on"), log)
        });
        Self { process, file }
    }

    /// All bytes of all packets, once `expected` packets to or from `port` are in.
    fn bytes(self, host: &Host, port: u16) -> Vec<u8> {
        let line = format!(
            "tcpdump -r {} -n tcp port {port} 2>/dev/null | wc -l",
            self.file.display()
        );
        wait_until("the packets to be written", SOON, || {
            let count: u32 = host.ok(&line).trim().parse().unwrap_or_default();
            check(5 < count, format!("{count} packets"))
        });
        self.process.stop();
        std::fs::read(self.file).unwrap()
    }
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes
        .windows(text.len())
        .any(|window| window == text.as_bytes())
}

/// First the plaintext of the same call without the mesh is found, so that not finding it says something.
#[test]
fn the_same_call_is_plaintext_without_the_mesh_and_not_with_it() {
    let pair = Pair::new("the_same_call_is_plaintext_without");
    let location = format!("location = /secret {{ return 200 \"{ANSWER}\\n\"; }}");
    let _web = pair.web("http", &location);
    let call = |name: &str| {
        let line = format!("curl -sS -m 10 -H 'X-Secret: {SECRET}' http://{name}/secret");
        let text = pair.cmd(&line).deadline(Duration::from_secs(20)).ok();
        assert_eq!(text, format!("{ANSWER}\n"));
    };
    let server = &pair.server.host;
    let plain = Capture::start(server, "plain");
    call(&server.v4().to_string());
    let bytes = plain.bytes(server, 80);
    assert!(
        has(&bytes, SECRET) && has(&bytes, ANSWER),
        "the capture misses what is there"
    );
    let meshed = Capture::start(server, "meshed");
    call(&mesh_name("web"));
    let bytes = meshed.bytes(server, 7441);
    for text in [SECRET, ANSWER, "HTTP/1.1", "X-Secret", "nginx"] {
        assert!(!has(&bytes, text), "`{text}` is on the wire");
    }
}
