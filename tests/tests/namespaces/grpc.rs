//! gRPC as its own library speaks it: all forms of calls, and refusals as statuses.

use meshwork_tests::wait::{SOON, check, wait_until};

use crate::pair::Pair;

const SERVER: &str = "\
import grpc
from concurrent import futures
def upper(request, context):
    context.set_trailing_metadata((('x-length', str(len(request))), ('x-raw-bin', b'\\x00\\xff')))
    return request.upper()
def collect(requests, context): return b'+'.join(requests)
def split(request, context):
    for word in request.split(b'+'): yield word
def chat(requests, context):
    for request in requests: yield request[::-1]
def fail(request, context): context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'not today')
def hang(requests, context):
    context.add_callback(lambda: print('ended', flush=True))
    for request in requests: pass
    return b''
handlers = {
    'Upper': grpc.unary_unary_rpc_method_handler(upper),
    'Collect': grpc.stream_unary_rpc_method_handler(collect),
    'Split': grpc.unary_stream_rpc_method_handler(split),
    'Chat': grpc.stream_stream_rpc_method_handler(chat),
    'Fail': grpc.unary_unary_rpc_method_handler(fail),
    'Hang': grpc.stream_unary_rpc_method_handler(hang),
}
server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('t.T', handlers),))
server.add_insecure_port('0.0.0.0:50051')
server.start()
server.wait_for_termination()
";

const CALLS: &str = "\
import grpc, threading
with grpc.insecure_channel('greeter.shop.mesh.internal:50051') as channel:
    upper = channel.unary_unary('/t.T/Upper')
    reply, call = upper.with_call(b'a' * 1000000, timeout=20)
    assert reply == b'A' * 1000000
    trailers = dict(call.trailing_metadata())
    assert trailers['x-length'] == '1000000' and trailers['x-raw-bin'] == b'\\x00\\xff', trailers
    for n in range(200): assert upper(b'x%d' % n, timeout=20) == b'X%d' % n
    assert channel.stream_unary('/t.T/Collect')(iter([b'a', b'', b'c' * 100000]), timeout=20) == b'a++' + b'c' * 100000
    assert list(channel.unary_stream('/t.T/Split')(b'a+b+' + b'c' * 100000, timeout=20)) == [b'a', b'b', b'c' * 100000]
    words = [b'abc', b'', b'xyz' * 10000]
    assert list(channel.stream_stream('/t.T/Chat')(iter(words), timeout=20)) == [w[::-1] for w in words]
    # Each answer comes before the next question is asked.
    asked = threading.Semaphore(0)
    def questions():
        for word in words:
            yield word
            assert asked.acquire(timeout=20)
    for n, reply in enumerate(channel.stream_stream('/t.T/Chat')(questions(), timeout=20)):
        assert reply == words[n][::-1]
        asked.release()
    try:
        channel.unary_unary('/t.T/Fail')(b'', timeout=20)
        raise AssertionError('it did not fail')
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION and error.details() == 'not today', error
        assert 'x-meshwork-reason' not in dict(error.initial_metadata() or ()), 'the status of the app is its own'
    stop = threading.Event()
    def never():
        yield b'x'
        stop.wait()
    call = channel.stream_unary('/t.T/Hang').future(never(), timeout=2)
    try:
        call.result()
        raise AssertionError('it did not end')
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    stop.set()
print('ok')
";

const REFUSED: &str = "\
import grpc
with grpc.insecure_channel('greeter.shop.mesh.internal:50051') as channel:
    try:
        channel.unary_unary('/t.T/Upper')(b'x', timeout=20)
        print('answered')
    except grpc.RpcError as error:
        metadata = dict(error.initial_metadata() or ()) | dict(error.trailing_metadata() or ())
        print(error.code().name, metadata.get('x-meshwork-reason'), '|', error.details())
";

const ONLY_BOSS: &str = "\
apiVersion: meshwork.io/v1alpha1
kind: Policy
metadata: {name: only-boss, namespace: shop}
spec:
  rules:
  - name: boss
    from: [{identity: shop/boss}]
";

#[test]
fn every_form_of_call_and_its_end_pass() {
    let pair = Pair::new("grpc_calls");
    let server = &pair.server.host;
    let greeter = server.python("greeter", SERVER).cgroup("greeter");
    let greeter = greeter.spawn("greeter");
    server.wait_listening(50051, SOON);
    pair.declare("greeter", 50051, "grpc");
    let calls = pair.client.host.python("calls", CALLS).cgroup("client");
    assert_eq!(calls.deadline(SOON * 2).ok(), "ok\n");
    wait_until("the server to hear that a call was given up", SOON, || {
        check(greeter.log().contains("ended"), greeter.log())
    });
    // 201 of `Upper`, one each of `Collect` and `Split` and two of `Chat` went well; `Fail` is FAILED_PRECONDITION.
    for (agent, direction) in [(&pair.client, "Outbound"), (&pair.server, "Inbound")] {
        for (status, expected) in [("0", 205.0), ("9", 1.0)] {
            let labels = [
                ("direction", direction),
                ("dst", "shop/greeter"),
                ("grpc_status", status),
            ];
            let count = agent.metrics().sum("mesh_grpc_responses_total", &labels);
            assert_eq!(count, expected, "{direction} {status}");
        }
    }
}

#[test]
fn a_refusal_is_a_grpc_status_with_its_reason() {
    let pair = Pair::new("grpc_refusals");
    let server = &pair.server.host;
    let greeter = server.python("greeter", SERVER).cgroup("greeter");
    let greeter = greeter.spawn("greeter");
    server.wait_listening(50051, SOON);
    pair.declare("greeter", 50051, "grpc");
    let call = || {
        pair.client
            .host
            .python("refused", REFUSED)
            .cgroup("client")
            .ok()
    };
    assert_eq!(call(), "answered\n");
    pair.control.apply(ONLY_BOSS).ok();
    wait_until("the denial", SOON, || {
        let text = call();
        check(
            text.starts_with("PERMISSION_DENIED not_allowed | not_allowed: no rule"),
            text,
        )
    });
    let labels = [("direction", "Outbound"), ("grpc_status", "7")];
    let denied = pair
        .client
        .metrics()
        .sum("mesh_grpc_responses_total", &labels);
    assert!(1.0 <= denied, "{denied}");
    pair.control.meshctl("delete policy only-boss -n shop").ok();
    wait_until("the call to be allowed again", SOON, || {
        let text = call();
        check(text == "answered\n", text)
    });
    greeter.kill9();
    wait_until("the refusal without a server", SOON, || {
        let text = call();
        check(
            text.starts_with("UNAVAILABLE ") && text.contains(" | "),
            text,
        )
    });
}
