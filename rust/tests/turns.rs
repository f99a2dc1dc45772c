//! Contexts take turns: one at a time, each as often as the others.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tabagent_model::context::Turn;

#[test]
fn only_one_computes_at_a_time_and_everybody_comes_in() {
    const STEPS: usize = 300;
    let inside = AtomicUsize::new(0);
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for who in 0..3 {
            let (inside, order) = (&inside, &order);
            scope.spawn(move || {
                for _ in 0..STEPS {
                    let turn = Turn::take();
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
    let panicked = std::thread::spawn(|| {
        let _turn = Turn::take();
        panic!("while computing");
    });
    assert!(panicked.join().is_err());
    drop(Turn::take());
}
