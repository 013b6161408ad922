//! The agent of a called host is stopped while calls are open: they end whole, and who comes now goes elsewhere at once. What
//! is open for longer than is allowed is reset, with the reason.

use meshwork_tests::control::TokenOptions;
use meshwork_tests::process::Process;
use meshwork_tests::wait::{SOON, check, wait_until};

use crate::bounds::reached;
use crate::http2;
use crate::limits::{ECHO, HTTP, Open, PORTS, Rig, answer, app};
use crate::pair::owner;

/// What is open to the server: a connection of bytes, an HTTP/1 request that waits for its answer, an HTTP/2 tunnel.
pub(crate) struct Calls {
    pub(crate) bytes: Open,
    request: Process,
    tunnel: Process,
}

const TUNNEL: &str = "\
c = Client()
stream = c.h2.get_next_available_stream_id()
c.h2.send_headers(stream, [(':method', 'CONNECT'), (':authority', 'echo:80')])
c.flush()
c.read(stream, lambda event: isinstance(event, ev.ResponseReceived))
print('open', flush=True)
if 'GO' in os.environ:
    while not os.path.exists(os.environ['GO']): time.sleep(0.01)
    c.h2.send_data(stream, b'still here', end_stream=True)
    c.flush()
print('ended', *c.read(stream)[1::3], flush=True)
";

impl Calls {
    #[track_caller]
    pub(crate) fn begin(rig: &Rig, goes_on: bool) -> Self {
        let bytes = rig.open("bytes", "client");
        let request = rig.curl("/wait/drained").spawn("request");
        rig.wait_said("GET /wait/drained", 1);
        let mut tunnel = http2::script(&rig.pair, "tunnel", TUNNEL);
        if goes_on {
            tunnel = tunnel.env("GO", &bytes.go.display().to_string());
        }
        let tunnel = tunnel.spawn("tunnel");
        wait_until("the tunnel", SOON, || {
            check(tunnel.log().contains("open"), tunnel.log())
        });
        Self {
            bytes,
            request,
            tunnel,
        }
    }

    #[track_caller]
    pub(crate) fn wait_ends(&self, bytes: &str, request: &str, tunnel: &str) {
        self.bytes.wait(bytes);
        wait_until("the request to end", SOON, || {
            let got = answer(&self.request.log());
            check(got == request, got)
        });
        wait_until("the tunnel to end", SOON, || {
            let log = self.tunnel.log();
            check(log.contains(&format!("ended {tunnel}\n")), log)
        });
    }
}

/// A rig whose server has HTTP/2 beside the app, and drains for so long.
#[track_caller]
fn rig(name: &str, drain_s: u32) -> (Rig, Process) {
    let rig = Rig::new(name, "", &format!("[timeouts]\ndrain_s = {drain_s}\n"));
    let server = http2::serve(&rig.pair.server.host, &[]);
    rig.pair.declare("h2", 8080, "http2");
    (rig, server)
}

/// Waits until the server's agent has said this.
#[track_caller]
fn wait_server(rig: &Rig, what: &str) -> String {
    wait_until(&format!("the agent to say `{what}`"), SOON, || {
        let log = rig.pair.server.log();
        check(log.contains(what), log.clone()).map(|()| log)
    })
}

#[test]
fn a_stopped_agent_lets_calls_end_and_new_ones_go_elsewhere_at_once() {
    let (mut rig, _h2) = rig("drain_ends_whole", 60);
    let calls = Calls::begin(&rig, true);
    let second = rig.pair.site.host("second");
    let second = rig.pair.control.join(&second, &TokenOptions::default());
    let _app = app(&second.host, "app", ECHO, HTTP);
    second.serve("app", &owner("app"), &PORTS);
    rig.pair.control.wait_endpoints("shop/app", 2);
    wait_until("both to answer", SOON, || {
        let got = rig.get("/");
        check(got == "second", got)
    });
    rig.pair.server.begin_stop();
    wait_server(&rig, "takes no new calls");
    for _ in 0..10 {
        assert_eq!(rig.get("/"), "second");
        assert_eq!(rig.once("client", "app", ECHO), "open");
    }
    let client = &rig.pair.client;
    assert_eq!(reached(client, "handshake"), 0.0, "nobody waits for it");
    assert_eq!(calls.tunnel.log(), "open\n");
    rig.answer("drained");
    calls.bytes.go();
    calls.wait_ends("went on to its end", "server", "b'STILL HERE' end");
    let log = wait_server(&rig, "the worker ended");
    assert!(!log.contains("what is still open is cut"), "{log}");
    rig.pair.server.stop();
    assert_eq!(rig.get("/"), "second");
}

#[test]
fn what_is_open_after_the_drain_is_reset_with_its_reason() {
    let (mut rig, _h2) = rig("drain_cuts", 8);
    let calls = Calls::begin(&rig, false);
    rig.pair.server.begin_stop();
    wait_server(&rig, "takes no new calls");
    assert_eq!(rig.get("/"), "503 draining", "there is no other endpoint");
    let client = &rig.pair.client;
    wait_until("three calls to be cut", SOON, || {
        let cut = client.refused("agent_stopped");
        check(cut == 3.0, format!("{cut}"))
    });
    calls.bytes.go();
    calls.wait_ends("ConnectionResetError", "502 agent_stopped", "b'' 2");
    let log = wait_server(&rig, "the worker ended");
    for what in ["limit=drain", "reason=agent_stopped", "calls=3"] {
        assert!(log.contains(what), "{what}: {log}");
    }
    rig.pair.server.stop();
    // The app had the request, and saw that nobody waits for the answer. It was not sent again.
    rig.answer("drained");
    rig.wait_said("cut", 1);
    assert_eq!(rig.app.log().matches("GET /wait/drained").count(), 1);
}

/// The operator takes a service of one host out: others answer in its place, what is open ends by itself, and it stays out over a
/// restart until it is put back.
#[test]
fn a_drained_service_is_called_no_more_and_what_is_open_ends_whole() {
    let (mut rig, _h2) = rig("drain_service", 60);
    let second = rig.pair.site.host("second");
    let second = rig.pair.control.join(&second, &TokenOptions::default());
    let _app = app(&second.host, "app", ECHO, HTTP);
    let bytes = rig.open("bytes", "client");
    let request = rig.curl("/wait/drained").spawn("request");
    rig.wait_said("GET /wait/drained", 1);
    second.serve("app", &owner("app"), &PORTS);
    rig.pair.control.wait_endpoints("shop/app", 2);
    let refused = rig.pair.server.command("drain shop/none");
    assert_eq!(refused.code(), 2, "{refused}");
    let late = rig.pair.server.command("drain shop/app --wait 1s");
    assert_eq!(late.code(), 1, "{late}");
    assert!(late.stderr.contains("2 calls are still open"), "{late}");
    rig.pair.control.wait_endpoints("shop/app", 1);
    wait_until("the second to answer alone", SOON, || {
        let got = rig.get("/");
        check(got == "second", got)
    });
    for _ in 0..10 {
        assert_eq!(rig.get("/"), "second");
    }
    rig.answer("drained");
    bytes.goes_on();
    let said = rig.pair.server.command("drain shop/app --wait 20s").ok();
    assert_eq!(said, "shop/app: not listed, and no call is open\n");
    wait_until("the answer", SOON, || {
        let got = answer(&request.log());
        check(got == "server", got)
    });
    rig.pair.server.stop();
    rig.pair.server.start();
    let status = rig.pair.server.command("status").ok();
    assert!(status.contains("draining"), "{status}");
    rig.pair.control.wait_endpoints("shop/app", 1);
    rig.pair.server.command("undrain").ok();
    rig.pair.control.wait_endpoints("shop/app", 2);
}
