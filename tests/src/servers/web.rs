//! Web servers that programs are written with or stand behind: Apache httpd, Node, Go. Each answers the same:
//! `/` with `hello`, `/bytes?n=` with so many bytes (chunked and followed by their digest as a trailer, or with
//! `&length=1`), `POST /digest` with digest, length, framing and trailer of what came.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::{Debian, golang};
use crate::host::Host;
use crate::process::Process;
use crate::wait::SOON;

/// `bytes` and `digest` of Apache, which has no program of its own.
const CGI: &str = r#"#!/usr/bin/python3
import hashlib, os, sys, urllib.parse
query = urllib.parse.parse_qs(os.environ['QUERY_STRING'])
out = sys.stdout.buffer
if os.environ['SCRIPT_NAME'] == '/bytes':
    n = int(query['n'][0])
    length = b'Content-Length: %d\r\n' % n if 'length' in query else b''
    out.write(b'Content-Type: application/octet-stream\r\n' + length + b'\r\n')
    part = hashlib.sha512(str(n).encode()).digest() * 1024
    while n > 0:
        out.write(part[:n])
        n -= len(part)
else:
    digest, n = hashlib.sha256(), 0
    while part := sys.stdin.buffer.read(65536):
        digest.update(part)
        n += len(part)
    length = os.environ.get('CONTENT_LENGTH') or '-1'
    out.write(b'Content-Type: text/plain\r\n\r\n%s %d %s \n' % (digest.hexdigest().encode(), n, length.encode()))
"#;

/// Apache httpd (threads) on `port`, in cgroup `name`.
#[track_caller]
pub fn apache(host: &Host, name: &str, port: u16) -> Process {
    let dir = host.subdir(name, None);
    let www = host.subdir(&format!("{name}/www"), None);
    fs::write(www.join("index.html"), "hello\n").expect("a page");
    for script in ["bytes", "digest"] {
        let path = dir.join(script);
        fs::write(&path, CGI).expect("a script");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
    }
    let modules: String = ["mpm_event", "authz_core", "dir", "alias", "cgid", "mime"]
        .iter()
        .map(|m| format!("LoadModule {m}_module /usr/lib/apache2/modules/mod_{m}.so\n"))
        .collect();
    let dir = dir.display();
    let config = format!(
        "{modules}ServerName web\nServerRoot {dir}\nDocumentRoot {dir}/www\nDirectoryIndex index.html\n\
         Listen 0.0.0.0:{port}\nListen [::]:{port}\nPidFile {dir}/pid\nDefaultRuntimeDir {dir}\nScriptSock {dir}/cgi\n\
         Mutex file:{dir} default\nErrorLog {dir}/error.log\nTypesConfig /dev/null\nUser nobody\nGroup nogroup\n\
         StartServers 1\nThreadsPerChild 64\nMaxRequestWorkers 256\n\
         ScriptAlias /bytes {dir}/bytes\nScriptAlias /digest {dir}/digest\n\
         <Directory />\nRequire all granted\n</Directory>\n"
    );
    let path = host.dir().join(name).join("httpd.conf");
    fs::write(&path, config).expect("a configuration");
    let words = [
        Debian("apache2").path(),
        "-DFOREGROUND".to_owned(),
        "-f".to_owned(),
        path.display().to_string(),
    ];
    let process = host.program(words).cgroup(name).spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// Node's http on `port`, in cgroup `name`.
#[track_caller]
pub fn node(host: &Host, name: &str, port: u16) -> Process {
    let script = host.dir().join(format!("{name}.js"));
    fs::write(&script, include_str!("web.js")).expect("a script");
    let words = [
        Debian("node").path(),
        script.display().to_string(),
        port.to_string(),
    ];
    let process = host.program(words).cgroup(name).spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// Go's net/http on `port`, in cgroup `name`.
#[track_caller]
pub fn go(host: &Host, name: &str, port: u16) -> Process {
    let program = golang::program("web").display().to_string();
    let process = host.program([program, port.to_string()]);
    let process = process.cgroup(name).spawn(name);
    host.wait_listening(port, SOON);
    process
}
