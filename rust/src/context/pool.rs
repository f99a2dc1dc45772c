//! The threads that compute, one set for all contexts of the process, and whose turn it is.
//!
//! Two contexts that computed at the same time on the same cores would spin against each other: the
//! threads of each wait for one another in a loop that never sleeps. So they take turns, step by step.
//! Where all of them only generate, two compute beside each other with half of the threads each: what one
//! does between its products, the other uses to read weights (docs/performance.md).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::core_waits::threads_called;
use super::line::Line;
use crate::error::Result;
use crate::ffi::{self, ShimPool};

/// Long enough for idle workers to be awake for the next step, short enough to leave the core to
/// Python.
const POLL: u32 = 1;

/// As the shim calls them.
const WORKERS: &str = "tabagent-worker";

/// Worker threads of llama.cpp. Only the context whose turn it is computes on them.
pub struct Pool {
    raw: *mut ShimPool,
    n_threads: u32,
    workers: Vec<u32>,
}

// SAFETY: whoever computes on a shared pool holds a `Turn`; any other belongs to one context.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// The pool of this process, with at least so many threads. Contexts keep the one that they were
    /// made with; a larger one is for those that come later.
    pub fn shared(n_threads: u32) -> Result<Arc<Pool>> {
        static POOL: Mutex<Weak<Pool>> = Mutex::new(Weak::new());
        let mut known = lock(&POOL);
        if let Some(pool) = known.upgrade().filter(|pool| pool.n_threads >= n_threads) {
            return Ok(pool);
        }
        let pool = Pool::new(n_threads)?;
        *known = Arc::downgrade(&pool);
        Ok(pool)
    }

    pub fn new(n_threads: u32) -> Result<Arc<Pool>> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one_at_a_time = lock(&ONE_AT_A_TIME);
        let others = threads_called(WORKERS);
        let mut raw = std::ptr::null_mut();
        // SAFETY: plain numbers, and a place for the result.
        ffi::call(|error| unsafe { ffi::ta_pool_new(n_threads as i32, POLL, &mut raw, error) })?;
        let mut workers = threads_called(WORKERS);
        workers.retain(|id| !others.contains(id));
        Ok(Arc::new(Pool { raw, n_threads, workers }))
    }

    /// The kernel's ids of its threads, as far as they are known. Whoever computes is one more.
    pub fn workers(&self) -> &[u32] {
        &self.workers
    }

    pub(crate) fn as_ptr(&self) -> *mut ShimPool {
        self.raw
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the contexts that used it are gone.
        unsafe { ffi::ta_pool_free(self.raw) }
    }
}

/// How long somebody who met another one counts as still there.
const MEMORY: Duration = Duration::from_millis(200);

static TURNS: LazyLock<Turns> = LazyLock::new(|| Turns {
    line: Line::new(),
    contended_ms: AtomicU64::new(0),
    unshared_ms: AtomicU64::new(0),
});

/// The right to compute with all threads or with half of them, until it is dropped.
pub struct Turn {
    halves: u32,
}

struct Turns {
    line: Line,
    /// Milliseconds since `epoch` when somebody met another one last.
    contended_ms: AtomicU64,
    /// And when somebody came who needed all threads.
    unshared_ms: AtomicU64,
}

impl Turn {
    /// With half of the threads, if that is enough for everybody who was here lately.
    pub fn take(can_share: bool) -> Turn {
        if !can_share {
            TURNS.unshared_ms.store(now_ms(), Ordering::Relaxed);
        }
        let is_shared = can_share && Turn::is_contended() && !is_recent(&TURNS.unshared_ms);
        let halves = if is_shared { 1 } else { 2 };
        TURNS.line.enter(halves, || TURNS.contended_ms.store(now_ms(), Ordering::Relaxed));
        Turn { halves }
    }

    pub fn is_half(&self) -> bool {
        self.halves == 1
    }

    /// Whether another context computed or waited for its turn a moment ago.
    pub fn is_contended() -> bool {
        is_recent(&TURNS.contended_ms)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TURNS.line.leave(self.halves);
    }
}

fn is_recent(then_ms: &AtomicU64) -> bool {
    let then = then_ms.load(Ordering::Relaxed);
    then > 0 && now_ms().saturating_sub(then) < MEMORY.as_millis() as u64
}

/// Never 0, which means never.
fn now_ms() -> u64 {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    EPOCH.elapsed().as_millis() as u64 + 1
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
