//! How many prompt tokens a step takes along, from what steps were seen to cost.

use std::time::Duration;

use tabagent_model::context::Budget;

const MOST: usize = 512;
const LONG: usize = 4000;
const SHORT: usize = 400;

/// A machine on which a pass over the weights takes 10 ms, each further one who generates 1 ms, and
/// each prompt token 2 ms on top of a pass of its own.
fn seconds(num_generating: usize, prompt_rows: usize) -> Duration {
    let generating = match num_generating {
        0 => 0,
        n => 10 + (n as u64 - 1),
    };
    let reading = if prompt_rows > 0 { 10 + 2 * prompt_rows as u64 } else { 0 };
    Duration::from_millis(generating + reading)
}

fn experienced() -> Budget {
    let mut budget = Budget::new(MOST);
    for num_generating in [1, 2, 4, 8] {
        budget.took(num_generating, 0, seconds(num_generating, 0));
    }
    for _ in 0..8 {
        budget.took(0, MOST, seconds(0, MOST));
    }
    budget
}

#[test]
fn who_knows_nothing_yet_reads_at_full_speed() {
    let mut budget = Budget::new(MOST);
    assert_eq!(budget.rows(LONG, 1, 1), MOST);
    budget.took(1, 0, seconds(1, 0));
    assert_eq!(budget.rows(LONG, 1, 1), MOST);
}

#[test]
fn a_step_takes_at_most_three_times_as_long_as_without_a_prompt() {
    let budget = experienced();
    for num_generating in [1, 2, 4, 8] {
        let rows = budget.rows(LONG, num_generating, 1);
        let (with, without) = (seconds(num_generating, rows), seconds(num_generating, 0));
        assert!(with <= without * 3, "{num_generating}: {rows} rows, {with:?} for {without:?}");
    }
}

#[test]
fn the_more_wait_to_be_read_the_more_is_read() {
    let budget = experienced();
    let rows = [1, 2, 4, 8].map(|num_prompts| budget.rows(LONG, 1, num_prompts));
    assert!(rows.is_sorted() && rows[0] < rows[3] && rows[3] < MOST, "{rows:?}");
    // As many who read as generate are no crowd.
    assert_eq!(budget.rows(LONG, 8, 8), budget.rows(LONG, 8, 1));
}

#[test]
fn a_short_prompt_is_read_in_larger_pieces() {
    let budget = experienced();
    let (short, long) = (budget.rows(SHORT, 4, 4), budget.rows(LONG, 4, 4));
    assert!(short > 4 * long, "{short} rows, and {long} of a long one");
    let (with, without) = (seconds(4, short), seconds(4, 0));
    assert!(with <= without * 24, "{short} rows, {with:?} for {without:?}");
}

#[test]
fn who_arrives_waits_for_half_a_second_at_most() {
    let mut budget = Budget::new(MOST);
    assert_eq!(budget.rows_undisturbed(), MOST);
    budget.took(0, MOST, seconds(0, MOST));
    for rows in [128, 240, 242] {
        assert_eq!(budget.rows_undisturbed(), rows);
        budget.took(0, rows, seconds(0, rows));
    }
}

#[test]
fn with_nobody_there_pieces_are_large_enough_to_be_of_use() {
    let (mut quick, mut slow) = (Budget::new(MOST), Budget::new(MOST));
    quick.took(0, MOST, Duration::from_millis(100));
    slow.took(0, MOST, Duration::from_secs(60));
    assert_eq!(quick.rows_undisturbed(), MOST);
    assert_eq!(slow.rows_undisturbed(), 128);
}

#[test]
fn reading_never_stops() {
    let mut budget = experienced();
    for _ in 0..50 {
        budget.took(1, 2, Duration::from_secs(3));
    }
    assert_eq!(budget.rows(LONG, 1, 1), 2);
}

#[test]
fn it_learns_from_steps_that_cost_more_than_they_did() {
    let mut budget = experienced();
    let before = budget.rows(LONG, 1, 4);
    let dear = |rows: usize| Duration::from_millis(10 + 10 + 16 * rows as u64);
    for _ in 0..8 {
        let rows = budget.rows(LONG, 1, 4);
        budget.took(1, rows, dear(rows));
    }
    let after = budget.rows(LONG, 1, 4);
    assert!(after * 3 < before * 2, "{before} before, {after} after");
}

#[test]
fn a_crowd_that_was_never_seen_without_prompts_is_not_read_in_crumbs() {
    let mut budget = Budget::new(MOST);
    budget.took(1, 0, seconds(1, 0));
    budget.took(0, MOST, seconds(0, MOST));
    for num_generating in 10..40 {
        let rows = budget.rows(SHORT, num_generating, 1);
        assert!(rows > 64, "{num_generating}: {rows} rows");
        budget.took(num_generating, rows, seconds(num_generating, rows));
    }
}

#[test]
fn a_disturbed_step_hardly_counts() {
    let mut budget = experienced();
    let before = budget.rows(LONG, 1, 1);
    budget.took(1, 0, Duration::from_secs(9));
    let after = budget.rows(LONG, 1, 1);
    assert!(after <= before * 3, "{before} before, {after} after");
}
