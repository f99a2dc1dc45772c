//! One row of logits → one token: greedy, the kept sets, the penalties and the dice, on
//! distributions small enough to compute by hand.

use std::collections::BTreeMap;
use std::sync::Arc;

use tabagent_model::config::GenerationConfig;
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
        let mut tokens: Vec<i32> = (0..3000).map(|_| dice.i32(..5000)).collect();
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
