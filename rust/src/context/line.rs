//! Those who wait to compute, in the order in which they came.
//!
//! `rust/tests/line.rs` compiles this file with loom's locks, and runs the orders in which threads can meet in
//! it.

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// There are two halves to be had; whoever comes takes one of them, or both.
pub struct Line {
    state: Mutex<State>,
    next: Condvar,
}

struct State {
    /// The next number to be drawn, and the next one to be let in.
    drawn: u64,
    next: u64,
    free_halves: u32,
}

impl Line {
    pub fn new() -> Line {
        Line {
            state: Mutex::new(State { drawn: 0, next: 0, free_halves: 2 }),
            next: Condvar::new(),
        }
    }

    /// Waits until it is let in. `meets` is called when somebody else is there, and after each wait.
    pub fn enter(&self, halves: u32, meets: impl Fn()) {
        let mut state = self.lock();
        let mine = state.drawn;
        state.drawn += 1;
        if state.next != mine || state.free_halves < 2 {
            meets();
        }
        while state.next != mine || state.free_halves < halves {
            state = self.next.wait(state).unwrap_or_else(PoisonError::into_inner);
            meets();
        }
        state.next += 1;
        state.free_halves -= halves;
        self.let_in(state);
    }

    pub fn leave(&self, halves: u32) {
        let mut state = self.lock();
        state.free_halves += halves;
        self.let_in(state);
    }

    /// Whoever wakes takes the lock, so it is let go before.
    fn let_in(&self, state: MutexGuard<State>) {
        let can_go = state.next != state.drawn && state.free_halves > 0;
        drop(state);
        if can_go {
            self.next.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
