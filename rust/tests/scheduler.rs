//! The loop, with a runner that speaks the lines it was given: who runs when, what each request is
//! told, and that nothing is lost whatever the runner does.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use tabagent_model::config::{GenerationConfig, LogitsHook, Overflow, Priority};
use tabagent_model::context::message::FinishReason::{Cancelled, Length, Stop};
use tabagent_model::context::message::{Event, FinishReason, TokenLogprobs};
use tabagent_model::context::runner::{Interrupt, Row};
use tabagent_model::context::{Capacity, Context, Prompt, SlotView};
use tabagent_model::error::Error;

const SMALL: Capacity = Capacity { queue_size: 10, prompt_cache_bytes: 0 };

/// One slot, and a gate before every step.
fn one_slot() -> Setup {
    Setup { n_slots: 1, gate: Some(0), ..Setup::default() }
}

fn with_priority(priority: Priority) -> GenerationConfig {
    GenerationConfig { priority, ..at_most(2) }
}

fn panicked() -> Error {
    Error::internal("the engine's step panicked")
}

fn unloaded() -> Error {
    Error::ModelUnloaded
}

/// How many slots have rows in a batch, and how many rows each: sorted.
fn shape(batch: &[tabagent_model::context::runner::Row]) -> Vec<usize> {
    let mut counts = std::collections::BTreeMap::<usize, usize>::new();
    for row in batch {
        *counts.entry(row.slot).or_default() += 1;
    }
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable();
    counts
}

// ---- what a request is told ----------------------------------------------------------------

#[test]
fn a_request_ends_when_the_model_ends_its_turn() {
    let mut engine = Engine::new(Setup::default());
    assert_eq!(engine.ask(1, &[90, 95], greedy()), said([96, 97, 98], Stop));
    assert_eq!(engine.stats(1).generated_tokens, 3);
}

#[test]
fn a_request_ends_at_its_limit() {
    let mut engine = Engine::new(Setup::default());
    assert_eq!(engine.ask(1, &[10], at_most(3)), said([11, 12, 13], Length));
}

#[test]
fn each_step_is_told_on_its_own_and_the_last_one_with_the_end() {
    let context = Context::with_runner(
        ScriptedRunner::new(Setup::default(), Interrupt::default()).0,
        SMALL,
        Interrupt::default(),
    )
    .unwrap();
    context.submit(7, Prompt::Tokens(vec![10]), at_most(3)).unwrap();
    let mut events: Vec<Event> = Vec::new();
    while events.last().is_none_or(|event| event.end.is_none()) {
        events.extend(context.next_events());
    }
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.id, event.text.as_str(), event.tokens.as_slice(), event.end.is_some()))
        .collect();
    assert_eq!(
        told,
        [(7, "11 ", &[11][..], false), (7, "12 ", &[12], false), (7, "13 ", &[13], true)]
    );
}

#[test]
fn a_stop_string_over_several_tokens_ends_the_text_before_it() {
    let mut engine = Engine::new(Setup::default());
    let config = GenerationConfig { stop: vec!["2 13 1".into()], ..greedy() };
    let expected =
        Answer { text: "11 1".into(), stop: Some("2 13 1".into()), ..said([11, 12, 13, 14], Stop) };
    assert_eq!(engine.ask(1, &[10], config), expected);
}

#[test]
fn what_was_held_back_for_a_stop_string_is_not_lost_at_the_end() {
    let mut engine = Engine::new(Setup::default());
    let config = GenerationConfig { stop: vec!["12 13 15".into()], ..at_most(3) };
    assert_eq!(engine.ask(1, &[10], config), said([11, 12, 13], Length));
}

#[test]
fn no_tokens_wanted_means_no_step() {
    let mut engine = Engine::new(Setup::default());
    assert_eq!(engine.ask(1, &[10, 20], at_most(0)), said([], Length));
    assert_eq!(engine.stage.num_batches(), 0);
}

#[test]
fn ignoring_the_end_goes_on_to_the_limit() {
    let mut engine = Engine::new(Setup::default());
    let config = GenerationConfig { ignore_eos: true, ..at_most(4) };
    // Instead of END the best of the rest, which is token 0.
    assert_eq!(engine.ask(1, &[97], config), said([98, 0, 1, 2], Length));
}

#[test]
fn the_end_has_to_wait_for_the_fewest_tokens() {
    let mut engine = Engine::new(Setup::default());
    let at_least = |min_tokens| GenerationConfig { min_tokens, ..at_most(3) };
    assert_eq!(engine.ask(1, &[97], at_least(1)), said([98], Stop));
    assert_eq!(engine.ask(2, &[97], at_least(2)), said([98, 0, 1], Length));
}

#[test]
fn a_prompt_may_be_one_shorter_than_the_context_and_gets_one_token() {
    let mut engine = Engine::new(Setup { n_ctx: 16, ..Setup::default() });
    let prompt: Vec<i32> = (1..17).collect();
    assert_eq!(engine.ask(1, &prompt[..15], greedy()), said([16], Length));
    let refused = engine.try_submit(2, &prompt, greedy()).unwrap_err();
    assert_eq!(refused.to_string(), "the prompt needs 17 tokens of context, but `n_ctx` is 16");
    let far = engine.try_submit(3, &[1; 160], greedy()).unwrap_err();
    assert_eq!(far.to_string(), "the prompt needs 161 tokens of context, but `n_ctx` is 16");
    assert_eq!(engine.ask(4, &[1, 2, 3], greedy()), said(4..17, Length));
    assert_eq!(engine.heard(), [1, 4]);
}

#[test]
fn a_prompt_of_nothing_is_refused() {
    let engine = Engine::new(Setup::default());
    let refused = engine.try_submit(1, &[], greedy()).unwrap_err();
    assert_eq!(refused.to_string(), "`prompt` must be at least one token, got nothing");
}

#[test]
fn logits_that_are_no_numbers_end_only_their_request() {
    let mut engine = Engine::new(Setup::default());
    engine.submit(1, &[POISON, 64], at_most(5));
    engine.submit(2, &[10], at_most(5));
    let broken = Error::internal("non-finite logits; the weights or the context are broken");
    let expected = [failed([65], &broken), said(11..16, Length)];
    assert_eq!(engine.answers([1, 2]), expected);
    assert_eq!(engine.ask(3, &[20], at_most(2)), said([21, 22], Length));
}

#[test]
fn a_logits_hook_that_fails_ends_only_its_request() {
    let mut engine = Engine::new(Setup::default());
    let hook = |tokens: &[i32], _: &mut [f32]| match tokens.len() {
        3 => Err(Error::Sampling { what: "three".into() }),
        _ => Ok(()),
    };
    let hooked = GenerationConfig { logits_hook: Some(LogitsHook(Arc::new(hook))), ..at_most(5) };
    engine.submit(1, &[30], hooked);
    engine.submit(2, &[10], at_most(5));
    let error = Error::Sampling { what: "three".into() };
    assert_eq!(engine.answers([1, 2]), [failed([31, 32], &error), said(11..16, Length)]);
}

#[test]
fn a_logits_hook_that_panics_ends_only_its_request() {
    let mut engine = Engine::new(Setup::default());
    let hook = LogitsHook(Arc::new(|_, _| panic!("in the hook")));
    engine.submit(1, &[30], GenerationConfig { logits_hook: Some(hook), ..at_most(5) });
    engine.submit(2, &[10], at_most(5));
    let error = Error::LogitsHook { what: "it panicked".into(), cause: None };
    assert_eq!(engine.answers([1, 2]), [failed([], &error), said(11..16, Length)]);
}

#[test]
fn a_stop_token_ends_the_text_before_it() {
    let mut engine = Engine::new(Setup::default());
    let stops = |min_tokens| GenerationConfig { stop_tokens: vec![13], min_tokens, ..at_most(5) };
    assert_eq!(engine.ask(1, &[10], stops(0)), said([11, 12], Stop));
    // Too early it is not chosen at all; of the others, which are alike, the first one is.
    assert_eq!(engine.ask(2, &[10], stops(3)), said([11, 12, 0, 1, 2], Length));
}

#[test]
fn each_token_comes_with_its_logprobs() {
    let mut engine = Engine::new(Setup::default());
    engine.submit(1, &[10], GenerationConfig { logprobs: Some(1), ..at_most(3) });
    engine.submit(2, &[20], at_most(3));
    engine.answers([1, 2]);
    let told = engine.logprobs(1);
    let ids = |told: &[TokenLogprobs]| told.iter().map(|each| each.chosen.token).collect();
    let tokens: Vec<Vec<i32>> = told.iter().map(|event| ids(event)).collect();
    assert_eq!(tokens, [[11], [12], [13]]);
    let told = told.concat();
    assert!(told.iter().all(|each| each.top == [each.chosen.clone()] && each.chosen.logprob < 0.0));
    assert_eq!(told[0].chosen.text, text_of(&[11]));
    assert_eq!(engine.logprobs(2).concat(), []);
}

// ---- crowds ----------------------------------------------------------------------------------

#[test]
fn a_crowd_gets_the_same_as_each_alone() {
    let setup = || Setup { rule: hash_all, n_slots: 4, ..Setup::default() };
    let prompts: [Vec<i32>; 12] = std::array::from_fn(|i| (0..=i as i32 * 3).rev().collect());
    let alone = prompts.each_ref().map(|prompt| Engine::new(setup()).ask(1, prompt, at_most(40)));
    let mut crowd = Engine::new(setup());
    let ids: [u64; 12] = std::array::from_fn(|i| i as u64);
    for (id, prompt) in ids.iter().zip(&prompts) {
        crowd.submit(*id, prompt, at_most(40));
    }
    assert_eq!(crowd.answers(ids), alone);
}

#[test]
fn the_queue_is_first_come_first_served_within_a_priority() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], at_most(2));
    engine.stage.wait_for_batch(1);
    use Priority::{High, Low, Normal};
    for (id, priority) in [(2, Low), (3, Normal), (4, High), (5, Low), (6, Normal), (7, High)] {
        engine.submit(id, &[10], with_priority(priority));
    }
    engine.stage.open();
    engine.answers([1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(engine.ended, [1, 4, 7, 3, 6, 2, 5]);
}

#[test]
fn a_full_queue_says_so_and_has_room_again_later() {
    let mut engine = Engine::new(Setup { queue_size: 2, ..one_slot() });
    engine.submit(1, &[10], at_most(2));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[10], at_most(2));
    engine.submit(3, &[10], at_most(2));
    let full = engine.try_submit(4, &[10], at_most(2)).unwrap_err();
    assert_eq!(full.to_string(), "2 requests are waiting already, which is the limit");
    engine.stage.open();
    engine.answers([1, 2, 3]);
    assert_eq!(engine.ask(4, &[10], at_most(2)), said([11, 12], Length));
}

#[test]
fn the_metrics_know_who_runs_and_who_waits_also_during_a_step() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10, 11], at_most(2));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[10, 11], at_most(2));
    let seen = |engine: &Engine| {
        let m = engine.context.metrics();
        let tokens = (m.prompt_tokens, m.cached_tokens, m.generated_tokens, m.held_tokens);
        ((m.running, m.waiting, m.requests), tokens, (m.steps, m.busy_slots, m.ended_length))
    };
    assert_eq!(seen(&engine), ((1, 1, 2), (2, 0, 0, 0), (0, 0, 0)));
    let first = SlotView { request: Some(1), prompt_tokens: 2, ..SlotView::default() };
    assert_eq!(engine.context.slots(), [first]);
    engine.stage.open();
    engine.answers([1, 2]);
    assert_eq!(seen(&engine), ((0, 0, 2), (4, 1, 4, 0), (4, 4, 2)));
    assert_eq!(engine.context.slots(), [SlotView { held_tokens: 3, ..SlotView::default() }]);
    let metrics = engine.context.metrics();
    let counts = [metrics.queue, metrics.first_token, metrics.gap, metrics.whole]
        .map(|distribution| distribution.buckets.last().unwrap().1);
    assert_eq!(counts, [2; 4]);
}

#[test]
fn a_long_prompt_costs_its_neighbour_a_slower_step_and_not_a_pause() {
    let mut engine = Engine::new(Setup { n_batch: 8, gate: Some(0), ..Setup::default() });
    engine.submit(1, &[10], at_most(20));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &(1..21).collect::<Vec<_>>(), at_most(2));
    engine.stage.open();
    assert_eq!(engine.answers([1, 2]), [said(11..31, Length), said([21, 22], Length)]);
    let shapes: Vec<_> = engine.stage.batches()[..6].iter().map(|batch| shape(batch)).collect();
    assert_eq!(shapes, [vec![1], vec![1, 7], vec![1, 7], vec![1, 6], vec![1, 1], vec![1]]);
}

#[test]
fn a_prompt_keeps_to_what_the_runner_advises_beside_those_who_generate() {
    let prompt_rows = |generating, prompts| {
        assert_eq!(prompts, 1);
        if generating == 0 { usize::MAX } else { 3 }
    };
    let setup = Setup { n_batch: 8, gate: Some(0), prompt_rows, ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &[10], at_most(4));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &(1..21).collect::<Vec<_>>(), at_most(1));
    engine.stage.open();
    assert_eq!(engine.answers([1, 2]), [said(11..15, Length), said([21], Length)]);
    let shapes: Vec<_> = engine.stage.batches().iter().map(|batch| shape(batch)).collect();
    assert_eq!(shapes, [vec![1], vec![1, 3], vec![1, 3], vec![1, 3], vec![8], vec![3]]);
}

#[test]
fn a_short_prompt_overtakes_a_long_one_that_goes_on_all_the_same() {
    let setup = Setup { n_batch: 4, n_slots: 4, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &(0..90).collect::<Vec<_>>(), at_most(1));
    engine.stage.wait_for_batch(1);
    for id in 2..5 {
        engine.submit(id, &[id as i32 * 10; 12], at_most(1));
    }
    engine.stage.let_through(18);
    engine.stage.wait_for_batch(18);
    engine.stage.open();
    engine.answers([1, 2, 3, 4]);
    assert_eq!(engine.ended, [2, 3, 4, 1]);
    let rows = engine.stage.rows_since(0);
    let of_the_long_one = rows.iter().take(4 * 12).filter(|(slot, ..)| *slot == 0).count();
    assert_eq!(of_the_long_one, 3 * 4, "one step in four");
}

#[test]
fn the_gap_that_a_request_leaves_is_closed() {
    let setup = Setup { n_slots: 3, gate: Some(0), rule: hash_all, ..Setup::default() };
    let mut engine = Engine::new(setup);
    let on_and_on = |max_tokens| GenerationConfig { ignore_eos: true, ..at_most(max_tokens) };
    for (id, max_tokens) in [(1, 30), (2, 2), (3, 30)] {
        engine.submit(id, &[id as i32, 5], on_and_on(max_tokens));
        engine.stage.wait_for_batch(1); // the first one is on its own, whoever is quicker
    }
    engine.stage.open();
    let answers = engine.answers([1, 2, 3]);
    let alone = |id: i32, max_tokens| {
        let setup = Setup { rule: hash_all, ..Setup::default() };
        Engine::new(setup).ask(1, &[id, 5], on_and_on(max_tokens))
    };
    assert_eq!(answers, [alone(1, 30), alone(2, 2), alone(3, 30)]);
    let slots: Vec<Vec<usize>> = engine.stage.batches()[..8]
        .iter()
        .map(|batch| batch.iter().map(|row| row.slot).collect::<std::collections::BTreeSet<_>>())
        .map(|slots| slots.into_iter().collect())
        .collect();
    let [one, all, gap, dense] = [vec![0], vec![0, 1, 2], vec![0, 2], vec![0, 1]];
    let expected = [&one, &all, &all, &gap, &gap, &gap, &dense, &dense].map(Clone::clone);
    assert_eq!(slots, expected);
}

#[test]
fn low_priority_is_not_passed_over_for_ever() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], at_most(2));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[20], with_priority(Priority::Low));
    (3..23).for_each(|id| engine.submit(id, &[30], with_priority(Priority::High)));
    engine.stage.open();
    engine.answers([2, 22]);
    assert_eq!(engine.ended.iter().position(|id| *id == 2), Some(9));
}

#[test]
fn low_priority_gives_its_slot_to_whoever_is_more_urgent_and_loses_nothing() {
    let mut engine = Engine::new(Setup { rule: hash_all, ..one_slot() });
    let config = |priority, max_tokens| GenerationConfig {
        priority,
        ignore_eos: true,
        ..at_most(max_tokens)
    };
    engine.submit(1, &[10], config(Priority::Low, 9));
    engine.stage.let_through(3);
    engine.stage.wait_for_batch(4);
    engine.submit(2, &[20], config(Priority::Normal, 4));
    engine.stage.open();
    let alone = |prompt: i32, max_tokens| {
        let setup = Setup { rule: hash_all, ..Setup::default() };
        Engine::new(setup).ask(1, &[prompt], config(Priority::Normal, max_tokens))
    };
    assert_eq!(engine.answers([1, 2]), [alone(10, 9), alone(20, 4)]);
    assert_eq!(engine.ended, [2, 1]);
    assert_eq!(engine.context.metrics().preemptions, 1);
}

#[test]
fn what_a_preempted_request_finds_again_was_not_cached_for_it() {
    let mut engine = Engine::new(Setup { prompt_cache_bytes: 1 << 12, ..one_slot() });
    let low = GenerationConfig { priority: Priority::Low, ..at_most(45) };
    engine.submit(1, &[10], low);
    engine.stage.let_through(40);
    engine.stage.wait_for_batch(41);
    engine.submit(2, &[60], at_most(2));
    engine.stage.open();
    engine.answers([1, 2]);
    assert_eq!((engine.ended.as_slice(), engine.stage.restored().len()), (&[2, 1][..], 1));
    let stats = engine.stats(1);
    assert_eq!((stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens), (1, 0, 45));
    let metrics = engine.context.metrics();
    assert_eq!((metrics.prompt_tokens, metrics.cached_tokens, metrics.preemptions), (2, 0, 1));
}

#[test]
fn normal_priority_keeps_its_slot() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], with_priority(Priority::Normal));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[20], with_priority(Priority::High));
    engine.stage.open();
    engine.answers([1, 2]);
    assert_eq!(engine.ended, [1, 2]);
}

#[test]
fn who_finds_no_place_in_time_hears_so() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], at_most(3));
    engine.stage.wait_for_batch(1);
    let wait = Some(Duration::from_millis(1));
    engine.submit(2, &[20], GenerationConfig { max_queue_wait: wait, ..at_most(3) });
    engine.stage.let_through(1);
    std::thread::sleep(Duration::from_millis(5));
    engine.stage.let_through(1);
    let error = Error::QueueTimeout { seconds: 0.001 };
    assert_eq!(engine.answers([2]), [failed([], &error)]);
    engine.stage.open();
    assert_eq!(engine.answers([1]), [said([11, 12, 13], Length)]);
    // Who runs already has found its place.
    let config = GenerationConfig { max_queue_wait: Some(Duration::from_secs(60)), ..at_most(1) };
    assert_eq!(engine.ask(3, &[30], config), said([31], Length));
}

#[test]
fn many_threads_share_one_context() {
    let engine = Engine::new(Setup { rule: hash_all, n_slots: 3, ..Setup::default() });
    let alone = |first: i32| {
        let prompt = [first, 1, 2];
        Engine::new(Setup { rule: hash_all, ..Setup::default() }).ask(1, &prompt, at_most(30)).text
    };
    std::thread::scope(|scope| {
        for first in 0..8 {
            let context = &engine.context;
            scope.spawn(move || {
                let expected = alone(first);
                for _ in 0..20 {
                    let prompt = Prompt::Tokens(vec![first, 1, 2]);
                    let text = context.generate(prompt, at_most(30), |_| true, || true).unwrap();
                    assert_eq!(text, expected);
                }
            });
        }
    });
}

// ---- the prefix cache ------------------------------------------------------------------------

#[test]
fn sequences_come_to_the_runner_in_ascending_order_without_gaps() {
    // llama.cpp computes others in a pass of their own each.
    let mut engine = Engine::new(Setup { n_slots: 4, gate: Some(0), ..Setup::default() });
    for id in 1..=3 {
        engine.submit(id, &[10 * id as i32], at_most(5));
    }
    engine.stage.open();
    engine.answers([1, 2, 3]);
    for batch in engine.stage.batches() {
        let slots: Vec<usize> = batch.iter().map(|row| row.slot).collect();
        assert_eq!(slots, (slots[0]..slots[0] + slots.len()).collect::<Vec<_>>());
    }
}

/// A beginning that is worth sharing, and the tail that makes the prompt one's own.
fn shared_and(tail: i32) -> Vec<i32> {
    (0..50).chain([tail]).collect()
}

#[test]
fn a_beginning_that_another_slot_holds_is_copied_instead_of_computed() {
    let mut engine = Engine::new(Setup { n_slots: 2, ..Setup::default() });
    engine.submit(1, &shared_and(10), GenerationConfig { ignore_eos: true, ..at_most(70) });
    engine.stage.wait_for_batch(6); // the prompt's 51 rows need 4 steps of 16
    let before = engine.stage.num_batches();
    let second = engine.ask(2, &shared_and(20), at_most(2));
    assert_eq!(second, said([21, 22], Length));
    assert_eq!(engine.stats(2).cached_tokens, 50);
    let computed = engine.stage.rows_since(before);
    assert_eq!(computed.iter().filter(|(_, position, _)| *position < 50).count(), 0);
    engine.answers([1]);
    engine.close();
    assert_eq!(engine.stage.faults(), [""; 0]);
}

#[test]
fn a_crowd_with_one_beginning_computes_it_once() {
    let setup = Setup { n_slots: 4, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    for id in 1..=4 {
        engine.submit(id, &shared_and(10 * id as i32), at_most(2));
    }
    engine.stage.open();
    let answers = engine.answers([1, 2, 3, 4]);
    assert_eq!(answers, [10, 20, 30, 40].map(|tail| said([tail + 1, tail + 2], Length)));
    let rows = engine.stage.rows_since(0);
    let of_the_beginning = rows.iter().filter(|(_, position, _)| *position < 50);
    assert_eq!(of_the_beginning.count(), 50);
    engine.close();
    assert_eq!(engine.stage.faults(), [""; 0]);
}

#[test]
fn who_waits_for_a_beginning_computes_it_when_its_maker_is_gone() {
    let setup = Setup { n_slots: 2, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &shared_and(10), at_most(2));
    engine.submit(2, &shared_and(20), at_most(2));
    engine.stage.wait_for_batch(1);
    engine.context.abort(1);
    engine.stage.open();
    let [first, second] = engine.answers([1, 2]);
    assert_eq!((first.reason, second), (Cancelled, said([21, 22], Length)));
}

#[test]
fn who_waits_for_a_beginning_holds_up_nobody_behind() {
    let setup = Setup { n_slots: 3, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &shared_and(10), at_most(2));
    engine.submit(2, &shared_and(20), at_most(2));
    engine.submit(3, &[70], at_most(2));
    engine.stage.open();
    let answers = engine.answers([1, 2, 3]);
    assert_eq!(answers, [10, 20, 70].map(|last| said([last + 1, last + 2], Length)));
    let is_in = |token| move |batch: &Vec<Row>| batch.iter().any(|row| row.token == token);
    let begins = |token| engine.stage.batches().iter().position(is_in(token));
    // The first prompt takes four steps. The third request may come too late for the first of them.
    assert!(begins(70) <= Some(1), "{:?}", begins(70));
}

/// The beginning of `shared_and`, and so much more of one's own.
fn shared_and_much() -> Vec<i32> {
    (0..50).chain([60; 110]).collect()
}

#[test]
fn who_waits_for_a_beginning_does_not_wait_for_the_rest() {
    let setup = Setup { n_slots: 2, gate: Some(0), n_ctx: 256, ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &shared_and_much(), at_most(2));
    engine.submit(2, &shared_and(20), at_most(2));
    engine.stage.open();
    assert_eq!(engine.answers([1, 2]), [said([61, 62], Length), said([21, 22], Length)]);
    assert_eq!(engine.ended, [2, 1]);
    assert_eq!(engine.stats(2).cached_tokens, 50);
    engine.close();
    assert_eq!(engine.stage.faults(), [""; 0]);
}

#[test]
fn who_is_more_urgent_does_not_wait_for_a_beginning() {
    let setup = Setup { n_slots: 2, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &shared_and(10), with_priority(Priority::Low));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &shared_and(20), with_priority(Priority::High));
    engine.stage.open();
    assert_eq!(engine.answers([1, 2]), [10, 20].map(|last| said([last + 1, last + 2], Length)));
    assert_eq!((engine.ended.as_slice(), engine.stats(2).cached_tokens), (&[2, 1][..], 0));
}

#[test]
fn memory_that_keeps_only_whole_sequences_shares_nothing() {
    let setup = Setup { n_slots: 2, gate: Some(0), forgets_parts: false, ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &shared_and(10), at_most(2));
    engine.submit(2, &shared_and(20), at_most(2));
    engine.stage.open();
    let answers = engine.answers([1, 2]);
    assert_eq!(answers, [10, 20].map(|tail| said([tail + 1, tail + 2], Length)));
    assert_eq!(engine.stats(2).cached_tokens, 0);
}

#[test]
fn a_second_prompt_with_the_same_beginning_computes_only_the_rest() {
    let mut engine = Engine::new(Setup { n_slots: 1, ..Setup::default() });
    assert_eq!(engine.ask(1, &[10, 11, 12, 13], at_most(2)), said([14, 15], Length));
    let before = engine.stage.num_batches();
    // 14 was computed to get 15, which nobody computed.
    let turn = [10, 11, 12, 13, 14, 15, 40];
    assert_eq!(engine.ask(2, &turn, at_most(1)), said([41], Length));
    assert_eq!(engine.stage.rows_since(before), [(0, 5, 15), (0, 6, 40)]);
    assert_eq!(engine.stats(2).cached_tokens, 5);
}

#[test]
fn the_last_prompt_token_is_always_computed() {
    let mut engine = Engine::new(Setup { n_slots: 1, ..Setup::default() });
    let first = engine.ask(1, &[10, 11, 12, 13], at_most(2));
    let before = engine.stage.num_batches();
    assert_eq!(engine.ask(2, &[10, 11, 12, 13], at_most(2)), first);
    assert_eq!(engine.stage.rows_since(before), [(0, 3, 13), (0, 4, 14)]);
}

#[test]
fn a_shared_beginning_that_parts_gives_the_same_as_a_cold_start() {
    let long: Vec<i32> = (0..30).collect();
    let other = [&long[..20], &[77, 78]].concat();
    for forgets_parts in [true, false] {
        let setup = || Setup { rule: hash_all, forgets_parts, n_slots: 1, ..Setup::default() };
        let cold = Engine::new(setup()).ask(1, &other, at_most(30));
        let mut engine = Engine::new(setup());
        engine.ask(1, &long, at_most(30));
        assert_eq!(engine.ask(2, &other, at_most(30)), cold);
        let cached = if forgets_parts { 20 } else { 0 };
        assert_eq!(engine.stats(2).cached_tokens, cached);
    }
}

#[test]
fn what_a_slot_lost_comes_back_from_the_prompt_cache() {
    for forgets_parts in [true, false] {
        let setup =
            Setup { n_slots: 1, prompt_cache_bytes: 1 << 12, forgets_parts, ..Setup::default() };
        let mut engine = Engine::new(setup);
        let (first, other): (Vec<i32>, Vec<i32>) = ((0..50).collect(), (50..90).collect());
        engine.ask(1, &first, at_most(2));
        engine.ask(2, &other, at_most(2));
        assert_eq!(engine.context.metrics().prompt_cache_bytes, 4 * 51);
        let before = engine.stage.num_batches();
        let turn = [&first[..], &[50, 70]].concat();
        assert_eq!(engine.ask(3, &turn, at_most(1)), said([71], Length));
        assert_eq!(engine.stage.rows_since(before), [(0, 51, 70)], "{forgets_parts}");
        assert_eq!(engine.stage.restored(), [(0, 51)]);
        assert_eq!(engine.stats(3).cached_tokens, 51);
    }
}

#[test]
fn the_prompt_cache_keeps_to_its_size_and_forgets_what_was_of_no_use() {
    let setup = Setup { n_slots: 1, prompt_cache_bytes: 4 * 110, ..Setup::default() };
    let mut engine = Engine::new(setup);
    let prompt = |first: i32| (first..first + 40).collect::<Vec<_>>();
    for (id, first) in (1..).zip([0, 10, 0, 20, 30, 0]) {
        engine.ask(id, &prompt(first), at_most(1));
        assert!(engine.context.metrics().prompt_cache_bytes <= 4 * 110);
    }
    // 0 was used in between, so that 10 had to go.
    assert_eq!([3, 6].map(|id| engine.stats(id).cached_tokens), [39, 39]);
    assert_eq!(engine.ask(7, &prompt(10), at_most(1)).tokens, [50]);
    assert_eq!(engine.stats(7).cached_tokens, 0);
}

#[test]
fn what_is_pinned_stays_until_it_is_released() {
    let setup = Setup { n_slots: 1, prompt_cache_bytes: 4 * 60, ..Setup::default() };
    let mut engine = Engine::new(setup);
    let pin = || GenerationConfig { pin: true, ..greedy() };
    let pinned: Vec<i32> = (0..40).collect();
    assert_eq!(engine.ask(1, &pinned, pin()), said([], Length));
    let too_much = Error::OutOfMemory {
        what: "pinning 30 tokens in the prompt cache".into(),
        needed: 120,
        free: 80,
    };
    assert_eq!(engine.ask(2, &[7; 30], pin()), failed([], &too_much));
    let mut cached = |id, first: i32| {
        engine.ask(id, &(first..first + 40).collect::<Vec<_>>(), at_most(1));
        engine.stats(id).cached_tokens
    };
    assert_eq!([cached(3, 20), cached(4, 30), cached(5, 0)], [0, 0, 39]);
    engine.context.unpin(1);
    let mut cached = |id, first: i32| {
        engine.ask(id, &(first..first + 40).collect::<Vec<_>>(), at_most(1));
        engine.stats(id).cached_tokens
    };
    assert_eq!([cached(6, 20), cached(7, 30), cached(8, 0)], [0, 0, 0]);
}

// ---- a context that is full ------------------------------------------------------------------

fn shifting(max_tokens: i64) -> GenerationConfig {
    GenerationConfig { overflow: Overflow::Shift, ..at_most(max_tokens) }
}

#[test]
fn a_full_context_drops_what_came_first_after_the_prompt() {
    let setup = || Setup { n_ctx: 16, rule: hash_all, ..Setup::default() };
    let mut engine = Engine::new(setup());
    let config = GenerationConfig { ignore_eos: true, ..shifting(40) };
    let answer = engine.ask(1, &[1, 2, 3], config.clone());
    assert_eq!(answer, reference(&[1, 2, 3], &config, 16));
    assert_eq!(answer.tokens.len(), 40);
    assert_eq!((engine.stats(1).dropped_tokens, engine.stats(1).n_ctx), (30, 16));
    // What was computed with the dropped tokens before it is of no use to anybody.
    let turn = [&[1, 2, 3], &answer.tokens[34..40]].concat();
    let cold = Engine::new(setup()).ask(1, &turn, at_most(5));
    assert_eq!(engine.ask(2, &turn, at_most(5)), cold);
    assert_eq!(engine.stats(2).cached_tokens, 3);
}

#[test]
fn a_prompt_that_does_not_fit_loses_its_middle_if_that_was_asked_for() {
    let mut engine = Engine::new(Setup { n_ctx: 16, ..Setup::default() });
    let prompt: Vec<i32> = (0..40).collect();
    let config = GenerationConfig { n_keep: 2, ..shifting(2) };
    assert_eq!(engine.ask(1, &prompt, config), said([40, 41], Length));
    let tokens: Vec<i32> = engine.stage.rows_since(0).iter().map(|(.., token)| *token).collect();
    assert_eq!(tokens, [&[0, 1], &prompt[33..], &[40]].concat());
    let stats = engine.stats(1);
    assert_eq!((stats.prompt_tokens, stats.dropped_tokens), (40, 31));
}

#[test]
fn memory_that_cannot_be_shifted_says_so_at_once() {
    let engine = Engine::new(Setup { can_shift: false, ..Setup::default() });
    let refused = engine.try_submit(1, &[1], shifting(2)).unwrap_err().to_string();
    let expected = "`overflow` must be `error` with this model, whose memory cannot be shifted, \
                    got shift";
    assert_eq!(refused, expected);
}

// ---- cancelling ------------------------------------------------------------------------------

#[test]
fn cancelling_in_the_queue_means_never_computed() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], at_most(2));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[50], at_most(2));
    engine.submit(3, &[30], at_most(2));
    engine.context.abort(2);
    engine.stage.open();
    let expected = [said([11, 12], Length), said([], Cancelled), said([31, 32], Length)];
    assert_eq!(engine.answers([1, 2, 3]), expected);
    assert!(engine.stage.rows_since(0).iter().all(|(_, _, token)| *token != 50));
    assert_eq!(engine.context.metrics().waiting, 0);
}

#[test]
fn cancelling_while_generating_takes_one_step() {
    let mut engine = Engine::new(Setup { gate: Some(3), n_slots: 1, ..Setup::default() });
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(4);
    engine.submit(2, &[30], at_most(2));
    engine.context.abort(1);
    engine.stage.let_through(1);
    assert_eq!(engine.answers([1]), [said(11..15, Cancelled)]);
    engine.stage.open();
    assert_eq!(engine.answers([2]), [said([31, 32], Length)]);
}

#[test]
fn cancelling_during_a_long_prompt_does_not_wait_for_its_step() {
    let setup = || Setup { n_batch: 64, rule: hash_all, ..Setup::default() };
    let config = || GenerationConfig { ignore_eos: true, ..at_most(9) };
    let long: Vec<i32> = (0..50).collect();
    let cold = Engine::new(setup()).ask(1, &long, config());
    let neighbour = Engine::new(setup()).ask(1, &[5, 6], config());

    let mut engine = Engine::new(Setup { gate: Some(1), ..setup() });
    engine.submit(1, &[5, 6], config());
    engine.stage.wait_for_batch(2);
    engine.submit(2, &long, config());
    engine.stage.let_through(1);
    engine.stage.wait_for_batch(3);
    engine.context.abort(2); // the gate stays shut
    assert_eq!(engine.answers([2]), [said([], Cancelled)]);
    engine.stage.open();
    assert_eq!(engine.answers([1]), [neighbour]);
    assert_eq!(engine.ask(3, &long, config()), cold);
}

#[test]
fn whose_turn_it_is_for_having_come_first_is_quick_beside_others() {
    let prompt_rows = |generating, _| if generating == 0 { usize::MAX } else { 4 };
    let setup = Setup { gate: Some(3), prompt_rows, ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &(0..100).collect::<Vec<i32>>(), at_most(1));
    engine.stage.wait_for_batch(4);
    engine.submit(2, &[7, 8, 9], at_most(1));
    engine.stage.open();
    engine.answers([1, 2]);
    // Alone; its turn; what is soon read, and a bit; alone again.
    let sizes: Vec<usize> = engine.stage.batches()[3..7].iter().map(Vec::len).collect();
    assert_eq!(sizes, [16, 4, 3 + 4, 16]);
}

#[test]
fn a_memory_that_an_interruption_would_spoil_is_given_the_time_of_a_step() {
    let setup = Setup { n_batch: 64, forgets_parts: false, gate: Some(0), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &(0..50).collect::<Vec<i32>>(), at_most(9));
    engine.submit(2, &[70], at_most(2));
    engine.stage.wait_for_batch(1);
    engine.context.abort(1);
    engine.stage.open();
    assert_eq!(engine.answers([1, 2]), [said([50], Cancelled), said([71, 72], Length)]);
}

#[test]
fn cancelling_twice_or_late_or_nobody_is_fine() {
    let mut engine = Engine::new(one_slot());
    engine.context.abort(404);
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(1);
    engine.context.abort(1);
    engine.context.abort(1);
    engine.stage.open();
    assert_eq!(engine.answers([1]), [said([11], Cancelled)]);
    engine.context.abort(1);
    assert_eq!(engine.ask(2, &[10], at_most(2)), said([11, 12], Length));
    assert_eq!(engine.heard(), [1, 2]);
}

#[test]
fn what_a_cancelled_request_computed_is_found_again() {
    let mut engine = Engine::new(Setup { gate: Some(2), n_slots: 1, ..Setup::default() });
    engine.submit(1, &[10, 11, 12], greedy());
    engine.stage.wait_for_batch(3);
    engine.context.abort(1);
    engine.stage.open();
    assert_eq!(engine.answers([1]), [said([13, 14, 15], Cancelled)]);
    let before = engine.stage.num_batches();
    engine.ask(2, &[10, 11, 12, 13, 14, 15, 16], at_most(1));
    assert_eq!(engine.stage.rows_since(before), [(0, 5, 15), (0, 6, 16)]);
}

// ---- time ------------------------------------------------------------------------------------

#[test]
fn a_request_out_of_time_ends_with_what_it_has() {
    let mut engine = Engine::new(Setup { gate: Some(1), ..Setup::default() });
    let timeout = Duration::from_millis(40);
    let config = GenerationConfig { timeout: Some(timeout), ..greedy() };
    let begun = Instant::now();
    engine.submit(1, &[10], config);
    engine.stage.wait_for_batch(2);
    while begun.elapsed() <= timeout {
        std::thread::sleep(Duration::from_millis(1));
    }
    engine.stage.open();
    let error = Error::GenerationTimeout { seconds: 0.04, generated: 2 };
    assert_eq!(engine.answers([1]), [failed([11, 12], &error)]);
    assert_eq!(engine.ask(2, &[10], at_most(2)), said([11, 12], Length));
}

#[test]
fn a_request_can_run_out_of_time_in_the_queue() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], at_most(3));
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[50], GenerationConfig { timeout: Some(Duration::ZERO), ..greedy() });
    engine.stage.let_through(1);
    let error = Error::GenerationTimeout { seconds: 0.0, generated: 0 };
    assert_eq!(engine.answers([2]), [failed([], &error)]);
    assert!(!engine.has_ended(1));
    engine.stage.open();
    assert_eq!(engine.answers([1]), [said([11, 12, 13], Length)]);
    assert_eq!(engine.context.metrics().waiting, 0);
}

// ---- a runner in trouble -----------------------------------------------------------------------

#[test]
fn without_room_the_youngest_waits_once_more_and_loses_nothing() {
    let setup = || Setup { rule: hash_all, n_slots: 3, cells: 30, ..Setup::default() };
    // The rule must not end them: with these prompts it does not for twelve tokens.
    let config = || GenerationConfig { ignore_eos: true, ..at_most(12) };
    let prompts = [[1, 2, 3, 4, 5], [11, 2, 3, 4, 5], [21, 2, 3, 4, 5]];
    let alone = prompts.map(|prompt| Engine::new(setup()).ask(1, &prompt, config()));
    let mut engine = Engine::new(Setup { gate: Some(0), ..setup() });
    for (id, prompt) in (1..).zip(&prompts) {
        engine.submit(id, prompt, config());
    }
    engine.stage.open();
    assert_eq!(engine.answers([1, 2, 3]), alone);
    assert_eq!(engine.ended, [1, 2, 3]);
    assert_eq!(engine.context.metrics().waiting, 0);
    // Nobody is tried again before there is hope: each preemption costs a recomputation or two.
    assert!(engine.stage.num_batches() < 60, "{} steps", engine.stage.num_batches());
}

#[test]
fn without_room_what_idles_in_the_cache_goes_first() {
    let mut engine = Engine::new(Setup { cells: 30, ..Setup::default() });
    assert_eq!(engine.ask(1, &[10], at_most(20)), said(11..31, Length));
    assert_eq!(engine.ask(2, &[50], at_most(20)), said(51..71, Length));
}

#[test]
fn who_finds_no_room_even_alone_hears_the_numbers() {
    let mut engine = Engine::new(Setup { cells: 10, ..Setup::default() });
    let error = Error::ContextLimitExceeded { max: 128, required: 11 };
    assert_eq!(engine.ask(1, &[1, 2, 3, 4, 5], greedy()), failed(6..12, &error));
    assert_eq!(engine.ask(2, &[1, 2, 3], at_most(2)), said([4, 5], Length));
}

#[test]
fn an_interrupted_step_is_done_again_from_where_it_began() {
    for (forgets_parts, after) in [(true, 0), (true, 9), (false, 1), (false, 9), (false, 99)] {
        let setup = || Setup { rule: hash_all, forgets_parts, ..Setup::default() };
        let prompts: [Vec<i32>; 2] = [(0..30).collect(), (30..50).collect()];
        let alone = prompts.each_ref().map(|p| Engine::new(setup()).ask(1, p, at_most(20)));
        for step in 0..6 {
            let plot = at_step(step, Trick::Abort { after });
            let mut engine = Engine::new(Setup { plot, ..setup() });
            engine.submit(1, &prompts[0], at_most(20));
            engine.submit(2, &prompts[1], at_most(20));
            assert_eq!(engine.answers([1, 2]), alone);
        }
    }
}

#[test]
fn a_refused_step_is_computed_once_more_from_the_beginning() {
    let setup = || Setup { rule: hash_all, prompt_cache_bytes: 1 << 10, ..Setup::default() };
    let prompts: [Vec<i32>; 2] = [(0..30).collect(), (30..50).collect()];
    let alone = prompts.each_ref().map(|p| Engine::new(setup()).ask(1, p, at_most(20)));
    for step in 0..6 {
        let mut engine = Engine::new(Setup { plot: at_step(step, Trick::Refuse), ..setup() });
        engine.submit(1, &prompts[0], at_most(20));
        engine.submit(2, &prompts[1], at_most(20));
        assert_eq!(engine.answers([1, 2]), alone);
    }
}

#[test]
fn a_step_that_is_refused_again_ends_those_who_ran() {
    let plot: Plot = Box::new(|step, _| if step < 2 { Trick::Refuse } else { Trick::Compute });
    let mut engine = Engine::new(Setup { plot, ..Setup::default() });
    let error = Error::internal("the script says so");
    assert_eq!(engine.ask(1, &[10], greedy()), failed([], &error));
    assert_eq!(engine.ask(2, &[10], at_most(2)), said([11, 12], Length));
}

#[test]
fn a_step_without_memory_is_computed_once_more_without_the_prompt_cache() {
    let plot: Plot = at_step(8, Trick::Exhaust);
    let setup = Setup { n_slots: 1, prompt_cache_bytes: 1 << 12, plot, ..Setup::default() };
    let mut engine = Engine::new(setup);
    let [first, second]: [Vec<i32>; 2] = [(0..40).collect(), (40..80).collect()];
    assert_eq!(engine.ask(1, &first, at_most(3)), said([40, 41, 42], Length));
    assert_eq!(engine.ask(2, &second, at_most(9)), said(80..89, Length));
    assert!(engine.stage.num_batches() > 8);
    assert_eq!(engine.context.metrics().prompt_cache_bytes, 0);
}

#[test]
fn who_ran_when_there_was_no_memory_twice_hears_that() {
    let plot: Plot = Box::new(|step, _| if step < 2 { Trick::Exhaust } else { Trick::Compute });
    let mut engine = Engine::new(Setup { plot, ..Setup::default() });
    let error = Error::StepMemory { device: "cpu" };
    assert_eq!(engine.ask(1, &[10], greedy()), failed([], &error));
    assert_eq!(engine.ask(2, &[10], at_most(2)), said([11, 12], Length));
}

/// One runs, one has just come, one waits; then the step with number 2 goes wrong.
fn trouble_at_step_2(trick: Trick, error: &Error) {
    let setup = Setup { gate: Some(0), plot: at_step(2, trick), ..Setup::default() };
    let mut engine = Engine::new(setup);
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[20], greedy());
    engine.submit(3, &[30], at_most(3));
    engine.stage.open();
    let expected = [failed([11, 12], error), failed([21], error), said([31, 32, 33], Length)];
    assert_eq!(engine.answers([1, 2, 3]), expected);
    // Nothing of what the failed step touched is trusted.
    assert_eq!(engine.ask(4, &[10, 11, 12, 13], at_most(2)), said([14, 15], Length));
    assert_eq!(engine.stats(4).cached_tokens, 0);
}

#[test]
fn a_failed_step_ends_those_who_ran_and_nobody_else() {
    trouble_at_step_2(Trick::Fail, &Error::internal("the script says so"));
}

#[test]
fn a_panic_ends_those_who_ran_and_nobody_else() {
    trouble_at_step_2(Trick::Panic, &panicked());
}

#[test]
fn an_injected_panic_is_survived() {
    let mut engine = Engine::new(Setup::default());
    engine.context.inject_panic();
    assert_eq!(engine.ask(1, &[10], at_most(2)), failed([], &panicked()));
    assert_eq!(engine.ask(2, &[10], at_most(2)), said([11, 12], Length));
}

#[test]
fn a_panic_while_a_slot_is_prepared_loses_nobody() {
    let mut engine = Engine::new(Setup { forget_panics: Some(1), ..Setup::default() });
    assert_eq!(engine.ask(1, &[10], at_most(2)), failed([], &panicked()));
    assert_eq!(engine.ask(2, &[10], at_most(2)), failed([], &panicked()));
    engine.stage.calm_down();
    for id in 3..6 {
        assert_eq!(engine.ask(id, &[10], at_most(2)), said([11, 12], Length));
    }
}

#[test]
fn a_panic_that_cannot_be_recovered_from_closes_the_context() {
    let mut engine = Engine::new(Setup {
        n_slots: 1,
        gate: Some(0),
        plot: at_step(0, Trick::Panic),
        forget_all_panics: true,
        ..Setup::default()
    });
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(1);
    engine.submit(2, &[10], greedy());
    engine.stage.open();
    engine.read_to_the_end();
    assert_eq!(engine.answer(1), failed([], &panicked()));
    assert_eq!(engine.answer(2), failed([], &unloaded()));
    let refused = engine.try_submit(3, &[10], greedy()).unwrap_err();
    assert!(matches!(refused, Error::ModelUnloaded), "{refused}");
    assert_eq!(engine.context.metrics().waiting, 0);
    engine.context.close();
}

// ---- leaving ---------------------------------------------------------------------------------

#[test]
fn an_id_is_refused_as_long_as_a_request_has_it() {
    let mut engine = Engine::new(Setup { gate: Some(1), ..one_slot() });
    engine.submit(1, &[10], greedy());
    engine.submit(2, &[20], greedy());
    for id in [1, 2] {
        let refused = engine.try_submit(id, &[30], greedy()).unwrap_err();
        let message = format!("`request_id` must be one that no request under way has, got {id}");
        assert_eq!(refused.to_string(), message);
    }
    engine.stage.open();
    engine.answers([1, 2]);
    engine.try_submit(1, &[10], greedy()).unwrap();
}

#[test]
fn closing_tells_everybody_and_then_nothing_more() {
    let mut engine = Engine::new(Setup { gate: Some(1), ..one_slot() });
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(2);
    engine.submit(2, &[20], greedy());
    engine.submit(3, &[30], with_priority(Priority::High));
    engine.context.abort(2);
    engine.close(); // the gate stays shut
    assert_eq!(engine.answer(1), failed([11], &unloaded()));
    assert_eq!(engine.answer(2), said([], Cancelled));
    assert_eq!(engine.answer(3), failed([], &unloaded()));
    assert_eq!(engine.context.next_events(), []);
    let metrics = engine.context.metrics();
    assert_eq!((metrics.running, metrics.waiting), (0, 0));
    assert!(engine.stage.is_dropped());

    engine.context.close();
    engine.context.abort(1);
    let refused = engine.try_submit(4, &[10], greedy()).unwrap_err();
    assert_eq!(refused.to_string(), "the model was unloaded");
}

#[test]
fn closing_from_many_threads_at_once_waits_for_the_end_in_each() {
    let mut engine = Engine::new(one_slot());
    engine.submit(1, &[10], greedy());
    engine.stage.wait_for_batch(1);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                engine.context.close();
                assert!(engine.stage.is_dropped());
            });
        }
    });
    engine.read_to_the_end();
    assert_eq!(engine.answer(1), failed([], &unloaded()));
}

#[test]
fn dropping_the_context_frees_the_runner() {
    let interrupt = Interrupt::default();
    let (runner, stage) = ScriptedRunner::new(one_slot(), interrupt.clone());
    let context = Context::with_runner(runner, SMALL, interrupt).unwrap();
    context.submit(1, Prompt::Tokens(vec![10]), greedy()).unwrap();
    stage.wait_for_batch(1);
    drop(context);
    assert!(stage.is_dropped());
}

#[test]
fn a_submit_that_races_with_close_gets_an_error_or_a_last_event() {
    for _ in 0..200 {
        let mut engine = Engine::new(Setup::default());
        let context = engine.context.clone();
        let submitter = std::thread::spawn(move || {
            let send = |id| context.submit(id, Prompt::Tokens(vec![10]), greedy());
            (0..).take_while(|&id| send(id).is_ok()).count() as u64
        });
        std::thread::yield_now();
        engine.close();
        let accepted = submitter.join().unwrap();
        assert_eq!(engine.ended.len() as u64, accepted);
        assert_eq!(engine.context.metrics().waiting, 0);
    }
}

// ---- generate --------------------------------------------------------------------------------

fn prompt_of_10() -> Prompt {
    Prompt::Tokens(vec![10])
}

#[test]
fn generate_gives_the_whole_text_and_leaves_the_common_outbox_alone() {
    let mut engine = Engine::new(Setup::default());
    let mut pieces = Vec::new();
    let keep = |piece: &str| {
        pieces.push(piece.to_owned());
        true
    };
    let text = engine.context.generate(prompt_of_10(), at_most(3), keep, || true).unwrap();
    assert_eq!((text.as_str(), pieces.concat().as_str()), ("11 12 13 ", "11 12 13 "));
    engine.ask(1, &[10], at_most(1));
    assert_eq!(engine.heard(), [1]);
}

#[test]
fn generate_stops_where_its_callback_says_so() {
    let engine = Engine::new(Setup { n_slots: 1, ..Setup::default() });
    for _ in 0..3 {
        let stop_at_13 = |piece: &str| piece != "13 ";
        let text = engine.context.generate(prompt_of_10(), greedy(), stop_at_13, || true);
        assert_eq!(text.unwrap(), "11 12 13 ");
    }
}

#[test]
fn generate_stops_when_its_caller_is_interrupted_meanwhile() {
    let engine = Engine::new(one_slot());
    let stage = engine.stage.clone();
    let interrupted = || {
        stage.open();
        false
    };
    let text = engine.context.generate(prompt_of_10(), greedy(), |_| true, interrupted);
    assert_eq!(text.unwrap(), "");
}

#[test]
fn generate_reports_what_ended_it() {
    let plot = at_step(1, Trick::Fail);
    let engine = Engine::new(Setup { plot, ..Setup::default() });
    let error = engine.context.generate(prompt_of_10(), greedy(), |_| true, || true).unwrap_err();
    assert_eq!(error.to_string(), "internal error: the script says so");
}

#[test]
fn a_callback_may_generate_itself() {
    let engine = Engine::new(Setup { n_slots: 1, ..Setup::default() });
    let context = &engine.context;
    let inner = |_: &str| {
        let prompt = Prompt::Tokens(vec![20]);
        context.generate(prompt, at_most(1), |_| true, || true).unwrap() == "21 "
    };
    assert_eq!(context.generate(prompt_of_10(), at_most(2), inner, || true).unwrap(), "11 12 ");
}

#[test]
fn a_callback_may_close_the_context() {
    let engine = Engine::new(Setup { gate: Some(1), ..Setup::default() });
    let context = &engine.context;
    let close = |_: &str| {
        context.close();
        true
    };
    let error = context.generate(prompt_of_10(), greedy(), close, || true).unwrap_err();
    assert_eq!(error.to_string(), unloaded().to_string());
}

#[test]
fn a_callback_that_panics_ends_its_request() {
    let engine = Engine::new(Setup { gate: Some(1), n_slots: 1, ..Setup::default() });
    let context = &engine.context;
    let panics = |_: &str| {
        engine.stage.wait_for_batch(2);
        panic!("the script says so")
    };
    let generate = || context.generate(prompt_of_10(), greedy(), panics, || true);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(generate)).unwrap_err();
    engine.stage.open();
    context.generate(Prompt::Tokens(vec![50]), at_most(1), |_| true, || true).unwrap();
    assert_eq!(engine.stage.rows_since(0), [(0, 0, 10), (0, 1, 11), (0, 0, 50)]);
}

// ---- anything at any time --------------------------------------------------------------------

/// What a request would be told if it were alone and nothing went wrong.
fn reference(prompt: &[i32], config: &GenerationConfig, n_ctx: usize) -> Answer {
    let shifts = config.overflow == Overflow::Shift;
    let room = if shifts { usize::MAX } else { n_ctx - prompt.len() };
    let most = usize::try_from(config.max_tokens).unwrap_or(usize::MAX).min(room);
    let mut history = prompt.to_vec();
    let mut generated = Vec::new();
    while generated.len() < most {
        let next = match hash_all(&history) {
            END if config.ignore_eos || generated.len() < config.min_tokens as usize => 0, // the next best
            next => next,
        };
        if next == END {
            return said(generated, Stop);
        }
        history.push(next);
        generated.push(next);
        let text = text_of(&generated);
        if let Some((stop, at)) = config.stop.iter().find_map(|stop| Some((stop, text.find(stop)?)))
        {
            let stop = Some(stop.clone());
            return Answer { text: text[..at].into(), stop, ..said(generated, Stop) };
        }
        if history.len() == n_ctx {
            let keep = config.kept_tokens(prompt.len(), n_ctx);
            history.drain(keep..keep + (n_ctx - keep) / 2);
        }
    }
    said(generated, Length)
}

struct Storm {
    dice: fastrand::Rng,
    can_shift: bool,
    n_ctx: usize,
    base: Vec<i32>,
}

impl Storm {
    fn new(seed: u64) -> Storm {
        let mut dice = fastrand::Rng::with_seed(seed);
        let n_ctx = dice.usize(24..64);
        let base = (0..n_ctx).map(|_| dice.i32(0..60)).collect();
        Storm { can_shift: dice.bool(), dice, n_ctx, base }
    }

    fn setup(&mut self) -> Setup {
        let dice = &mut self.dice;
        let n_slots = dice.usize(1..5);
        let mut plot_dice = dice.fork();
        let is_wild = dice.bool();
        let plot = move |_: usize, batch: &[_]| match plot_dice.u32(0..400) {
            _ if !is_wild => Trick::Compute,
            0..=2 => Trick::Fail,
            3..=4 => Trick::Panic,
            5..=12 => Trick::NoRoom,
            13..=40 => Trick::Abort { after: plot_dice.usize(0..=batch.len()) },
            41..=42 => Trick::Refuse,
            43 => Trick::Exhaust,
            _ => Trick::Compute,
        };
        Setup {
            n_ctx: self.n_ctx,
            n_batch: n_slots + dice.usize(0..40),
            n_slots,
            queue_size: dice.usize(3..60),
            prompt_cache_bytes: dice.usize(0..4) * 4 * self.n_ctx,
            can_shift: self.can_shift,
            prompt_rows: [|_, _| usize::MAX, |generating, _| if generating > 0 { 2 } else { 9 }]
                [dice.usize(0..2)],
            rule: hash_all,
            cells: self.n_ctx * dice.usize(1..=n_slots),
            forgets_parts: dice.bool(),
            gate: None,
            plot: Box::new(plot),
            forget_panics: is_wild.then_some(200),
            forget_all_panics: false,
        }
    }

    /// Many share a beginning, some part soon.
    fn prompt(&mut self) -> Vec<i32> {
        let shared = self.dice.usize(0..self.n_ctx - 4);
        let mut prompt = self.base[..shared].to_vec();
        prompt.extend((0..self.dice.usize(1..4)).map(|_| self.dice.i32(0..60)));
        prompt
    }

    fn config(&mut self) -> GenerationConfig {
        use Priority::{High, Low, Normal};
        let dice = &mut self.dice;
        let stop =
            if dice.u32(0..4) == 0 { vec![format!("{} {}", 3, dice.u32(1..6))] } else { vec![] };
        let priority = dice.choice([High, Normal, Normal, Low]).unwrap();
        // Memory that cannot forget a part cannot shift, and what it makes then is no reference.
        let (overflow, limit) = match self.can_shift && dice.u32(0..4) == 0 {
            true => (Overflow::Shift, dice.i64(0..90)),
            false => (Overflow::Error, dice.i64(-1..20)),
        };
        let soon = |dice: &mut fastrand::Rng| {
            let micros = dice.u64(0..2000);
            (dice.u32(0..20) == 0).then(|| Duration::from_micros(micros))
        };
        let (timeout, max_queue_wait) = (soon(dice), soon(dice));
        let min_tokens = if dice.u32(0..4) == 0 { dice.u32(0..6) } else { 0 };
        GenerationConfig {
            priority,
            stop,
            overflow,
            timeout,
            max_queue_wait,
            min_tokens,
            ..at_most(limit)
        }
    }
}

fn weather(seed: u64, num_events: usize, num_failures: &AtomicUsize) {
    let mut storm = Storm::new(seed);
    let setup = storm.setup();
    let n_slots = setup.n_slots;
    let mut engine = Engine::new(setup);
    let mut accepted = Vec::new();
    for id in 0..num_events as u64 {
        match storm.dice.u32(0..10) {
            0..7 => {
                let (prompt, config) = (storm.prompt(), storm.config());
                match engine.try_submit(id, &prompt, config.clone()) {
                    Ok(()) => accepted.push((id, prompt, config)),
                    Err(Error::QueueFull { .. }) => std::thread::yield_now(),
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
            _ => engine.context.abort(storm.dice.u64(0..=id)),
        }
        if storm.dice.u32(0..8) == 0 {
            std::thread::sleep(Duration::from_micros(storm.dice.u64(0..200)));
        }
    }
    for (id, prompt, config) in accepted {
        let [answer] = engine.answers([id]);
        let stats = engine.stats(id);
        assert!(stats.cached_tokens < stats.prompt_tokens, "seed {seed}: {stats:?}");
        let expected = reference(&prompt, &config, storm.n_ctx);
        match answer.reason {
            Stop | Length => assert_eq!(answer, expected, "seed {seed}, request {id}"),
            Cancelled | FinishReason::Error => {
                num_failures.fetch_add(1, Ordering::Relaxed);
                let known = &expected.tokens[..answer.tokens.len().min(expected.tokens.len())];
                assert_eq!(answer.tokens, known, "seed {seed}, request {id}");
                assert_eq!(answer.text, text_of(known), "seed {seed}, request {id}");
            }
        }
    }

    // Every slot is there, and every one works.
    engine.stage.calm_down();
    engine.stage.shut();
    let first_step = engine.stage.num_batches();
    let probe = |id: u64| (1 << 20 | id, [id as i32]);
    let (id, prompt) = probe(0);
    engine.submit(id, &prompt, at_most(3));
    engine.stage.wait_for_batch(first_step + 1);
    for (id, prompt) in (1..n_slots as u64).map(probe) {
        engine.submit(id, &prompt, at_most(3));
    }
    engine.stage.let_through(1);
    engine.stage.wait_for_batch(first_step + 2);
    let num_slots = shape(&engine.stage.batches()[first_step + 1]).len();
    engine.stage.open();
    for (id, prompt) in (0..n_slots as u64).map(probe) {
        let expected = reference(&prompt, &at_most(3), storm.n_ctx);
        assert_eq!(engine.answers([id]), [expected], "seed {seed}");
    }
    assert_eq!(num_slots, n_slots, "seed {seed}");
    assert_eq!(engine.context.metrics().waiting, 0, "seed {seed}");
    assert_eq!(engine.stage.faults(), [""; 0], "seed {seed}");
}

#[test]
fn whatever_comes_nobody_is_lost_and_nobody_hears_wrong_words() {
    let num_failures = Arc::new(AtomicUsize::new(0));
    for seed in 0..200 {
        weather(seed, 100, &num_failures);
    }
    // The storm was one.
    assert!(num_failures.load(Ordering::Relaxed) > 500, "{num_failures:?}");
}
