//! Which layout of weights a model computes with: as they lie in its file, or laid out anew for the CPU.
//!
//! A layout of one's own is not the faster one everywhere: kernels for the file's layout tile it too,
//! and what competes with them differs from module to module, AMX included. What was measured is
//! remembered, and compared, in Python (`_layouts.py`); without it there is a built-in rule
//! (`model/load.rs`).

use std::time::Duration;

use super::pool::Turn;
use super::stopwatch::least_in_calm;
use crate::error::{Error, Result};
use crate::{ffi, gguf};

/// How long a mebibyte of weights takes, as it is counted in the file: for a token of a prompt, and for
/// one of the answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayoutPace {
    pub prompt_token: Duration,
    pub answer_token: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayoutTiming {
    pub type_name: &'static str,
    pub as_in_file: LayoutPace,
    pub anew: LayoutPace,
}

/// Rows of a prompt that are computed together.
const ROWS: u32 = 128;
const BUDGET: Duration = Duration::from_millis(200);
const MIB: f64 = (1 << 20) as f64;

/// Times the types of these names that the CPU module lays out anew, in less than half a second. None:
/// the machine was busy, or has no memory to spare.
pub fn measure_layouts(types: &[String], n_threads: u32) -> Result<Option<Vec<LayoutTiming>>> {
    let n_threads = n_threads.clamp(1, 512);
    let is_relaid = |&(number, name): &(u32, &str)| {
        types.iter().any(|wanted| wanted == name) && ffi::relaid(number).is_some()
    };
    let (numbers, names): (Vec<u32>, Vec<&str>) = gguf::weight_types().filter(is_relaid).unzip();
    if numbers.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let unknown = names.into_iter().map(LayoutTiming::unknown).collect();
    match least_times(&numbers, unknown, n_threads) {
        Err(Error::Exhausted { .. }) => Ok(None), // the load may still do without
        found => found,
    }
}

fn least_times(
    types: &[u32],
    unknown: Vec<LayoutTiming>,
    n_threads: u32,
) -> Result<Option<Vec<LayoutTiming>>> {
    let stopwatch = Stopwatch::new(types, n_threads)?;
    least_in_calm(n_threads, BUDGET, unknown, |least| {
        least.iter_mut().enumerate().try_for_each(|(place, timing)| {
            stopwatch.time(place, false, &mut timing.as_in_file)?;
            stopwatch.time(place, true, &mut timing.anew)
        })
    })
}

impl LayoutTiming {
    fn unknown(type_name: &'static str) -> LayoutTiming {
        let unknown = LayoutPace { prompt_token: Duration::MAX, answer_token: Duration::MAX };
        LayoutTiming { type_name, as_in_file: unknown, anew: unknown }
    }
}

struct Stopwatch(*mut ffi::ShimLayouts);

impl Stopwatch {
    fn new(types: &[u32], n_threads: u32) -> Result<Stopwatch> {
        let mut layouts = std::ptr::null_mut();
        // SAFETY: numbers that outlive the call, and a pointer of ours for what is made.
        ffi::call(|error| unsafe {
            let (first, count) = (types.as_ptr().cast(), types.len() as i32);
            ffi::ta_layouts_new(first, count, n_threads as i32, &mut layouts, error)
        })?;
        Ok(Stopwatch(layouts))
    }

    /// Keeps the least of what was seen before and now.
    fn time(&self, place: usize, anew: bool, least: &mut LayoutPace) -> Result<()> {
        let prompt = self.look(place, anew, ROWS)? / ROWS;
        let answer = self.look(place, anew, 1)?;
        least.prompt_token = least.prompt_token.min(prompt);
        least.answer_token = least.answer_token.min(answer);
        Ok(())
    }

    fn look(&self, place: usize, anew: bool, rows: u32) -> Result<Duration> {
        let mut seconds = 0.0;
        let _turn = Turn::take(false); // contexts that compute meanwhile are no disturbance
        // SAFETY: the stopwatch is alive, and `place` counts the types that it was made with.
        ffi::call(|error| unsafe {
            let (place, rows) = (place as i32, rows as i32);
            ffi::ta_layouts_time(self.0, place, anew, rows, &mut seconds, error)
        })?;
        Ok(Duration::from_secs_f64(seconds * MIB))
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        unsafe { ffi::ta_layouts_free(self.0) }
    }
}
