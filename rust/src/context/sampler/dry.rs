//! DRY: the longer the passage that a token would repeat, the less likely it becomes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::row::{ByToken, Changes};
use crate::config::GenerationConfig;
use crate::error::Result;
use crate::model::Vocabulary;

/// What ends a passage: a token, and the tokens that must follow it.
pub type Breakers = ByToken<Vec<Vec<i32>>>;

pub struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    last_n: usize,
    breakers: Arc<Breakers>,
    /// Of each position, backwards from the end: how many tokens before it are also the last ones.
    repeats: Vec<u32>,
    longest: ByToken<u32>,
}

impl Dry {
    pub fn new(config: &GenerationConfig, breakers: Arc<Breakers>, n_ctx: usize) -> Dry {
        let is_off = config.dry_multiplier == 0.0;
        Dry {
            multiplier: config.dry_multiplier,
            base: config.dry_base,
            allowed_length: config.dry_allowed_length as usize,
            last_n: if is_off { 0 } else { super::window(config.dry_penalty_last_n, n_ctx) },
            breakers,
            repeats: Vec::new(),
            longest: ByToken::default(),
        }
    }

    pub fn apply(&mut self, row: &[f32], tokens: &[i32], changes: &mut Changes) {
        let tokens = &tokens[tokens.len().saturating_sub(self.last_n)..];
        if tokens.len() <= self.allowed_length {
            return;
        }
        let limit = self.since_breaker(tokens);
        if limit < self.allowed_length {
            return;
        }
        self.find_repeats(tokens, limit);
        self.find_longest(tokens);
        // Beyond it the power is no number any more.
        let most = if self.base > 1.000_001 { f32::MAX.ln() / self.base.ln() } else { f32::MAX };
        for (&token, &length) in &self.longest {
            let is_breaker = |tails: &Vec<Vec<i32>>| tails.iter().any(Vec::is_empty);
            if self.breakers.get(&token).is_some_and(is_breaker) {
                continue;
            }
            let excess = ((length as usize - self.allowed_length) as f32).min(most.trunc());
            changes.change(row, token, |logit| logit - self.multiplier * self.base.powf(excess));
        }
    }

    /// How many tokens there are behind the last breaker.
    fn since_breaker(&self, tokens: &[i32]) -> usize {
        if self.breakers.is_empty() {
            return tokens.len();
        }
        for back in 0..tokens.len() {
            let at = tokens.len() - 1 - back;
            let Some(tails) = self.breakers.get(&tokens[at]) else { continue };
            let tails = tails.iter().filter(|tail| tokens[at + 1..].starts_with(tail));
            if let Some(longest) = tails.map(Vec::len).max() {
                return back - longest;
            }
        }
        tokens.len()
    }

    /// The Z-algorithm on the reversed tokens: each of them is compared at most twice.
    ///
    ///     tokens    a b c c b c y a b c
    ///     repeats   0 0 3 1 0 2 0 0 0 0     "3": a b c came before, and comes last
    ///
    /// `repeats[k]` here is about the position `k` tokens before the end.
    fn find_repeats(&mut self, tokens: &[i32], limit: usize) {
        let count = tokens.len();
        let back = |distance: usize| tokens[count - 1 - distance];
        let repeats = &mut self.repeats;
        repeats.clear();
        repeats.resize(count, 0);
        let (mut left, mut right) = (0, 0); // the match that reaches farthest back
        for k in 1..count {
            let known = if k <= right { repeats[k - left] as usize } else { 0 };
            if k <= right && known < right - k + 1 {
                repeats[k] = known as u32;
                continue;
            }
            let mut end = if k <= right { right + 1 } else { k };
            while end < count && back(end) == back(end - k) {
                end += 1;
            }
            repeats[k] = (end - k).min(limit) as u32;
            if end > k {
                (left, right) = (k, end - 1);
            }
        }
    }

    /// Which tokens would go on with a passage, and how long that is by now.
    fn find_longest(&mut self, tokens: &[i32]) {
        self.longest.clear();
        for k in 1..tokens.len() {
            let length = self.repeats[k];
            if length as usize >= self.allowed_length {
                let next = tokens[tokens.len() - k];
                let longest = self.longest.entry(next).or_default();
                *longest = length.max(*longest);
            }
        }
    }
}

/// The breakers of the last few requests that had any: most have the same.
#[derive(Default)]
pub struct KnownBreakers(Mutex<VecDeque<(Vec<String>, Arc<Breakers>)>>);

impl KnownBreakers {
    const MOST: usize = 8;

    pub fn of(&self, config: &GenerationConfig, vocabulary: &Vocabulary) -> Result<Arc<Breakers>> {
        let strings = &config.dry_sequence_breakers;
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = known().iter().find(|(of, _)| of == strings) {
            return Ok(found.clone());
        }
        let found = Arc::new(dry_breakers(strings, vocabulary)?);
        let mut known = known();
        known.truncate(Self::MOST - 1);
        known.push_front((strings.clone(), found.clone()));
        Ok(found)
    }
}

/// llama.cpp looks no farther into a breaker.
const MOST_BYTES: usize = 40;
const MOST_TOKENS: usize = 20;

/// Finds the tokens in which the strings begin. It asks the vocabulary for each of its tokens, so it
/// is done where a request comes in, and not in the thread that everybody waits for.
pub fn dry_breakers(strings: &[String], vocabulary: &Vocabulary) -> Result<Breakers> {
    let mut breakers = Breakers::default();
    let mut word = Vec::new();
    for token in 0..vocabulary.size() as i32 {
        word.clear();
        vocabulary.piece(token, true, &mut word)?;
        for string in strings {
            let end = (0..=string.len().min(MOST_BYTES)).rfind(|&at| string.is_char_boundary(at));
            let string = &string[..end.unwrap_or(0)];
            let bytes = string.as_bytes();
            if word.windows(bytes.len()).any(|part| part == bytes) {
                add(&mut breakers, token, Vec::new());
                continue;
            }
            // The end of the token may be the beginning of the string.
            let shares = (1..bytes.len()).filter(|&n| word.ends_with(&bytes[..n]));
            for rest in shares.filter_map(|n| string.get(n..)) {
                let mut tail = vocabulary.tokenize(rest, false, false)?;
                tail.truncate(MOST_TOKENS);
                add(&mut breakers, token, tail);
            }
        }
    }
    Ok(breakers)
}

fn add(breakers: &mut Breakers, head: i32, tail: Vec<i32>) {
    let tails = breakers.entry(head).or_default();
    if !tails.contains(&tail) {
        tails.push(tail);
    }
}
