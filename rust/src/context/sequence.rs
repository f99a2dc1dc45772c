//! One request on its way: tokens, stop rules, bytes becoming text.

use std::sync::Arc;
use std::time::Instant;

use super::message::{End, Event, FinishReason, Logprob, Outbox, Request, Stats, TokenLogprobs};
use super::runner::Runner;
use super::sampler::Sampler;
use super::text::TextStream;
use crate::config::Priority;
use crate::error::Error;

/// The tokens of one request, in three parts:
///
///     [0, cached)          found in the slot, computed for an earlier request
///     [cached, computed)   computed for this one
///     [computed, len)      waiting: the rest of the prompt, or the token sampled last
pub struct Sequence {
    pub id: u64,
    pub tokens: Vec<i32>,
    pub computed: usize,
    pub slot: Option<usize>,
    pub priority: Priority,
    num_prompt: usize,
    cached: usize,
    max_tokens: usize,
    min_tokens: usize,
    ignores_end: bool,
    stop_tokens: Vec<i32>,
    n_ctx: usize,
    sampler: Sampler,
    logprobs: Option<Vec<TokenLogprobs>>,
    text: TextStream,
    news: Event,
    deadline: Option<Instant>,
    times: Times,
    outbox: Arc<Outbox>,
}

struct Times {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
}

impl Sequence {
    pub fn new(request: Request, n_ctx: usize) -> Sequence {
        let Request { id, prompt, mut config, breakers, submitted, outbox } = request;
        let stops = std::mem::take(&mut config.stop);
        Sequence {
            id,
            num_prompt: prompt.len(),
            computed: 0,
            cached: 0,
            slot: None,
            priority: config.priority,
            max_tokens: usize::try_from(config.max_tokens).unwrap_or(usize::MAX),
            min_tokens: config.min_tokens as usize,
            ignores_end: config.ignore_eos,
            stop_tokens: std::mem::take(&mut config.stop_tokens),
            deadline: config.timeout.and_then(|timeout| submitted.checked_add(timeout)),
            logprobs: config.logprobs.map(|_| Vec::new()),
            sampler: Sampler::new(config, breakers, n_ctx),
            tokens: prompt,
            n_ctx,
            text: TextStream::new(stops),
            news: Event { id, ..Event::default() },
            times: Times { submitted, started: None, first_token: None },
            outbox,
        }
    }

    pub fn start(&mut self, slot: usize, cached: usize, now: Instant) {
        self.slot = Some(slot);
        self.computed = cached;
        self.cached = cached;
        self.times.started.get_or_insert(now);
    }

    /// Back to the queue; what was computed is lost, what was generated is not.
    pub fn stop(&mut self) {
        self.slot = None;
        self.computed = 0;
        self.cached = 0;
    }

    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.num_prompt
    }

    pub fn is_overdue(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    pub fn timeout_error(&self) -> Error {
        let allowed = self.deadline.map(|deadline| deadline - self.times.submitted);
        Error::GenerationTimeout {
            seconds: allowed.unwrap_or_default().as_secs_f64(),
            generated: self.num_generated() as u64,
        }
    }

    /// Nothing was asked for, so nothing needs to be computed.
    pub fn wants_nothing(&self) -> bool {
        self.max_tokens == 0
    }

    /// Takes the next token from the logits. `Some` says that it was the last step.
    pub fn advance(
        &mut self,
        logits: &[f32],
        end_tokens: &[i32],
        runner: &impl Runner,
        now: Instant,
    ) -> Option<Ending> {
        let is_early = self.num_generated() < self.min_tokens;
        let ends: &[i32] = if is_early || self.ignores_end { end_tokens } else { &[] };
        let stops: &[i32] = if is_early { &self.stop_tokens } else { &[] };
        let banned = ends.iter().chain(stops).copied();
        let token = match self.sampler.sample(logits, &self.tokens, banned) {
            Ok(token) => token,
            Err(error) => return Some(Ending::Failed(error)),
        };
        self.times.first_token.get_or_insert(now);
        if end_tokens.contains(&token) || self.stop_tokens.contains(&token) {
            return Some(Ending::Stop(None));
        }
        self.note_logprobs(logits, token, runner);
        self.tokens.push(token);
        self.news.tokens.push(token);
        let mut bytes = Vec::with_capacity(16);
        if let Err(error) = runner.piece(token, &mut bytes) {
            return Some(Ending::Failed(error));
        }
        let (text, stop) = self.text.push(&bytes);
        self.news.text.push_str(&text);
        if stop.is_some() {
            return Some(Ending::Stop(stop));
        }
        let is_full = self.tokens.len() >= self.n_ctx;
        (self.num_generated() >= self.max_tokens || is_full).then_some(Ending::Length)
    }

    fn note_logprobs(&mut self, logits: &[f32], token: i32, runner: &impl Runner) {
        let Some(all) = &mut self.logprobs else { return };
        let Some((logprob, top)) = self.sampler.logprobs(logits, token) else { return };
        let with_text = |(token, logprob)| {
            let mut text = Vec::new();
            let _ = runner.name(token, &mut text); // what has no text is known by its id
            let text = String::from_utf8_lossy(&text).into_owned();
            Logprob { token, text, logprob }
        };
        let top = top.into_iter().map(with_text).collect();
        all.push(TokenLogprobs { chosen: with_text((token, logprob)), top });
    }

    /// What is new since the last time, if anything is.
    pub fn take_news(&mut self) -> Option<Event> {
        if self.news.text.is_empty() && self.news.tokens.is_empty() {
            return None;
        }
        Some(std::mem::replace(&mut self.news, Event { id: self.id, ..Event::default() }))
    }

    /// The last event. Text that was held back is certain now, unless a stop string cut it.
    pub fn end(&mut self, ending: Ending, now: Instant) -> Event {
        let stats = self.stats(now);
        let (reason, stop, error) = match ending {
            Ending::Stop(stop) => (FinishReason::Stop, stop, None),
            Ending::Length => (FinishReason::Length, None, None),
            Ending::Cancelled => (FinishReason::Cancelled, None, None),
            Ending::Failed(error) => (FinishReason::Error, None, Some(error)),
        };
        let mut event =
            std::mem::replace(&mut self.news, Event { id: self.id, ..Event::default() });
        if stop.is_none() {
            event.text.push_str(&self.text.finish());
        }
        let logprobs = self.logprobs.take();
        event.end = Some(End { reason, stop, error, stats, logprobs });
        event
    }

    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    fn stats(&self, now: Instant) -> Stats {
        let Times { submitted, started, first_token } = self.times;
        let until = |instant: Option<Instant>| ms(instant.unwrap_or(now) - submitted);
        let since = |instant: Option<Instant>| instant.map_or(0.0, |instant| ms(now - instant));
        Stats {
            prompt_tokens: self.num_prompt,
            cached_tokens: self.cached,
            generated_tokens: self.num_generated(),
            n_ctx: self.n_ctx,
            seed: self.sampler.seed(),
            queue_ms: until(started),
            prompt_ms: started.map_or(0.0, |started| ms(first_token.unwrap_or(now) - started)),
            first_token_ms: until(first_token),
            decode_ms: since(first_token),
            total_ms: ms(now - submitted),
        }
    }
}

pub enum Ending {
    Stop(Option<String>),
    Length,
    Cancelled,
    Failed(Error),
}

fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
