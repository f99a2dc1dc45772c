//! One row of logits → one token. What is done and in which order is as in llama.cpp: logit bias,
//! penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature, dice. With mirostat
//! it is logit bias, temperature, mirostat.
//!
//! Unlike there, no list of the whole vocabulary is made where the first cut leaves little of it.
//!
//! A constraint is asked about the token that was chosen without it. Only where it refuses, which is
//! seldom when the model has understood what is wanted, the choice is made again among all that it
//! allows. A token that it allows comes with its own share of the first choice, and with its share of
//! the second in the rest of the cases: together that is its share among the allowed ones, except that
//! top-k and the other cuts have looked at all tokens first, as they do in llama.cpp.
//!
//! ```text
//! row         one pass over the logits, and the quick ways to the best of them
//! penalties   ┐ few tokens whose logits are not what the row says
//! dry         ┘
//! candidates  those that are left, and the cuts
//! mirostat    cuts that keep the surprise level
//! llama       what the tests compare with
//! ```

mod candidates;
mod dry;
mod llama;
mod mirostat;
mod penalties;
mod row;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::config::{GenerationConfig, LogitsHook};
use crate::constraint::{Allowed, Guide};
use crate::error::{Error, Result};
use candidates::Candidates;
use dry::Dry;
use mirostat::Mirostat;
use penalties::Penalties;
use row::{Changes, Scan, deviation, keep_best};

pub use dry::{Breakers, KnownBreakers, dry_breakers};
pub use llama::{LlamaSampler, llama_samplers};

pub struct Sampler {
    config: GenerationConfig,
    dice: fastrand::Rng,
    seed: i64,
    penalties: Penalties,
    dry: Dry,
    mirostat: Mirostat,
    scan: Scan,
    changes: Changes,
    /// What the caller's hook made of the row.
    hooked: Vec<f32>,
    /// A copy of the row, where one is needed.
    row: Vec<f32>,
    candidates: Candidates,
    log_total: f32,
    top: Candidates,
    guide: Option<Guide>,
}

impl Sampler {
    /// `n_ctx` bounds what the penalties look at; `breakers` are those of the config's strings.
    pub fn new(config: GenerationConfig, breakers: Arc<Breakers>, n_ctx: usize) -> Sampler {
        let seed = match config.seed {
            -1 => fastrand::i64(0..=i64::from(u32::MAX)),
            seed => seed,
        };
        Sampler {
            dice: fastrand::Rng::with_seed(seed as u64),
            seed,
            penalties: Penalties::new(&config, n_ctx),
            dry: Dry::new(&config, breakers, n_ctx),
            mirostat: Mirostat::new(&config),
            scan: Scan::default(),
            changes: Changes::default(),
            hooked: Vec::new(),
            row: Vec::new(),
            candidates: Candidates::default(),
            log_total: 0.0,
            top: Candidates::default(),
            guide: None,
            config,
        }
    }

    /// Chooses only what the constraint allows.
    pub fn guided_by(self, guide: Option<Guide>) -> Sampler {
        Sampler { guide, ..self }
    }

    /// Nothing but the end could come next.
    pub fn is_finished(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::is_finished)
    }

    /// The seed in use, also where a random one was asked for.
    pub fn seed(&self) -> i64 {
        self.seed
    }

    /// Chooses the token that follows these, and none of `banned`.
    pub fn sample(
        &mut self,
        logits: &[f32],
        tokens: &[i32],
        banned: impl IntoIterator<Item = i32> + Clone,
    ) -> Result<i32> {
        self.read(logits, tokens)?;
        self.prepare(logits, tokens, banned.clone(), None)?;
        let (mut token, mut probability) = self.candidates.roll(&mut self.dice);
        if let Some(mut guide) = self.guide.take() {
            if !guide.allows(token)? {
                self.prepare(logits, tokens, banned, Some(&guide.allowed()?))?;
                (token, probability) = self.candidates.roll(&mut self.dice);
            }
            guide.accept(token)?;
            self.guide = Some(guide);
        }
        self.mirostat.observe(probability);
        Ok(token)
    }

    /// What the dice of `sample` would be rolled on: tokens and their probabilities.
    pub fn distribution(
        &mut self,
        logits: &[f32],
        tokens: &[i32],
        banned: impl IntoIterator<Item = i32>,
    ) -> Result<Vec<(i32, f32)>> {
        self.read(logits, tokens)?;
        self.prepare(logits, tokens, banned, None)?;
        Ok(self.candidates.probabilities())
    }

    /// Of the row that was sampled last, as the model gave it: the logarithm of this token's
    /// probability, and the likeliest tokens with theirs. None where they were not asked for.
    pub fn logprobs(&self, logits: &[f32], token: i32) -> Option<(f32, Vec<(i32, f32)>)> {
        self.config.logprobs?;
        let top = self.top.list.iter().map(|c| (c.token, c.logit - self.log_total));
        Some((logits[token as usize] - self.log_total, top.collect()))
    }

    /// What is done once per row: a look at all of it, and the caller's hook, which gets a copy.
    fn read(&mut self, logits: &[f32], tokens: &[i32]) -> Result<()> {
        if !self.scan.read(logits) || logits.is_empty() {
            return Err(Error::internal(
                "non-finite logits; the weights or the context are broken",
            ));
        }
        self.note_logprobs(logits);
        if let Some(hook) = self.config.logits_hook.clone() {
            self.hooked.clear();
            self.hooked.extend_from_slice(logits);
            call(&hook, tokens, &mut self.hooked)?;
        }
        Ok(())
    }

    /// Fills the candidates. It is done again where a constraint leaves other tokens to choose from.
    fn prepare(
        &mut self,
        logits: &[f32],
        tokens: &[i32],
        banned: impl IntoIterator<Item = i32>,
        allowed: Option<&Allowed>,
    ) -> Result<()> {
        let hooked = std::mem::take(&mut self.hooked);
        let mut copy = std::mem::take(&mut self.row);
        let given = if self.config.logits_hook.is_some() { &hooked } else { logits };
        let mut row = given;
        if let Some(allowed) = allowed {
            copy.clear();
            copy.extend_from_slice(given);
            allowed.apply(&mut copy);
            row = &copy;
        }
        if allowed.is_some() || self.config.logits_hook.is_some() {
            self.scan.read(row);
        }
        self.adjust(row, tokens, banned);
        if self.needs_whole_row() {
            if allowed.is_none() {
                copy.clear();
                copy.extend_from_slice(given);
            }
            self.changes.settle(&mut copy);
            self.scan.read(&copy);
            row = &copy;
        }
        let done = self.cut(row);
        (self.row, self.hooked) = (copy, hooked);
        done
    }

    fn note_logprobs(&mut self, logits: &[f32]) {
        let Some(count) = self.config.logprobs else { return };
        self.log_total = self.scan.best + self.scan.total(logits, 1.0).ln() as f32;
        self.top.list.clear();
        if count > 0 {
            self.changes.clear();
            self.scan.take_best(logits, &self.changes, count as usize, &mut self.top.list);
        }
    }

    fn adjust(&mut self, row: &[f32], tokens: &[i32], banned: impl IntoIterator<Item = i32>) {
        self.changes.clear();
        for &(token, bias) in &self.config.logit_bias {
            self.changes.change(row, token, |logit| logit + bias);
        }
        if !self.mirostat.is_on() {
            self.penalties.apply(row, tokens, &mut self.changes);
            self.dry.apply(row, tokens, &mut self.changes);
        }
        for token in self.config.banned_tokens.iter().copied().chain(banned) {
            self.changes.ban(row, token);
        }
    }

    /// Sums over the vocabulary want it in one piece. So does a search around very many changes.
    fn needs_whole_row(&self) -> bool {
        let few = self.first_cut().is_some_and(|k| !self.scan.is_too_many(k + self.changes.len()));
        !few || self.config.top_n_sigma > 0.0 && !self.is_greedy()
    }

    /// How many of the best can be left after the first cut, where that is certain from the start.
    fn first_cut(&self) -> Option<usize> {
        match self.config.top_k as usize {
            _ if self.is_greedy() => Some(1),
            _ if self.mirostat.is_on() => None,
            0 => None,
            k => Some(k),
        }
    }

    /// Temperature 0 takes the best of what is left, and most cuts leave the best.
    fn is_greedy(&self) -> bool {
        let config = &self.config;
        let keeps_best = config.typical_p >= 1.0 && !self.excludes_top_choices();
        let is_fixed = config.dynatemp_range <= 0.0;
        config.temperature == 0.0 && (self.mirostat.is_on() || keeps_best && is_fixed)
    }

    fn excludes_top_choices(&self) -> bool {
        self.config.xtc_probability > 0.0 && self.config.xtc_threshold <= 0.5
    }

    fn cut(&mut self, row: &[f32]) -> Result<()> {
        let Sampler { scan, changes, candidates, mirostat, .. } = self;
        if self.config.temperature > 0.0 && mirostat.is_on() {
            mirostat.cut(row, changes, scan, candidates);
        } else if self.is_greedy() {
            self.scan.take_best(row, &self.changes, 1, &mut self.candidates.list);
        } else {
            self.truncate(row);
        }
        if self.candidates.list.is_empty() {
            return Err(Error::Sampling { what: "no token is left to choose from".into() });
        }
        self.candidates.weigh(self.temperature());
        Ok(())
    }

    /// Only what is left of the row after a cut, or has to be sorted, becomes a list.
    fn truncate(&mut self, row: &[f32]) {
        let Sampler { config, scan, changes, candidates: left, .. } = self;
        let mut is_whole = true;
        if config.top_n_sigma > 0.0 {
            let floor = scan.best - config.top_n_sigma * deviation(row, scan.best);
            scan.take_from(row, changes, floor, &mut left.list);
            is_whole = false;
        }
        if config.top_k > 0 {
            match is_whole {
                true => scan.take_best(row, changes, config.top_k as usize, &mut left.list),
                false => keep_best(&mut left.list, config.top_k as usize),
            }
            is_whole = false;
        }
        if config.typical_p < 1.0 {
            if is_whole {
                scan.take_from(row, changes, f32::MIN, &mut left.list);
            }
            left.keep_typical(config.typical_p);
            is_whole = false;
        }
        if config.top_p < 1.0 {
            match is_whole {
                true => take_top_p(row, config.top_p, scan, left),
                false => drop(left.keep_top_p(config.top_p, left.total())),
            }
            is_whole = false;
        }
        if config.min_p > 0.0 {
            match is_whole {
                true => {
                    let floor = scan.best + config.min_p.ln();
                    scan.take_from(row, changes, floor, &mut left.list);
                }
                false => left.keep_min_p(config.min_p),
            }
            is_whole = false;
        }
        if is_whole {
            scan.take_from(row, changes, f32::MIN, &mut left.list);
        }
        if self.excludes_top_choices() && self.dice.f32() < self.config.xtc_probability {
            self.candidates.exclude_top_choices(self.config.xtc_threshold);
        }
    }

    fn temperature(&self) -> f32 {
        let GenerationConfig { temperature, dynatemp_range: range, .. } = self.config;
        if range <= 0.0 || self.mirostat.is_on() {
            return temperature;
        }
        let low = (temperature - range).max(0.0);
        self.candidates.dynamic_temperature(low, temperature + range, self.config.dynatemp_exponent)
    }
}

/// From a row without changes. Mostly a few hundred tokens reach the share.
fn take_top_p(row: &[f32], share: f32, scan: &mut Scan, left: &mut Candidates) {
    const FEW: usize = 256;
    let total = scan.total(row, 1.0) as f32;
    scan.take_best(row, &Changes::default(), FEW, &mut left.list);
    if !left.keep_top_p(share, total) {
        // All that are less likely than this do not make up the rest, even together.
        let least = (1.0 - share) * total / row.len() as f32;
        scan.take_from(row, &Changes::default(), scan.best + least.ln(), &mut left.list);
        left.keep_top_p(share, total);
    }
}

/// So many tokens back does a penalty look; -1 means the whole context.
fn window(last_n: i32, n_ctx: usize) -> usize {
    usize::try_from(last_n).unwrap_or(n_ctx).min(n_ctx)
}

fn call(hook: &LogitsHook, tokens: &[i32], row: &mut [f32]) -> Result<()> {
    let failed = |what: String| Error::LogitsHook { what, cause: None };
    catch_unwind(AssertUnwindSafe(|| (hook.0)(tokens, row)))
        .unwrap_or_else(|_| Err(failed("it panicked".into())))?;
    match row.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(at) => Err(failed(format!("it left {} as the logit of token {at}", row[at]))),
        None => Ok(()),
    }
}
