//! llama.cpp's own log lines, on their way to whoever takes them; nothing is ever printed.
//!
//! The callback runs on llama.cpp's threads, so it only stores. One reader takes the lines, and a
//! load listens to the lines of its own thread, because llama.cpp gives its reasons nowhere else.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Debug,
    Info,
    Warning,
    Error,
}

/// Lines beyond this are dropped, oldest first: nobody may be reading.
const MAX_LINES: usize = 4096;

/// Of a line that is written for those who come after.
pub const BREADCRUMB_BYTES: usize = 1024;

struct Queue {
    lines: VecDeque<(Level, String)>,
    stopped: bool,
}

/// Where the last line is written at once, for those who look after this process has died.
static BREADCRUMB: Mutex<Option<File>> = Mutex::new(None);

static QUEUE: Mutex<Queue> = Mutex::new(Queue { lines: VecDeque::new(), stopped: false });
static FILLED: Condvar = Condvar::new();

thread_local! {
    /// A line comes in pieces; this is what has come of the present one.
    static PARTIAL: RefCell<(Option<Level>, String)> = const { RefCell::new((None, String::new())) };
    /// What this thread has been told since `listen` began.
    static HEARD: RefCell<Option<Vec<(Level, String)>>> = const { RefCell::new(None) };
    /// Lines that go on only if what is under way turns out to be worth telling.
    static HELD: RefCell<Option<Vec<(Level, String)>>> = const { RefCell::new(None) };
}

/// Route llama.cpp's and ggml's lines here. Called before anything of theirs can log.
pub(crate) fn install() {
    // SAFETY: a function that neither unwinds nor keeps the text.
    unsafe { llama_cpp_sys_2::llama_log_set(Some(on_line), std::ptr::null_mut()) };
}

/// A panic's message is a line as well, instead of text on stderr; for a host that owns the process.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| note(Level::Error, panic.to_string())));
}

/// Sleeps until there are lines, and takes them. Empty once `stop` was called.
pub fn take() -> Vec<(Level, String)> {
    let mut queue = lock();
    while queue.lines.is_empty() && !queue.stopped {
        queue = FILLED.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
    queue.lines.drain(..).collect()
}

pub fn stop() {
    lock().stopped = true;
    FILLED.notify_all();
}

/// A line of our own, in the same stream.
pub fn note(level: Level, line: impl Into<String>) {
    push(level, line.into());
}

/// Back to llama.cpp's own way, on stderr: for a child process that may die before a line is read here.
pub(crate) fn uninstall() {
    // SAFETY: without a function it takes its own again.
    unsafe { llama_cpp_sys_2::llama_log_set(None, std::ptr::null_mut()) };
}

/// From now on the first bytes of this open file are the last line, filled up with zeros.
#[cfg(unix)]
pub fn keep_last_line(descriptor: i32) -> std::io::Result<()> {
    use std::os::fd::BorrowedFd;
    // SAFETY: it is only borrowed for the copy, which fails if it is not open.
    let given = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let copy = given.try_clone_to_owned()?;
    *BREADCRUMB.lock().unwrap_or_else(PoisonError::into_inner) = Some(File::from(copy));
    Ok(())
}

#[cfg(unix)]
fn write_last(line: &str) {
    use std::os::unix::fs::FileExt;
    if let Some(file) = &*BREADCRUMB.lock().unwrap_or_else(PoisonError::into_inner) {
        let mut record = [0; BREADCRUMB_BYTES];
        let length = line.len().min(BREADCRUMB_BYTES);
        record[..length].copy_from_slice(&line.as_bytes()[..length]);
        let _ = file.write_all_at(&record, 0);
    }
}

#[cfg(not(unix))]
fn write_last(_: &str) {}

/// Runs `work` and gives back what llama.cpp complained about meanwhile, on this thread.
pub(crate) fn listen<T>(work: impl FnOnce() -> T) -> (T, Vec<String>) {
    HEARD.set(Some(Vec::new()));
    let result = work();
    let heard = HEARD.take().unwrap_or_default();
    let errors = heard.iter().filter(|(level, _)| *level == Level::Error);
    (result, errors.map(|(_, line)| line.clone()).collect())
}

/// Runs `work`; what llama.cpp says meanwhile on this thread is passed on only if `is_news`.
pub(crate) fn unless_expected<T>(work: impl FnOnce() -> T, is_news: impl FnOnce(&T) -> bool) -> T {
    HELD.set(Some(Vec::new()));
    let result = work();
    let held = HELD.take().unwrap_or_default();
    if is_news(&result) {
        held.into_iter().for_each(|(level, line)| push(level, line));
    }
    result
}

unsafe extern "C" fn on_line(
    level: llama_cpp_sys_2::ggml_log_level,
    text: *const c_char,
    _: *mut c_void,
) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp gives a zero-terminated string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    // A panic must not travel through llama.cpp's frames.
    let _ = catch_unwind(AssertUnwindSafe(|| collect(level_of(level), &text)));
}

/// `None` continues the line before.
fn level_of(level: llama_cpp_sys_2::ggml_log_level) -> Option<Level> {
    match level {
        llama_cpp_sys_2::GGML_LOG_LEVEL_DEBUG => Some(Level::Debug),
        llama_cpp_sys_2::GGML_LOG_LEVEL_WARN => Some(Level::Warning),
        llama_cpp_sys_2::GGML_LOG_LEVEL_ERROR => Some(Level::Error),
        llama_cpp_sys_2::GGML_LOG_LEVEL_CONT => None,
        _ => Some(Level::Info),
    }
}

fn collect(level: Option<Level>, text: &str) {
    PARTIAL.with_borrow_mut(|(current, line)| {
        if level.is_some() && line.is_empty() {
            *current = level;
        }
        for part in text.split_inclusive('\n') {
            line.push_str(part);
            if part.ends_with('\n') {
                let whole = std::mem::take(line);
                push(current.or(level).unwrap_or(Level::Info), whole.trim_end().to_owned());
                *current = level;
            }
        }
    });
}

fn push(level: Level, line: String) {
    if line.trim_matches(['.', ' ']).is_empty() {
        return; // progress dots
    }
    write_last(&line);
    let is_held = HELD.with_borrow_mut(|held| match held {
        Some(held) => {
            held.push((level, line.clone()));
            true
        }
        None => false,
    });
    if is_held {
        return;
    }
    HEARD.with_borrow_mut(|heard| {
        if let Some(heard) = heard {
            heard.push((level, line.clone()));
        }
    });
    let mut queue = lock();
    if queue.lines.len() == MAX_LINES {
        queue.lines.pop_front();
    }
    queue.lines.push_back((level, line));
    drop(queue);
    FILLED.notify_one();
}

fn lock() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}
