//! One request on its way: tokens, stop rules, bytes becoming text.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{End, Event, FinishReason, Logprob, Outbox, Request, Stats, TokenLogprobs};
use super::metrics::SlotView;
use super::runner::Runner;
use super::sampler::Sampler;
use super::text::TextStream;
use crate::config::{Overflow, Priority};
use crate::error::Error;

/// The tokens of one request, in three parts:
///
///     [0, cached)          found in a slot or the prompt cache when it came into its slot
///     [cached, computed)   computed for this one
///     [computed, len)      waiting: the rest of the prompt, or the token sampled last
///
/// When the context is full, `overflow` says whether that is the end, or whether a part after the
/// first `keep` tokens is dropped and the rest moves up.
pub struct Sequence {
    pub id: u64,
    pub tokens: Vec<i32>,
    pub computed: usize,
    pub slot: Option<usize>,
    pub priority: Priority,
    /// It got its slot because it had waited for so long; nobody else may take it now.
    pub keeps_its_slot: bool,
    /// Nothing is generated; the prompt is computed and stays in the prompt cache.
    pub is_pin: bool,
    num_prompt: usize,
    num_generated: usize,
    cached: usize,
    /// The same when it came into a slot for the first time.
    reused: Option<usize>,
    dropped: usize,
    keep: usize,
    shifts: bool,
    is_shifted: bool,
    max_tokens: usize,
    min_tokens: usize,
    ignores_end: bool,
    stop_tokens: Vec<i32>,
    /// Control tokens that are part of the text.
    written: Vec<i32>,
    n_ctx: usize,
    sampler: Sampler,
    text: TextStream,
    /// The bytes of the last token.
    piece: Vec<u8>,
    news: Event,
    deadline: Option<Instant>,
    start_by: Option<Instant>,
    times: Times,
    outbox: Arc<Outbox>,
}

struct Times {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// Seconds between one token and the next.
    gaps: Vec<f32>,
}

impl Sequence {
    pub fn new(request: Request, n_ctx: usize) -> Sequence {
        let Request { id, prompt, dropped, mut config, breakers, guide, submitted, outbox } =
            request;
        let stops = std::mem::take(&mut config.stop);
        let after = |time: Option<Duration>| time.and_then(|time| submitted.checked_add(time));
        Sequence {
            id,
            num_prompt: prompt.len() + dropped,
            num_generated: 0,
            computed: 0,
            cached: 0,
            reused: None,
            dropped,
            keep: config.kept_tokens(prompt.len(), n_ctx),
            shifts: config.overflow == Overflow::Shift,
            is_shifted: false,
            slot: None,
            priority: config.priority,
            keeps_its_slot: false,
            is_pin: config.pin,
            max_tokens: usize::try_from(config.max_tokens).unwrap_or(usize::MAX),
            min_tokens: config.min_tokens as usize,
            ignores_end: config.ignore_eos,
            stop_tokens: std::mem::take(&mut config.stop_tokens),
            deadline: after(config.timeout),
            start_by: after(config.max_queue_wait),
            written: std::mem::take(&mut config.preserved_tokens),
            sampler: Sampler::new(config, breakers, n_ctx).guided_by(guide),
            tokens: prompt,
            n_ctx,
            text: TextStream::new(stops),
            piece: Vec::new(),
            news: Event { id, ..Event::default() },
            times: Times::new(submitted),
            outbox,
        }
    }

    pub fn start(&mut self, slot: usize, now: Instant) {
        self.slot = Some(slot);
        self.times.started.get_or_insert(now);
    }

    /// How much of it was in its slot. Whether it came into one for the first time.
    pub fn found(&mut self, cached: usize) -> bool {
        self.computed = cached;
        self.cached = cached;
        let is_first = self.reused.is_none();
        self.reused.get_or_insert(cached);
        is_first
    }

    /// Back to the queue; what was computed is lost, what was generated is not.
    pub fn stop(&mut self) {
        self.slot = None;
        self.compute_again();
    }

    /// In the same slot, which holds nothing of it any more.
    pub fn compute_again(&mut self) {
        self.computed = 0;
        self.cached = 0;
    }

    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What was not found in the cache.
    pub fn num_to_read(&self) -> usize {
        self.tokens.len() - self.cached
    }

    pub fn num_generated(&self) -> usize {
        self.num_generated
    }

    pub fn is_overdue(&self, now: Instant) -> bool {
        let waits = self.times.started.is_none();
        let is_over = |time: Option<Instant>| time.is_some_and(|time| now >= time);
        is_over(self.deadline) || (waits && is_over(self.start_by))
    }

    /// What to say to one that is overdue.
    pub fn timeout_error(&self, now: Instant) -> Error {
        let seconds = |end: Instant| (end - self.times.submitted).as_secs_f64();
        match (self.deadline, self.start_by) {
            (Some(deadline), _) if now >= deadline => Error::GenerationTimeout {
                seconds: seconds(deadline),
                generated: self.num_generated as u64,
            },
            (_, start_by) => Error::QueueTimeout { seconds: start_by.map_or(0.0, seconds) },
        }
    }

    /// Nothing was asked for, so nothing needs to be computed.
    pub fn wants_nothing(&self) -> bool {
        self.max_tokens == 0 && !self.is_pin
    }

    /// The computed tokens that would be computed the same way for another request: all of them,
    /// until a part was dropped before the rest.
    pub fn reusable(&self) -> &[i32] {
        let computed = self.computed.min(self.tokens.len());
        &self.tokens[..if self.is_shifted { computed.min(self.keep) } else { computed }]
    }

    pub fn is_full(&self) -> bool {
        self.tokens.len() >= self.n_ctx
    }

    /// How many tokens stay at the beginning and how many after them are dropped to make room;
    /// none where that was not asked for.
    pub fn next_shift(&self) -> Option<(usize, usize)> {
        (self.shifts && self.is_full()).then(|| (self.keep, dropped_at_once(self.n_ctx, self.keep)))
    }

    /// What comes after the gap was moved in the memory, or is to be computed again.
    pub fn shift(&mut self, keep: usize, drop: usize, is_moved: bool) {
        self.tokens.drain(keep..keep + drop);
        self.computed = if is_moved { self.computed - drop } else { keep };
        self.dropped += drop;
        self.is_shifted |= is_moved;
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
        self.times.note_token(now);
        if end_tokens.contains(&token) || self.stop_tokens.contains(&token) {
            return Some(Ending::Stop(None));
        }
        self.note_logprobs(logits, token, runner);
        self.tokens.push(token);
        self.num_generated += 1;
        self.news.tokens.push(token);
        self.piece.clear();
        let piece = match self.written.contains(&token) {
            true => runner.name(token, &mut self.piece),
            false => runner.piece(token, &mut self.piece),
        };
        if let Err(error) = piece {
            return Some(Ending::Failed(error));
        }
        let (text, stop) = self.text.push(&self.piece);
        self.news.text.push_str(&text);
        if stop.is_some() {
            return Some(Ending::Stop(stop));
        }
        if self.sampler.is_finished() {
            return Some(Ending::Stop(None)); // nothing but the end could come
        }
        let is_at_the_end = self.is_full() && !self.shifts;
        (self.num_generated >= self.max_tokens || is_at_the_end).then_some(Ending::Length)
    }

    /// The time between the last token and the one before.
    pub fn last_gap(&self) -> Option<Duration> {
        self.times.gaps.last().map(|gap| Duration::from_secs_f32(*gap))
    }

    fn note_logprobs(&mut self, logits: &[f32], token: i32, runner: &impl Runner) {
        let Some((logprob, top)) = self.sampler.logprobs(logits, token) else { return };
        let with_text = |(token, logprob)| {
            let mut text = Vec::new();
            let _ = runner.name(token, &mut text); // what has no text is known by its id
            let text = String::from_utf8_lossy(&text).into_owned();
            Logprob { token, text, logprob }
        };
        let top = top.into_iter().map(with_text).collect();
        self.news.logprobs.push(TokenLogprobs { chosen: with_text((token, logprob)), top });
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
        event.end = Some(End { reason, stop, error, stats });
        event
    }

    pub fn view(&self) -> SlotView {
        SlotView {
            request: Some(self.id),
            held_tokens: self.computed,
            prompt_tokens: self.num_prompt,
            cached_tokens: self.reused.unwrap_or(0),
            generated_tokens: self.num_generated,
        }
    }

    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    fn stats(&self, now: Instant) -> Stats {
        let Times { submitted, started, first_token, .. } = self.times;
        let until = |instant: Option<Instant>| ms(instant.unwrap_or(now) - submitted);
        let since = |instant: Option<Instant>| instant.map_or(0.0, |instant| ms(now - instant));
        let [gap_p50_ms, gap_p99_ms] = self.times.gap_percentiles([0.5, 0.99]);
        Stats {
            prompt_tokens: self.num_prompt,
            cached_tokens: self.reused.unwrap_or(0),
            dropped_tokens: self.dropped,
            generated_tokens: self.num_generated,
            n_ctx: self.n_ctx,
            seed: self.sampler.seed(),
            queue_ms: until(started),
            prompt_ms: started.map_or(0.0, |started| ms(first_token.unwrap_or(now) - started)),
            first_token_ms: until(first_token),
            decode_ms: since(first_token),
            total_ms: ms(now - submitted),
            gap_p50_ms,
            gap_p99_ms,
        }
    }
}

impl Times {
    fn new(submitted: Instant) -> Times {
        Times { submitted, started: None, first_token: None, last_token: None, gaps: Vec::new() }
    }

    fn note_token(&mut self, now: Instant) {
        self.first_token.get_or_insert(now);
        if let Some(last) = self.last_token.replace(now) {
            self.gaps.push((now - last).as_secs_f32());
        }
    }

    fn gap_percentiles<const N: usize>(&self, shares: [f64; N]) -> [f64; N] {
        let mut gaps = self.gaps.clone();
        gaps.sort_unstable_by(f32::total_cmp);
        shares.map(|share| {
            let at = (gaps.len() as f64 * share) as usize;
            gaps.get(at.min(gaps.len().saturating_sub(1))).map_or(0.0, |gap| f64::from(*gap) * 1e3)
        })
    }
}

/// A shift drops half of what comes after the tokens that are kept.
pub fn dropped_at_once(n_ctx: usize, keep: usize) -> usize {
    ((n_ctx - keep) / 2).max(1)
}

pub enum Ending {
    Stop(Option<String>),
    Length,
    Cancelled,
    Failed(Error),
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
