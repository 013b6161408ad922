//! The TLS 1.3 record layer of a connection whose handshake is through (RFC 8446 §5), without I/O. Records are
//! sealed from and opened into the buffers of those who have the bytes, so that a byte is copied by the cipher only;
//! rustls' own layer copies each byte twice more and reads 4 KiB at a time.
//!
//! Keys come from rustls' handshake and are renewed through it; the ciphers are aws-lc-rs'.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce,
    UnboundKey,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error};

/// Before each record.
pub const HEADER_LEN: usize = 5;
/// Longest content of a record (RFC 8446 §5.1).
pub const CONTENT_MAX: usize = 1 << 14;
/// Longest record with its header (RFC 8446 §5.2).
pub const RECORD_MAX: usize = HEADER_LEN + CONTENT_MAX + 256;
/// What a record is longer than its content, as we seal it: header, content type, tag.
pub const OVERHEAD: usize = HEADER_LEN + 1 + MAX_TAG_LEN;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: u8 = 0;

/// One direction's key, with the number of the next record.
#[derive(Debug)]
struct Keyed {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Keyed {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher suite without AEAD".to_owned())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| Error::EncryptError)?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv: iv.as_ref().try_into().map_err(|_| Error::EncryptError)?,
            sequence,
        })
    }

    /// The nonce of the next record (RFC 8446 §5.3). A number is never used twice: keys are renewed long before the last.
    fn next_nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Seals what leaves.
#[derive(Debug)]
pub(super) struct Sealer(Keyed);

impl Sealer {
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Keyed::new(secrets).map(Self)
    }

    /// Records sealed with this key.
    pub(super) fn sealed(&self) -> u64 {
        self.0.sequence
    }

    /// Appends a record of application data, at most [`CONTENT_MAX`] bytes, to `out`.
    pub(super) fn seal_data(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        self.seal(APPLICATION_DATA, data, out)
    }

    pub(super) fn seal_close_notify(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        const WARNING: u8 = 1;
        self.seal(ALERT, &[WARNING, CLOSE_NOTIFY], out)
    }

    /// Says that what follows is sealed with the next key, and with `answer` that the peer's shall be too.
    pub(super) fn seal_key_update(&mut self, answer: bool, out: &mut Vec<u8>) -> Result<(), Error> {
        self.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, answer.into()], out)
    }

    fn seal(&mut self, kind: u8, content: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        let length = content.len() + 1 + MAX_TAG_LEN;
        let [high, low] = (length as u16).to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, high, low];
        let nonce = self.0.next_nonce()?;
        let start = out.len();
        out.extend_from_slice(&header);
        out.resize(start + HEADER_LEN + length, 0);
        let (sealed, tail) = out[start + HEADER_LEN..].split_at_mut(content.len());
        self.0
            .key
            .seal_out_of_place_scatter(nonce, Aad::from(header), content, sealed, &[kind], tail)
            .map_err(|_| Error::EncryptError)
    }
}

/// What a record brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// So many bytes of application data are at the front of the buffer.
    Data(usize),
    /// The peer's next record has its next key; with `true` ours shall too.
    KeyUpdate(bool),
    CloseNotify,
}

/// Opens what comes.
#[derive(Debug)]
pub(super) struct Opener(Keyed);

impl Opener {
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Keyed::new(secrets).map(Self)
    }

    /// Opens `record`, header included, into `out`, which holds [`content_room`] bytes of it.
    pub(super) fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, Error> {
        let (header, sealed) = record.split_at(HEADER_LEN);
        let (text, tag) = sealed.split_at(sealed.len() - MAX_TAG_LEN);
        let out = out.get_mut(..text.len()).ok_or(Error::DecryptError)?;
        let nonce = self.0.next_nonce()?;
        self.0
            .key
            .open_separate_gather(nonce, Aad::from(header), text, tag, out)
            .map_err(|_| Error::DecryptError)?;
        content(out)
    }
}

/// What the opened text of a record says: its content is at its front.
///
/// # Errors
/// When it is nothing that may come after the handshake.
pub fn content(text: &[u8]) -> Result<Opened, Error> {
    // Padding is zeros behind the content's type (RFC 8446 §5.4).
    let end = text.iter().rposition(|byte| *byte != 0);
    let end = end.ok_or(Error::PeerMisbehaved(
        rustls::PeerMisbehaved::IllegalTlsInnerPlaintext,
    ))?;
    if end > CONTENT_MAX {
        return Err(Error::PeerSentOversizedRecord);
    }
    match (text[end], &text[..end]) {
        (APPLICATION_DATA, data) => Ok(Opened::Data(data.len())),
        (HANDSHAKE, [KEY_UPDATE, 0, 0, 1, answer @ (0 | 1)]) => Ok(Opened::KeyUpdate(*answer == 1)),
        (ALERT, [_, CLOSE_NOTIFY]) => Ok(Opened::CloseNotify),
        (ALERT, [_, alert]) => Err(Error::AlertReceived(AlertDescription::from(*alert))),
        // Tickets are never asked for, and nothing else may come after the handshake.
        _ => Err(Error::InappropriateMessage {
            expect_types: vec![rustls::ContentType::ApplicationData],
            got_type: rustls::ContentType::from(text[end]),
        }),
    }
}

/// The length of the record that `bytes` begin with, header included; `None` while that can not be told.
///
/// # Errors
/// When it is no record that may come after the handshake.
pub fn record_len(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let Some([kind, _, _, high, low]) = bytes.first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let length = HEADER_LEN + usize::from(u16::from_be_bytes([*high, *low]));
    if *kind != APPLICATION_DATA {
        return Err(Error::InappropriateMessage {
            expect_types: vec![rustls::ContentType::ApplicationData],
            got_type: rustls::ContentType::from(*kind),
        });
    }
    if length > RECORD_MAX {
        return Err(Error::PeerSentOversizedRecord);
    }
    if length < OVERHEAD {
        return Err(Error::DecryptError);
    }
    Ok(Some(length))
}

/// What [`Opener::open`] needs of room for a record of this length.
pub fn content_room(record_len: usize) -> usize {
    record_len - HEADER_LEN - MAX_TAG_LEN
}
