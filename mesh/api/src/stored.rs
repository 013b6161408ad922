//! What an agent keeps on disk of what control said: one protobuf message a file, with a checksum before it. A file
//! that was cut or changed is told from a good one and never half believed.

use prost::Message;

use crate::proto;

/// What every file of this form begins with; the digit is the form's version.
const MAGIC: &[u8; 8] = b"meshwk1\n";
/// Largest content, in bytes: an index of 65,536 services takes about 12 MiB.
pub const STORED_MAX: u64 = 64 * 1024 * 1024;

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    #[error("it does not begin as a file of the agent does")]
    Magic,
    #[error("its checksum is wrong: it was cut or changed")]
    Checksum,
    #[error("its content can not be read: {0}")]
    Content(#[from] prost::DecodeError),
}

/// The index as one snapshot.
#[derive(Clone, PartialEq, Message)]
pub struct StoredIndex {
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// Unix time, milliseconds.
    #[prost(uint64, tag = "2")]
    pub received_ms: u64,
    #[prost(message, optional, tag = "3")]
    pub update: Option<proto::IndexUpdate>,
}

/// All policies that concern the host.
#[derive(Clone, PartialEq, Message)]
pub struct StoredPolicies {
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    #[prost(uint64, tag = "2")]
    pub received_ms: u64,
    #[prost(message, optional, tag = "3")]
    pub update: Option<proto::PolicyUpdate>,
}

/// The endpoints of all services that were asked for.
#[derive(Clone, PartialEq, Message)]
pub struct StoredEndpoints {
    #[prost(message, repeated, tag = "1")]
    pub services: Vec<StoredService>,
}

/// The endpoints of one service.
#[derive(Clone, PartialEq, Message)]
pub struct StoredService {
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    #[prost(uint64, tag = "2")]
    pub received_ms: u64,
    /// When a program of the host last asked for them.
    #[prost(uint64, tag = "3")]
    pub used_ms: u64,
    #[prost(message, optional, tag = "4")]
    pub update: Option<proto::EndpointsUpdate>,
}

/// All revocations that the agent heard of.
#[derive(Clone, PartialEq, Message)]
pub struct StoredRevocations {
    /// Of the control that was heard last.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// What of that epoch is whole.
    #[prost(uint64, tag = "2")]
    pub revision: u64,
    #[prost(message, repeated, tag = "3")]
    pub revoked: Vec<proto::Revocation>,
    /// To which they point.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub issuers: Vec<bytes::Bytes>,
}

/// The content of a file that holds `message`.
pub fn seal(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 4 + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&crc32fast::hash(&body).to_be_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Reads the content of a file.
pub fn unseal<M: Message + Default>(bytes: &[u8]) -> Result<M, StoredError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(StoredError::Magic)?;
    let (sum, body) = rest.split_first_chunk::<4>().ok_or(StoredError::Checksum)?;
    if crc32fast::hash(body) != u32::from_be_bytes(*sum) {
        return Err(StoredError::Checksum);
    }
    Ok(M::decode(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_and_every_changed_byte_is_noticed() {
        let message = StoredPolicies {
            epoch: 3,
            received_ms: 1_700_000_000_000,
            update: Some(proto::PolicyUpdate {
                revision: 9,
                policies: vec!["{}".to_owned()],
            }),
        };
        let bytes = seal(&message);
        assert_eq!(unseal::<StoredPolicies>(&bytes).unwrap(), message);
        for end in 0..bytes.len() {
            assert!(unseal::<StoredPolicies>(&bytes[..end]).is_err(), "{end}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(unseal::<StoredPolicies>(&changed).is_err(), "{at}");
        }
    }
}
