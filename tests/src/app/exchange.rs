//! One exchange, as a caller makes it and as the server answers it.
//!
//! What is wanted stands in the target: `/give?bytes=…&seed=…&framing=…&stop=…&reset=1&step=…`. The server takes the
//! request's body whole, says in `x-taken` what it took, and gives a body of its own. Over plain bytes the same
//! words are the first line; both directions then run at once, and the server's last line is what it took.

use std::io::{self, Error, ErrorKind};
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::framing::{Body, Framing, Progress, give, line, take};
use super::seeded::{Digest, Sum};

/// Of one field of a query.
pub(super) fn field<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let fields = query.split('&').filter_map(|field| field.split_once('='));
    fields.into_iter().find(|(n, _)| *n == name).map(|(_, v)| v)
}

/// What the server is to give.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) body: Body,
    pub(super) framing: Framing,
    /// The connection is reset where the body stops.
    pub(super) reset: bool,
}

impl Wanted {
    pub(super) fn to_query(self) -> String {
        let framing = match self.framing {
            Framing::Length(_) => "length",
            Framing::Chunked => "chunked",
            Framing::Close => "close",
        };
        let Body {
            bytes,
            seed,
            step,
            stop,
        } = self.body;
        let stop = stop.map(|stop| format!("&stop={stop}")).unwrap_or_default();
        let reset = u8::from(self.reset);
        format!("bytes={bytes}&seed={seed}&framing={framing}&step={step}&reset={reset}{stop}")
    }

    pub(super) fn of_query(query: &str) -> Option<Self> {
        let number = |name: &str| field(query, name).and_then(|value| value.parse::<u64>().ok());
        let bytes = number("bytes")?;
        let framing = match field(query, "framing")? {
            "length" => Framing::Length(bytes),
            "chunked" => Framing::Chunked,
            _ => Framing::Close,
        };
        let mut body = Body::new(bytes, number("seed")?);
        body.step = usize::try_from(number("step")?).ok()?.max(1);
        body.stop = number("stop");
        Some(Self {
            body,
            framing,
            reset: number("reset") == Some(1),
        })
    }
}

/// A body of this size in this framing, whole.
pub(super) const fn wanted(framing: Framing, bytes: u64, seed: u64) -> Wanted {
    Wanted {
        body: Body::new(bytes, seed),
        framing,
        reset: false,
    }
}

/// The head of a message: its first line's second word, and what its body is.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) word: String,
    pub(super) framing: Framing,
    pub(super) taken: Option<String>,
    /// The connection ends with this message.
    pub(super) last: bool,
}

/// Reads a head. `None` is an end before its first byte.
pub(super) async fn head<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    otherwise: Framing,
) -> io::Result<Option<Head>> {
    if reader.fill_buf().await?.is_empty() {
        return Ok(None);
    }
    let first = line(reader).await?;
    let word = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut head = Head {
        word,
        framing: otherwise,
        taken: None,
        last: false,
    };
    loop {
        let field = line(reader).await?;
        if field.is_empty() {
            return Ok(Some(head));
        }
        let (name, value) = field.split_once(": ").unwrap_or((&field, ""));
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let bytes = value.parse().map_err(|_| ErrorKind::InvalidData)?;
                head.framing = Framing::Length(bytes);
            }
            "transfer-encoding" => head.framing = Framing::Chunked,
            "connection" => head.last |= value.eq_ignore_ascii_case("close"),
            "x-taken" => head.taken = Some(value.to_owned()),
            // The mesh answers in the app's place: that is never what a caller here wants.
            "x-meshwork-reason" => return Err(Error::other(format!("refused: {value}"))),
            _ => (),
        }
    }
}

/// The field that says how the body is framed.
pub(super) fn framing_field(framing: Framing) -> String {
    match framing {
        Framing::Length(bytes) => format!("content-length: {bytes}\r\n"),
        Framing::Chunked => "transfer-encoding: chunked\r\n".to_owned(),
        Framing::Close => "connection: close\r\n".to_owned(),
    }
}

/// A caller's connection over HTTP/1.1.
#[derive(Debug)]
pub(super) struct Http(BufReader<TcpStream>, bool);

/// What one exchange brought: what the server took of us, and what we took of it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) taken: String,
    pub(super) got: Sum,
}

impl Http {
    pub(super) fn new(socket: TcpStream) -> Self {
        Self(BufReader::with_capacity(64 * 1024, socket), false)
    }

    /// Whether its last answer said that it ends with it.
    pub(super) fn is_over(&self) -> bool {
        self.1
    }

    pub(super) async fn ask(
        &mut self,
        path: &str,
        sent: Option<(Framing, Body)>,
    ) -> io::Result<Sum> {
        let framing = sent.map(|(framing, _)| framing_field(framing));
        let method = if sent.is_some() { "POST" } else { "GET" };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: app\r\n{}\r\n",
            framing.unwrap_or_default()
        );
        let socket = self.0.get_mut();
        socket.write_all(head.as_bytes()).await?;
        match sent {
            Some((framing, body)) => give(socket, framing, body).await,
            None => Ok(Digest::new().finish()),
        }
    }

    pub(super) async fn answer(&mut self, progress: &Progress) -> io::Result<Answer> {
        let head = head(&mut self.0, Framing::Close).await?;
        let head = head.ok_or(ErrorKind::UnexpectedEof)?;
        if head.word != "200" {
            return Err(Error::other(format!("status {}", head.word)));
        }
        self.1 |= head.last;
        let got = take(&mut self.0, head.framing, progress).await?;
        let taken = head.taken.unwrap_or_default();
        Ok(Answer { taken, got })
    }

    /// One exchange in which nothing goes wrong, or an error.
    pub(super) async fn exchange(
        &mut self,
        sent: Option<(Framing, Body)>,
        wanted: Wanted,
    ) -> io::Result<()> {
        let given = self
            .ask(&format!("/give?{}", wanted.to_query()), sent)
            .await?;
        let answer = self.answer(&Progress::default()).await?;
        let Body { bytes, seed, .. } = wanted.body;
        check("sent", &given.to_string(), &answer.taken)?;
        let expected = super::seeded::sum_of(seed, bytes);
        check("got", &expected.to_string(), &answer.got.to_string())
    }

    pub(super) fn into_socket(self) -> TcpStream {
        self.0.into_inner()
    }
}

pub(super) fn check(what: &str, expected: &str, found: &str) -> io::Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::other(format!("{what}: {found}, not {expected}")))
}

/// A whole exchange over plain bytes: both directions at once.
pub(super) async fn over_tcp(
    socket: &mut TcpStream,
    sent: Body,
    wanted: Wanted,
    progress: &Progress,
) -> io::Result<()> {
    let first = format!("give {}\n", wanted.to_query());
    socket.write_all(first.as_bytes()).await?;
    let (reader, writer) = socket.split();
    let (taken, given) =
        tokio::try_join!(take_tcp(reader, wanted, progress), give_tcp(writer, sent))?;
    check("sent", &given.to_string(), &taken)
}

async fn give_tcp(mut writer: WriteHalf<'_>, sent: Body) -> io::Result<Sum> {
    let given = give(&mut writer, Framing::Close, sent).await?;
    if sent.stop.is_none() {
        writer.shutdown().await?;
    }
    Ok(given)
}

async fn take_tcp(reader: ReadHalf<'_>, wanted: Wanted, progress: &Progress) -> io::Result<String> {
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let bytes = wanted.body.bytes;
    let got = take(&mut reader, Framing::Length(bytes), progress).await?;
    let expected = super::seeded::sum_of(wanted.body.seed, bytes);
    check("got", &expected.to_string(), &got.to_string())?;
    let taken = line(&mut reader).await?;
    // Nothing may come behind it.
    if !reader.fill_buf().await?.is_empty() {
        return Err(Error::other("bytes behind the end"));
    }
    Ok(taken)
}

/// Closes so that the other end sees a reset.
pub(super) fn reset(socket: TcpStream) {
    drop(socket.set_zero_linger());
    drop(socket);
}

/// Until nobody else is there any more: a body that stops neither ends nor goes on.
pub(super) async fn forever() -> ! {
    loop {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
}
