//! How many threads compute: all of them, until somebody else needs a core.
//!
//! Between two nodes of a graph llama.cpp's threads wait for each other in a loop that never sleeps.
//! When the kernel gives one of their cores to another process, all of them spin until it comes back,
//! and a step takes ten times as long, or a thousand times. One thread less has nobody to wait for.

use std::time::{Duration, Instant};

/// As long as nobody knows how long one thread takes, a step so much slower than its like counts as
/// disturbed.
const DISTURBED: f64 = 2.5;
/// So many of them in a row, and a thread is taken out.
const PATIENCE: u32 = 3;
/// A slow step was disturbed if its threads waited for a core for at least this share of it.
const WAITED: f64 = 0.25;
/// A step that takes so much longer than one thread alone would is not waited for.
const HOPELESS: f64 = 4.0;
/// The same for a trial, which has failed when it is not faster than one thread.
const HOPELESS_TRIAL: f64 = 1.25;
const LEAST_LIMIT: Duration = Duration::from_millis(5);
/// What is normal may rise by so much a step: a longer context is no disturbance.
const DRIFT: f64 = 1.01;
const FIRST_TRIAL_AFTER: Duration = Duration::from_millis(100);
const LAST_TRIAL_AFTER: Duration = Duration::from_secs(4);
/// With less than so much of a core left over nobody needs to try: a neighbour who has come to terms
/// with us would be disturbed for nothing.
const LEFT_OVER: f64 = 0.5;

/// Decides before each step how many threads compute it, from how long the last ones took.
pub struct Pace {
    most: u32,
    threads: u32,
    /// For steps of 1, 2–3, 4–7, … rows.
    known: [Known; 17],
    num_slow: u32,
    trial_at: Option<Instant>,
    /// Then at the latest, whatever the cores seem to do.
    trial_by: Option<Instant>,
    trial_after: Duration,
    is_trial: bool,
    /// What was idle until now says nothing about the time to come.
    has_changed: bool,
}

/// Seconds that a step takes.
#[derive(Clone, Copy, Default)]
struct Known {
    /// Undisturbed, as far as one can tell.
    with_all: Option<f64>,
    /// The last time. More threads that take longer are no help; a context that has grown since then
    /// looks the same, until one thread has been tried again.
    with_one: Option<f64>,
}

impl Pace {
    pub fn new(most: u32) -> Pace {
        Pace {
            most,
            threads: most,
            known: [Known::default(); 17],
            num_slow: 0,
            trial_at: None,
            trial_by: None,
            trial_after: FIRST_TRIAL_AFTER,
            is_trial: false,
            has_changed: false,
        }
    }

    pub fn most(&self) -> u32 {
        self.most
    }

    /// For the step that is about to begin. `idle` says how many cores were left over since it was asked
    /// last, if the kernel tells.
    pub fn threads(&mut self, now: Instant, mut idle: impl FnMut() -> Option<f64>) -> u32 {
        if std::mem::take(&mut self.has_changed) {
            idle();
        }
        self.is_trial = self.trial_at.is_some_and(|at| now >= at);
        if self.is_trial && self.trial_by.is_some_and(|by| now < by) {
            let is_taken = idle().is_some_and(|cores| cores < LEFT_OVER);
            if is_taken {
                self.is_trial = false;
                self.trial_at = Some(now + FIRST_TRIAL_AFTER);
            }
        }
        if self.is_trial { self.most } else { self.threads }
    }

    /// How long a step may take before it is better begun again with fewer threads.
    pub fn limit(&self, rows: usize, threads: u32) -> Option<Duration> {
        let same = self.known[like(rows)].with_one;
        // A row more never costs more than the first.
        let one = same.or_else(|| Some(self.known[0].with_one? * rows as f64))?;
        let hopeless = if self.is_trial { HOPELESS_TRIAL } else { HOPELESS };
        (threads > 1).then(|| Duration::from_secs_f64(one * hopeless).max(LEAST_LIMIT))
    }

    /// A step of `rows` rows on `threads` threads took `elapsed` and has just ended. Meanwhile its
    /// threads waited for cores for so long, if the kernel tells.
    pub fn took(
        &mut self,
        rows: usize,
        threads: u32,
        elapsed: Duration,
        waited: Option<Duration>,
        now: Instant,
    ) {
        let seconds = elapsed.as_secs_f64();
        let known = &mut self.known[like(rows)];
        let had_to_wait = waited.is_none_or(|waited| waited.as_secs_f64() >= WAITED * seconds);
        let is_slow = had_to_wait && known.is_slow(seconds, threads);
        known.learn(seconds, threads, self.most);
        match (self.is_trial, is_slow) {
            (true, _) => self.judge_trial(!is_slow, now),
            (false, true) => self.num_slow += 1,
            (false, false) => self.num_slow = 0,
        }
        if self.num_slow >= PATIENCE {
            self.take_one_out(now);
        }
    }

    /// A step went over its limit and was given up.
    pub fn gave_up(&mut self, now: Instant) {
        if self.is_trial { self.judge_trial(false, now) } else { self.take_one_out(now) }
    }

    fn take_one_out(&mut self, now: Instant) {
        self.num_slow = 0;
        if self.threads > 1 {
            self.threads -= 1;
            self.try_later(now);
        }
    }

    /// All threads were tried again while some were out.
    fn judge_trial(&mut self, is_fine: bool, now: Instant) {
        self.is_trial = false;
        if is_fine {
            self.threads = self.most;
            self.num_slow = 0;
            self.trial_at = None;
            self.trial_after = FIRST_TRIAL_AFTER;
        } else {
            self.trial_after = (self.trial_after * 2).min(LAST_TRIAL_AFTER);
            self.try_later(now);
        }
    }

    fn try_later(&mut self, now: Instant) {
        self.trial_at = Some(now + self.trial_after);
        self.trial_by = Some(now + LAST_TRIAL_AFTER);
        self.has_changed = true;
    }
}

impl Known {
    fn is_slow(&self, seconds: f64, threads: u32) -> bool {
        let limit = self.with_one.or_else(|| Some(self.with_all? * DISTURBED));
        threads > 1 && limit.is_some_and(|limit| seconds > limit)
    }

    fn learn(&mut self, seconds: f64, threads: u32, most: u32) {
        if threads == 1 {
            self.with_one = Some(seconds);
        }
        if threads == most {
            let normal = self.with_all.map_or(seconds, |normal| (normal * DRIFT).min(seconds));
            self.with_all = Some(normal);
        }
    }
}

fn like(rows: usize) -> usize {
    rows.max(1).ilog2().min(16) as usize
}
