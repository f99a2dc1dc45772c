//! A row of logits: one pass over all of it, and what can be found quickly after that pass.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// So many logits share one maximum.
const BLOCK: usize = 64;
const LANES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub logit: f32,
    pub token: i32,
}

/// The better first; of equals the one with the smaller id.
pub fn better(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// The `count` best, best first.
pub fn keep_best(list: &mut Vec<Candidate>, count: usize) {
    if count < list.len() {
        list.select_nth_unstable_by(count - 1, better);
        list.truncate(count);
    }
    list.sort_unstable_by(better);
}

/// The largest logit of each block. They say where to look, so that a vocabulary is read once per
/// token: whoever wants the 40 best looks into 40 blocks and a few more.
#[derive(Default)]
pub struct Scan {
    maxima: Vec<f32>,
    scratch: Vec<f32>,
    pub best: f32,
}

impl Scan {
    /// Whether all of them are finite numbers.
    pub fn read(&mut self, row: &[f32]) -> bool {
        self.maxima.clear();
        let mut is_finite = true;
        for block in row.chunks(BLOCK) {
            let (largest, is_sound) = read_block(block);
            self.maxima.push(largest);
            is_finite &= is_sound;
        }
        self.best = self.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        is_finite
    }

    /// Whether looking for `count` logits would mean looking at nearly all.
    pub fn is_too_many(&self, count: usize) -> bool {
        count > self.maxima.len() / 2
    }

    /// The `count` best, best first.
    pub fn take_best(
        &mut self,
        row: &[f32],
        changes: &Changes,
        count: usize,
        out: &mut Vec<Candidate>,
    ) {
        // Of so many blocks at least `count` have a maximum that was not changed.
        let floor = self.floor(count.saturating_add(changes.len()));
        self.take_from(row, changes, floor, out);
        keep_best(out, count);
    }

    /// All that are not below `floor`, in no order; never those at −∞.
    pub fn take_from(&self, row: &[f32], changes: &Changes, floor: f32, out: &mut Vec<Candidate>) {
        let floor = floor.max(f32::MIN);
        out.clear();
        for (number, (block, &largest)) in row.chunks(BLOCK).zip(&self.maxima).enumerate() {
            if largest < floor {
                continue;
            }
            for (place, &logit) in block.iter().enumerate() {
                let token = (number * BLOCK + place) as i32;
                if logit >= floor && !changes.has(token) {
                    out.push(Candidate { logit, token });
                }
            }
        }
        let changed = changes.iter().filter(|&(_, logit)| logit >= floor);
        out.extend(changed.map(|(token, logit)| Candidate { logit, token }));
    }

    /// Σ exp((logit − best) · scale).
    pub fn total(&self, row: &[f32], scale: f32) -> f64 {
        let blocks = row.chunks(BLOCK).zip(&self.maxima);
        // Who is that far behind adds nothing that the sum could hold.
        let counted = blocks.filter(|(_, largest)| (**largest - self.best) * scale > -32.0);
        counted.map(|(block, _)| f64::from(total_of_block(block, self.best, scale))).sum()
    }

    /// At least `count` logits of the row are not below this.
    fn floor(&mut self, count: usize) -> f32 {
        match count {
            0 | 1 => self.best,
            _ if count > self.maxima.len() => f32::NEG_INFINITY,
            _ => {
                self.scratch.clone_from(&self.maxima);
                *self.scratch.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
            }
        }
    }
}

/// The logits of a few tokens that are not what the row says.
#[derive(Default)]
pub struct Changes(ByToken<f32>);

impl Changes {
    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// A token at −∞ stays there, and one of another vocabulary is left alone.
    pub fn change(&mut self, row: &[f32], token: i32, change: impl FnOnce(f32) -> f32) {
        let Some(&logit) = row.get(token as usize) else { return };
        if logit > f32::NEG_INFINITY {
            let logit = self.0.entry(token).or_insert(logit);
            *logit = change(*logit).clamp(f32::MIN, f32::MAX);
        }
    }

    pub fn ban(&mut self, row: &[f32], token: i32) {
        if (token as usize) < row.len() {
            self.0.insert(token, f32::NEG_INFINITY);
        }
    }

    /// Writes them into a copy of the row that they were made for.
    pub fn settle(&mut self, row: &mut [f32]) {
        for (token, logit) in self.0.drain() {
            row[token as usize] = logit;
        }
    }

    fn has(&self, token: i32) -> bool {
        !self.0.is_empty() && self.0.contains_key(&token)
    }

    fn iter(&self) -> impl Iterator<Item = (i32, f32)> {
        self.0.iter().map(|(&token, &logit)| (token, logit))
    }
}

/// How far the logits lie around their mean; those at −∞ do not count. Infinite where it is more than
/// a number can hold.
pub fn deviation(row: &[f32], best: f32) -> f32 {
    let mean = best - mean_of(row, |logit| best - logit);
    let variance = mean_of(row, |logit| (logit - mean) * (logit - mean));
    if variance.is_nan() { f32::INFINITY } else { variance.sqrt() }
}

/// e to the power of something that is not above zero, to seven digits and without a branch, so
/// that a loop of it becomes vector code.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: what is added to it loses its fraction
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let is_something = x > SMALLEST;
    let x = if is_something { x } else { 0.0 };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    let rest = x - whole * LN_2_HIGH - whole * LN_2_LOW;
    let mut power = 1.987_569_1e-4;
    for factor in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        power = power * rest + factor;
    }
    let power = power * rest * rest + rest + 1.0;
    let power = f32::from_bits(power.to_bits().wrapping_add(rounded.to_bits() << 23));
    if is_something { power } else { 0.0 }
}

/// Its `exp` is the smallest that is a normal number.
const SMALLEST: f32 = -87.0;

fn read_block(block: &[f32]) -> (f32, bool) {
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut zeros = [0.0; LANES];
    let (lanes, rest) = block.as_chunks::<LANES>();
    let padding = [rest.first().copied().unwrap_or(block[0]); LANES];
    let mut last = padding;
    last[..rest.len()].copy_from_slice(rest);
    for lane in lanes.iter().chain([&last]) {
        for place in 0..LANES {
            let logit = lane[place];
            largest[place] = if logit > largest[place] { logit } else { largest[place] };
            // NaN and infinities are the only numbers that do not vanish here.
            zeros[place] += logit * 0.0;
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (largest, zeros.into_iter().sum::<f32>() == 0.0)
}

fn total_of_block(block: &[f32], best: f32, scale: f32) -> f32 {
    let mut sums = [0.0; LANES];
    let (lanes, rest) = block.as_chunks::<LANES>();
    for lane in lanes {
        for place in 0..LANES {
            sums[place] += exp((lane[place] - best) * scale);
        }
    }
    let rest = rest.iter().map(|logit| exp((logit - best) * scale));
    sums.into_iter().chain(rest).sum()
}

/// Over those that are not at −∞.
fn mean_of(row: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (mut sum, mut count) = (0.0f64, 0.0f64);
    for block in row.chunks(BLOCK) {
        let (mut sums, mut counts) = ([0.0; LANES], [0.0; LANES]);
        let (lanes, rest) = block.as_chunks::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for lane in lanes.iter().chain([&last]) {
            for place in 0..LANES {
                let counted = lane[place] > f32::NEG_INFINITY;
                sums[place] += if counted { term(lane[place]) } else { 0.0 };
                counts[place] += if counted { 1.0 } else { 0.0 };
            }
        }
        sum += f64::from(sums.into_iter().sum::<f32>());
        count += f64::from(counts.into_iter().sum::<f32>());
    }
    (sum / count) as f32
}

pub type ByToken<T> = HashMap<i32, T, BuildHasherDefault<TokenHasher>>;

/// Token ids are small numbers: one multiplication spreads them well enough.
#[derive(Default)]
pub struct TokenHasher(u64);

impl Hasher for TokenHasher {
    fn write_i32(&mut self, token: i32) {
        self.0 = (token as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_i32(self.0 as i32 ^ i32::from(byte)));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
