//! A worker's end of the socket to its parent (docs/protocol.md): frames, whole ones after each other,
//! whichever thread sends them.
//!
//! The engine's own thread tells most of its news here itself. Another thread that had to be woken for
//! that would take a core from those who compute, and find its code out of the caches.

use std::io::{self, Write};
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use crate::context::message::Event;

pub struct Wire {
    stream: Mutex<UnixStream>,
}

impl Wire {
    /// Over a socket that somebody else owns and closes.
    pub fn over(socket: RawFd) -> io::Result<Wire> {
        // SAFETY: it is open for the length of this call, or the copy fails.
        let copy = unsafe { BorrowedFd::borrow_raw(socket) }.try_clone_to_owned()?;
        Ok(Wire { stream: Mutex::new(copy.into()) })
    }

    pub fn send<'a>(&self, parts: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        parts.into_iter().try_for_each(|part| stream.write_all(part))
    }

    /// Sends the news of a step. Of an event that is more than text and tokens, no more is told.
    pub fn tell(&self, events: &[Event]) -> io::Result<()> {
        let mut frame = b"\0\0\0\0{\"events\":[".to_vec();
        for (index, event) in events.iter().enumerate() {
            let told = (event.id, &event.text, &event.tokens);
            frame.extend_from_slice(if index > 0 { b"," } else { b"" });
            serde_json::to_writer(&mut frame, &told)?;
        }
        frame.extend_from_slice(b"]}");
        let length = u32::try_from(frame.len() - 4).map_err(io::Error::other)?;
        frame[..4].copy_from_slice(&length.to_be_bytes());
        self.send([&*frame])
    }
}
