//! The tokens that are left, and the ways of llama.cpp's samplers to leave fewer. None of them
//! leaves nobody.

use std::cmp::Ordering;

use super::row::{Candidate, better, exp};

#[derive(Default)]
pub struct Candidates {
    pub list: Vec<Candidate>,
    weights: Vec<f32>,
    total: f64,
}

impl Candidates {
    /// The fewest of the likeliest whose probabilities reach `share`; `total` as of `total()`, or of
    /// a whole row whose best these are. False: these do not reach it.
    pub fn keep_top_p(&mut self, share: f32, total: f32) -> bool {
        self.keep_until(total, better, |sum| sum >= share)
    }

    /// Those whose probability is not below this share of the best one's.
    pub fn keep_min_p(&mut self, share: f32) {
        let floor = self.best() + share.ln();
        self.list.retain(|c| c.logit >= floor);
    }

    /// Those whose surprise comes nearest to what is to be expected.
    pub fn keep_typical(&mut self, share: f32) {
        let (best, total) = (self.best(), self.total());
        let expected = self.entropy() - total.ln();
        let distance = |c: &Candidate| (best - c.logit - expected).abs();
        let order = |a: &Candidate, b: &Candidate| distance(a).total_cmp(&distance(b));
        self.keep_until(total, order, |sum| sum > share);
    }

    /// Takes out the top choices, but for the least likely of them.
    pub fn exclude_top_choices(&mut self, threshold: f32) {
        let (best, total) = (self.best(), self.total());
        let is_top = |c: &Candidate| exp(c.logit - best) / total >= threshold;
        let least = self.list.iter().filter(|c| is_top(c)).max_by(|a, b| better(a, b)).copied();
        self.list.retain(|c| !is_top(c) || Some(c) == least.as_ref());
    }

    /// Flat distributions get a higher temperature than peaked ones.
    pub fn dynamic_temperature(&self, low: f32, high: f32, exponent: f32) -> f32 {
        let most = (self.list.len().max(2) as f32).ln();
        low + (high - low) * (self.entropy() / most).clamp(0.0, 1.0).powf(exponent)
    }

    /// Weighs them for the dice. Temperature 0 leaves the best alone.
    pub fn weigh(&mut self, temperature: f32) {
        let best = self.best();
        if temperature <= 0.0 {
            let first = self.list.iter().copied().min_by(better);
            self.list.truncate(1);
            self.list.copy_from_slice(first.as_slice());
        }
        self.weights.clear();
        let temperature = temperature.max(f32::MIN_POSITIVE);
        self.weights.extend(self.list.iter().map(|c| (c.logit - best) / temperature));
        self.weights.iter_mut().for_each(|weight| *weight = exp(*weight));
        self.total = self.weights.iter().copied().map(f64::from).sum();
    }

    /// One of those that were weighed, and its probability.
    pub fn roll(&self, dice: &mut fastrand::Rng) -> (i32, f32) {
        let mut left = dice.f64() * self.total;
        let hit = self.weights.iter().position(|&weight| {
            left -= f64::from(weight);
            left < 0.0
        });
        self.probability(hit.unwrap_or(self.list.len() - 1))
    }

    pub fn probabilities(&self) -> Vec<(i32, f32)> {
        (0..self.list.len()).map(|index| self.probability(index)).collect()
    }

    pub fn best(&self) -> f32 {
        self.list.iter().map(|c| c.logit).fold(f32::NEG_INFINITY, f32::max)
    }

    /// Σ exp(logit − best).
    pub fn total(&self) -> f32 {
        let best = self.best();
        self.list.iter().map(|c| f64::from(exp(c.logit - best))).sum::<f64>() as f32
    }

    fn probability(&self, index: usize) -> (i32, f32) {
        (self.list[index].token, (f64::from(self.weights[index]) / self.total) as f32)
    }

    /// How surprising the next token is expected to be.
    fn entropy(&self) -> f32 {
        let best = self.best();
        let (mut total, mut mean) = (0.0f64, 0.0f64);
        for candidate in &self.list {
            let behind = candidate.logit - best;
            let weight = exp(behind);
            total += f64::from(weight);
            mean += f64::from(weight * behind.max(-1e3));
        }
        (total.ln() - mean / total) as f32
    }

    /// Keeps the first in this order until the sum of their shares is enough. No more of them are
    /// put in order than needed.
    fn keep_until(
        &mut self,
        total: f32,
        order: impl Fn(&Candidate, &Candidate) -> Ordering,
        is_enough: impl Fn(f32) -> bool,
    ) -> bool {
        const FIRST: usize = 256;
        let best = self.best();
        let (mut sorted, mut sum) = (0, 0.0f64);
        while sorted < self.list.len() {
            let rest = &mut self.list[sorted..];
            let next = rest.len().min(FIRST.max(sorted * 8));
            if next < rest.len() {
                rest.select_nth_unstable_by(next - 1, &order);
            }
            rest[..next].sort_unstable_by(&order);
            for (index, candidate) in rest[..next].iter().enumerate() {
                sum += f64::from(exp(candidate.logit - best));
                if is_enough((sum / f64::from(total)) as f32) {
                    self.list.truncate(sorted + index + 1);
                    return true;
                }
            }
            sorted += next;
        }
        false
    }
}
