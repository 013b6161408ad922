//! Join tokens: what an operator hands to a host. `mesh1_` and base64url (RFC 4648 §5) of the fields, which end
//! in a CRC-32 of all before it, so that a truncated or mistyped token is told from a wrong one.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::Message as _;

/// What every token of this version begins with.
pub const PREFIX: &str = "mesh1_";
/// Longest token we read, in bytes.
pub const TOKEN_MAX: usize = 4096;
/// Bytes of the secret.
pub const SECRET_LEN: usize = 32;

/// A join token. Its secret is never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Where control answers: `host:port`, tried in turn. 1 to 8.
    pub addresses: Vec<String>,
    /// SHA-256 of the SubjectPublicKeyInfo of the roots that control may show, active and prepared. 1 to 8.
    pub pins: Vec<[u8; 32]>,
    /// Public: names the token in lists, logs and audit.
    pub id: String,
    pub secret: [u8; SECRET_LEN],
}

/// Why a text is not a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("this is not a join token: it does not begin with `{PREFIX}`")]
    Prefix,
    #[error("the join token is truncated or mistyped (its checksum is wrong); copy it whole")]
    Checksum,
    #[error("the join token is of a form that this version does not read: {0}")]
    Form(&'static str),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(string, repeated, tag = "1")]
    addresses: Vec<String>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pins: Vec<Vec<u8>>,
    #[prost(string, tag = "3")]
    id: String,
    #[prost(bytes = "vec", tag = "4")]
    secret: Vec<u8>,
}

impl JoinToken {
    /// Reads a token as it was pasted; white space around it is ignored.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if text.len() > TOKEN_MAX {
            return Err(TokenError::Form("it is longer than 4096 bytes"));
        }
        let bytes = URL_SAFE_NO_PAD
            .decode(body)
            .map_err(|_| TokenError::Checksum)?;
        let (fields, sum) = bytes.split_last_chunk::<4>().ok_or(TokenError::Checksum)?;
        if crc32fast::hash(fields) != u32::from_be_bytes(*sum) {
            return Err(TokenError::Checksum);
        }
        let wire =
            Wire::decode(fields).map_err(|_| TokenError::Form("its fields can not be read"))?;
        if !(1..=8).contains(&wire.addresses.len()) || !(1..=8).contains(&wire.pins.len()) {
            return Err(TokenError::Form("it names no control address or no pin"));
        }
        let pins = wire.pins.into_iter().map(|pin| pin.try_into().ok());
        Ok(Self {
            addresses: wire.addresses,
            pins: pins
                .collect::<Option<_>>()
                .ok_or(TokenError::Form("a pin has not 32 bytes"))?,
            id: wire.id,
            secret: wire
                .secret
                .try_into()
                .map_err(|_| TokenError::Form("its secret has not 32 bytes"))?,
        })
    }

    /// The secret as `JoinRequest.token_secret` carries it.
    pub fn secret_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.secret)
    }

    /// Reads what [`JoinToken::secret_text`] wrote.
    pub fn read_secret(text: &str) -> Option<[u8; SECRET_LEN]> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
    }

    /// The token as the operator copies it. It holds the secret.
    pub fn reveal(&self) -> String {
        let wire = Wire {
            addresses: self.addresses.clone(),
            pins: self.pins.iter().map(|pin| pin.to_vec()).collect(),
            id: self.id.clone(),
            secret: self.secret.to_vec(),
        };
        let mut bytes = wire.encode_to_vec();
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_be_bytes());
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("addresses", &self.addresses)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            addresses: vec!["10.0.0.1:7440".to_owned()],
            pins: vec![[7; 32]],
            id: "t-1".to_owned(),
            secret: [9; 32],
        }
    }

    #[test]
    fn reads_back_and_hides_its_secret() {
        let text = token().reveal();
        assert_eq!(JoinToken::parse(&format!(" {text}\n")).unwrap(), token());
        let secret = token().secret_text();
        assert_eq!(JoinToken::read_secret(&secret), Some(token().secret));
        assert_eq!(JoinToken::read_secret(&secret[1..]), None);
        assert!(!format!("{:?}", token()).contains('9'));
    }

    #[test]
    fn every_truncation_and_every_changed_letter_is_noticed() {
        let text = token().reveal();
        for end in PREFIX.len()..text.len() {
            assert!(JoinToken::parse(&text[..end]).is_err(), "cut at {end}");
        }
        for at in PREFIX.len()..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert_ne!(JoinToken::parse(&changed), Ok(token()), "changed at {at}");
        }
        assert_eq!(JoinToken::parse("hello"), Err(TokenError::Prefix));
    }
}
