//! How long threads that had something to compute waited for a core, and how many cores nobody needed, as
//! the kernel counts it.
//!
//! A step may be slow for many reasons of its own. Only the first says that somebody else had the core, and
//! only the second that he is gone.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use crate::hardware::cpu::allowed_processors;

/// The accounts of some threads of this process.
pub struct CoreWaits(Vec<File>);

impl CoreWaits {
    /// Of the calling thread and of `others`, by their ids. None where the kernel keeps no account.
    pub fn of(others: &[u32]) -> Option<CoreWaits> {
        let others = others.iter().map(|id| format!("/proc/self/task/{id}/schedstat"));
        let paths = std::iter::once("/proc/thread-self/schedstat".to_owned()).chain(others);
        let files = paths.map(|path| File::open(path).ok()).collect::<Option<Vec<File>>>()?;
        let waits = CoreWaits(files);
        waits.total().map(|_| waits)
    }

    /// All of them together, since they began.
    pub fn total(&self) -> Option<Duration> {
        self.0.iter().map(waited).sum()
    }
}

/// The ids of the threads of this process that are called so.
pub fn threads_called(name: &str) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    let is_called = |id: &u32| {
        fs::read_to_string(format!("/proc/self/task/{id}/comm")).is_ok_and(|n| n.trim_end() == name)
    };
    let ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(is_called).collect()
}

/// The second of three numbers: nanoseconds on a core, nanoseconds waiting for one, turns.
fn waited(mut account: &File) -> Option<Duration> {
    let mut text = [0; 96];
    account.seek(SeekFrom::Start(0)).ok()?;
    let length = account.read(&mut text).ok()?;
    let second = std::str::from_utf8(&text[..length]).ok()?.split_whitespace().nth(1)?;
    second.parse().ok().map(Duration::from_nanos)
}

/// The cores that this process may use, and nobody did. What gives way to us (`nice`) counts as nobody.
#[derive(Default)]
pub struct IdleCores(Option<Ticks>);

#[derive(Clone, Copy)]
struct Ticks {
    idle: u64,
    all: u64,
    cores: usize,
}

impl IdleCores {
    /// On average since it was asked last. None the first time, and where the kernel does not tell.
    pub fn since_last(&mut self) -> Option<f64> {
        let before = std::mem::replace(&mut self.0, Ticks::now());
        let (before, now) = (before?, self.0?);
        let all = now.all.checked_sub(before.all).filter(|&all| all > 0)?;
        let idle = now.idle.saturating_sub(before.idle);
        Some(now.cores as f64 * idle as f64 / all as f64)
    }
}

impl Ticks {
    fn now() -> Option<Ticks> {
        let allowed = allowed_processors()?;
        Ticks::of(&fs::read_to_string("/proc/stat").ok()?, &allowed)
    }

    /// Of the lines of these processors: user, nice, system, idle, iowait, irq, softirq, steal, ….
    fn of(text: &str, allowed: &[usize]) -> Option<Ticks> {
        let mut found = Ticks { idle: 0, all: 0, cores: 0 };
        for line in text.lines() {
            let Some((name, counts)) = line.split_once(' ') else { continue };
            let number = name.strip_prefix("cpu").and_then(|number| number.parse().ok());
            if !number.is_some_and(|number| allowed.contains(&number)) {
                continue;
            }
            let counts: Vec<u64> =
                counts.split_whitespace().take(8).map(|count| count.parse().unwrap_or(0)).collect();
            let [_, nice, _, idle, iowait, ..] = counts[..] else { continue };
            found.idle += nice + idle + iowait;
            found.all += counts.iter().sum::<u64>();
            found.cores += 1;
        }
        (found.cores > 0).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processors_of_this_process_count_and_who_gives_way_is_nobody() {
        let text = "cpu  9 9 9 9 9 9 9 9 9 9\n\
                    cpu0 10 1 2 300 4 5 6 7 0 0\n\
                    cpu1 1000 0 0 0 0 0 0 0 0 0\n\
                    cpu10 20 0 0 80 0 0 0 0 0 0\n\
                    intr 1 2 3\n";
        let of = |allowed: &[usize]| Ticks::of(text, allowed).map(|t| (t.idle, t.all, t.cores));
        assert_eq!(of(&[0]), Some((305, 335, 1)));
        assert_eq!(of(&[0, 10]), Some((385, 435, 2)));
        assert_eq!(of(&[7]), None);
        assert_eq!(Ticks::of("", &[0]).map(|t| t.cores), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_machine_tells_what_was_idle_since_the_last_question() {
        let mut idle = IdleCores::default();
        assert_eq!(idle.since_last(), None);
        std::thread::sleep(Duration::from_millis(50));
        let cores = allowed_processors().map_or(0, |allowed| allowed.len());
        let found = idle.since_last().expect("Linux counts");
        assert!((0.0..=cores as f64).contains(&found), "{found} of {cores}");
    }
}
