//! What we ask of the owner thread, and what we are told: the whole protocol on one page.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::sampler::Breakers;
use crate::config::GenerationConfig;
use crate::constraint::Guide;
use crate::error::Error;

#[allow(clippy::large_enum_variant)] // one is moved per request
pub enum Command {
    Add(Request),
    Abort(u64),
    /// What was pinned for this request may go like anything else.
    Unpin(u64),
    /// Asks for the state of the slot that holds the longest beginning of these tokens.
    Export {
        tokens: Vec<i32>,
        reply: Sender<Option<Exported>>,
    },
    /// Gives the prompt cache a state; the answer says whether it could be kept.
    Import {
        exported: Exported,
        reply: Sender<bool>,
    },
    /// Every request gets a last event, then the thread ends.
    Close,
    /// For tests: the next step that computes something panics.
    Panic,
    /// For tests: the next step that computes something never ends.
    Hang,
}

/// What a slot holds: the tokens, and their keys and values as llama.cpp writes them down.
pub struct Exported {
    pub tokens: Vec<i32>,
    pub state: Vec<u8>,
}

/// A request that was found sound: its prompt is tokenized and fits the context.
pub struct Request {
    pub id: u64,
    pub prompt: Vec<i32>,
    /// Tokens of the prompt that were dropped because it did not fit.
    pub dropped: usize,
    pub config: GenerationConfig,
    /// Of the strings in the config.
    pub breakers: Arc<Breakers>,
    /// Of the constraint in the config.
    pub guide: Option<Guide>,
    pub submitted: Instant,
    /// Where its events go: the context's own outbox, or that of a caller who waits for it alone.
    pub outbox: Arc<Outbox>,
}

/// News of one request. Each request gets exactly one event whose `end` is set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Event {
    pub id: u64,
    /// Whole characters only.
    pub text: String,
    /// Without the token that ended the generation.
    pub tokens: Vec<i32>,
    /// For each of them, where they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    pub end: Option<End>,
}

#[derive(Debug, Clone)]
pub struct End {
    pub reason: FinishReason,
    pub stop: Option<String>,
    pub error: Option<Error>,
    pub stats: Stats,
}

/// What the model thought of a chosen token and of the likeliest ones, before any sampler.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub chosen: Logprob,
    pub top: Vec<Logprob>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Logprob {
    pub token: i32,
    pub text: String,
    pub logprob: f32,
}

impl PartialEq for End {
    fn eq(&self, other: &End) -> bool {
        let error = |end: &End| end.error.as_ref().map(ToString::to_string);
        self.reason == other.reason && self.stop == other.stop && error(self) == error(other)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or a stop string came.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    Cancelled,
    Error,
}

impl FinishReason {
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error => "error",
        }
    }
}

/// Times are milliseconds; those up to an event are counted from `submitted`. A gap is the time
/// between one token and the next.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub dropped_tokens: usize,
    pub generated_tokens: usize,
    pub n_ctx: usize,
    pub seed: i64,
    pub queue_ms: f64,
    pub prompt_ms: f64,
    pub first_token_ms: f64,
    pub decode_ms: f64,
    pub total_ms: f64,
    pub gap_p50_ms: f64,
    pub gap_p99_ms: f64,
}

/// Where events wait for their reader. The writer never waits, unless a tap does.
#[derive(Default)]
pub struct Outbox {
    state: Mutex<OutboxState>,
    filled: Condvar,
    tap: OnceLock<Tap>,
}

/// Hears events in the writer's thread, and gives those back that are to be posted.
pub type Tap = Box<dyn Fn(Vec<Event>) -> Vec<Event> + Send + Sync>;

#[derive(Default)]
struct OutboxState {
    events: VecDeque<Event>,
    closed: bool,
}

impl Outbox {
    pub fn post(&self, events: impl IntoIterator<Item = Event>) {
        let mut events = events.into_iter().collect();
        if let Some(tap) = self.tap.get() {
            events = tap(events);
        }
        if !events.is_empty() {
            self.lock().events.extend(events);
            self.filled.notify_one();
        }
    }

    /// For good: another tap later is ignored.
    pub fn tap(&self, tap: Tap) {
        let _ = self.tap.set(tap);
    }

    /// What has been posted can still be taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
    }

    /// Sleeps until there is something. An empty list means closed.
    pub fn take(&self) -> Vec<Event> {
        let mut state = self.lock();
        while state.events.is_empty() && !state.closed {
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.events.drain(..).collect()
    }

    /// Like `take`, but an empty list may also mean that nothing came in time.
    pub fn take_within(&self, time: std::time::Duration) -> Vec<Event> {
        let state = self.lock();
        let idle = |state: &mut OutboxState| state.events.is_empty() && !state.closed;
        let waited = self.filled.wait_timeout_while(state, time, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.events.drain(..).collect()
    }

    fn lock(&self) -> MutexGuard<'_, OutboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
