//! What the engine counts and what it takes long over: written by its own thread, read by anyone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::message::{FinishReason, Stats};

/// Upper bounds in seconds, as vLLM's dashboards expect them.
const WAITS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
];
const GAPS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0,
];
const WHOLES: &[f64] = &[
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    300.0,
];

/// The live numbers. Only the owner thread writes, but for `waiting` and `requests`.
pub struct Meter {
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    pub requests: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub cached_tokens: AtomicU64,
    pub dropped_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub steps: AtomicU64,
    /// Those on half of the threads, beside another context.
    pub shared_steps: AtomicU64,
    /// Slots in use, summed over the steps.
    pub busy_slots: AtomicU64,
    pub preemptions: AtomicU64,
    pub held_tokens: AtomicU64,
    pub prompt_cache_bytes: AtomicU64,
    prompt_us: AtomicU64,
    decode_us: AtomicU64,
    ended: [AtomicU64; 4],
    queue: Histogram,
    first_token: Histogram,
    gap: Histogram,
    whole: Histogram,
}

/// All of them at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    pub running: u64,
    pub waiting: u64,
    pub requests: u64,
    pub ended_stop: u64,
    pub ended_length: u64,
    pub ended_cancelled: u64,
    pub ended_error: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub dropped_tokens: u64,
    pub generated_tokens: u64,
    pub steps: u64,
    pub shared_steps: u64,
    pub busy_slots: u64,
    pub preemptions: u64,
    /// Tokens in the slots of those who run.
    pub held_tokens: u64,
    pub prompt_cache_bytes: u64,
    /// Summed over requests.
    pub prompt_seconds: f64,
    pub decode_seconds: f64,
    pub queue: Distribution,
    pub first_token: Distribution,
    pub gap: Distribution,
    pub whole: Distribution,
}

/// One slot, for the curious.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotView {
    /// The request that is in it, if any.
    pub request: Option<u64>,
    pub held_tokens: usize,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub generated_tokens: usize,
}

/// How often something took so long.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Distribution {
    /// How many took at most so many seconds; the last bound is infinite.
    pub buckets: Vec<(f64, u64)>,
    pub seconds: f64,
}

struct Histogram {
    bounds: &'static [f64],
    /// One more than there are bounds.
    counts: Vec<AtomicU64>,
    sum_us: AtomicU64,
}

impl Default for Meter {
    fn default() -> Meter {
        Meter {
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            dropped_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            shared_steps: AtomicU64::new(0),
            busy_slots: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            held_tokens: AtomicU64::new(0),
            prompt_cache_bytes: AtomicU64::new(0),
            prompt_us: AtomicU64::new(0),
            decode_us: AtomicU64::new(0),
            ended: Default::default(),
            queue: Histogram::new(WAITS),
            first_token: Histogram::new(WAITS),
            gap: Histogram::new(GAPS),
            whole: Histogram::new(WHOLES),
        }
    }
}

impl Meter {
    /// A request has ended.
    pub fn note_end(&self, reason: FinishReason, stats: &Stats) {
        add(&self.ended[reason as usize], 1);
        add(&self.dropped_tokens, stats.dropped_tokens as u64);
        add(&self.prompt_us, (stats.prompt_ms * 1e3) as u64);
        add(&self.decode_us, (stats.decode_ms * 1e3) as u64);
        self.queue.note(stats.queue_ms / 1e3);
        self.whole.note(stats.total_ms / 1e3);
        if stats.generated_tokens > 0 {
            self.first_token.note(stats.first_token_ms / 1e3);
        }
    }

    pub fn note_gap(&self, gap: Duration) {
        self.gap.note(gap.as_secs_f64());
    }

    pub fn snapshot(&self) -> Metrics {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let ended = |reason: FinishReason| get(&self.ended[reason as usize]);
        Metrics {
            running: get(&self.running),
            waiting: get(&self.waiting),
            requests: get(&self.requests),
            ended_stop: ended(FinishReason::Stop),
            ended_length: ended(FinishReason::Length),
            ended_cancelled: ended(FinishReason::Cancelled),
            ended_error: ended(FinishReason::Error),
            prompt_tokens: get(&self.prompt_tokens),
            cached_tokens: get(&self.cached_tokens),
            dropped_tokens: get(&self.dropped_tokens),
            generated_tokens: get(&self.generated_tokens),
            steps: get(&self.steps),
            shared_steps: get(&self.shared_steps),
            busy_slots: get(&self.busy_slots),
            preemptions: get(&self.preemptions),
            held_tokens: get(&self.held_tokens),
            prompt_cache_bytes: get(&self.prompt_cache_bytes),
            prompt_seconds: get(&self.prompt_us) as f64 / 1e6,
            decode_seconds: get(&self.decode_us) as f64 / 1e6,
            queue: self.queue.snapshot(),
            first_token: self.first_token.snapshot(),
            gap: self.gap.snapshot(),
            whole: self.whole.snapshot(),
        }
    }
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Histogram { bounds, counts, sum_us: AtomicU64::new(0) }
    }

    fn note(&self, seconds: f64) {
        let index = self.bounds.partition_point(|bound| *bound < seconds);
        add(&self.counts[index], 1);
        add(&self.sum_us, (seconds * 1e6) as u64);
    }

    fn snapshot(&self) -> Distribution {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let counts = self.counts.iter().scan(0, |sum, count| {
            *sum += count.load(Ordering::Relaxed);
            Some(*sum)
        });
        let seconds = self.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        Distribution { buckets: bounds.zip(counts).collect(), seconds }
    }
}

pub fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
