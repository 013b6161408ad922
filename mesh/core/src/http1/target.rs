//! A request's target and its Host (RFC 9112 §3.2): whom it is for must be read in one way only.

/// Whether `target` has one of the four forms, the one of its method, and agrees with Host.
pub(super) fn is_proper(method: &[u8], target: &[u8], host: Option<&[u8]>) -> bool {
    // A fragment is no part of a request: some cut it off, others take it for a path.
    let is_char = |b: &u8| *b > b' ' && !matches!(b, 0x7f | b'#');
    if !target.iter().all(is_char) || !host.is_none_or(is_authority) {
        return false;
    }
    match target {
        [] => false,
        _ if method == b"CONNECT" => {
            let (name, port) = split(target);
            let agrees = |host: &[u8]| host.is_empty() || split(host).0.eq_ignore_ascii_case(name);
            let port = port.is_some_and(|port| !port.is_empty());
            is_authority(target) && !name.is_empty() && port && host.is_none_or(agrees)
        }
        b"*" => method == b"OPTIONS",
        [b'/', ..] => true,
        _ => is_absolute(target, host),
    }
}

/// `scheme://authority` and a path. A server that heeds Host and one that heeds the target must mean the same.
fn is_absolute(target: &[u8], host: Option<&[u8]>) -> bool {
    let Some(colon) = memchr::memchr(b':', target) else {
        return false;
    };
    let (scheme, rest) = target.split_at(colon);
    let is_scheme = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
    let Some(rest) = rest.strip_prefix(b"://") else {
        return false;
    };
    let end = rest.iter().position(|b| matches!(b, b'/' | b'?'));
    let authority = &rest[..end.unwrap_or(rest.len())];
    let (name, port) = split(authority);
    let implied: &[u8] = match scheme {
        s if s.eq_ignore_ascii_case(b"http") || s.eq_ignore_ascii_case(b"ws") => b"80",
        s if s.eq_ignore_ascii_case(b"https") || s.eq_ignore_ascii_case(b"wss") => b"443",
        _ => b"",
    };
    let with_default = |port: Option<&'_ [u8]>| match port {
        None | Some([]) => implied.to_vec(),
        Some(port) => port.to_vec(),
    };
    let agrees = |host: &[u8]| {
        let (host, host_port) = split(host);
        host.eq_ignore_ascii_case(name) && with_default(host_port) == with_default(port)
    };
    scheme.first().is_some_and(u8::is_ascii_alphabetic)
        && scheme.iter().all(is_scheme)
        && !name.is_empty()
        && is_authority(authority)
        && host.is_none_or(agrees)
}

/// A name or address and a port, if there is one.
fn split(authority: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memrchr(b':', authority) {
        // The colons of an IPv6 address are within its brackets.
        Some(at) if !authority[at..].contains(&b']') => {
            (&authority[..at], Some(&authority[at + 1..]))
        }
        _ => (authority, None),
    }
}

/// `uri-host [":" port]` of RFC 3986 §3.2, without user and comma; it may be empty.
fn is_authority(bytes: &[u8]) -> bool {
    let (name, port) = split(bytes);
    let is_name = match name {
        [b'[', address @ .., b']'] => address
            .iter()
            .all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.' | b'v')),
        _ => name.iter().all(|b| {
            b.is_ascii_alphanumeric()
                || matches!(
                    b,
                    b'-' | b'.'
                        | b'_'
                        | b'~'
                        | b'%'
                        | b'!'
                        | b'$'
                        | b'&'
                        | b'\''
                        | b'('
                        | b')'
                        | b'*'
                        | b'+'
                        | b';'
                        | b'='
                )
        }),
    };
    is_name && port.is_none_or(|port| port.iter().all(u8::is_ascii_digit))
}
