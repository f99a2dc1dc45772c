//! What a worker tells: whole frames, whichever thread sends them.
#![cfg(unix)]

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::thread;

use serde_json::{Value, json};
use tabagent_model::context::message::{Event, Outbox};
use tabagent_model::wire::Wire;

fn event(id: u64, text: &str, tokens: &[i32]) -> Event {
    Event { id, text: text.into(), tokens: tokens.to_vec(), ..Event::default() }
}

fn connected() -> (Wire, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Wire::over(ours.as_raw_fd()).unwrap(), theirs) // ours is closed, its copy is not
}

fn frame(stream: &mut UnixStream) -> Value {
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn the_news_of_a_step_are_one_frame() {
    let (wire, mut stream) = connected();
    let text = "\"Ünï\" \\ 字 🙂\n\t\0\u{7f}\u{2028}";
    wire.tell(&[event(7, text, &[1, -2]), event(1 << 60, "", &[])]).unwrap();
    assert_eq!(frame(&mut stream), json!({"events": [[7, text, [1, -2]], [1u64 << 60, "", []]]}));
}

#[test]
fn frames_of_several_threads_do_not_mix() {
    let (wire, mut stream) = connected();
    let long = "x".repeat(100_000); // more than a socket takes at once
    thread::scope(|scope| {
        for id in 0..4 {
            let (wire, long) = (&wire, &long);
            scope.spawn(move || {
                for _ in 0..20 {
                    wire.tell(&[event(id, long, &[])]).unwrap();
                    wire.send([&b"\0\0\0\x05"[..], b"[1", b",2]"]).unwrap();
                }
            });
        }
        let frames = (0..160).map(|_| frame(&mut stream));
        assert_eq!(frames.filter(|frame| *frame == json!([1, 2])).count(), 80);
    });
}

#[test]
fn a_parent_that_is_gone_is_an_error() {
    let (wire, stream) = connected();
    drop(stream);
    wire.tell(&[event(1, "a", &[])]).unwrap_err();
}

#[test]
fn what_a_tap_keeps_waits_for_nobody() {
    let (sender, kept) = channel();
    let outbox = Outbox::default();
    outbox.post([event(1, "before", &[])]);
    outbox.tap(Box::new(move |events| {
        let (keeps, rest): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event.id == 1);
        keeps.into_iter().for_each(|event| sender.send(event).unwrap());
        rest
    }));
    outbox.post([event(1, "a", &[]), event(2, "b", &[])]);
    outbox.post([event(1, "c", &[])]);
    outbox.close();
    assert_eq!(outbox.take(), [event(1, "before", &[]), event(2, "b", &[])]);
    assert_eq!(outbox.take(), []);
    assert_eq!(kept.try_iter().collect::<Vec<_>>(), [event(1, "a", &[]), event(1, "c", &[])]);
}
