//! How long threads that had something to compute waited for a core, as the kernel counts it.
//!
//! A step may be slow for many reasons of its own. Only this says that somebody else had the core.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

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
