//! HTTP/1 messages that a parser may stumble over, by seed: well-formed in the main, with one or two places that
//! implementations are known to read differently, then a few changed bytes. Bytes drawn at random would all be refused
//! at their first line and prove nothing.

use mesh_core::rng::Rng;

/// Bytes that mean something to a parser.
const MEANT: &[u8] = b"\r\n \t:;,.-_/*#?%+\"'[](){}=0159afAFxXzZ\0\x0b\x0c\x7f\x80\x85\xa0\xff";

const METHODS: &[&str] = &[
    "GET", "GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "CONNECT", "get",
    "M-SEARCH", "X!", "PRI", "SOURCE",
];

const TARGETS: &[&str] = &[
    "/",
    "/",
    "/a/b?c=d",
    "*",
    "a:443",
    "http://a/",
    "http://b/x",
    "http://a",
    "//a/b",
    "/a#b",
    "/%00",
    "/\u{e9}",
    "/{}|^`\"<>\\",
    "?x",
    "/HTTP/1.1",
];

const VERSIONS: &[&str] = &[
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/0.9",
    "HTTP/1.2",
    "http/1.1",
    "HTTP/01.1",
    "HTTP/1.1 ",
    "",
];

const STATUS_LINES: &[&str] = &[
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200 OK",
    "HTTP/1.1 200 ",
    "HTTP/1.1 200",
    "HTTP/1.0 200 OK",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 205 Reset Content",
    "HTTP/1.1 206 Partial Content",
    "HTTP/1.1 304 Not Modified",
    "HTTP/1.1 404 Not \u{e9} Found",
    "HTTP/1.1 101 Switching Protocols",
    "HTTP/1.1 500 \tx",
    "HTTP/1.1 599 a b",
    "HTTP/1.1 999 x",
    "HTTP/1.1 099 x",
    "HTTP/1.1  200 OK",
    "HTTP/1.1 +200 OK",
    "HTTP/2 200 OK",
];

/// Header lines about which implementations disagree. `#` stands for the length of the body.
const TRICKY: &[&str] = &[
    "Content-Length: #",
    "content-length:#",
    "Content-Length: \t # \t",
    "Content-Length: 0",
    "Content-Length: 00#",
    "Content-Length: +#",
    "Content-Length: -#",
    "Content-Length: #, #",
    "Content-Length: #,",
    "Content-Length: # #",
    "Content-Length: 0x#",
    "Content-Length: #.0",
    "Content-Length: #;a",
    "Content-Length: \"#\"",
    "Content-Length: \x0b#",
    "Content-Length: #\u{a0}",
    "Content-Length:",
    "Content-Length",
    "Content-Length : #",
    " Content-Length: #",
    "Content_Length: #",
    "Content-Length\0: #",
    "Content-Length: 18446744073709551617",
    "Content-Length: 9223372036854775808",
    "Transfer-Encoding: chunked",
    "transfer-encoding:chunked",
    "Transfer-Encoding: CHUNKED",
    "Transfer-Encoding: \tchunked\t ",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: gzip,chunked",
    "Transfer-Encoding: , chunked",
    "Transfer-Encoding: chunked,",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: chunked, chunked",
    "Transfer-Encoding: chunked;q=1",
    "Transfer-Encoding: x;a=\"b, chunked\"",
    "Transfer-Encoding: x;a=\"b, chunked",
    "Transfer-Encoding: \"chunked\"",
    "Transfer-Encoding: x chunked",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunkedx",
    "Transfer-Encoding: chunked\x0b",
    "Transfer-Encoding: \u{a0}chunked",
    "Transfer-Encoding:\r\n chunked",
    "Transfer-Encoding: chunked\r\n gzip",
    "Transfer-Encoding:",
    "Transfer-Encoding : chunked",
    "Transfer_Encoding: chunked",
    "Transfer-Encoding: identity",
    "Host: a",
    "Host: b",
    "Host:",
    "Host : a",
    "Host: a\r\n b",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: keep-alive, close",
    "Connection: close\r\nConnection: keep-alive",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Connection: Content-Length",
    "Connection: transfer-encoding",
    "Upgrade: websocket",
    "Expect: 100-continue",
    "TE: trailers",
    "Trailer: t",
    "X: a\tb",
    "X: \u{e9}",
    "X: a\rb",
    "X: a\nContent-Length: #",
    "X:\r\n\tContent-Length: #",
    "X-Meshwork-Client-Id: forged",
    "X_Meshwork_Client_Id: forged",
    "X@Y: a",
    "X\u{e9}: a",
    ": a",
    "",
    "\r",
    "\n",
];

const PLAIN: &[&str] = &[
    "Accept: */*",
    "User-Agent: x",
    "Cookie: a=b; c=\"d\"",
    "X-Long: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy",
];

/// Bodies that would be requests of their own to who misses a length.
const BODIES: &[&str] = &[
    "",
    "hello",
    "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n",
    "0\r\n\r\nGET /hidden HTTP/1.1\r\nHost: a\r\n\r\n",
    "\r\n",
    "5\r\nhello\r\n0\r\n\r\n",
];

const SIZES: &[&str] = &[
    "#",
    "#",
    "#",
    "#",
    "0#",
    "00#",
    "#;a",
    "#;a=b",
    "#;a=\"b;c\"",
    "#;a=\"b",
    "#; a = b",
    "#;",
    "#;\t\u{e9}",
    "# ",
    " #",
    "#\t;a",
    "# ;a",
    "+#",
    "-#",
    "0x#",
    "#g",
    "#,",
    "10000000000000000#",
    "#;a\rb",
    "#;a\nb",
];

const TRAILERS: &[&str] = &[
    "",
    "",
    "",
    "T: 1\r\n",
    "T: 1\r\nU:\r\n",
    "Content-Length: 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Host: b\r\n",
    "Connection: close\r\n",
    "Connection: Upgrade\r\nUpgrade: websocket\r\n",
    "X-Meshwork-Client-Id: forged\r\n",
    "no colon\r\n",
    "T : 1\r\n",
    " T: 1\r\n",
    "T: 1\r\n folded\r\n",
    ": 1\r\n",
    "T: a\rb\r\n",
    "T\n",
    "\u{e9}: 1\r\n",
    "GET /hidden HTTP/1.1\r\n",
];

fn pick<'a>(rng: &mut Rng, of: &[&'a str]) -> &'a str {
    of[rng.below(of.len() as u64) as usize]
}

fn chance(rng: &mut Rng, one_in: u64) -> bool {
    rng.below(one_in) == 0
}

/// One to three requests as a caller may send them behind each other.
pub fn requests(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    for _ in 0..=rng.below(3) {
        let method = pick(&mut rng, METHODS);
        // What the method wants is mostly there: else the line alone decides.
        let target = match method {
            "CONNECT" if !chance(&mut rng, 4) => "a:443",
            _ if chance(&mut rng, 3) => pick(&mut rng, TARGETS),
            _ => "/x",
        };
        let version = if chance(&mut rng, 4) {
            pick(&mut rng, VERSIONS)
        } else {
            "HTTP/1.1"
        };
        let gap = if chance(&mut rng, 40) { "\t" } else { " " };
        out.extend(format!("{method} {target}{gap}{version}").bytes());
        let host = (!chance(&mut rng, 30)).then_some("Host: a");
        let bare = matches!(method, "GET" | "HEAD" | "CONNECT") && !chance(&mut rng, 4);
        message(&mut rng, &mut out, host, bare);
        if chance(&mut rng, 30) {
            out.extend(pick(&mut rng, &["\r\n", "\n", " ", "\0"]).bytes());
        }
    }
    mutate(&mut rng, &mut out);
    out
}

/// A response, sometimes behind interim ones.
pub fn response(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    if chance(&mut rng, 6) {
        out.extend(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n");
    }
    out.extend(pick(&mut rng, STATUS_LINES).bytes());
    message(&mut rng, &mut out, None, false);
    mutate(&mut rng, &mut out);
    out
}

/// A chunked body and what follows it.
pub fn chunked_body(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    chunks(&mut rng, &mut out);
    out.extend(pick(&mut rng, &["", "GET /next HTTP/1.1\r\n"]).bytes());
    mutate(&mut rng, &mut out);
    out
}

/// The rest of a message behind its first line.
fn message(rng: &mut Rng, out: &mut Vec<u8>, host: Option<&str>, bare: bool) {
    let body = pick(rng, BODIES);
    let mut lines: Vec<String> = host.map(str::to_owned).into_iter().collect();
    let chunked = match rng.below(3) {
        _ if bare => None,
        0 => {
            lines.push(format!("Content-Length: {}", body.len()));
            Some(false)
        }
        1 => {
            lines.push("Transfer-Encoding: chunked".to_owned());
            Some(true)
        }
        _ => None,
    };
    if chance(rng, 2) {
        lines.push(pick(rng, PLAIN).to_owned());
    }
    if chance(rng, 3) {
        let at = rng.below(lines.len() as u64 + 1) as usize;
        let line = pick(rng, TRICKY).replace('#', &body.len().to_string());
        lines.insert(at, line);
    }
    let end = match rng.below(40) {
        0 => "\n",
        1 => "\r\r\n",
        _ => "\r\n",
    };
    out.extend(b"\r\n");
    for line in &lines {
        out.extend(line.bytes());
        out.extend(b"\r\n");
    }
    out.extend(end.bytes());
    // Without a length there is mostly no body either; with one, what was announced.
    match chunked {
        Some(true) => chunks(rng, out),
        Some(false) => out.extend(body.bytes()),
        None if chance(rng, 4) => match chance(rng, 2) {
            true => chunks(rng, out),
            false => out.extend(body.bytes()),
        },
        None => (),
    }
}

fn chunks(rng: &mut Rng, out: &mut Vec<u8>) {
    let odd = chance(rng, 3);
    let size = |rng: &mut Rng, length: usize| {
        let form = if odd && chance(rng, 2) {
            pick(rng, SIZES)
        } else {
            "#"
        };
        let hex = if chance(rng, 2) {
            format!("{length:x}")
        } else {
            format!("{length:X}")
        };
        form.replace('#', &hex)
    };
    for _ in 0..rng.below(3) {
        let body = pick(rng, BODIES);
        if body.is_empty() {
            continue;
        }
        out.extend(size(rng, body.len()).bytes());
        out.extend(b"\r\n");
        out.extend(body.bytes());
        let end = if odd && chance(rng, 8) {
            pick(rng, &["\n", "\r", "", "x\r\n"])
        } else {
            "\r\n"
        };
        out.extend(end.bytes());
    }
    out.extend(size(rng, 0).bytes());
    let end = if odd && chance(rng, 8) { "\n" } else { "\r\n" };
    out.extend(end.bytes());
    if odd {
        out.extend(pick(rng, TRAILERS).bytes());
    }
    out.extend(b"\r\n");
}

/// Half of the inputs stay as the grammar made them; the others have one to three changes.
fn mutate(rng: &mut Rng, bytes: &mut Vec<u8>) {
    if chance(rng, 2) {
        return;
    }
    for _ in 0..=rng.below(3) {
        change(rng, bytes);
    }
}

/// Changes one place: a byte more, less or other, a part twice, or the end cut off.
pub fn change(rng: &mut Rng, bytes: &mut Vec<u8>) {
    let at = rng.below(bytes.len().max(1) as u64) as usize;
    let byte = match rng.below(3) {
        0 => rng.next_u64() as u8,
        _ => MEANT[rng.below(MEANT.len() as u64) as usize],
    };
    match rng.below(10) {
        0..=2 => bytes.insert(at, byte),
        3 | 4 if at < bytes.len() => drop(bytes.remove(at)),
        5 => bytes.truncate(at.max(1)),
        6 => {
            let end = (at + rng.below(12) as usize).min(bytes.len());
            let part = bytes[at.min(end)..end].to_vec();
            bytes.splice(at..at, part);
        }
        _ if at < bytes.len() => bytes[at] = byte,
        _ => bytes.push(byte),
    }
}
