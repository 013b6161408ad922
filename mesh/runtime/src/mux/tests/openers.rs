//! Who waits for a stream, and whose turn it is.

use super::super::*;
use super::{echo, local};
use mesh_core::stream::Limits;
use tokio::io::duplex;
use tokio::task::spawn_local;

/// Who gives up idle connections must not take one away from the call that it was dialled for.
#[test]
fn a_connection_is_idle_only_when_nobody_has_or_waits_for_a_stream() {
    local(async {
        let limits = Limits {
            max_streams: 1,
            ..Limits::DEFAULT
        };
        let (a, b) = duplex(10_000);
        let (client, _, ours) = connection(a, Side::Client, limits);
        let (_, incoming, theirs) = connection(b, Side::Server, limits);
        assert!(
            !client.is_idle(),
            "it was dialled for a call that is to come"
        );
        spawn_local(ours);
        tokio::task::yield_now().await;
        assert!(!client.is_idle(), "the peer's hello is under way");
        let opening = spawn_local({
            let client = client.clone();
            async move { client.open(b"first").await.unwrap() }
        });
        spawn_local(theirs);
        spawn_local(echo(incoming));
        let first = opening.await.unwrap();
        assert!(!client.is_idle(), "it has a stream");
        let waiting = spawn_local({
            let client = client.clone();
            async move { client.open(b"second").await.unwrap() }
        });
        while client.0.borrow().opening.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert!(client.0.borrow().opening.is_empty(), "it is woken");
        assert!(!client.is_idle(), "the next stream has its place soon");
        drop(waiting.await.unwrap());
        while !client.is_idle() {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn who_waits_for_room_has_it_in_turn_and_leaves_it_to_the_next() {
    local(async {
        let limits = Limits {
            max_streams: 1,
            ..Limits::DEFAULT
        };
        let (a, b) = duplex(10_000);
        let (client, _, ours) = connection(a, Side::Client, limits);
        let (_, incoming, theirs) = connection(b, Side::Server, limits);
        spawn_local(ours);
        spawn_local(theirs);
        spawn_local(echo(incoming));
        let first = client.open(b"first").await.unwrap();
        let order = Rc::new(RefCell::new(Vec::new()));
        let mut waiting: Vec<_> = (0..4)
            .map(|number| {
                let (client, order) = (client.clone(), Rc::clone(&order));
                spawn_local(async move {
                    let opened = client.open(b"next").await;
                    order.borrow_mut().push(number);
                    opened.map(drop)
                })
            })
            .collect();
        while client.0.borrow().opening.len() < 4 {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert_eq!(client.0.borrow().opening.len(), 3, "one turn, one is woken");
        // It is given up in its turn.
        waiting.remove(0).abort();
        for one in waiting {
            one.await.unwrap().unwrap();
        }
        assert_eq!(*order.borrow(), [1, 2, 3]);
        // Nobody waits on a connection that is given up.
        let last = client.open(b"last").await.unwrap();
        let late = spawn_local({
            let client = client.clone();
            async move { client.open(b"late").await.map(drop) }
        });
        while client.0.borrow().opening.is_empty() {
            tokio::task::yield_now().await;
        }
        client.retire(Reason::Draining);
        assert_eq!(late.await.unwrap(), Err(Reason::Draining));
        drop(last);
    });
}

#[test]
fn nobody_who_comes_anew_takes_a_turn_that_was_given() {
    local(async {
        let limits = Limits {
            max_streams: 1,
            ..Limits::DEFAULT
        };
        let (a, b) = duplex(10_000);
        let (client, _, ours) = connection(a, Side::Client, limits);
        let (_, incoming, theirs) = connection(b, Side::Server, limits);
        spawn_local(ours);
        assert_eq!(client.room(), Room::Free);
        let first = spawn_local({
            let client = client.clone();
            async move { client.open(b"first").await.unwrap() }
        });
        while client.0.borrow().opening.is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(client.room(), Room::Full, "one waits for the hello");
        spawn_local(theirs);
        spawn_local(echo(incoming));
        let first = first.await.unwrap();
        let waits = spawn_local({
            let client = client.clone();
            async move { client.open(b"waits").await.unwrap() }
        });
        while client.0.borrow().opening.is_empty() {
            tokio::task::yield_now().await;
        }
        drop(first);
        assert_eq!(client.0.borrow().turns, 1);
        assert_eq!(client.room(), Room::Full, "the turn is given");
        let cx = Context::from_waker(Waker::noop());
        let mut anew = Opener::begin(&client.0);
        assert!(client.poll_open(&cx, b"anew", &mut anew).is_pending());
        drop(waits.await.unwrap());
        assert_eq!(client.0.borrow().turns, 1, "it is the newcomer's now");
        assert!(client.poll_open(&cx, b"anew", &mut anew).is_ready());
        drop(anew);
        assert_eq!(client.0.borrow().turns, 0);
        assert_eq!(client.room(), Room::Free);
    });
}
