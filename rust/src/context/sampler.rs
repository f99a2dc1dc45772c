//! One row of logits → one token, in the order that llama.cpp's users know:
//! penalties, top-k, top-p, min-p, temperature, dice.

use std::collections::{HashMap, VecDeque};

use crate::config::GenerationConfig;
use crate::error::{Error, Result};

pub struct Sampler {
    config: GenerationConfig,
    dice: fastrand::Rng,
    seed: i64,
    /// The last tokens, and how often each is among them: what the penalties look at.
    recent: VecDeque<i32>,
    counts: HashMap<i32, u32>,
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    token: i32,
}

impl Sampler {
    /// `n_ctx` bounds what the penalties look at.
    pub fn new(mut config: GenerationConfig, prompt: &[i32], n_ctx: usize) -> Sampler {
        let last_n = usize::try_from(config.penalty_last_n).unwrap_or(n_ctx).min(n_ctx);
        config.penalty_last_n = last_n as i32;
        let seed = match config.seed {
            -1 => fastrand::i64(0..=i64::from(u32::MAX)),
            seed => seed,
        };
        let mut sampler = Sampler {
            dice: fastrand::Rng::with_seed(seed as u64),
            seed,
            recent: VecDeque::new(),
            counts: HashMap::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
            config,
        };
        prompt[prompt.len().saturating_sub(last_n)..].iter().for_each(|&t| sampler.accept(t));
        sampler
    }

    /// The seed in use, also where a random one was asked for.
    pub fn seed(&self) -> i64 {
        self.seed
    }

    /// Chooses a token that is not among `banned`, and remembers it.
    pub fn sample(&mut self, logits: &[f32], banned: &[i32]) -> Result<i32> {
        // NaN and infinities are the only numbers that do not vanish when multiplied by zero.
        if logits.iter().map(|logit| logit * 0.0).sum::<f32>() != 0.0 || logits.is_empty() {
            return Err(Error::internal(
                "non-finite logits; the weights or the context are broken",
            ));
        }
        let mut row = std::mem::take(&mut self.logits);
        row.clear();
        row.extend_from_slice(logits);
        self.penalize(&mut row);
        for &token in banned {
            row[token as usize] = f32::NEG_INFINITY;
        }
        let token = if self.config.temperature == 0.0 { argmax(&row) } else { self.draw(&row) };
        self.logits = row;
        let no_token = || Error::Sampling { what: "no token is left to choose from".into() };
        let token = token.ok_or_else(no_token)?;
        self.accept(token);
        Ok(token)
    }

    fn accept(&mut self, token: i32) {
        let last_n = self.config.penalty_last_n as usize;
        if last_n == 0 {
            return;
        }
        if self.recent.len() == last_n
            && let Some(oldest) = self.recent.pop_front()
        {
            match self.counts.get_mut(&oldest) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.counts.remove(&oldest)),
            }
        }
        self.recent.push_back(token);
        *self.counts.entry(token).or_default() += 1;
    }

    /// Only tokens that were seen are touched, not the whole vocabulary.
    fn penalize(&self, row: &mut [f32]) {
        let config = &self.config;
        for (&token, &count) in &self.counts {
            let Some(logit) = row.get_mut(token as usize) else { continue };
            if *logit > 0.0 {
                *logit /= config.repeat_penalty;
            } else {
                *logit *= config.repeat_penalty;
            }
            *logit -= config.presence_penalty + config.frequency_penalty * count as f32;
        }
    }

    fn draw(&mut self, row: &[f32]) -> Option<i32> {
        self.keep_top_k(row);
        let best = self.candidates.first()?.logit;
        self.keep_top_p();
        self.keep_min_p();
        let weight = |c: &Candidate| ((c.logit - best) / self.config.temperature).exp();
        let total: f32 = self.candidates.iter().map(weight).sum();
        let mut left = self.dice.f32() * total;
        for candidate in &self.candidates {
            left -= weight(candidate);
            if left < 0.0 {
                return Some(candidate.token);
            }
        }
        Some(self.candidates[0].token)
    }

    /// The best `top_k` of the row, best first; none only where all are banned.
    fn keep_top_k(&mut self, row: &[f32]) {
        let k = match self.config.top_k as usize {
            0 => row.len(),
            k => k.min(row.len()),
        };
        let kept = &mut self.candidates;
        kept.clear();
        let better =
            |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token));
        // Twice k are gathered before the worse half is thrown out, so most logits only meet the
        // threshold.
        let mut threshold = f32::NEG_INFINITY;
        for (token, &logit) in row.iter().enumerate() {
            if logit > threshold {
                kept.push(Candidate { logit, token: token as i32 });
                if kept.len() >= 2 * k {
                    kept.select_nth_unstable_by(k - 1, better);
                    kept.truncate(k);
                    threshold = kept[k - 1].logit;
                }
            }
        }
        kept.sort_unstable_by(better);
        kept.truncate(k);
    }

    fn keep_top_p(&mut self) {
        if self.config.top_p >= 1.0 {
            return;
        }
        let best = self.candidates[0].logit;
        let total: f32 = self.candidates.iter().map(|c| (c.logit - best).exp()).sum();
        let mut sum = 0.0;
        let enough = self.candidates.iter().position(|c| {
            sum += (c.logit - best).exp() / total;
            sum >= self.config.top_p
        });
        self.candidates.truncate(enough.map_or(usize::MAX, |last| last + 1));
    }

    fn keep_min_p(&mut self) {
        if self.config.min_p > 0.0 {
            let least = self.candidates[0].logit + self.config.min_p.ln();
            let kept = self.candidates.iter().take_while(|c| c.logit >= least).count();
            self.candidates.truncate(kept.max(1));
        }
    }
}

/// The first of the largest; none where all are banned.
fn argmax(row: &[f32]) -> Option<i32> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at = row.iter().position(|&logit| logit == largest && logit > f32::NEG_INFINITY)?;
    Some(at as i32)
}
