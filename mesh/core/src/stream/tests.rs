//! The stream machine's rules one by one; all at once in [`simulation`].

mod simulation;

use super::*;

const SMALL: Limits = Limits {
    max_streams: 5,
    stream_credit: 4096,
    connection_credit: 8192,
    max_frame: 1024,
};

fn pair() -> (Machine, Machine) {
    let mut client = Machine::new(Side::Client, SMALL);
    let mut server = Machine::new(Side::Server, SMALL);
    let hello = client.poll_control().unwrap();
    assert_eq!(server.handle(&hello), Ok(Event::Ready));
    let hello = server.poll_control().unwrap();
    assert_eq!(client.handle(&hello), Ok(Event::Ready));
    (client, server)
}

fn data(stream: u32, data: &[u8], end: bool) -> Frame<'_> {
    Frame::Data { stream, data, end }
}

#[test]
fn hello_comes_first_and_once() {
    let mut server = Machine::new(Side::Server, SMALL);
    assert_eq!(
        server.handle(&Frame::Ping { nonce: 1 }),
        Err(Violation::Hello)
    );
    let (mut client, _) = pair();
    let again = Frame::Hello {
        version: VERSION,
        limits: SMALL,
    };
    assert_eq!(client.handle(&again), Err(Violation::Hello));
}

#[test]
fn a_stream_is_over_when_both_sides_ended() {
    let (mut client, mut server) = pair();
    let id = client.open().unwrap();
    server
        .handle(&Frame::Open {
            stream: id,
            header: &[],
        })
        .unwrap();
    client.sent(id, 3, true);
    assert_eq!(
        server.handle(&data(id, b"abc", true)),
        Ok(Event::Data {
            stream: id,
            end: true
        })
    );
    assert_eq!(
        server.handle(&data(id, b"", true)),
        Err(Violation::AfterEnd(id))
    );
    server.sent(id, 0, true);
    client.handle(&data(id, b"", true)).unwrap();
    assert_eq!((client.open_streams(), server.open_streams()), (0, 0));
    // Late frames of a stream that is over are not a violation.
    assert_eq!(
        client.handle(&Frame::Credit {
            stream: id,
            bytes: 1
        }),
        Ok(Event::None)
    );
}

#[test]
fn a_peer_that_breaks_a_bound_is_named() {
    let (_, mut server) = pair();
    assert_eq!(
        server.handle(&data(1, b"x", false)),
        Err(Violation::NeverOpened(1))
    );
    let open = |stream| Frame::Open {
        stream,
        header: &[],
    };
    assert_eq!(server.handle(&open(2)), Err(Violation::OpenOrder(2)));
    for n in 0..SMALL.max_streams {
        server.handle(&open(n * 2 + 1)).unwrap();
    }
    let next = SMALL.max_streams * 2 + 1;
    assert_eq!(server.handle(&open(next)), Err(Violation::TooManyStreams));
    let left_out = Err(Violation::OpenOrder(next + 2));
    assert_eq!(server.handle(&open(next + 2)), left_out);
    assert_eq!(server.handle(&open(1)), Err(Violation::OpenOrder(1)));
    let bulk = [0; 4097];
    assert_eq!(
        server.handle(&data(1, &bulk, false)),
        Err(Violation::StreamCredit(1))
    );
    let credit = Frame::Credit {
        stream: 0,
        bytes: u32::MAX,
    };
    assert_eq!(server.handle(&credit), Err(Violation::CreditOverflow));
}

#[test]
fn a_ping_flood_is_bounded() {
    let (_, mut server) = pair();
    let mut outcome = Ok(Event::None);
    for nonce in 0..=CONTROL_QUEUE_MAX as u64 {
        outcome = server.handle(&Frame::Ping { nonce });
    }
    assert_eq!(outcome, Err(Violation::ControlFlood));
}

#[test]
fn going_away_refuses_new_streams_and_keeps_old_ones() {
    let (mut client, mut server) = pair();
    let old = client.open().unwrap();
    server
        .handle(&Frame::Open {
            stream: old,
            header: &[],
        })
        .unwrap();
    server.go_away(Reason::Draining);
    let late = client.open().unwrap();
    assert_eq!(
        server.handle(&Frame::Open {
            stream: late,
            header: &[]
        }),
        Ok(Event::None)
    );
    while let Some(frame) = server.poll_control() {
        client.handle(&frame).unwrap();
    }
    assert_eq!(client.open(), Err(OpenError::GoingAway));
    assert_eq!(client.open_streams(), 1);
    assert!(client.send_capacity(old) > 0);
}

/// However many readers stand still, a stream that comes gets its bytes through, and nothing is lost for later.
#[test]
fn readers_that_stand_still_leave_something_for_each_new_stream() {
    let limits = Limits {
        max_streams: 4096,
        ..Limits::DEFAULT
    };
    let mut client = Machine::new(Side::Client, limits);
    let mut server = Machine::new(Side::Server, limits);
    let hello = client.poll_control().unwrap();
    server.handle(&hello).unwrap();
    let hello = server.poll_control().unwrap();
    client.handle(&hello).unwrap();
    let zeros = vec![0; limits.max_frame as usize];
    let mut standing = Vec::new();
    for number in 0..1000 {
        let stream = client.open().unwrap();
        let header = &[];
        server.handle(&Frame::Open { stream, header }).unwrap();
        let first = client.send_capacity(stream);
        assert!(first >= 1024, "stream {number} may send {first}");
        let mut unread = 0;
        loop {
            let bytes = client.send_capacity(stream);
            if bytes == 0 {
                break;
            }
            client.sent(stream, bytes, false);
            server
                .handle(&data(stream, &zeros[..bytes], false))
                .unwrap();
            unread += bytes;
        }
        standing.push((stream, unread));
        // One that is read goes on as if nobody stood beside it.
        if number % 100 == 0 {
            small_calls(&mut client, &mut server, &zeros);
        }
    }
    for (stream, unread) in standing {
        server.consumed(stream, unread);
    }
    deliver(&mut server, &mut client);
    let stream = client.open().unwrap();
    assert_eq!(client.send_capacity(stream), zeros.len());
}

/// Streams of 64 KiB, read as it comes.
fn small_calls(client: &mut Machine, server: &mut Machine, zeros: &[u8]) {
    for _ in 0..20 {
        let stream = client.open().unwrap();
        let header = &[];
        server.handle(&Frame::Open { stream, header }).unwrap();
        let mut left = 64 * 1024;
        while left > 0 {
            let bytes = client.send_capacity(stream).min(left);
            assert!(bytes > 0, "{left} bytes wait for nobody");
            left -= bytes;
            client.sent(stream, bytes, left == 0);
            let frame = data(stream, &zeros[..bytes], left == 0);
            server.handle(&frame).unwrap();
            server.consumed(stream, bytes);
            deliver(server, client);
        }
        server.reset(stream, Reason::Cancelled);
        deliver(server, client);
    }
}

fn deliver(from: &mut Machine, to: &mut Machine) {
    while let Some(frame) = from.poll_control() {
        to.handle(&frame).unwrap();
    }
}
