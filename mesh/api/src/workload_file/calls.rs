//! `[[call]]`: local ports and unix sockets by which a workload calls services without capture.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Component, PathBuf};

use mesh_core::names::ServiceName;
use serde::Deserialize;

use super::FileError;

/// Most local ports and sockets of one workload.
pub const CALLS_MAX: usize = 64;
/// The least local port: those below it need a privilege.
const CALL_PORT_MIN: u16 = 1024;
/// Longest path of a unix socket: `sun_path` has 108 bytes with its end.
const SOCKET_PATH_MAX: usize = 107;

/// A local port or socket that leads to one port of a service, for the programs of one workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalCall {
    pub service: ServiceName,
    pub port: u16,
    pub at: CallAt,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallAt {
    /// On loopback.
    Port(SocketAddr),
    Socket(PathBuf),
}

impl std::fmt::Display for CallAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Port(address) => write!(f, "{address}"),
            Self::Socket(path) => write!(f, "{}", path.display()),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CallForm {
    service: String,
    port: u16,
    listen: Option<String>,
    socket: Option<String>,
}

/// Reads all of a file.
pub(super) fn calls(
    forms: Vec<toml::Spanned<CallForm>>,
    at: impl Fn(Range<usize>) -> usize,
) -> Result<Vec<LocalCall>, FileError> {
    let mut calls: Vec<LocalCall> = Vec::new();
    for spanned in forms {
        let line = at(spanned.span());
        let fault = |message: String, remedy| FileError {
            line,
            message,
            remedy,
        };
        let call = call(spanned.into_inner(), fault)?;
        if calls.iter().any(|other| other.at == call.at) {
            let message = format!("{} is above already", call.at);
            return Err(fault(message, "give each call its own port or socket"));
        }
        if calls.len() == CALLS_MAX {
            let message = format!("more than {CALLS_MAX} calls");
            return Err(fault(message, "split the workload"));
        }
        calls.push(call);
    }
    Ok(calls)
}

fn call(
    form: CallForm,
    fault: impl Fn(String, &'static str) -> FileError,
) -> Result<LocalCall, FileError> {
    let service = ServiceName::parse(&form.service)
        .map_err(|e| fault(e.to_string(), "write namespace/service"))?;
    if form.port == 0 {
        return Err(fault("port 0".to_owned(), "write a port of the service"));
    }
    let at = match (form.listen, form.socket) {
        (Some(text), None) => {
            let address = text.parse::<SocketAddr>().ok();
            let fits = |a: &SocketAddr| a.ip().is_loopback() && CALL_PORT_MIN <= a.port();
            CallAt::Port(address.filter(fits).ok_or_else(|| {
                fault(
                    format!("listen `{text}` is no address of loopback with a port from {CALL_PORT_MIN} on"),
                    "write e.g. \"127.0.0.1:15432\"",
                )
            })?)
        }
        (None, Some(text)) => {
            let path = PathBuf::from(&text);
            let plain = path
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !path.is_absolute() || !plain || SOCKET_PATH_MAX < text.len() {
                return Err(fault(
                    format!(
                        "socket `{text}` is no absolute path of at most {SOCKET_PATH_MAX} bytes"
                    ),
                    "write e.g. \"/run/web/db.sock\"",
                ));
            }
            CallAt::Socket(path)
        }
        _ => {
            return Err(fault(
                "a call has exactly one of listen and socket".to_owned(),
                "write listen = \"127.0.0.1:15432\" or socket = \"/run/web/db.sock\"",
            ));
        }
    };
    Ok(LocalCall {
        service,
        port: form.port,
        at,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Workload;
    use super::*;

    fn read(calls: &str) -> Result<Vec<LocalCall>, FileError> {
        let file = format!("namespace = \"shop\"\n[owner]\nuser = \"web\"\n{calls}");
        Workload::parse("web", &file).map(|workload| workload.calls)
    }

    fn call(at: &str) -> String {
        format!("[[call]]\nservice = \"shop/db\"\nport = 5432\n{at}\n")
    }

    #[test]
    fn ports_and_sockets_are_read() {
        let port = call("listen = \"127.0.0.1:15432\"");
        let socket = call("socket = \"/run/web/db.sock\"");
        let read = read(&format!("{port}{socket}")).unwrap();
        assert_eq!(read[0].at.to_string(), "127.0.0.1:15432");
        assert_eq!(read[1].at, CallAt::Socket("/run/web/db.sock".into()));
        assert_eq!(read[1].service.to_string(), "shop/db");
    }

    #[test]
    fn what_others_could_reach_or_nobody_could_open_is_refused() {
        for bad in [
            "",
            "listen = \"0.0.0.0:15432\"",
            "listen = \"10.0.0.1:15432\"",
            "listen = \"127.0.0.1:1023\"",
            "listen = \"localhost:15432\"",
            "socket = \"db.sock\"",
            "socket = \"/run/../db.sock\"",
            "listen = \"127.0.0.1:15432\"\nsocket = \"/run/db.sock\"",
        ] {
            let error = read(&call(bad)).unwrap_err();
            assert_eq!(error.line, 4, "{bad}");
        }
        assert!(read(&call("listen = \"[::1]:15432\"")).is_ok());
        let long = format!("socket = \"/{}\"", "x".repeat(107));
        assert!(read(&call(&long)).is_err());
        let twice = call("listen = \"127.0.0.1:15432\"").repeat(2);
        assert!(read(&twice).unwrap_err().message.contains("above already"));
        let port = |n: usize| call(&format!("listen = \"127.0.0.1:{}\"", 2_000 + n));
        let most: String = (0..CALLS_MAX).map(port).collect();
        assert!(read(&most).is_ok());
        assert!(read(&(most + &port(CALLS_MAX))).is_err());
    }
}
