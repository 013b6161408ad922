//! What passes between a program and the mesh, and what does not.

use super::*;
use mesh_api::message::{PREFIX_LEN, Part, Reader, Side};

const MAX: usize = 8192;

fn line() -> RequestLine<'static> {
    RequestLine {
        method: b"GET",
        scheme: b"http",
        authority: b"web",
        path: b"/a?b",
        protocol: b"",
    }
}

fn block(line: &RequestLine<'_>, fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut block = BlockWriter::request(&mut out, true, line);
    for (name, value) in fields {
        block.field(&Field {
            name,
            value,
            never_indexed: false,
        });
    }
    block.finish();
    out.split_off(PREFIX_LEN)
}

fn decode(line: &RequestLine<'_>, fields: &[(&[u8], &[u8])]) -> Result<Request<()>, Failed> {
    let id = HeaderValue::from_static("spiffe://a/ns/b/sa/c");
    decode_request(&block(line, fields), &id, MAX)
}

#[test]
fn a_request_comes_out_as_it_went_in() {
    let request = Request::builder()
        .method("PUT")
        .uri("http://web:80/a?b=%20")
        .header("x-note", "b")
        .header("authorization", "secret")
        .header("x-note", "a")
        .header("X-Meshwork-Client-Id", "forged")
        .body(())
        .unwrap();
    let (parts, ()) = request.into_parts();
    let mut out = Vec::new();
    encode_request(&parts, false, MAX, &mut out).unwrap();
    let mut reader = Reader::new(Side::Request, MAX);
    let (used, part) = reader.read(&out).unwrap();
    assert_eq!(used, out.len());
    let Some(Part::Block { block, last, .. }) = part else {
        panic!("no block");
    };
    assert!(!last);
    let id = HeaderValue::from_static("spiffe://a/ns/b/sa/c");
    let request = decode_request(block, &id, MAX).unwrap();
    assert_eq!(request.method(), "PUT");
    assert_eq!(request.uri(), "http://web:80/a?b=%20");
    let notes: Vec<_> = request.headers().get_all("x-note").iter().collect();
    assert_eq!(notes, ["b", "a"]);
    assert!(request.headers()["authorization"].is_sensitive());
    let ids: Vec<_> = request.headers().get_all(CLIENT_ID).iter().collect();
    assert_eq!(ids, [&id]);
}

#[test]
fn what_a_peer_makes_up_never_becomes_a_request() {
    assert!(decode(&line(), &[(b"te", b"trailers")]).is_ok());
    for (name, value) in [
        (b"connection".as_slice(), b"close".as_slice()),
        (b"proxy-connection", b"close"),
        (b"keep-alive", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
        (b"X-Upper", b"a"),
        (b":path", b"/other"),
        (b"x a", b"b"),
        (b"", b"b"),
        (b"x-a", b"b\r\nc: d"),
        (b"x-a", b"b\0c"),
        (b"x-a", b" b"),
        (b"x-a", b"b\t"),
        (b"host", b"other"),
        (b"content-length", b"+1"),
        (b"content-length", b"1, 1"),
        (b"content-length", b""),
    ] {
        let decoded = decode(&line(), &[(name, value)]);
        assert_eq!(decoded.unwrap_err(), MALFORMED, "{name:?}: {value:?}");
    }
    let twice: &[(&[u8], &[u8])] = &[(b"content-length", b"1"), (b"content-length", b"1")];
    assert!(decode(&line(), twice).is_err());
    let odd = [
        RequestLine {
            method: b"GE T",
            ..line()
        },
        RequestLine {
            method: b"",
            ..line()
        },
        RequestLine {
            scheme: b"",
            ..line()
        },
        RequestLine {
            path: b"",
            ..line()
        },
        RequestLine {
            path: b"a b",
            ..line()
        },
        RequestLine {
            authority: b"",
            ..line()
        },
        RequestLine {
            authority: b"me@web",
            ..line()
        },
        RequestLine {
            authority: b"a/b",
            ..line()
        },
        RequestLine {
            protocol: b"websocket",
            ..line()
        },
        RequestLine {
            method: b"CONNECT",
            ..line()
        },
    ];
    for line in odd {
        assert_eq!(decode(&line, &[]).unwrap_err(), MALFORMED, "{line:?}");
    }
}

#[test]
fn a_host_that_only_a_field_names_becomes_the_authority() {
    let line = RequestLine {
        authority: b"",
        ..line()
    };
    let request = decode(&line, &[(b"host", b"web")]).unwrap();
    assert_eq!(request.uri(), "http://web/a?b");
}

#[test]
fn tunnels_name_what_they_must_and_nothing_else() {
    let connect = RequestLine {
        method: b"CONNECT",
        scheme: b"",
        authority: b"other:80",
        path: b"",
        protocol: b"",
    };
    assert_eq!(decode(&connect, &[]).unwrap().uri(), "other:80");
    let websocket = RequestLine {
        method: b"CONNECT",
        protocol: b"websocket",
        ..line()
    };
    let request = decode(&websocket, &[]).unwrap();
    let protocol = request.extensions().get::<Protocol>().unwrap();
    assert_eq!(protocol.as_str(), "websocket");
}

#[test]
fn our_names_are_no_words_of_an_app_and_heads_are_bounded() {
    let response = Response::builder()
        .header("x-meshwork-reason", "forged")
        .header("x_meshwork_reason", "forged")
        .header("x-a", "1")
        .body(())
        .unwrap();
    let (parts, ()) = response.into_parts();
    let mut out = Vec::new();
    encode_response(&parts, Kind::Head, true, MAX, &mut out).unwrap();
    let response = decode_response(&out[PREFIX_LEN..], Kind::Head, MAX).unwrap();
    assert_eq!(response.headers().len(), 1);
    let large = Response::builder().header("x-a", "y".repeat(MAX));
    let (parts, ()) = large.body(()).unwrap().into_parts();
    assert_eq!(
        encode_response(&parts, Kind::Head, true, MAX, &mut out),
        Err(Failed::Malformed(Reason::HttpHeadTooLarge))
    );
    for (status, kind) in [
        (101, Kind::Interim),
        (200, Kind::Interim),
        (103, Kind::Head),
        (42, Kind::Head),
    ] {
        let mut out = Vec::new();
        BlockWriter::response(&mut out, kind, false, status).finish();
        assert!(
            decode_response(&out[PREFIX_LEN..], kind, MAX).is_err(),
            "{status}"
        );
    }
}
