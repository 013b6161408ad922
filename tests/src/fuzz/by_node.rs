//! The third reader of HTTP/1: llhttp in a Node that stays, one line of JSON for each input.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::reading::{Message, Seen};

const SCRIPT: &str = include_str!("by_node.js");

/// What Node reads from each input: `requests`, or the method whose answer it is, and its bytes.
#[track_caller]
pub fn read(inputs: &[(&'static str, Vec<u8>)]) -> Vec<Vec<Seen>> {
    let node = Command::new("node")
        .args(["-e", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut node = node.expect("Debian's nodejs; `cargo xtask test --tier wire` installs it");
    let (mut input, output) = (
        node.stdin.take().expect("piped"),
        node.stdout.take().expect("piped"),
    );
    let seen = std::thread::scope(|scope| {
        scope.spawn(move || {
            for (kind, bytes) in inputs {
                // A Node that died is seen by its missing lines.
                if writeln!(input, "{kind} {}", STANDARD.encode(bytes)).is_err() {
                    return;
                }
            }
        });
        let lines = BufReader::new(output).lines();
        lines
            .map(|line| answers(&line.expect("UTF-8 of JSON")))
            .collect::<Vec<_>>()
    });
    let status = node.wait().expect("waitpid");
    assert!(
        status.success() && seen.len() == inputs.len(),
        "Node ended with {status} after {} inputs",
        seen.len()
    );
    seen
}

fn answers(line: &str) -> Vec<Seen> {
    let json: Value = serde_json::from_str(line).expect("a line of JSON");
    json.as_array().expect("a list").iter().map(seen).collect()
}

fn seen(json: &Value) -> Seen {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |name: &str| {
        json[name]
            .as_array()
            .map(|all| all.iter().map(text).collect::<Vec<_>>())
            .unwrap_or_default()
    };
    let raw = list("headers");
    let mut headers: Vec<_> = raw
        .chunks_exact(2)
        .map(|pair| (pair[0].to_ascii_lowercase(), bytes(&pair[1])))
        .collect();
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    let message = Message {
        line: list("line"),
        headers,
        body: bytes(&text(&json["body"])),
    };
    Seen {
        message,
        whole: json["whole"] == true,
    }
}

/// Node gives bytes as characters.
fn bytes(text: &str) -> Vec<u8> {
    text.chars()
        .map(|c| u8::try_from(c).expect("a byte"))
        .collect()
}
