//! One row of logits → one token: greedy, the kept sets, the penalties and the dice, on
//! distributions small enough to compute by hand.

use std::collections::BTreeMap;
use std::sync::Arc;

use tabagent_model::config::{GenerationConfig, LogitsHook};
use tabagent_model::context::Sampler;

const N_CTX: usize = 64;

/// Everything off, temperature 1.
fn plain() -> GenerationConfig {
    GenerationConfig {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repeat_penalty: 1.0,
        seed: 42,
        ..GenerationConfig::default()
    }
}

fn greedy() -> GenerationConfig {
    GenerationConfig { temperature: 0.0, ..plain() }
}

/// Logits whose softmax is this.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln().max(-80.0)).collect()
}

fn sampler(config: GenerationConfig) -> Sampler {
    config.validate().unwrap();
    Sampler::new(config, Arc::default(), N_CTX)
}

fn sample(config: GenerationConfig, prompt: &[i32], row: &[f32], banned: &[i32]) -> i32 {
    sampler(config).sample(row, prompt, banned.iter().copied()).unwrap()
}

const DRAWS: usize = 10_000;

/// How often each token comes, in hundredths, without those that never do.
fn frequencies(config: GenerationConfig, row: &[f32], banned: &[i32]) -> BTreeMap<i32, i64> {
    let mut sampler = sampler(config);
    let mut counts = BTreeMap::new();
    for _ in 0..DRAWS {
        *counts
            .entry(sampler.sample(row, &[], banned.iter().copied()).unwrap())
            .or_insert(0usize) += 1;
    }
    let percent = |count: usize| (count as f64 * 100.0 / DRAWS as f64).round() as i64;
    counts.into_iter().map(|(token, count)| (token, percent(count))).collect()
}

/// Within two hundredths, and exactly the same tokens.
fn assert_close(found: &BTreeMap<i32, i64>, expected: &[(i32, i64)]) {
    let tokens: Vec<i32> = expected.iter().map(|(token, _)| *token).collect();
    let is_close = expected.iter().all(|(token, share)| (found[token] - share).abs() <= 2);
    assert!(found.keys().copied().eq(tokens) && is_close, "{found:?} instead of {expected:?}");
}

#[test]
fn greedy_takes_the_largest_and_of_equals_the_first() {
    assert_eq!(sample(greedy(), &[], &[0.0, 3.0, 1.0, 3.0], &[]), 1);
    assert_eq!(sample(greedy(), &[], &[-5.0, -5.0, -5.0], &[]), 0);
    assert_eq!(sample(greedy(), &[], &[f32::MIN, f32::MAX], &[]), 1);
}

#[test]
fn the_dice_follow_the_probabilities() {
    let row = logits(&[0.1, 0.6, 0.3]);
    assert_close(&frequencies(plain(), &row, &[]), &[(0, 10), (1, 60), (2, 30)]);
}

#[test]
fn temperature_sharpens_and_flattens() {
    let row = logits(&[0.2, 0.8]);
    let at = |temperature| frequencies(GenerationConfig { temperature, ..plain() }, &row, &[]);
    assert_close(&at(0.5), &[(0, 6), (1, 94)]); // 4 : 64
    assert_close(&at(2.0), &[(0, 33), (1, 67)]); // 1 : 2
    assert_close(&at(100.0), &[(0, 50), (1, 50)]);
}

#[test]
fn a_temperature_near_zero_is_greedy() {
    let row = [1.0, 2.0, 1.999];
    for temperature in [1e-4, 1e-10, 1e-38, f32::from_bits(1)] {
        let config = GenerationConfig { temperature, ..plain() };
        assert_eq!(frequencies(config, &row, &[]), BTreeMap::from([(1, 100)]), "{temperature}");
    }
}

#[test]
fn top_k_keeps_the_best() {
    let row = logits(&[0.1, 0.4, 0.2, 0.3]);
    let with = |top_k| frequencies(GenerationConfig { top_k, ..plain() }, &row, &[]);
    assert_close(&with(1), &[(1, 100)]);
    assert_close(&with(2), &[(1, 57), (3, 43)]);
    assert_close(&with(4), &[(0, 10), (1, 40), (2, 20), (3, 30)]);
    assert_close(&with(i32::MAX as u32), &[(0, 10), (1, 40), (2, 20), (3, 30)]);
}

#[test]
fn top_k_finds_the_best_of_many_whatever_their_order() {
    for seed in 0..100 {
        let mut dice = fastrand::Rng::with_seed(seed);
        let size = dice.usize(1..400);
        let k = dice.usize(1..12);
        // Few values, so that ties are common; the first of equals is the better one.
        let row: Vec<f32> = (0..size).map(|_| dice.i32(-20..20) as f32).collect();
        let mut best: Vec<usize> = (0..size).collect();
        best.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        best.truncate(k);
        best.sort_unstable();

        let config = GenerationConfig { top_k: k as u32, temperature: 100.0, ..plain() };
        let found = frequencies(config, &row, &[]);
        assert!(found.keys().map(|&token| token as usize).eq(best), "seed {seed}");
    }
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let row = logits(&[0.1, 0.4, 0.2, 0.3]);
    let with = |top_p| frequencies(GenerationConfig { top_p, ..plain() }, &row, &[]);
    assert_close(&with(f32::MIN_POSITIVE), &[(1, 100)]);
    assert_close(&with(0.39), &[(1, 100)]);
    assert_close(&with(0.41), &[(1, 57), (3, 43)]);
    assert_close(&with(0.85), &[(1, 44), (2, 22), (3, 33)]);
    assert_close(&with(0.95), &[(0, 10), (1, 40), (2, 20), (3, 30)]);
}

#[test]
fn min_p_keeps_those_that_come_near_the_best() {
    let row = logits(&[0.1, 0.4, 0.2, 0.3]);
    let with = |min_p| frequencies(GenerationConfig { min_p, ..plain() }, &row, &[]);
    assert_close(&with(0.2), &[(0, 10), (1, 40), (2, 20), (3, 30)]);
    assert_close(&with(0.45), &[(1, 44), (2, 22), (3, 33)]);
    assert_close(&with(0.7), &[(1, 57), (3, 43)]);
    assert_close(&with(1.0 - f32::EPSILON), &[(1, 100)]);
}

#[test]
fn top_p_looks_at_what_top_k_left() {
    // Of 0.4 and 0.3 alone, the first is 0.57.
    let row = logits(&[0.1, 0.4, 0.2, 0.3]);
    let config = GenerationConfig { top_k: 2, top_p: 0.5, ..plain() };
    assert_close(&frequencies(config, &row, &[]), &[(1, 100)]);
}

#[test]
fn equal_logits_are_equally_likely() {
    let expected = [(0, 25), (1, 25), (2, 25), (3, 25)];
    for value in [0.0, -80.0, 1e30, f32::MAX, f32::MIN] {
        let config = GenerationConfig { min_p: 0.5, top_p: 0.99, ..plain() };
        assert_close(&frequencies(config, &[value; 4], &[]), &expected);
    }
}

#[test]
fn banned_tokens_never_come() {
    let row = logits(&[0.1, 0.6, 0.3]);
    assert_close(&frequencies(plain(), &row, &[1]), &[(0, 25), (2, 75)]);
    assert_eq!(sample(greedy(), &[], &row, &[1, 2]), 0);
}

#[test]
fn with_everything_banned_there_is_an_error_and_no_panic() {
    for config in [plain(), greedy(), GenerationConfig { top_k: 1, ..plain() }] {
        let error = sampler(config).sample(&[1.0, 2.0], &[], [0, 1]).unwrap_err();
        assert_eq!(error.to_string(), "sampling failed: no token is left to choose from");
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let row = vec![0.0; 50];
    let draws = |seed| {
        let mut sampler = sampler(GenerationConfig { seed, ..plain() });
        let tokens: Vec<i32> = (0..20).map(|_| sampler.sample(&row, &[], []).unwrap()).collect();
        (tokens, sampler.seed())
    };
    assert_eq!(draws(7), draws(7));
    assert_ne!(draws(7).0, draws(8).0);
    assert_eq!(draws(i64::MAX).1, i64::MAX);
    let (random, seed) = draws(-1);
    assert!((0..=i64::from(u32::MAX)).contains(&seed));
    assert_eq!(draws(seed).0, random);
}

#[test]
fn what_are_no_numbers_is_refused() {
    let error = |row: &[f32]| sampler(plain()).sample(row, &[], []).unwrap_err().to_string();
    let expected = "internal error: non-finite logits; the weights or the context are broken";
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(error(&[0.0, bad, 1.0]), expected);
    }
    assert_eq!(error(&[f32::INFINITY, f32::NEG_INFINITY]), expected);
    assert_eq!(error(&[]), expected);
}

#[test]
fn the_repeat_penalty_divides_what_is_above_zero_and_multiplies_what_is_below() {
    let config = GenerationConfig { repeat_penalty: 2.0, ..greedy() };
    assert_eq!(sample(config.clone(), &[0], &[3.0, 2.0], &[]), 1); // 1.5 < 2
    assert_eq!(sample(config.clone(), &[0], &[5.0, 2.0], &[]), 0); // 2.5 > 2
    assert_eq!(sample(config.clone(), &[0], &[-1.0, -1.5], &[]), 1); // -2 < -1.5
    // More than once is not punished more.
    assert_eq!(sample(config, &[0, 0, 0], &[5.0, 2.0], &[]), 0);
}

#[test]
fn the_presence_penalty_counts_once_and_the_frequency_penalty_each_time() {
    let presence = GenerationConfig { presence_penalty: 1.0, ..greedy() };
    let frequency = GenerationConfig { frequency_penalty: 1.0, ..greedy() };
    let row = [3.5, 2.0];
    assert_eq!(sample(presence, &[0, 0], &row, &[]), 0);
    assert_eq!(sample(frequency.clone(), &[0], &row, &[]), 0);
    assert_eq!(sample(frequency, &[0, 0], &row, &[]), 1);
    let wanted = GenerationConfig { presence_penalty: -2.0, ..greedy() };
    assert_eq!(sample(wanted, &[1], &row, &[]), 1);
}

#[test]
fn the_penalties_look_back_a_limited_way() {
    let look_back =
        |penalty_last_n| GenerationConfig { repeat_penalty: 2.0, penalty_last_n, ..greedy() };
    let row = [3.0, 2.0, 0.0];
    assert_eq!(sample(look_back(0), &[0], &row, &[]), 0);
    assert_eq!(sample(look_back(2), &[0, 2, 2], &row, &[]), 0);
    assert_eq!(sample(look_back(3), &[0, 2, 2], &row, &[]), 1);
    // -1 means the whole context, and nothing is longer than that.
    let prompt: Vec<i32> = [&[0][..], &[2; N_CTX - 1]].concat();
    for all in [-1, N_CTX as i32, 1 << 24] {
        assert_eq!(sample(look_back(all), &prompt, &row, &[]), 1);
    }
    assert_eq!(sample(look_back(-1), &[&prompt[..], &[2]].concat(), &row, &[]), 0);
}

#[test]
fn what_was_sampled_is_remembered_and_forgotten_again() {
    let config = GenerationConfig { presence_penalty: 2.0, penalty_last_n: 2, ..greedy() };
    let mut sampler = sampler(config);
    let mut tokens = Vec::new();
    for _ in 0..7 {
        tokens.push(sampler.sample(&[3.0, 2.9, 2.8], &tokens, []).unwrap());
    }
    assert_eq!(tokens, [0, 1, 2, 0, 1, 2, 0]);
}

#[test]
fn tokens_of_another_vocabulary_are_not_penalized() {
    let config = GenerationConfig { repeat_penalty: 2.0, ..greedy() };
    assert_eq!(sample(config, &[-1, 2, i32::MAX], &[3.0, 2.0], &[]), 0);
}

#[test]
fn extreme_settings_give_a_token_and_no_panic() {
    let extremes = [
        GenerationConfig { repeat_penalty: f32::MIN_POSITIVE, ..plain() },
        GenerationConfig { repeat_penalty: 10.0, temperature: f32::MIN_POSITIVE, ..plain() },
        GenerationConfig { top_p: f32::MIN_POSITIVE, min_p: 1.0 - f32::EPSILON, ..plain() },
        GenerationConfig { temperature: 100.0, top_k: 1, ..plain() },
    ];
    for config in extremes {
        for row in [[f32::MAX, f32::MIN, 0.0], [-0.0, 0.0, 1e-45], [1e30, -1e30, 1.0]] {
            let config = config.clone();
            config.validate().unwrap();
            let mut sampler = sampler(config);
            for _ in 0..10 {
                assert!((0..3).contains(&sampler.sample(&row, &[0, 1, 2], []).unwrap()));
            }
        }
    }
}

#[test]
fn typical_keeps_those_that_surprise_as_much_as_expected() {
    // 1.28 nats are expected; the four surprise with 0.92, 1.20, 1.61 and 2.30.
    let row = logits(&[0.4, 0.3, 0.2, 0.1]);
    let with = |typical_p| frequencies(GenerationConfig { typical_p, ..plain() }, &row, &[]);
    assert_close(&with(0.2), &[(1, 100)]);
    assert_close(&with(0.45), &[(1, 60), (2, 40)]);
    assert_close(&with(0.8), &[(0, 44), (1, 33), (2, 22)]);
}

#[test]
fn top_n_sigma_keeps_what_is_within_so_many_deviations_of_the_best() {
    // The mean is 2, the deviation the square root of 2.
    let row = [0.0, 1.0, 2.0, 3.0, 4.0];
    let kept = |top_n_sigma| tokens_left(GenerationConfig { top_n_sigma, ..plain() }, &row);
    assert_eq!(kept(0.5), [4]);
    assert_eq!(kept(1.0), [3, 4]);
    assert_eq!(kept(2.2), [1, 2, 3, 4]);
    assert_eq!(kept(-1.0), [0, 1, 2, 3, 4]);
}

#[test]
fn xtc_leaves_out_all_top_choices_but_the_last_as_often_as_asked() {
    let row = logits(&[0.4, 0.3, 0.2, 0.1]);
    let with = |xtc_probability, xtc_threshold| {
        frequencies(GenerationConfig { xtc_probability, xtc_threshold, ..plain() }, &row, &[])
    };
    assert_close(&with(1.0, 0.15), &[(2, 67), (3, 33)]);
    assert_close(&with(1.0, 0.35), &[(0, 40), (1, 30), (2, 20), (3, 10)]);
    assert_close(&with(0.5, 0.15), &[(0, 20), (1, 15), (2, 43), (3, 22)]);
    assert_close(&with(0.0, 0.15), &[(0, 40), (1, 30), (2, 20), (3, 10)]);
}

#[test]
fn dry_makes_what_would_go_on_with_a_passage_less_likely() {
    let config = GenerationConfig {
        dry_multiplier: 1.0,
        dry_base: 2.0,
        dry_allowed_length: 2,
        dry_sequence_breakers: Vec::new(),
        ..greedy()
    };
    // 1 2 3 came before 4, so after 1 2 3 a 4 costs 1 · 2^(3 - 2).
    let tokens = [1, 2, 3, 4, 5, 1, 2, 3];
    assert_eq!(sample(config.clone(), &tokens, &[0.0, 0.0, 0.0, 0.0, 2.1, 0.0], &[]), 4);
    assert_eq!(sample(config.clone(), &tokens, &[0.0, 0.1, 0.0, 0.0, 1.9, 0.0], &[]), 1);
    let short = GenerationConfig { dry_allowed_length: 4, ..config.clone() };
    assert_eq!(sample(short, &tokens, &[0.0, 0.1, 0.0, 0.0, 1.9, 0.0], &[]), 4);
    let forgetful = GenerationConfig { dry_penalty_last_n: 4, ..config.clone() };
    assert_eq!(sample(forgetful, &tokens, &[0.0, 0.1, 0.0, 0.0, 1.9, 0.0], &[]), 4);
    // A breaker that is the second of them leaves one, which is allowed.
    let breakers = Arc::new([(2, vec![vec![]])].into_iter().collect());
    let mut broken = Sampler::new(config, breakers, N_CTX);
    assert_eq!(broken.sample(&[0.0, 0.1, 0.0, 0.0, 1.9, 0.0], &tokens, []).unwrap(), 4);
}

#[test]
fn mirostat_keeps_the_surprise_near_its_target() {
    let row = logits(&[1.0; 1000].map(|p: f32| p / 1000.0));
    for mirostat in [1, 2] {
        let config = GenerationConfig { mirostat, mirostat_tau: 3.0, mirostat_eta: 0.2, ..plain() };
        let mut sampler = sampler(config);
        for _ in 0..50 {
            sampler.sample(&row, &[], []).unwrap();
        }
        // Nothing in a flat row can be cut by surprise: all are as likely, or one is left.
        let left = sampler.distribution(&row, &[], []).unwrap().len();
        assert!(left == 1 || left == 1000, "{left}");
    }
}

#[test]
fn a_bias_is_added_and_a_ban_is_stronger() {
    let row = logits(&[0.5, 0.25, 0.25]);
    let biased = GenerationConfig { logit_bias: vec![(0, -1e30), (1, 2.0f32.ln())], ..plain() };
    assert_close(&frequencies(biased, &row, &[]), &[(1, 67), (2, 33)]);
    let extreme = GenerationConfig { logit_bias: vec![(2, f32::MAX)], ..greedy() };
    assert_eq!(sample(extreme.clone(), &[], &[0.0, 0.0, f32::MAX], &[]), 2);
    let banned = GenerationConfig { banned_tokens: vec![2], ..extreme };
    assert_eq!(sample(banned, &[], &[0.0, 1.0, f32::MAX], &[]), 1);
}

#[test]
fn logprobs_are_of_the_row_as_it_came() {
    let row = logits(&[0.1, 0.6, 0.3]);
    let config = GenerationConfig {
        logprobs: Some(2),
        logit_bias: vec![(0, 100.0)],
        temperature: 5.0,
        ..plain()
    };
    let mut sampler = sampler(config);
    assert_eq!(sampler.sample(&row, &[], []).unwrap(), 0);
    let (chosen, top) = sampler.logprobs(&row, 0).unwrap();
    let percent = |logprob: f32| (logprob.exp() * 100.0).round() as i32;
    assert_eq!(percent(chosen), 10);
    let top: Vec<(i32, i32)> =
        top.iter().map(|&(token, logprob)| (token, percent(logprob))).collect();
    assert_eq!(top, [(1, 60), (2, 30)]);
}

#[test]
fn a_hook_changes_the_row_before_the_samplers() {
    let hook = |tokens: &[i32], row: &mut [f32]| {
        assert_eq!(tokens, [7, 8]);
        row[0] = f32::NEG_INFINITY;
        row[2] = 9.0;
        Ok(())
    };
    let logits_hook = Some(LogitsHook(Arc::new(hook)));
    let config =
        GenerationConfig { logits_hook, logit_bias: vec![(0, 50.0), (1, 8.0)], ..greedy() };
    assert_eq!(sample(config, &[7, 8], &[3.0, 2.0, 1.0], &[]), 1);
}

#[test]
fn a_hook_that_leaves_no_number_is_an_error() {
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let hook = move |_: &[i32], row: &mut [f32]| {
            row[1] = bad;
            Ok(())
        };
        let config = GenerationConfig { logits_hook: Some(LogitsHook(Arc::new(hook))), ..greedy() };
        let error = sampler(config).sample(&[1.0, 2.0], &[], []).unwrap_err().to_string();
        let expected = format!("the logits hook failed: it left {name} as the logit of token 1");
        assert_eq!(error, expected);
    }
}

#[test]
fn a_history_that_was_cut_is_counted_again() {
    let config = GenerationConfig { presence_penalty: 2.0, penalty_last_n: 3, ..greedy() };
    let mut sampler = sampler(config);
    let mut after = |tokens: &[i32]| sampler.sample(&[1.2, 1.1, 1.0], tokens, []).unwrap();
    assert_eq!(after(&[0, 1, 1]), 2);
    assert_eq!(after(&[1, 1]), 0);
    assert_eq!(after(&[1, 1, 2, 2, 2, 2, 2, 2]), 0);
    assert_eq!(after(&[1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]), 1);
}

#[test]
fn no_combination_leaves_nobody_or_lets_a_banned_token_through() {
    let mut dice = fastrand::Rng::with_seed(5);
    for round in 0..3000 {
        let n_vocab = [1, 2, 63, 64, 65, 500][round % 6];
        let config = random_config(&mut dice, n_vocab);
        let scale = [1e-3, 1.0, 10.0, 1e30, f32::MAX][dice.usize(..5)];
        let row: Vec<f32> = (0..n_vocab).map(|_| (dice.f32() * 2.0 - 1.0) * scale).collect();
        let banned: Vec<i32> = (0..n_vocab as i32).filter(|_| dice.u8(..4) == 0).collect();
        let is_banned =
            |token: &i32| banned.contains(token) || config.banned_tokens.contains(token);
        let is_anything_left = !(0..n_vocab as i32).all(|token| is_banned(&token));
        let mut sampler = sampler(config.clone());
        let mut tokens: Vec<i32> =
            (0..dice.usize(..80)).map(|_| dice.i32(0..n_vocab as i32)).collect();
        for _ in 0..3 {
            match sampler.sample(&row, &tokens, banned.iter().copied()) {
                Ok(token) => {
                    assert!((0..n_vocab as i32).contains(&token) && !is_banned(&token));
                    tokens.push(token);
                }
                Err(error) => {
                    assert!(!is_anything_left, "{error} with {config:?} on {row:?}");
                    assert_eq!(
                        error.to_string(),
                        "sampling failed: no token is left to choose from"
                    );
                }
            }
        }
    }
}

fn random_config(dice: &mut fastrand::Rng, n_vocab: usize) -> GenerationConfig {
    let token = dice.i32(0..n_vocab as i32);
    GenerationConfig {
        temperature: pick(dice, [0.0, f32::MIN_POSITIVE, 0.7, 100.0]),
        dynatemp_range: pick(dice, [0.0, 0.0, 0.5, 100.0]),
        top_k: pick(dice, [0, 1, 40, i32::MAX as u32]),
        top_p: pick(dice, [1.0, f32::MIN_POSITIVE, 0.5, 1.0 - f32::EPSILON]),
        min_p: pick(dice, [0.0, 1e-30, 0.1, 1.0 - f32::EPSILON]),
        typical_p: pick(dice, [1.0, f32::MIN_POSITIVE, 0.5, 1.0 - f32::EPSILON]),
        top_n_sigma: pick(dice, [0.0, 1e-9, 1.0, 100.0]),
        xtc_probability: pick(dice, [0.0, 0.5, 1.0, 1.0]),
        xtc_threshold: pick(dice, [0.0, 0.1, 0.5, 1.0]),
        repeat_penalty: pick(dice, [1.0, f32::MIN_POSITIVE, 1.1, 10.0]),
        frequency_penalty: pick(dice, [0.0, 0.0, 2.0, -2.0]),
        penalty_last_n: pick(dice, [0, 1, 64, -1]),
        dry_multiplier: pick(dice, [0.0, 0.1, 1.0, 100.0]),
        dry_base: pick(dice, [1.0, 1.75, 2.0, 100.0]),
        dry_allowed_length: pick(dice, [0, 1, 2, 1 << 24]),
        dry_penalty_last_n: pick(dice, [0, 1, 64, -1]),
        mirostat: pick(dice, [0, 0, 1, 2]),
        mirostat_tau: pick(dice, [0.0, 1.0, 5.0, 100.0]),
        mirostat_eta: pick(dice, [0.0, 0.1, 1.0, 10.0]),
        logit_bias: vec![(token, pick(dice, [0.0, f32::MIN, 100.0, f32::MAX]))],
        banned_tokens: vec![dice.i32(0..n_vocab as i32)],
        logprobs: pick(dice, [None, Some(0), Some(5), Some(20)]),
        ..plain()
    }
}

fn pick<T: Copy>(dice: &mut fastrand::Rng, values: [T; 4]) -> T {
    values[dice.usize(..4)]
}

fn tokens_left(config: GenerationConfig, row: &[f32]) -> Vec<i32> {
    let left = sampler(config).distribution(row, &[], []).unwrap();
    let mut tokens: Vec<i32> = left.into_iter().map(|(token, _)| token).collect();
    tokens.sort_unstable();
    tokens
}

#[test]
fn every_parameter_out_of_its_range_is_refused_by_name_value_and_range() {
    let refused = |set: fn(&mut GenerationConfig), message: &str| {
        let mut config = GenerationConfig::default();
        set(&mut config);
        assert_eq!(config.validate().unwrap_err().to_string(), message);
    };
    refused(|c| c.temperature = -1.0, "`temperature` must be from 0 to 100, got -1");
    refused(|c| c.temperature = f32::NAN, "`temperature` must be from 0 to 100, got NaN");
    refused(|c| c.temperature = 1e9, "`temperature` must be from 0 to 100, got 1000000000");
    refused(|c| c.dynatemp_range = -0.5, "`dynatemp_range` must be from 0 to 100, got -0.5");
    refused(|c| c.dynatemp_exponent = 101.0, "`dynatemp_exponent` must be from 0 to 100, got 101");
    refused(|c| c.top_k = u32::MAX, "`top_k` must be from 0 to 2147483647, got 4294967295");
    refused(|c| c.min_p = 1.0, "`min_p` must be from 0 to 0.9999999, got 1");
    refused(|c| c.top_n_sigma = -2.0, "`top_n_sigma` must be from -1 to 100, got -2");
    refused(|c| c.xtc_probability = 2.0, "`xtc_probability` must be from 0 to 1, got 2");
    refused(|c| c.xtc_threshold = -1.0, "`xtc_threshold` must be from 0 to 1, got -1");
    refused(|c| c.penalty_last_n = -2, "`penalty_last_n` must be from -1 to 16777216, got -2");
    refused(|c| c.dry_multiplier = -1.0, "`dry_multiplier` must be from 0 to 100, got -1");
    refused(|c| c.dry_base = 0.0, "`dry_base` must be from 1 to 100, got 0");
    refused(
        |c| c.dry_allowed_length = u32::MAX,
        "`dry_allowed_length` must be from 0 to 16777216, got 4294967295",
    );
    refused(
        |c| c.dry_penalty_last_n = -2,
        "`dry_penalty_last_n` must be from -1 to 16777216, got -2",
    );
    refused(
        |c| c.dry_sequence_breakers = vec!["x".into(); 10_000],
        "`the number of `dry_sequence_breakers` strings` must be from 0 to 64, got 10000",
    );
    refused(
        |c| c.dry_sequence_breakers = vec!["x".repeat(1 << 20)],
        "`the bytes of each `dry_sequence_breakers` string` must be from 1 to 64, got 1048576",
    );
    refused(|c| c.mirostat = 3, "`mirostat` must be from 0 to 2, got 3");
    refused(|c| c.mirostat_tau = -1.0, "`mirostat_tau` must be from 0 to 100, got -1");
    refused(|c| c.mirostat_eta = 11.0, "`mirostat_eta` must be from 0 to 10, got 11");
    refused(|c| c.logprobs = Some(21), "`logprobs` must be from 0 to 20, got 21");
    refused(
        |c| c.banned_tokens = vec![3, -5],
        "`banned_tokens[1]` must be a token id from 0 to 2147483646, got -5",
    );
    let mut config = GenerationConfig { logit_bias: vec![(5, f32::NAN)], ..Default::default() };
    assert!(config.validate().unwrap_err().to_string().starts_with("`logit_bias[5]` must be from"));
    config.logit_bias = vec![(5, 1.0), (300, 1.0)];
    config.validate().unwrap();
    assert_eq!(
        config.check_tokens(300).unwrap_err().to_string(),
        "`logit_bias[1]` must be a token id from 0 to 299, got 300"
    );
}

/// `cargo test --release --no-default-features --test sampler -- --ignored --nocapture`
#[test]
#[ignore = "it measures and prints; it proves nothing"]
fn what_a_token_costs_at_a_large_vocabulary() {
    const N_VOCAB: usize = 152_064;
    let mut dice = fastrand::Rng::with_seed(1);
    let normal = |dice: &mut fastrand::Rng| (0..6).map(|_| dice.f32()).sum::<f32>() * 3.0 - 9.0;
    let mut rows: Vec<Vec<f32>> =
        (0..8).map(|_| (0..N_VOCAB).map(|_| normal(&mut dice)).collect()).collect();
    for row in &mut rows {
        (0..300).for_each(|_| row[dice.usize(..N_VOCAB)] += dice.f32() * 17.0);
    }
    let usual = GenerationConfig {
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        min_p: 0.05,
        top_p: 0.95,
        temperature: 0.8,
        ..GenerationConfig::default()
    };
    let dry_and_xtc = GenerationConfig {
        dry_multiplier: 0.8,
        dry_penalty_last_n: -1,
        xtc_probability: 0.5,
        ..usual.clone()
    };
    let whole = GenerationConfig { temperature: 0.8, penalty_last_n: -1, ..plain() };
    let cases = [
        ("greedy", greedy()),
        ("usual", usual.clone()),
        ("usual + logprobs", GenerationConfig { logprobs: Some(5), ..usual.clone() }),
        ("usual + dry + xtc", dry_and_xtc.clone()),
        ("the same, penalties over all", GenerationConfig { penalty_last_n: -1, ..dry_and_xtc }),
        ("usual, top_k=0", GenerationConfig { top_k: 0, ..usual.clone() }),
        ("only min_p", GenerationConfig { min_p: 0.05, ..whole.clone() }),
        ("usual, top_n_sigma=1", GenerationConfig { top_n_sigma: 1.0, ..usual.clone() }),
        ("usual, typical_p=0.9, top_k=0", GenerationConfig { typical_p: 0.9, top_k: 0, ..usual }),
        ("mirostat 2", GenerationConfig { mirostat: 2, ..whole.clone() }),
        ("temperature alone", whole),
    ];
    for (name, config) in cases {
        let mut sampler = Sampler::new(config, Arc::default(), 4096);
        let mut tokens: Vec<i32> = (0..3000).map(|_| dice.i32(0..5000)).collect();
        let mut times = Vec::new();
        for round in 0..201 {
            let begun = std::time::Instant::now();
            tokens.push(sampler.sample(&rows[round % rows.len()], &tokens, []).unwrap());
            times.push(begun.elapsed());
        }
        times.sort();
        println!("{:7.1} µs  {name}", times[100].as_secs_f64() * 1e6);
    }
}
