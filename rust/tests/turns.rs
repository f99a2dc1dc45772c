//! Contexts take turns, each as often as the others: one at a time, or two that need half of the threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tabagent_model::context::Turn;

/// There is one set of turns in a process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Until nobody is remembered.
fn forget() {
    thread::sleep(Duration::from_millis(250));
}

#[test]
fn only_one_computes_at_a_time_and_everybody_comes_in() {
    const STEPS: usize = 300;
    let _alone = alone();
    let inside = AtomicUsize::new(0);
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for who in 0..3 {
            let (inside, order) = (&inside, &order);
            scope.spawn(move || {
                for _ in 0..STEPS {
                    let turn = Turn::take(false);
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    order.lock().unwrap().push(who);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                }
            });
        }
    });
    let order = order.into_inner().unwrap();
    let counts = [0, 1, 2].map(|who| order.iter().filter(|taker| **taker == who).count());
    assert_eq!(counts, [STEPS; 3]);
    assert!(Turn::is_contended());
}

#[test]
fn a_panic_gives_the_turn_back() {
    let _alone = alone();
    let panicked = std::thread::spawn(|| {
        let _turn = Turn::take(false);
        panic!("while computing");
    });
    assert!(panicked.join().is_err());
    drop(Turn::take(false));
}

#[test]
fn two_that_met_compute_beside_each_other_until_one_needs_all_threads() {
    let _alone = alone();
    forget();
    let first = Turn::take(true);
    assert!(!first.is_half());
    thread::scope(|scope| {
        scope.spawn(|| drop(Turn::take(true))); // waits, and is remembered
        thread::sleep(Duration::from_millis(20));
        drop(first);
    });
    let (one, other) = (Turn::take(true), Turn::take(true));
    assert!(one.is_half() && other.is_half());

    let needs_all = thread::spawn(|| assert!(!Turn::take(false).is_half()));
    drop(one);
    thread::sleep(Duration::from_millis(20));
    assert!(!needs_all.is_finished());
    drop(other);
    needs_all.join().unwrap();
    assert!(!Turn::take(true).is_half()); // who needs all comes again, as a rule
}

#[test]
fn whoever_is_alone_has_all_threads() {
    let _alone = alone();
    forget();
    for _ in 0..3 {
        assert!(!Turn::take(true).is_half());
    }
    assert!(!Turn::is_contended());
}
