//! The orders in which threads can meet in the line for the threads that compute, by loom, up to three
//! interruptions: nobody is forgotten, and no more is given away than there is.

mod sync {
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
    pub use std::sync::PoisonError;
}

#[path = "../src/context/line.rs"]
mod line;

use std::sync::atomic::{AtomicU32, Ordering};

use line::Line;
use loom::sync::Arc;
use loom::thread;

fn all_orders_of(visits: &'static [&'static [u32]]) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let (line, taken) = (Arc::new(Line::new()), Arc::new(AtomicU32::new(0)));
        let visitors = visits.iter().map(|visits| {
            let (line, taken) = (line.clone(), taken.clone());
            thread::spawn(move || {
                for halves in visits.iter().copied() {
                    line.enter(halves, || ());
                    assert!(taken.fetch_add(halves, Ordering::SeqCst) + halves <= 2);
                    taken.fetch_sub(halves, Ordering::SeqCst);
                    line.leave(halves);
                }
            })
        });
        for visitor in visitors.collect::<Vec<_>>() {
            visitor.join().unwrap();
        }
    });
}

#[test]
fn two_who_need_all_come_in_one_after_the_other() {
    all_orders_of(&[&[2, 2], &[2]]);
}

#[test]
fn halves_are_side_by_side_and_whoever_needs_all_is_not_forgotten() {
    all_orders_of(&[&[1], &[1], &[2]]);
}

#[test]
fn who_changes_between_both_is_not_forgotten() {
    all_orders_of(&[&[1, 2], &[2, 1]]);
}
