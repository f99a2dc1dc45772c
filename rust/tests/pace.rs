//! Threads give way while somebody else needs a core, and come back when nobody does.

use std::time::{Duration, Instant};

use tabagent_model::context::Pace;

/// A machine on which one thread needs 10 ms for a step, and any number of disturbed ones 100 ms.
struct Machine {
    pace: Pace,
    now: Instant,
    /// Cores that are left over, if the kernel tells.
    idle: Option<f64>,
}

impl Machine {
    fn new(most: u32) -> Machine {
        Machine { pace: Pace::new(most), now: Instant::now(), idle: None }
    }

    fn step(&mut self, is_disturbed: bool) -> u32 {
        let threads = self.pace.threads(self.now, || self.idle);
        let elapsed = match (threads, is_disturbed) {
            (2.., true) => Duration::from_millis(100),
            _ => Duration::from_millis(10) / threads,
        };
        self.now += elapsed;
        self.pace.took(1, threads, elapsed, None, self.now);
        threads
    }

    fn steps(&mut self, count: usize, is_disturbed: bool) -> Vec<u32> {
        (0..count).map(|_| self.step(is_disturbed)).collect()
    }
}

#[test]
fn undisturbed_steps_use_all_threads() {
    assert_eq!(Machine::new(4).steps(100, false), vec![4; 100]);
}

#[test]
fn a_neighbour_takes_threads_out_within_a_few_steps() {
    let mut machine = Machine::new(2);
    machine.steps(10, false);
    assert_eq!(machine.steps(5, true), [2, 2, 2, 1, 1]);
}

#[test]
fn many_threads_go_one_by_one() {
    let mut machine = Machine::new(4);
    machine.steps(10, false);
    let threads = machine.steps(20, true);
    let mut fewest: Vec<u32> = threads.into_iter().filter(|&threads| threads != 4).collect();
    assert!(fewest.is_sorted_by(|a, b| a >= b), "{fewest:?}");
    fewest.dedup();
    assert_eq!(fewest, [3, 2, 1]);
}

#[test]
fn trials_become_rarer_while_the_neighbour_stays() {
    let mut machine = Machine::new(2);
    machine.steps(10, false);
    let threads = machine.steps(1000, true);
    let trials: Vec<usize> = (3..1000).filter(|&step| threads[step] == 2).collect();
    let gaps: Vec<usize> = trials.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.is_sorted(), "{gaps:?}");
    assert!(trials.len() <= 8, "{trials:?}");
}

#[test]
fn all_threads_come_back_when_the_neighbour_goes() {
    let mut machine = Machine::new(2);
    machine.steps(10, false);
    machine.steps(50, true);
    let threads = machine.steps(500, false);
    let back = threads.iter().position(|&threads| threads == 2).expect("a trial");
    assert_eq!(threads[back..], vec![2; 500 - back]);
}

#[test]
fn a_neighbour_from_the_beginning_is_noticed_by_comparing_with_one_thread() {
    let mut machine = Machine::new(2);
    let elapsed = Duration::from_millis(10);
    machine.pace.took(1, 1, elapsed, None, machine.now); // the warm-up measures one thread alone
    assert_eq!(machine.steps(5, true), [2, 2, 2, 1, 1]);
}

#[test]
fn a_growing_context_is_no_disturbance() {
    let mut pace = Pace::new(2);
    let mut now = Instant::now();
    let mut elapsed = Duration::from_millis(5);
    for _ in 0..1000 {
        assert_eq!(pace.threads(now, || None), 2);
        elapsed = elapsed.mul_f64(1.005);
        now += elapsed;
        pace.took(1, 2, elapsed, None, now);
    }
}

#[test]
fn a_context_that_is_suddenly_long_costs_a_few_steps_on_one_thread() {
    let mut pace = Pace::new(2);
    let mut now = Instant::now();
    let mut step = |milliseconds_with_one: u64| {
        let threads = pace.threads(now, || None);
        let elapsed = Duration::from_millis(milliseconds_with_one) / threads;
        now += elapsed;
        pace.took(1, threads, elapsed, None, now);
        threads
    };
    for _ in 0..10 {
        step(10);
    }
    let threads: Vec<u32> = (0..100).map(|_| step(60)).collect();
    assert_eq!(threads[..7], [2, 2, 2, 1, 1, 2, 2]);
    assert_eq!(threads[5..], vec![2; 95]);
}

#[test]
fn one_thread_is_never_taken_out() {
    let mut machine = Machine::new(1);
    machine.steps(10, false);
    assert_eq!(machine.steps(20, true), vec![1; 20]);
}

#[test]
fn a_step_is_given_up_when_one_thread_would_be_done_four_times_over() {
    let mut pace = Pace::new(2);
    let now = Instant::now();
    assert_eq!(pace.limit(1, 2), None); // nothing is known
    pace.took(1, 1, Duration::from_millis(10), None, now);
    assert_eq!(pace.limit(1, 2), Some(Duration::from_millis(40)));
    assert_eq!(pace.limit(8, 2), Some(Duration::from_millis(320)));
    assert_eq!(pace.limit(1, 1), None);

    assert_eq!(pace.threads(now, || None), 2);
    pace.gave_up(now);
    assert_eq!(pace.threads(now, || None), 1);
}

#[test]
fn a_trial_that_is_given_up_is_repeated_later() {
    let mut pace = Pace::new(2);
    let now = Instant::now();
    pace.took(1, 1, Duration::from_millis(10), None, now);
    pace.gave_up(now);
    let trial = now + Duration::from_millis(100);
    assert_eq!(pace.threads(trial, || None), 2);
    pace.gave_up(trial);
    assert_eq!(pace.threads(trial + Duration::from_millis(199), || None), 1);
    assert_eq!(pace.threads(trial + Duration::from_millis(200), || None), 2);
}

#[test]
fn a_trial_is_given_up_as_soon_as_one_thread_would_be_done() {
    let mut pace = Pace::new(2);
    let now = Instant::now();
    pace.took(1, 1, Duration::from_millis(10), None, now);
    pace.gave_up(now);
    assert_eq!(pace.threads(now + Duration::from_millis(100), || None), 2);
    assert_eq!(pace.limit(1, 2), Some(Duration::from_micros(12_500)));
}

#[test]
fn while_no_core_is_left_over_a_neighbour_is_disturbed_every_four_seconds_only() {
    let mut machine = Machine::new(2);
    machine.steps(10, false);
    machine.idle = Some(0.3);
    let begun = machine.now;
    machine.steps(2000, true);
    let (mut trials, mut last) = (Vec::new(), machine.now);
    while machine.now - begun < Duration::from_secs(40) {
        if machine.step(true) == 2 {
            trials.push((machine.now - last).as_millis());
            last = machine.now;
        }
    }
    assert!(trials.len() >= 4, "{trials:?}");
    assert!(trials[1..].iter().all(|after| (4000..4200).contains(after)), "{trials:?}");
}

#[test]
fn a_core_that_is_left_over_brings_the_threads_back_at_once() {
    let mut machine = Machine::new(2);
    machine.steps(10, false);
    machine.idle = Some(0.0);
    machine.steps(300, true);
    machine.idle = Some(1.0);
    let threads = machine.steps(100, false);
    let back = threads.iter().position(|&threads| threads == 2).expect("a trial");
    assert!(back <= 11, "after {back} steps of 10 ms");
    assert_eq!(threads[back..], vec![2; 100 - back]);
}

#[test]
fn what_was_idle_before_a_thread_was_taken_out_does_not_count() {
    let mut pace = Pace::new(2);
    let now = Instant::now();
    pace.took(1, 1, Duration::from_millis(10), None, now);
    pace.gave_up(now);
    let mut told = vec![0.0, 2.0]; // from the end
    let threads = [0, 50, 100].map(|after| {
        let now = now + Duration::from_millis(after);
        (pace.threads(now, || told.pop()), told.len())
    });
    assert_eq!(threads, [(1, 1), (1, 1), (1, 0)]);
}

#[test]
fn slow_steps_whose_threads_had_their_cores_are_nobodys_fault() {
    let now = Instant::now();
    let threads_after = |waited: Duration| {
        let mut pace = Pace::new(2);
        pace.took(1, 2, Duration::from_millis(10), Some(Duration::ZERO), now);
        for _ in 0..5 {
            pace.took(1, 2, Duration::from_millis(100), Some(waited), now);
        }
        pace.threads(now, || None)
    };
    assert_eq!(threads_after(Duration::from_millis(2)), 2);
    assert_eq!(threads_after(Duration::from_millis(60)), 1);
}
