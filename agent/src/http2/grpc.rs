//! What the agents read of gRPC: which exchanges are calls of it, and how they end.

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};

/// Whether fields are those of a gRPC call; gRPC-Web, which says its status in the body, is none.
pub(crate) fn is_call(fields: &HeaderMap) -> bool {
    let kind = fields.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let rest = kind.and_then(|kind| kind.strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// How a direction of an exchange ended, as far as gRPC says it. What is no call of it says nothing.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    is_call: bool,
    /// The status, until it is asked for; within, `None` is one that is not there or no number.
    ended: Option<Option<u16>>,
}

impl Outcome {
    /// The head of the final response; `last`: it is all.
    pub(crate) fn head(&mut self, fields: &HeaderMap, last: bool) {
        self.is_call = is_call(fields);
        if last {
            self.end(Some(fields));
        }
    }

    /// The end, with trailers or without.
    pub(crate) fn end(&mut self, fields: Option<&HeaderMap>) {
        if self.is_call {
            self.ended = Some(fields.and_then(status));
        }
    }

    /// The status of a call that ended, once.
    pub(crate) fn take(&mut self) -> Option<Option<u16>> {
        self.ended.take()
    }
}

fn status(fields: &HeaderMap) -> Option<u16> {
    let text = fields.get("grpc-status")?.to_str().ok()?;
    // A sign is no digit.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(of: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |(name, value): &(&'static str, &'static str)| {
            (name.parse().unwrap(), HeaderValue::from_static(value))
        };
        of.iter().map(field).collect()
    }

    #[test]
    fn calls_are_told_from_what_only_looks_like_them() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc; charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/json", false),
        ] {
            assert_eq!(
                is_call(&fields(&[("content-type", kind)])),
                expected,
                "{kind}"
            );
        }
        assert!(!is_call(&HeaderMap::new()));
    }

    #[test]
    fn a_call_ends_with_one_status() {
        const KIND: (&str, &str) = ("content-type", "application/grpc");
        let mut trailers_only = Outcome::default();
        trailers_only.head(&fields(&[KIND, ("grpc-status", "14")]), true);
        assert_eq!(
            (trailers_only.take(), trailers_only.take()),
            (Some(Some(14)), None)
        );
        for (trailers, expected) in [
            (Some(fields(&[("grpc-status", "0")])), Some(0)),
            (Some(fields(&[("grpc-status", "+1")])), None),
            (Some(fields(&[("grpc-status", "many")])), None),
            (Some(HeaderMap::new()), None),
            (None, None),
        ] {
            let mut call = Outcome::default();
            call.head(&fields(&[KIND]), false);
            assert_eq!(call.take(), None, "it goes on");
            call.end(trailers.as_ref());
            assert_eq!(call.take(), Some(expected), "{trailers:?}");
        }
        let mut other = Outcome::default();
        other.head(&fields(&[("grpc-status", "0")]), true);
        assert_eq!(other.take(), None);
    }
}
