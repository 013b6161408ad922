//! Real servers from Debian, each configured to need nothing but its own directory and to log to stderr.

pub mod golang;
pub mod web;

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::host::Host;
use crate::process::{Cmd, Process};
use crate::wait::SOON;

/// The user of servers that refuse to be root: `nobody`, since they look for their user's name.
pub const SERVER_USER: u32 = 65_534;
/// A database makes its files first.
const DATABASE_START: Duration = Duration::from_secs(60);

/// nginx on `port` of all addresses, in cgroup `name`; `locations` is put into its server block.
#[track_caller]
pub fn nginx(host: &Host, name: &str, port: u16, locations: &str) -> Process {
    let any = [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0; 16])];
    nginx_at(host, name, &any, port, locations)
}

/// nginx on `port` of these addresses.
#[track_caller]
pub fn nginx_at(
    host: &Host,
    name: &str,
    addresses: &[IpAddr],
    port: u16,
    locations: &str,
) -> Process {
    let dir = host.subdir(name, None);
    fs::create_dir_all(dir.join("body")).expect("a directory");
    let listen: Vec<String> = addresses
        .iter()
        .map(|address| match address {
            IpAddr::V4(v4) => format!("listen {v4}:{port};"),
            IpAddr::V6(v6) => format!("listen [{v6}]:{port};"),
        })
        .collect();
    let config = format!(
        "daemon off; master_process off; worker_processes 1; pid {dir}/pid; error_log stderr warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
         log_format seen '$remote_addr $request_method $request_uri $status \"$http_x_meshwork_client_id\" $http_x_note';\n\
         access_log {dir}/access.log seen;\n\
         client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;\n\
         uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;\n\
         client_max_body_size 1g; keepalive_requests 1000000;\n\
         server {{ {listen} root {dir}/www;\n{locations}\n}} }}\n",
        dir = dir.display(),
        listen = listen.join(" "),
    );
    host.subdir(&format!("{name}/www"), None);
    let path = dir.join("nginx.conf");
    fs::write(&path, config).expect("a configuration");
    let program = Debian("nginx").path();
    let command = host.program([program, "-c".to_owned(), path.display().to_string()]);
    let process = command.cgroup(name).spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// What nginx logged for each request: address, method, URI, status, the caller's identity, the header X-Note.
pub fn access_log(host: &Host, name: &str) -> String {
    fs::read_to_string(host.dir().join(name).join("access.log")).unwrap_or_default()
}

/// Redis on `port` of all addresses, without persistence.
#[track_caller]
pub fn redis(host: &Host, name: &str, port: u16) -> Process {
    let process = host
        .cmd(&format!(
            "exec redis-server --port {port} --bind 0.0.0.0 :: --protected-mode no --save '' --dir {}",
            host.subdir(name, None).display()
        ))
        .cgroup(name)
        .spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// PostgreSQL on `port` of all addresses, trusting the mesh's addresses; superuser `postgres`.
#[track_caller]
pub fn postgresql(host: &Host, name: &str, port: u16) -> Process {
    let dir = host.subdir(name, Some(SERVER_USER));
    let data = dir.join("data");
    let program = |program: &str| postgresql_program(program).display().to_string();
    let server = |command: Cmd| {
        command
            .user(SERVER_USER)
            .cgroup(name)
            .deadline(DATABASE_START)
    };
    server(host.cmd(&format!(
        "{} --pgdata {} --username postgres --auth trust --no-sync --locale C",
        program("initdb"),
        data.display()
    )))
    .ok();
    let access = "host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n";
    fs::write(data.join("pg_hba.conf"), access).expect("its access list");
    let process = server(host.cmd(&format!(
        "exec {} -D {} -p {port} -c listen_addresses='*' -c unix_socket_directories={} -c fsync=off",
        program("postgres"),
        data.display(),
        dir.display()
    )))
    .spawn(name);
    host.wait_listening(port, DATABASE_START);
    process
}

fn postgresql_program(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql");
    let versions = versions.into_iter().flatten().flatten();
    let newest = versions
        .map(|e| e.path().join("bin").join(name))
        .filter(|p| p.exists());
    newest.max().expect("postgresql of Debian is installed")
}

/// MariaDB on `port`: a server that speaks first. User `mesh` without a password.
#[track_caller]
pub fn mariadb(host: &Host, name: &str, port: u16) -> Process {
    let dir = host.subdir(name, Some(SERVER_USER));
    let server = |command: Cmd| {
        command
            .user(SERVER_USER)
            .cgroup(name)
            .deadline(DATABASE_START)
    };
    let data = dir.join("data");
    let common = format!("--no-defaults --datadir={}", data.display());
    server(host.cmd(&format!(
        "mariadb-install-db {common} --auth-root-authentication-method=normal --skip-test-db"
    )))
    .ok();
    let init = dir.join("init.sql");
    fs::write(
        &init,
        "CREATE USER mesh@'%';\nGRANT ALL ON *.* TO mesh@'%';\n",
    )
    .expect("its user");
    let process = server(host.cmd(&format!(
        "exec mariadbd {common} --port={port} --bind-address=* --socket={}/sock --init-file={} \
         --skip-name-resolve --innodb-flush-log-at-trx-commit=0",
        dir.display(),
        init.display()
    )))
    .spawn(name);
    host.wait_listening(port, DATABASE_START);
    process
}

/// nghttpd without TLS on `port`: HTTP/2 by prior knowledge, serving `www` of its directory.
#[track_caller]
pub fn nghttpd(host: &Host, name: &str, port: u16) -> Process {
    let www = host.subdir(&format!("{name}/www"), None);
    let process = host
        .cmd(&format!(
            "exec nghttpd --no-tls --echo-upload --trailer='x-sum: 7' -d {} {port}",
            www.display()
        ))
        .cgroup(name)
        .spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// grpc-go on `port`, the interoperability service of the gRPC project, in cgroup `name`.
#[track_caller]
pub fn grpc_go(host: &Host, name: &str, port: u16) -> Process {
    let program = golang::program("grpc").display().to_string();
    let words = [program, "serve".to_owned(), port.to_string()];
    let process = host.program(words).cgroup(name).spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// The Go end of the torture tests, HTTP/2 and gRPC, in cgroup `name`.
#[track_caller]
pub fn torture_go(host: &Host, name: &str, http2: u16, grpc: u16) -> Process {
    let program = golang::program("torture").display().to_string();
    let words = [format!("--http2={http2}"), format!("--grpc={grpc}")];
    let words = [program, "serve".to_owned()].into_iter().chain(words);
    let process = host.program(words).cgroup(name).spawn(name);
    for port in [http2, grpc] {
        host.wait_listening(port, SOON);
    }
    process
}

/// OpenSSH on `port`, in cgroup `name`, with keys of its own. Whoever has `<host>/<name>/client` may log in as root.
#[track_caller]
pub fn sshd(host: &Host, name: &str, port: u16) -> Process {
    let dir = host.subdir(name, None);
    let dir = dir.display();
    for key in ["host", "client"] {
        host.ok(&format!("ssh-keygen -q -t ed25519 -N '' -f {dir}/{key}"));
    }
    let process = host
        .cmd(&format!(
            // Where it wants its empty directory, also on a machine without the service; only this process sees it.
            "mount -t tmpfs none /run && mkdir /run/sshd && exec {} -D -e -f /dev/null -p {port} -h {dir}/host \
             -o AuthorizedKeysFile={dir}/client.pub -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes \
             -o PidFile=none -o Subsystem='sftp internal-sftp'",
            Debian("sshd").path()
        ))
        .cgroup(name)
        .spawn(name);
    host.wait_listening(port, SOON);
    process
}

/// A program of Debian that may be outside of a user's PATH.
struct Debian(&'static str);

impl Debian {
    fn path(&self) -> String {
        let places = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];
        let found = places.iter().map(|dir| format!("{dir}/{}", self.0));
        let mut found = found.filter(|path| std::path::Path::new(path).exists());
        found.next().unwrap_or_else(|| self.0.to_owned())
    }
}
