//! Repeat, presence and frequency penalties: only tokens that were seen are touched.

use super::row::{ByToken, Changes};
use crate::config::GenerationConfig;

pub struct Penalties {
    repeat: f32,
    presence: f32,
    frequency: f32,
    last_n: usize,
    /// How often each token is among those from `begin` to `end`.
    counts: ByToken<u32>,
    begin: usize,
    end: usize,
}

impl Penalties {
    pub fn new(config: &GenerationConfig, n_ctx: usize) -> Penalties {
        let GenerationConfig { repeat_penalty, presence_penalty, frequency_penalty, .. } = *config;
        let is_off = repeat_penalty == 1.0 && presence_penalty == 0.0 && frequency_penalty == 0.0;
        Penalties {
            repeat: repeat_penalty,
            presence: presence_penalty,
            frequency: frequency_penalty,
            last_n: if is_off { 0 } else { super::window(config.penalty_last_n, n_ctx) },
            counts: ByToken::default(),
            begin: 0,
            end: 0,
        }
    }

    pub fn apply(&mut self, row: &[f32], tokens: &[i32], changes: &mut Changes) {
        if self.last_n == 0 {
            return;
        }
        self.count(tokens);
        for (&token, &count) in &self.counts {
            changes.change(row, token, |logit| {
                let repeated = if logit > 0.0 { logit / self.repeat } else { logit * self.repeat };
                let repeated = repeated.clamp(f32::MIN, f32::MAX);
                repeated - self.presence - self.frequency * count as f32
            });
        }
    }

    /// Counts what is new, and takes out what is too long ago by now.
    fn count(&mut self, tokens: &[i32]) {
        let begin = tokens.len().saturating_sub(self.last_n);
        if tokens.len() < self.end || self.end < begin {
            // Somebody cut the history, or nothing of what was counted counts any more.
            self.counts.clear();
            (self.begin, self.end) = (begin, begin);
        }
        for &token in &tokens[self.end..] {
            *self.counts.entry(token).or_default() += 1;
        }
        for &token in &tokens[self.begin..begin.max(self.begin)] {
            self.take_out(token);
        }
        (self.begin, self.end) = (begin.max(self.begin), tokens.len());
    }

    fn take_out(&mut self, token: i32) {
        match self.counts.get_mut(&token) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(self.counts.remove(&token)),
        }
    }
}
