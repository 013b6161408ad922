//! Protocols that are bytes to the mesh, with their real servers and clients.

use std::time::Duration;

use meshwork_tests::servers;
use meshwork_tests::wait::SOON;

use crate::pair::{Pair, mesh_name, spiffe};

/// Enough to fill every window several times, in one direction at a time.
const PIPELINED: u32 = 100_000;

#[test]
fn redis_answers_one_by_one_and_in_a_pipeline() {
    let pair = Pair::new("redis");
    let _redis = servers::redis(&pair.server.host, "cache", 6379);
    pair.declare("cache", 6379, "tcp");
    let cli = format!("redis-cli -h {}", mesh_name("cache"));
    assert_eq!(pair.ok(&format!("{cli} set greeting hello")), "OK\n");
    assert_eq!(pair.ok(&format!("{cli} get greeting")), "hello\n");
    let text = pair
        .cmd(&format!(
            "yes incr\\ counter | head -n {PIPELINED} | {cli} --pipe"
        ))
        .deadline(Duration::from_secs(60))
        .ok();
    assert!(
        text.contains(&format!("errors: 0, replies: {PIPELINED}")),
        "{text}"
    );
    assert_eq!(
        pair.ok(&format!("{cli} get counter")),
        format!("{PIPELINED}\n")
    );
    let peers = pair.server.host.ok("redis-cli client list");
    assert!(0.0 < pair.calls(&spiffe("client"), "shop/cache"), "{peers}");
}

#[test]
fn postgresql_sees_the_callers_host_and_not_the_loopback() {
    let pair = Pair::new("postgresql");
    let _postgresql = servers::postgresql(&pair.server.host, "db", 5432);
    pair.declare("db", 5432, "tcp");
    let psql = format!(
        "psql -h {} -U postgres -X -A -t -v ON_ERROR_STOP=1",
        mesh_name("db")
    );
    let text = pair.ok(&format!(
        "{psql} -c 'create table t as select g, md5(g::text) from generate_series(1, 100000) g' \
         -c 'select count(*) from t' -c 'select inet_client_addr()'"
    ));
    let lines: Vec<&str> = text.lines().collect();
    let address = pair.client.host.v4().to_string();
    assert_eq!(
        lines,
        ["SELECT 100000", "100000", &address],
        "trust by address is by the peer's"
    );
    let digest = "select md5(string_agg(md5, '' order by g)) from t";
    let copied = pair.ok(&format!("{psql} -c 'copy t to stdout' | wc -l"));
    assert_eq!(copied.trim(), "100000");
    let here = pair.ok(&format!("{psql} -c \"{digest}\""));
    let there = pair.server.host.ok(&format!(
        "psql -h {} -U postgres -X -A -t -c \"{digest}\"",
        pair.server.host.v4()
    ));
    assert_eq!(here, there);
}

/// The server speaks first: nobody may wait for the client's first bytes.
#[test]
fn mariadb_speaks_first_on_a_port_of_either_kind() {
    let pair = Pair::new("mariadb");
    for (name, port, protocol) in [("sql-auto", 3306, "auto"), ("sql-tcp", 3307, "tcp")] {
        let _mariadb = servers::mariadb(&pair.server.host, name, port);
        pair.declare(name, port, protocol);
        let text = pair.ok(&format!(
            "mariadb --no-defaults --skip-ssl -h {} -P {port} -u mesh -N -e 'select user(), repeat(\"x\", 100000)'",
            mesh_name(name)
        ));
        let user = format!("mesh@{}", pair.client.host.v4());
        assert!(
            text.starts_with(&user) && 100_000 < text.len(),
            "{protocol}: {text:.100}"
        );
    }
}

#[test]
fn http2_passes_a_port_of_unknown_protocol() {
    let pair = Pair::new("h2_auto");
    let _server = servers::nghttpd(&pair.server.host, "h2-auto", 8081);
    let file = pair.server.host.dir().join("h2-auto/www/index.html");
    std::fs::write(file, "over h2\n").unwrap();
    pair.declare("h2-auto", 8081, "auto");
    let url = format!("http://{}:8081/", mesh_name("h2-auto"));
    let text = pair.ok(&format!("curl -sS -m 20 --http2-prior-knowledge {url}"));
    assert_eq!(text, "over h2\n");
    let text = pair.ok(&format!("h2load -n 2000 -c 4 -m 50 {url}"));
    assert!(text.contains("2000 succeeded, 0 failed"), "{text}");
}

/// Each direction ends on its own: the server answers after the client has said that it is done.
#[test]
fn half_closed_connections_go_on() {
    const SERVER: &str = "\
import hashlib, socket, threading
def serve(c):
    digest, data = hashlib.sha256(), c.recv(65536)
    while data:
        digest.update(data)
        data = c.recv(65536)
    c.sendall(digest.hexdigest().encode() + b'x' * 1000000)
    c.close()
s = socket.create_server(('0.0.0.0', 9000))
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";
    const CLIENT: &str = "\
import hashlib, os, socket
c = socket.create_connection(('sink.shop.mesh.internal', 9000), 20)
data = os.urandom(3000000)
c.sendall(data)
c.shutdown(socket.SHUT_WR)
got = b''
while True:
    part = c.recv(65536)
    if not part: break
    got += part
assert got == hashlib.sha256(data).hexdigest().encode() + b'x' * 1000000, len(got)
print('ok')
";
    for protocol in ["tcp", "auto"] {
        let pair = Pair::new(&format!("half_close_{protocol}"));
        let server = &pair.server.host;
        let _sink = server.python("sink", SERVER).cgroup("sink").spawn("sink");
        server.wait_listening(9000, SOON);
        pair.declare("sink", 9000, protocol);
        let text = pair
            .client
            .host
            .python("half", CLIENT)
            .cgroup("client")
            .ok();
        assert_eq!(text, "ok\n", "{protocol}");
    }
}

/// The mesh's TLS is around the application's own, not instead of it.
#[test]
fn an_applications_own_tls_passes_inside() {
    let pair = Pair::new("own_tls");
    let host = &pair.server.host;
    let dir = host.subdir("secure", None);
    host.ok(&format!(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=app.test -keyout {0}/key -out {0}/cert",
        dir.display()
    ));
    let line = format!(
        "exec openssl s_server -quiet -accept 8443 -cert {0}/cert -key {0}/key -www",
        dir.display()
    );
    let _server = host.cmd(&line).cgroup("secure").spawn("secure");
    host.wait_listening(8443, SOON);
    pair.declare("secure", 8443, "auto");
    let text = pair.ok(&format!(
        "curl -sS -m 20 --cacert {}/cert --connect-to app.test:443:{}:8443 https://app.test/",
        dir.display(),
        mesh_name("secure")
    ));
    assert!(text.contains("TLSv1.3"), "{text}");
}
