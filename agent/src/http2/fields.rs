//! Heads and trailers between their two forms: blocks of the mesh, and what h2 takes and gives. Everything that a
//! peer or a program could have made up is judged here.

use h2::ext::Protocol;
use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, HOST, PROXY_AUTHORIZATION, SET_COOKIE, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use mesh_api::message::{
    BlockWriter, FIELD_WEIGHT, Field, Fields, Kind, MessageError, RequestLine, read_request,
    read_response,
};
use mesh_core::http1::{is_ours, is_trailer};
use mesh_core::reason::Reason;

use super::Failed;

/// What the app learns of its caller. It replaces what came in under this name.
const CLIENT_ID: HeaderName = HeaderName::from_static("x-meshwork-client-id");

/// Never remembered by a compression on the way. h2 does not tell which fields came marked so, so those that carry
/// secrets always are.
const SECRET: [HeaderName; 4] = [AUTHORIZATION, PROXY_AUTHORIZATION, COOKIE, SET_COOKIE];

const MALFORMED: Failed = Failed::Malformed(Reason::HttpMalformed);

/// Appends a request's head.
///
/// # Errors
/// Why it must not go on.
pub(crate) fn encode_request(
    request: &http::request::Parts,
    last: bool,
    max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failed> {
    check_request(&request.method, &request.uri, &request.headers)?;
    let path = request
        .uri
        .path_and_query()
        .map_or("", PathAndQuery::as_str);
    let authority = request.uri.authority().map_or("", Authority::as_str);
    let protocol = request.extensions.get::<Protocol>();
    let tunnel = request.method == Method::CONNECT && protocol.is_none();
    let line = RequestLine {
        method: request.method.as_str().as_bytes(),
        scheme: match request.uri.scheme_str() {
            _ if tunnel => b"",
            // h2 forgets the scheme of a request that names its host in a field only.
            scheme => scheme.unwrap_or("http").as_bytes(),
        },
        authority: authority.as_bytes(),
        path: if tunnel { b"" } else { path.as_bytes() },
        protocol: protocol.map_or(b"".as_slice(), |protocol| protocol.as_str().as_bytes()),
    };
    let mut block = BlockWriter::request(out, last, &line);
    put_fields(&mut block, &request.headers, max, |_| true)?;
    block.finish();
    Ok(())
}

/// Appends a response's head, without our own names.
///
/// # Errors
/// Why it must not go on.
pub(crate) fn encode_response(
    response: &http::response::Parts,
    kind: Kind,
    last: bool,
    max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failed> {
    check_fields(&response.headers)?;
    content_length(&response.headers)?;
    let mut block = BlockWriter::response(out, kind, last, response.status.as_u16());
    put_fields(&mut block, &response.headers, max, |name| {
        !is_ours(name.as_str().as_bytes())
    })?;
    block.finish();
    Ok(())
}

/// Appends trailers, without our own names.
///
/// # Errors
/// Why they must not go on.
pub(crate) fn encode_trailers(
    trailers: &HeaderMap,
    max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failed> {
    check_fields(trailers)?;
    check_trailers(trailers)?;
    let mut block = BlockWriter::trailers(out);
    put_fields(&mut block, trailers, max, |name| {
        !is_ours(name.as_str().as_bytes())
    })?;
    block.finish();
    Ok(())
}

fn put_fields(
    block: &mut BlockWriter<'_>,
    fields: &HeaderMap,
    max: usize,
    passes: impl Fn(&HeaderName) -> bool,
) -> Result<(), Failed> {
    let mut weight = 0;
    for (name, value) in fields {
        weight += name.as_str().len() + value.len() + FIELD_WEIGHT;
        if weight > max {
            return Err(Failed::Malformed(Reason::HttpHeadTooLarge));
        }
        if passes(name) {
            block.field(&Field {
                name: name.as_str().as_bytes(),
                value: value.as_bytes(),
                never_indexed: value.is_sensitive() || SECRET.contains(name),
            });
        }
    }
    Ok(())
}

/// The request of a block, for the app: with the caller's identity, and no other name of ours.
///
/// # Errors
/// Why the app must not see it.
pub(crate) fn decode_request(
    block: &[u8],
    client_id: &HeaderValue,
    max: usize,
) -> Result<Request<()>, Failed> {
    let (line, fields) = read_request(block, max)?;
    let method = Method::from_bytes(line.method).map_err(|_| MALFORMED)?;
    let extended = !line.protocol.is_empty();
    let tunnel = method == Method::CONNECT && !extended;
    if (extended && method != Method::CONNECT)
        || tunnel != line.path.is_empty()
        || tunnel != line.scheme.is_empty()
    {
        return Err(MALFORMED);
    }
    let mut headers = read_fields(fields)?;
    let mut uri = http::uri::Parts::default();
    // A request may name its host in the field only; to the app it goes in the one place that all read.
    let host = headers
        .get(HOST)
        .map_or(b"".as_slice(), HeaderValue::as_bytes);
    let authority = if line.authority.is_empty() {
        host
    } else {
        line.authority
    };
    uri.authority = Some(Authority::try_from(authority).map_err(|_| MALFORMED)?);
    if !tunnel {
        uri.scheme = Some(Scheme::try_from(line.scheme).map_err(|_| MALFORMED)?);
        uri.path_and_query = Some(PathAndQuery::try_from(line.path).map_err(|_| MALFORMED)?);
    }
    let uri = Uri::from_parts(uri).map_err(|_| MALFORMED)?;
    check_request(&method, &uri, &headers)?;
    headers.insert(CLIENT_ID, client_id.clone());
    let mut request = Request::new(());
    if extended {
        let protocol = std::str::from_utf8(line.protocol).map_err(|_| MALFORMED)?;
        if !protocol.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(MALFORMED);
        }
        request.extensions_mut().insert(Protocol::from(protocol));
    }
    *request.version_mut() = http::Version::HTTP_2;
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(request)
}

/// The response of a block, for the caller.
///
/// # Errors
/// Why the caller must not see it.
pub(crate) fn decode_response(
    block: &[u8],
    kind: Kind,
    max: usize,
) -> Result<Response<()>, Failed> {
    let (status, fields) = read_response(block, max)?;
    let status = StatusCode::from_u16(status).map_err(|_| MALFORMED)?;
    // A change of protocol is not HTTP/2's (RFC 9113 §8.6).
    if status.is_informational() != (kind == Kind::Interim)
        || status == StatusCode::SWITCHING_PROTOCOLS
    {
        return Err(MALFORMED);
    }
    let mut response = Response::new(());
    *response.version_mut() = http::Version::HTTP_2;
    *response.status_mut() = status;
    *response.headers_mut() = read_fields(fields)?;
    Ok(response)
}

/// The trailers of a block.
///
/// # Errors
/// Why they must not go on.
pub(crate) fn decode_trailers(block: &[u8], max: usize) -> Result<HeaderMap, Failed> {
    let trailers = read_fields(Fields::new(block, max))?;
    check_trailers(&trailers)?;
    Ok(trailers)
}

/// As behind a body of HTTP/1: whoever merges trailers into headers would read another message.
fn check_trailers(trailers: &HeaderMap) -> Result<(), Failed> {
    let names = trailers.keys().map(|name| name.as_str().as_bytes());
    let mut passed = names.filter(|name| !is_ours(name));
    if passed.all(|name| is_trailer(name).is_ok()) {
        Ok(())
    } else {
        Err(MALFORMED)
    }
}

/// Fields without our own names.
fn read_fields(fields: Fields<'_>) -> Result<HeaderMap, Failed> {
    let mut headers = HeaderMap::with_capacity(16);
    for field in fields {
        let field = field?;
        if is_ours(field.name) {
            continue;
        }
        let name = HeaderName::from_lowercase(field.name).map_err(|_| MALFORMED)?;
        let mut value = HeaderValue::from_bytes(field.value).map_err(|_| MALFORMED)?;
        value.set_sensitive(field.never_indexed);
        headers
            .try_append(name, value)
            .map_err(|_| MessageError::TooLarge)?;
    }
    check_fields(&headers)?;
    Ok(headers)
}

/// What no request may say (RFC 9113 §8.3.1).
fn check_request(method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Failed> {
    check_fields(headers)?;
    content_length(headers)?;
    let authority = uri.authority().map(Authority::as_str);
    let mut hosts = headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    let named = match (authority, host) {
        (Some(authority), Some(host)) => authority.as_bytes().eq_ignore_ascii_case(host.as_bytes()),
        (Some(_), None) => true,
        (None, Some(host)) => !host.is_empty() && method != Method::CONNECT,
        (None, None) => false,
    };
    let user = authority.is_some_and(|authority| authority.contains('@'));
    if !named || second.is_some() || user {
        return Err(MALFORMED);
    }
    Ok(())
}

/// What no head and no trailer may say: fields of a connection (RFC 9113 §8.2.2), and values that begin or end in
/// white space (§8.2.1).
fn check_fields(headers: &HeaderMap) -> Result<(), Failed> {
    let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    for (name, value) in headers {
        let of_connection = match name.as_str().len() {
            2 => name == TE && value.as_bytes() != b"trailers",
            7 => name == UPGRADE,
            10 => name == CONNECTION || name.as_str() == "keep-alive",
            16 => name.as_str() == "proxy-connection",
            17 => name == TRANSFER_ENCODING,
            _ => false,
        };
        let value = value.as_bytes();
        if of_connection || blank(value.first()) || blank(value.last()) {
            return Err(MALFORMED);
        }
    }
    Ok(())
}

/// The length that a message announces: digits, and once.
///
/// # Errors
/// When two programs could read two lengths.
pub(crate) fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Failed> {
    let mut all = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = all.next() else {
        return Ok(None);
    };
    let text = first.to_str().map_err(|_| MALFORMED)?;
    let digits = !text.is_empty() && text.len() <= 19 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits || all.next().is_some() {
        return Err(MALFORMED);
    }
    text.parse().map(Some).map_err(|_| MALFORMED)
}

#[cfg(test)]
mod tests;
