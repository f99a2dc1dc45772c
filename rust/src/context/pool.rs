//! The threads that compute, one set for all contexts of the process, and whose turn it is.
//!
//! Two contexts that computed at the same time on the same cores would spin against each other: the
//! threads of each wait for one another in a loop that never sleeps. So they take turns, step by step.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::core_waits::threads_called;
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

/// How long somebody who had to wait for a turn counts as still there.
const MEMORY: Duration = Duration::from_millis(200);

static TURNS: Turns = Turns::new();

/// The right to compute, until it is dropped.
pub struct Turn(());

/// First come, first served.
struct Turns {
    state: Mutex<State>,
    next: Condvar,
    /// Milliseconds since `epoch` when somebody had to wait last.
    contended_ms: AtomicU64,
}

struct State {
    /// The next number to be drawn, and the one whose turn it is.
    drawn: u64,
    served: u64,
}

impl Turn {
    pub fn take() -> Turn {
        let mut state = lock(&TURNS.state);
        let mine = state.drawn;
        state.drawn += 1;
        while state.served != mine {
            TURNS.contended_ms.store(now_ms(), Ordering::Relaxed);
            state = TURNS.next.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(())
    }

    /// Whether another context waited for its turn a moment ago.
    pub fn is_contended() -> bool {
        let last = TURNS.contended_ms.load(Ordering::Relaxed);
        last > 0 && now_ms() - last < MEMORY.as_millis() as u64
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = lock(&TURNS.state);
        state.served += 1;
        if state.served != state.drawn {
            TURNS.next.notify_all();
        }
    }
}

impl Turns {
    const fn new() -> Turns {
        Turns {
            state: Mutex::new(State { drawn: 0, served: 0 }),
            next: Condvar::new(),
            contended_ms: AtomicU64::new(0),
        }
    }
}

/// Never 0, which means never.
fn now_ms() -> u64 {
    static EPOCH: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    EPOCH.elapsed().as_millis() as u64 + 1
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
