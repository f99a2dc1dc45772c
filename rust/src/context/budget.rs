//! How many prompt tokens a step takes along.
//!
//! Whoever arrives during a step waits for its end, so with nobody else there it is still a step of half
//! a second, where a processor is that slow. Beside those who are generating it is a shorter one:
//! reading a prompt in large pieces is efficient, and a pause for everybody who is in the middle of an
//! answer. So the piece is chosen such that a step takes a few times as long as one without prompts:
//! few for a long prompt, whose end is far; more for a short one, which is soon read.

use std::time::Duration;

/// Seconds that somebody who arrives may have to wait for, and the rows that are worth a step anyway.
const UNDISTURBED: f64 = 0.5;
const WORTHWHILE: usize = 128;
/// So many times as long, where no more people wait for their first token than for their next.
const BESIDE_LONG: f64 = 3.0;
const BESIDE_SHORT: f64 = 24.0;
/// Aimed at a bit less, because steps vary.
const SAFETY: f64 = 0.8;
/// A small piece costs more per token than a large one; until it is known how much, so many times as
/// much.
const UNKNOWN: f64 = 3.0;
/// Even the smallest piece goes on.
const LEAST: usize = 2;

/// Learns what steps cost from how long they took.
pub struct Budget {
    most: usize,
    /// Seconds of a step in which so many generate and nobody reads: 1, 2–3, 4–7, …
    generating: [Option<f64>; 9],
    /// Seconds of a prompt token on top of a pass over the weights, in pieces of 1, 2–3, 4–7, …
    per_row: [Option<f64>; 17],
}

impl Budget {
    /// `most` is what a batch can hold.
    pub fn new(most: usize) -> Budget {
        Budget { most, generating: [None; 9], per_row: [None; 17] }
    }

    /// The tokens for a step of a prompt with so many, beside so many who generate, when so many
    /// prompts wait to be read.
    pub fn rows(&self, num_tokens: usize, num_generating: usize, num_prompts: usize) -> usize {
        let Some(step) = self.step(num_generating) else { return self.most };
        let crowd = (num_prompts as f64 / num_generating.max(1) as f64).max(1.0);
        let slowdown = if num_tokens > self.most { BESIDE_LONG } else { BESIDE_SHORT };
        let allowed = step * (1.0 + (slowdown - 1.0) * crowd) * SAFETY;
        let left = allowed - step - self.pass().unwrap_or(step);
        self.fitting(left, LEAST)
    }

    /// The tokens for a step in which nobody generates.
    pub fn rows_undisturbed(&self) -> usize {
        self.fitting(UNDISTURBED, WORTHWHILE)
    }

    /// A step with so many who generated, and so many prompt tokens, took `elapsed`.
    pub fn took(&mut self, num_generating: usize, prompt_rows: usize, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if prompt_rows == 0 {
            let known = &mut self.generating[like(num_generating).min(8)];
            // A single disturbed step says little.
            *known = Some(known.map_or(seconds, |old| old * 0.8 + seconds.min(old * 2.0) * 0.2));
        } else if let Some(pass) = self.pass().or((prompt_rows >= WORTHWHILE).then_some(0.0)) {
            // Prompt rows need a pass of their own: llama.cpp computes only equal counts together.
            let step = self.step(num_generating).filter(|_| num_generating > 0);
            let rest = (seconds - pass - step.unwrap_or(0.0)).max(seconds * 0.2);
            let row = rest / prompt_rows as f64;
            let known = &mut self.per_row[like(prompt_rows)];
            *known = Some(known.map_or(row, |old| (old + row) / 2.0));
        }
    }

    /// The largest piece that takes at most so long, as far as that is known.
    fn fitting(&self, seconds: f64, least: usize) -> usize {
        if self.per_row.iter().all(Option::is_none) {
            return self.most;
        }
        let sizes = (0..=like(self.most)).map(|size| 1 << size);
        let fitting = sizes.filter_map(|rows| {
            let cost = self.row_cost(rows)?;
            (cost * rows as f64 <= seconds).then_some(((seconds / cost) as usize).min(rows * 2 - 1))
        });
        fitting.max().unwrap_or(0).max(least).min(self.most)
    }

    /// Of one token in a piece of so many: as it was, as in the next smaller piece, or a guess from the
    /// next larger one.
    fn row_cost(&self, rows: usize) -> Option<f64> {
        let (smaller, larger) = self.per_row.split_at(like(rows) + 1);
        let known = smaller.iter().rev().find_map(|cost| *cost);
        known.or_else(|| larger.iter().find_map(|cost| Some((*cost)? * UNKNOWN)))
    }

    /// One pass over the weights.
    fn pass(&self) -> Option<f64> {
        self.generating[0]
    }

    /// As it was; or no less than with fewer who generate, each of whom takes about as much as a prompt
    /// token in a large piece. A crowd that has just come is seen together with prompts only.
    fn step(&self, num_generating: usize) -> Option<f64> {
        let size = like(num_generating).min(8);
        if let Some(known) = self.generating[size] {
            return Some(known);
        }
        let fewer = self.generating[..size].iter().rev().find_map(|known| *known)?;
        let row = self.per_row.iter().flatten().copied().reduce(f64::min).unwrap_or(0.0);
        Some(fewer.max(self.pass().unwrap_or(0.0) + row * (num_generating - 1) as f64))
    }
}

fn like(count: usize) -> usize {
    (count.max(1).ilog2() as usize).min(16)
}
