//! One HTTP/2 exchange inside a stream: each direction is a list of messages, `length u24 | type u8 | payload`, big
//! endian.
//!
//! | type | message | payload |
//! |---|---|---|
//! | 0 | head of the request or of the final response | block |
//! | 1 | head of an informational response (1xx) | block |
//! | 2 | data | bytes |
//! | 3 | trailers | fields |
//!
//! The top bit of the type says that nothing follows in this direction. A direction that ends without it was cut, so a
//! short body never looks whole. A block begins with what HTTP/2 calls pseudo-header fields, each once and in its
//! place, and has no compression state:
//!
//! ```text
//! request   (length u24, bytes): method, scheme, authority, path, protocol; empty is absent
//! response  status u16
//! fields    (flags u8, name length u16, name, value length u24, value)*     flag 1: never indexed
//! ```

/// Bytes before each payload.
pub const PREFIX_LEN: usize = 4;

/// What a field weighs beside its bytes when a block is measured (RFC 9113 §6.5.2), so that both agents and both
/// programs measure alike, and a block of empty fields is no way around the bound.
pub const FIELD_WEIGHT: usize = 32;

const LAST: u8 = 0x80;
const NEVER_INDEXED: u8 = 1;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Head,
    Interim,
    Data,
    Trailers,
}

impl Kind {
    const fn to_wire(self) -> u8 {
        match self {
            Self::Head => 0,
            Self::Interim => 1,
            Self::Data => 2,
            Self::Trailers => 3,
        }
    }
}

/// Which direction of an exchange is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Request,
    Response,
}

/// Why bytes are no exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("a message of type {0} is not known or not in its place")]
    Order(u8),
    #[error("a block or its fields are larger than the limit")]
    TooLarge,
    #[error("a block can not be read")]
    Block,
    #[error("the direction ended before its last message was whole")]
    Cut,
}

/// Writes the prefix of a message whose payload of `length` bytes follows.
pub fn prefix(kind: Kind, last: bool, length: usize) -> [u8; PREFIX_LEN] {
    let [_, a, b, c] = (length as u32).to_be_bytes();
    let kind = kind.to_wire() | if last { LAST } else { 0 };
    [a, b, c, kind]
}

/// What begins a request's block. An empty part is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestLine<'a> {
    pub method: &'a [u8],
    pub scheme: &'a [u8],
    pub authority: &'a [u8],
    pub path: &'a [u8],
    /// Of an extended CONNECT (RFC 8441).
    pub protocol: &'a [u8],
}

/// One header or trailer field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
    /// No compression on the way may remember it (RFC 7541 §7.1.3).
    pub never_indexed: bool,
}

/// Appends one message that has a block.
#[derive(Debug)]
pub struct BlockWriter<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    kind: Kind,
    last: bool,
}

impl<'a> BlockWriter<'a> {
    pub fn request(out: &'a mut Vec<u8>, last: bool, line: &RequestLine<'_>) -> Self {
        let writer = Self::begin(out, Kind::Head, last);
        for part in [
            line.method,
            line.scheme,
            line.authority,
            line.path,
            line.protocol,
        ] {
            put_long(writer.out, part);
        }
        writer
    }

    /// `kind` is a final head or an informational one.
    pub fn response(out: &'a mut Vec<u8>, kind: Kind, last: bool, status: u16) -> Self {
        let writer = Self::begin(out, kind, last);
        writer.out.extend(status.to_be_bytes());
        writer
    }

    pub fn trailers(out: &'a mut Vec<u8>) -> Self {
        Self::begin(out, Kind::Trailers, true)
    }

    fn begin(out: &'a mut Vec<u8>, kind: Kind, last: bool) -> Self {
        let start = out.len();
        out.extend([0; PREFIX_LEN]);
        Self {
            out,
            start,
            kind,
            last,
        }
    }

    pub fn field(&mut self, field: &Field<'_>) {
        self.out.push(if field.never_indexed {
            NEVER_INDEXED
        } else {
            0
        });
        // A name is shorter than the bound of a block, but a value may not be shorter than 64 KiB.
        self.out.extend((field.name.len() as u16).to_be_bytes());
        self.out.extend_from_slice(field.name);
        put_long(self.out, field.value);
    }

    /// Fills in the length, now that it is known.
    pub fn finish(self) {
        let length = self.out.len() - self.start - PREFIX_LEN;
        let prefix = prefix(self.kind, self.last, length);
        self.out[self.start..self.start + PREFIX_LEN].copy_from_slice(&prefix);
    }
}

fn put_long(out: &mut Vec<u8>, bytes: &[u8]) {
    let [_, a, b, c] = (bytes.len() as u32).to_be_bytes();
    out.extend([a, b, c]);
    out.extend_from_slice(bytes);
}

/// What was read of a direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// A whole block.
    Block {
        kind: Kind,
        block: &'a [u8],
        last: bool,
    },
    /// A piece of a data message.
    Data { data: &'a [u8], last: bool },
}

/// Reads one direction, in whatever pieces it comes.
#[derive(Debug)]
pub struct Reader {
    side: Side,
    /// Longest block, in bytes.
    max: usize,
    prefix: [u8; PREFIX_LEN],
    have: usize,
    /// Of a message whose prefix is whole: what of its payload is still to come.
    current: Option<(Kind, bool)>,
    left: usize,
    /// What came of a block that is not whole yet.
    block: Vec<u8>,
    has_head: bool,
    over: bool,
}

impl Reader {
    pub fn new(side: Side, max: usize) -> Self {
        Self {
            side,
            max,
            prefix: [0; PREFIX_LEN],
            have: 0,
            current: None,
            left: 0,
            block: Vec::new(),
            has_head: false,
            over: false,
        }
    }

    /// Bytes of the current data message that are still to come.
    pub fn data_left(&self) -> usize {
        match self.current {
            Some((Kind::Data, _)) => self.left,
            _ => 0,
        }
    }

    /// Bytes of a prefix that come next: handed no more, it reads no payload with them.
    pub fn prefix_left(&self) -> usize {
        match self.current {
            None => PREFIX_LEN - self.have,
            Some(_) => 0,
        }
    }

    /// Bytes that it holds of a block that is not whole.
    pub fn held(&self) -> usize {
        match self.current {
            Some(_) => self.block.len(),
            None => 0,
        }
    }

    /// Whether the last message was read whole.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Reads at most one part from the start of `input`, and says how many bytes are used up. Without a part more
    /// bytes are needed, unless some of `input` is left.
    ///
    /// # Errors
    /// When the direction breaks the rules; it can not be read on.
    pub fn read<'a>(
        &'a mut self,
        input: &'a [u8],
    ) -> Result<(usize, Option<Part<'a>>), MessageError> {
        let mut used = 0;
        if self.current.is_none() {
            if self.over && !input.is_empty() {
                return Err(MessageError::Order(input[0]));
            }
            used = (PREFIX_LEN - self.have).min(input.len());
            self.prefix[self.have..self.have + used].copy_from_slice(&input[..used]);
            self.have += used;
            if self.have < PREFIX_LEN {
                return Ok((used, None));
            }
            self.begin()?;
        }
        let Some((kind, last)) = self.current else {
            return Ok((used, None));
        };
        let rest = &input[used..];
        let take = self.left.min(rest.len());
        self.left -= take;
        let whole = self.left == 0;
        if whole {
            self.current = None;
            self.have = 0;
            self.over |= last;
        }
        let bytes = &rest[..take];
        used += take;
        if kind == Kind::Data {
            let data = bytes;
            let last = last && whole;
            let part = Part::Data { data, last };
            return Ok((used, (!data.is_empty() || last).then_some(part)));
        }
        if !whole {
            self.block.extend_from_slice(bytes);
            return Ok((used, None));
        }
        let block = if self.block.is_empty() {
            bytes
        } else {
            self.block.extend_from_slice(bytes);
            &self.block
        };
        Ok((used, Some(Part::Block { kind, block, last })))
    }

    /// Takes a whole prefix.
    fn begin(&mut self) -> Result<(), MessageError> {
        let [a, b, c, kind] = self.prefix;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let last = kind & LAST != 0;
        let kind = match (kind & !LAST, self.has_head) {
            (0, false) => Kind::Head,
            (1, false) if self.side == Side::Response && !last => Kind::Interim,
            // Empty data that is not the last would be work without an end.
            (2, true) if length > 0 || last => Kind::Data,
            (3, true) if last => Kind::Trailers,
            _ => return Err(MessageError::Order(kind)),
        };
        if kind != Kind::Data && length > self.max {
            return Err(MessageError::TooLarge);
        }
        self.has_head |= kind == Kind::Head;
        self.block = Vec::new();
        self.left = length;
        self.current = Some((kind, last));
        Ok(())
    }
}

/// The fields of a block.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
    /// What fields may still weigh.
    weight: usize,
}

impl<'a> Fields<'a> {
    /// The fields of trailers, which weigh at most `max`.
    pub fn new(block: &'a [u8], max: usize) -> Self {
        Self {
            rest: block,
            weight: max,
        }
    }

    fn read(&mut self) -> Result<Field<'a>, MessageError> {
        let (flags, rest) = self.rest.split_first().ok_or(MessageError::Block)?;
        if flags & !NEVER_INDEXED != 0 {
            return Err(MessageError::Block);
        }
        let (length, rest) = rest.split_first_chunk().ok_or(MessageError::Block)?;
        let (name, mut rest) = rest
            .split_at_checked(usize::from(u16::from_be_bytes(*length)))
            .ok_or(MessageError::Block)?;
        let value = take_long(&mut rest)?;
        self.rest = rest;
        self.weight = self
            .weight
            .checked_sub(name.len() + value.len() + FIELD_WEIGHT)
            .ok_or(MessageError::TooLarge)?;
        let never_indexed = flags & NEVER_INDEXED != 0;
        Ok(Field {
            name,
            value,
            never_indexed,
        })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, MessageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

/// Reads a request's block, whose fields weigh at most `max`.
///
/// # Errors
/// When it is cut.
pub fn read_request(
    mut block: &[u8],
    max: usize,
) -> Result<(RequestLine<'_>, Fields<'_>), MessageError> {
    let line = RequestLine {
        method: take_long(&mut block)?,
        scheme: take_long(&mut block)?,
        authority: take_long(&mut block)?,
        path: take_long(&mut block)?,
        protocol: take_long(&mut block)?,
    };
    Ok((line, Fields::new(block, max)))
}

/// Reads a response's block, whose fields weigh at most `max`.
///
/// # Errors
/// When it is cut.
pub fn read_response(block: &[u8], max: usize) -> Result<(u16, Fields<'_>), MessageError> {
    let (status, rest) = block.split_first_chunk().ok_or(MessageError::Block)?;
    Ok((u16::from_be_bytes(*status), Fields::new(rest, max)))
}

fn take_long<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], MessageError> {
    let ([a, b, c], rest) = bytes.split_first_chunk::<3>().ok_or(MessageError::Block)?;
    let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
    let (taken, rest) = rest.split_at_checked(length).ok_or(MessageError::Block)?;
    *bytes = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::rng::Rng;

    const MAX: usize = 4096;

    fn request(last: bool) -> Vec<u8> {
        let mut out = Vec::new();
        let line = RequestLine {
            method: b"GET",
            scheme: b"http",
            authority: b"a",
            path: b"/",
            protocol: b"",
        };
        let mut block = BlockWriter::request(&mut out, last, &line);
        block.field(&Field {
            name: b"cookie",
            value: b"x",
            never_indexed: true,
        });
        block.finish();
        out
    }

    fn response() -> Vec<u8> {
        let mut out = Vec::new();
        BlockWriter::response(&mut out, Kind::Interim, false, 103).finish();
        BlockWriter::response(&mut out, Kind::Head, false, 200).finish();
        out.extend(prefix(Kind::Data, false, 2));
        out.extend(b"hi");
        let mut trailers = BlockWriter::trailers(&mut out);
        trailers.field(&Field {
            name: b"grpc-status",
            value: b"0",
            never_indexed: false,
        });
        trailers.finish();
        out
    }

    /// Golden bytes: a change here is a change of the wire, and of docs/protocol.md.
    #[test]
    fn every_message_has_its_golden_bytes() {
        let expected: &[&[u8]] = &[
            &[0, 0, 36, 0x80],
            &[0, 0, 3, b'G', b'E', b'T', 0, 0, 4, b'h', b't', b't', b'p'],
            &[0, 0, 1, b'a', 0, 0, 1, b'/', 0, 0, 0],
            &[1, 0, 6, b'c', b'o', b'o', b'k', b'i', b'e', 0, 0, 1, b'x'],
        ];
        let mut expected = expected.concat();
        expected[2] = (expected.len() - PREFIX_LEN) as u8;
        assert_eq!(request(true), expected);
        let expected: &[&[u8]] = &[
            &[0, 0, 2, 1, 0, 103],
            &[0, 0, 2, 0, 0, 200],
            &[0, 0, 2, 2, b'h', b'i'],
            &[0, 0, 18, 0x83, 0, 0, 11],
            b"grpc-status",
            &[0, 0, 1, b'0'],
        ];
        assert_eq!(response(), expected.concat());
    }

    /// Blocks, data, and whether the last message came.
    type ReadBack = (Vec<(Kind, Vec<u8>)>, Vec<u8>, bool);

    /// What a reader makes of `bytes` in pieces of `size`: kinds of blocks, and all data.
    fn read(side: Side, bytes: &[u8], size: usize) -> Result<ReadBack, MessageError> {
        let mut reader = Reader::new(side, MAX);
        let (mut blocks, mut all) = (Vec::new(), Vec::new());
        for mut piece in bytes.chunks(size) {
            while !piece.is_empty() {
                let (used, part) = reader.read(piece)?;
                match part {
                    Some(Part::Block { kind, block, .. }) => blocks.push((kind, block.to_vec())),
                    Some(Part::Data { data, .. }) => all.extend_from_slice(data),
                    None => (),
                }
                piece = &piece[used..];
            }
        }
        Ok((blocks, all, reader.is_over()))
    }

    #[test]
    fn a_direction_reads_alike_in_whatever_pieces_it_comes() {
        for size in 1..80 {
            let (blocks, data, over) = read(Side::Response, &response(), size).unwrap();
            let kinds: Vec<Kind> = blocks.iter().map(|b| b.0).collect();
            assert_eq!(kinds, [Kind::Interim, Kind::Head, Kind::Trailers], "{size}");
            assert_eq!((data.as_slice(), over), (b"hi".as_slice(), true));
            let (blocks, _, over) = read(Side::Request, &request(true), size).unwrap();
            assert!(over);
            let (line, fields) = read_request(&blocks[0].1, MAX).unwrap();
            assert_eq!(
                (line.method, line.path),
                (b"GET".as_slice(), b"/".as_slice())
            );
            let fields: Vec<_> = fields.map(Result::unwrap).collect();
            assert_eq!(fields.len(), 1);
            assert!(fields[0].never_indexed);
        }
    }

    #[test]
    fn what_is_cut_is_never_over() {
        let bytes = response();
        for end in 0..bytes.len() {
            assert!(!read(Side::Response, &bytes[..end], 7).unwrap().2, "{end}");
        }
    }

    #[test]
    fn messages_out_of_place_are_refused() {
        let data = |last, bytes: &[u8]| [&prefix(Kind::Data, last, bytes.len()), bytes].concat();
        let order = |side, bytes: &[u8]| {
            assert!(
                matches!(read(side, bytes, 1000), Err(MessageError::Order(_))),
                "{bytes:?}"
            );
        };
        order(Side::Request, &data(false, b"x"));
        order(Side::Request, &[request(false), request(false)].concat());
        order(Side::Request, &[request(true), data(true, b"")].concat());
        order(Side::Request, &[request(false), data(false, b"")].concat());
        order(Side::Request, &prefix(Kind::Interim, false, 2));
        order(Side::Response, &prefix(Kind::Interim, true, 2));
        order(Side::Response, &[0, 0, 0, 4]);
        order(Side::Request, &[request(false), vec![0, 0, 0, 3]].concat());
    }

    #[test]
    fn blocks_are_bounded_by_bytes_and_by_weight() {
        let long = prefix(Kind::Head, true, MAX + 1);
        assert_eq!(
            read(Side::Request, &long, 10).unwrap_err(),
            MessageError::TooLarge
        );
        // Many empty fields weigh more than their bytes.
        let block = [0; 6].repeat(MAX / FIELD_WEIGHT + 1);
        let last = Fields::new(&block, MAX).last();
        assert_eq!(last, Some(Err(MessageError::TooLarge)));
        let block = [0; 6].repeat(MAX / FIELD_WEIGHT);
        assert!(Fields::new(&block, MAX).all(|field| field.is_ok()));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut rng = Rng::new(7);
        let whole = [request(false), response()];
        for _ in 0..100_000 {
            let mut bytes = whole[rng.below(2) as usize].clone();
            for _ in 0..rng.below(4) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.below(256) as u8;
            }
            let size = 1 + rng.below(20) as usize;
            for side in [Side::Request, Side::Response] {
                if let Ok((blocks, _, _)) = read(side, &bytes, size) {
                    for (_, block) in blocks {
                        let _ = read_request(&block, MAX).map(|(_, fields)| fields.count());
                        let _ = read_response(&block, MAX).map(|(_, fields)| fields.count());
                    }
                }
            }
        }
    }
}
