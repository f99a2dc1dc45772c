//! How many prompt tokens a step takes along while others are generating.
//!
//! Reading a prompt in large pieces is efficient, and a pause for everybody who is in the middle of an
//! answer. So the piece is chosen such that a step takes a few times as long as one without prompts.

use std::time::Duration;

/// So many times as long, where no more people wait for their first token than for their next.
const SLOWDOWN: f64 = 3.0;
/// Aimed at a bit less, because steps vary.
const SAFETY: f64 = 0.85;
/// Even the smallest piece goes on.
const LEAST: usize = 4;

/// Learns what steps cost from how long they took.
pub struct Budget {
    most: usize,
    /// Seconds of a step in which so many generate and nobody reads: 1, 2–3, 4–7, …
    generating: [Option<f64>; 9],
    /// Seconds of a prompt token on top of a pass over the weights.
    per_row: Option<f64>,
}

impl Budget {
    /// `most` is what a batch can hold.
    pub fn new(most: usize) -> Budget {
        Budget { most, generating: [None; 9], per_row: None }
    }

    /// The prompt tokens for a step beside so many who generate, when so many wait to be read.
    pub fn rows(&self, num_generating: usize, num_prompts: usize) -> usize {
        let known = (self.step(num_generating), self.per_row);
        let (Some(step), Some(per_row)) = known else { return self.most };
        let crowd = (num_prompts as f64 / num_generating.max(1) as f64).max(1.0);
        let allowed = step * (1.0 + (SLOWDOWN - 1.0) * crowd) * SAFETY;
        let rows = (allowed - step - self.pass().unwrap_or(step)) / per_row;
        (rows.max(0.0) as usize).clamp(LEAST, self.most)
    }

    /// A step with so many who generated, and so many prompt tokens, took `elapsed`.
    pub fn took(&mut self, num_generating: usize, prompt_rows: usize, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if prompt_rows == 0 {
            let known = &mut self.generating[like(num_generating)];
            // A single disturbed step says little.
            *known = Some(known.map_or(seconds, |old| old * 0.8 + seconds.min(old * 2.0) * 0.2));
        } else if let Some(pass) = self.pass() {
            // Prompt rows need a pass of their own: llama.cpp computes only equal counts together.
            let step = self.step(num_generating).filter(|_| num_generating > 0);
            let rest = (seconds - pass - step.unwrap_or(0.0)).max(seconds * 0.2);
            let row = rest / prompt_rows as f64;
            self.per_row = Some(self.per_row.map_or(row, |old| (old + row) / 2.0));
        }
    }

    /// One pass over the weights.
    fn pass(&self) -> Option<f64> {
        self.generating[0]
    }

    /// As far as it is known; fewer generating are no slower.
    fn step(&self, num_generating: usize) -> Option<f64> {
        let at_most = &self.generating[..=like(num_generating)];
        at_most.iter().rev().find_map(|known| *known)
    }
}

fn like(count: usize) -> usize {
    (count.max(1).ilog2() as usize).min(8)
}
