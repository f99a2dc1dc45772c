//! Mirostat 1 and 2: as many candidates as keep the surprise near a target.

use std::f32::consts::LN_2;

use super::candidates::Candidates;
use super::row::{Changes, Scan};
use crate::config::GenerationConfig;

/// Of so many of the best tokens is the shape of the distribution estimated.
const SEEN: usize = 100;

pub struct Mirostat {
    version: u32,
    target: f32,
    rate: f32,
    temperature: f32,
    /// The surprise in bits that is allowed next.
    limit: f32,
}

impl Mirostat {
    pub fn new(config: &GenerationConfig) -> Mirostat {
        Mirostat {
            version: config.mirostat,
            target: config.mirostat_tau,
            rate: config.mirostat_eta,
            temperature: config.temperature,
            limit: 2.0 * config.mirostat_tau,
        }
    }

    pub fn is_on(&self) -> bool {
        self.version > 0
    }

    /// Learns from the probability that the chosen token had among the candidates.
    pub fn observe(&mut self, probability: f32) {
        if self.is_on() {
            let surprise = -probability.max(f32::MIN_POSITIVE).log2();
            self.limit -= self.rate * (surprise - self.target);
        }
    }

    pub fn cut(&self, row: &[f32], changes: &Changes, scan: &mut Scan, left: &mut Candidates) {
        match self.version {
            1 => {
                scan.take_best(row, changes, SEEN, &mut left.list);
                let count = self.count(left, row.len());
                scan.take_best(row, changes, count, &mut left.list);
            }
            _ => {
                let total = scan.total(row, 1.0 / self.temperature).log2() as f32;
                // Not more than `limit` bits of surprise: the best has log2(total) of them.
                let behind = self.temperature * LN_2 * (self.limit - total);
                let floor = (scan.best - behind).min(scan.best);
                scan.take_from(row, changes, floor, &mut left.list);
            }
        }
    }

    /// From a power law fitted to the best tokens.
    fn count(&self, best: &Candidates, n_vocab: usize) -> usize {
        let (mut products, mut squares) = (0.0, 0.0);
        for (index, pair) in best.list.windows(2).enumerate() {
            let rank = ((index + 2) as f32 / (index + 1) as f32).ln();
            products += rank * (pair[0].logit - pair[1].logit) / self.temperature;
            squares += rank * rank;
        }
        let slope: f32 = products / squares;
        let excess = slope - 1.0;
        let count = (excess * self.limit.exp2()) / (1.0 - (n_vocab as f32).powf(-excess));
        (count.powf(1.0 / slope) as usize).clamp(1, n_vocab)
    }
}
