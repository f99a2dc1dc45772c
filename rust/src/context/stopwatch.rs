//! What the CPU is timed with: windows in which nobody else computed.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::ffi;

/// Windows without a neighbour are enough when there were so many, and hopeless after so many others.
const NUM_CALM: u32 = 3;
const NUM_BUSY: u32 = 3;
const WINDOW: Duration = Duration::from_millis(60);
/// With less CPU time than this share of what the threads could have had, somebody else had it.
const CALM: f64 = 0.9;

/// Looks again and again, for so long at most. A round looks at everything, so that what comes and
/// goes meets all of it, and keeps the least of what was seen. None: the machine was busy.
pub fn least_in_calm<T: Clone>(
    n_threads: u32,
    budget: Duration,
    mut least: T,
    mut round: impl FnMut(&mut T) -> Result<()>,
) -> Result<Option<T>> {
    let (mut num_calm, mut num_busy) = (0, 0);
    let begun = Instant::now();
    while num_calm < NUM_CALM && num_busy < NUM_BUSY && begun.elapsed() < budget {
        let mut seen = least.clone();
        let (cpu, wall) = (ffi::cpu_time(), Instant::now());
        while wall.elapsed() < WINDOW {
            round(&mut seen)?;
        }
        // The kernel counts in ticks, so only the whole window says something.
        let possible = wall.elapsed().as_secs_f64() * f64::from(n_threads);
        let is_calm = (ffi::cpu_time() - cpu).as_secs_f64() >= CALM * possible;
        match is_calm {
            true => (least, num_calm) = (seen, num_calm + 1),
            false => num_busy += 1,
        }
    }
    Ok((num_calm > 0).then_some(least))
}
