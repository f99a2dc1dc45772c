//! Our sampler leaves the candidates that llama.cpp's own samplers leave, with their probabilities.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use fastrand::Rng;
use tabagent_model::config::{GenerationConfig, ModelConfig};
use tabagent_model::context::{LlamaSampler, Sampler, dry_breakers, llama_samplers};
use tabagent_model::hardware::modules::usable_modules;
use tabagent_model::model::{self, Model, Vocabulary};

const N_CTX: usize = 512;
const SIZES: [usize; 6] = [1, 2, 7, 300, 5_003, 152_064];

fn off() -> GenerationConfig {
    GenerationConfig {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        repeat_penalty: 1.0,
        seed: 7,
        dry_sequence_breakers: Vec::new(),
        ..GenerationConfig::default()
    }
}

/// llama.cpp's default chain, or the one that it makes for mirostat, with these settings.
fn chain_of<'a>(config: &GenerationConfig, breakers: &'a [CString]) -> Vec<LlamaSampler<'a>> {
    let sampler = |name: &'static CStr, values: &[f32]| {
        let mut all = [0.0; 4];
        all[..values.len()].copy_from_slice(values);
        LlamaSampler { name, values: all, strings: Vec::new() }
    };
    let c = config;
    let two = |biases: &[(i32, f32)]| [0, 1].map(|at| biases.get(at).copied().unwrap_or((0, 0.0)));
    let biases = two(&c.logit_bias).map(|(token, bias)| [token as f32, bias]).concat();
    if c.mirostat > 0 {
        let name = if c.mirostat == 1 { c"mirostat" } else { c"mirostat_v2" };
        let temperature = sampler(c"temp", &[c.temperature]);
        return vec![temperature, sampler(name, &[c.mirostat_tau, c.mirostat_eta])];
    }
    let last_n = |n: i32| if n < 0 { N_CTX as f32 } else { n as f32 };
    let repeated = [c.repeat_penalty, c.frequency_penalty, c.presence_penalty];
    let length = c.dry_allowed_length as f32;
    let dry = [c.dry_multiplier, c.dry_base, length, last_n(c.dry_penalty_last_n)];
    vec![
        sampler(c"logit_bias", &biases),
        sampler(c"penalties", &[&[last_n(c.penalty_last_n)], &repeated[..]].concat()),
        LlamaSampler {
            strings: breakers.iter().map(CString::as_c_str).collect(),
            ..sampler(c"dry", &dry)
        },
        sampler(c"top_n_sigma", &[c.top_n_sigma]),
        sampler(c"top_k", &[c.top_k as f32]),
        sampler(c"typical", &[c.typical_p]),
        sampler(c"top_p", &[c.top_p]),
        sampler(c"min_p", &[c.min_p]),
        sampler(c"xtc", &[c.xtc_probability, c.xtc_threshold]),
        sampler(c"temp_ext", &[c.temperature, c.dynatemp_range, c.dynatemp_exponent]),
    ]
}

/// Near a normal distribution; in a large vocabulary a few hundred tokens stand out, as with models.
fn random_row(dice: &mut Rng, n_vocab: usize) -> Vec<f32> {
    let width = 1.0 + dice.f32() * 2.0;
    let normal = |dice: &mut Rng| ((0..6).map(|_| dice.f32()).sum::<f32>() - 3.0) * width;
    let mut row: Vec<f32> = (0..n_vocab).map(|_| normal(dice)).collect();
    for _ in 0..n_vocab.min(300) {
        row[dice.usize(..n_vocab)] += dice.f32() * n_vocab.ilog2() as f32;
    }
    row
}

/// Few different tokens, so that passages come again.
fn random_history(dice: &mut Rng, n_vocab: usize) -> Vec<i32> {
    let kinds = dice.usize(1..=n_vocab.min(40)) as i32;
    let mut tokens: Vec<i32> = (0..dice.usize(..200)).map(|_| dice.i32(0..kinds)).collect();
    for _ in 0..dice.usize(..4).min(tokens.len()) {
        let from = dice.usize(..tokens.len());
        tokens.extend_from_within(from..(from + 12).min(tokens.len()));
    }
    tokens
}

/// The same tokens, and each with its probability to 1e-5. Sums of many floats differ in the sixth
/// digit, so that unlikely tokens on the very border may fall to either side.
fn assert_same(ours: &[(i32, f32)], theirs: &[(i32, f64)], config: &GenerationConfig) {
    let possible = |(token, p): (i32, f64)| (p > 1e-30).then_some((token, p));
    let ours: BTreeMap<i32, f64> =
        ours.iter().filter_map(|&(token, p)| possible((token, p.into()))).collect();
    let theirs: BTreeMap<i32, f64> = theirs.iter().copied().filter_map(possible).collect();
    let p_of = |all: &BTreeMap<i32, f64>, token: &i32| all.get(token).copied().unwrap_or(0.0);
    let tokens: BTreeSet<i32> = ours.keys().chain(theirs.keys()).copied().collect();
    let on_border = tokens.iter().filter(|t| ours.contains_key(t) != theirs.contains_key(t));
    let on_border: Vec<&i32> = on_border.collect();
    let share: f64 = on_border.iter().map(|t| p_of(&ours, t) + p_of(&theirs, t)).sum();
    let counts = (ours.len(), theirs.len());
    assert!(share < 1e-4, "(ours, theirs) = {counts:?}, {on_border:?} differ with {config:?}");
    for token in tokens.iter().filter(|t| !on_border.contains(t)) {
        let (p, q) = (ours[token], theirs[token]);
        assert!((p - q).abs() <= 1e-5, "{p} instead of {q} for token {token} with {config:?}");
    }
}

fn compare(configs: &[GenerationConfig]) {
    compare_from(1, configs);
}

fn compare_from(smallest: usize, configs: &[GenerationConfig]) {
    let mut dice = Rng::with_seed(1);
    for n_vocab in SIZES.into_iter().filter(|size| *size >= smallest) {
        let rounds = if n_vocab > 100_000 { 1 } else { 5 };
        for config in configs {
            config.validate().unwrap();
            for _ in 0..rounds {
                let row = random_row(&mut dice, n_vocab);
                let history = random_history(&mut dice, n_vocab);
                let theirs = llama_samplers(
                    None,
                    &chain_of(config, &[]),
                    &history,
                    std::slice::from_ref(&row),
                )
                .unwrap();
                let mut sampler = Sampler::new(config.clone(), Arc::default(), N_CTX);
                let ours = sampler.distribution(&row, &history, []).unwrap();
                assert_same(&ours, &theirs, config);
            }
        }
    }
}

fn each<T: Copy>(values: &[T], set: impl Fn(&mut GenerationConfig, T)) -> Vec<GenerationConfig> {
    let with = |&value| {
        let mut config = off();
        set(&mut config, value);
        config
    };
    values.iter().map(with).collect()
}

#[test]
fn with_everything_off_all_are_left() {
    compare(&[off()]);
}

#[test]
fn top_k_leaves_the_same() {
    compare(&each(&[1, 2, 40, 129, 3_000, 1 << 30], |c, top_k| c.top_k = top_k));
}

#[test]
fn top_p_leaves_the_same() {
    compare(&each(&[1e-6, 0.1, 0.5, 0.9, 0.95], |c, top_p| c.top_p = top_p));
}

#[test]
fn min_p_leaves_the_same() {
    compare(&each(&[1e-6, 0.01, 0.05, 0.5, 0.999], |c, min_p| c.min_p = min_p));
}

#[test]
fn typical_leaves_the_same() {
    compare(&each(&[0.2, 0.5, 0.9], |c, typical_p| c.typical_p = typical_p));
}

#[test]
fn top_n_sigma_leaves_the_same() {
    compare(&each(&[-1.0, 0.1, 1.0, 2.5], |c, sigma| c.top_n_sigma = sigma));
}

#[test]
fn xtc_leaves_the_same() {
    compare(&each(&[0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.6], |c, threshold| {
        (c.xtc_probability, c.xtc_threshold) = (1.0, threshold);
    }));
}

#[test]
fn temperature_gives_the_same_probabilities() {
    compare(&each(&[0.0, 0.1, 0.7, 1.3, 10.0], |c, temperature| c.temperature = temperature));
}

#[test]
fn dynamic_temperature_gives_the_same_probabilities() {
    let values = [(0.0, 0.5, 1.0), (0.7, 0.3, 1.0), (1.0, 2.0, 0.5), (1.5, 0.5, 3.0)];
    compare(&each(&values, |c, (temperature, range, exponent)| {
        (c.temperature, c.dynatemp_range, c.dynatemp_exponent) = (temperature, range, exponent);
        // llama.cpp adds up the surprise in 32 bits, which very many terms are too many for.
        c.top_k = 300;
    }));
}

#[test]
fn penalties_give_the_same_probabilities() {
    let values =
        [(1.1, 0.0, 0.0, 64), (1.0, 0.5, 0.0, 5), (0.8, 0.0, 1.5, -1), (2.0, -1.0, 0.3, 1)];
    compare(&each(&values, |c, (repeat, presence, frequency, last_n)| {
        (c.repeat_penalty, c.presence_penalty) = (repeat, presence);
        (c.frequency_penalty, c.penalty_last_n) = (frequency, last_n);
    }));
}

#[test]
fn biases_give_the_same_probabilities() {
    compare(&each(&[-1e30, 0.0, 2.5, 100.0], |c, bias| c.logit_bias = vec![(0, bias)]));
    let pairs = [(2.5, -1.0), (100.0, -100.0), (-1e30, 0.25)];
    // A penalty multiplies what the bias has added to.
    let penalized = each(&pairs, |c, (first, second)| {
        c.logit_bias = vec![(3, first), (299, second)];
        (c.top_k, c.repeat_penalty, c.penalty_last_n) = (40, 1.3, -1);
    });
    compare_from(300, &penalized);
}

#[test]
fn dry_gives_the_same_probabilities() {
    let values = [(0.8, 1.75, 2, 64), (2.0, 1.0, 0, -1), (0.1, 100.0, 1, 200), (1.0, 2.0, 5, 0)];
    compare(&each(&values, |c, (multiplier, base, length, last_n)| {
        (c.dry_multiplier, c.dry_base) = (multiplier, base);
        (c.dry_allowed_length, c.dry_penalty_last_n) = (length, last_n);
    }));
}

#[test]
fn mirostat_leaves_the_same_at_first() {
    let values = [(1, 5.0, 0.7), (1, 1.0, 1.0), (2, 5.0, 1.0), (2, 2.0, 0.3), (2, 0.0, 1.0)];
    // In a very small vocabulary the number of version 1 can be too large for llama.cpp's integer.
    compare_from(
        300,
        &each(&values, |c, (version, tau, temperature)| {
            (c.mirostat, c.mirostat_tau, c.temperature) = (version, tau, temperature);
        }),
    );
}

#[test]
fn mirostat_learns_the_same() {
    // A token without surprise moves the limit by a known amount, whichever dice are rolled.
    let mut dice = Rng::with_seed(2);
    for mirostat in [1, 2] {
        let config = GenerationConfig { mirostat, mirostat_tau: 1.5, mirostat_eta: 0.4, ..off() };
        let mut sampler = Sampler::new(config.clone(), Arc::default(), N_CTX);
        let certain: Vec<f32> =
            (0..300).map(|token| if token == 5 { 0.0 } else { -60.0 }).collect();
        let mut rows = Vec::new();
        for _ in 0..5 {
            rows.push(random_row(&mut dice, 300));
            let theirs = llama_samplers(None, &chain_of(&config, &[]), &[], &rows).unwrap();
            let ours = sampler.distribution(rows.last().unwrap(), &[], []).unwrap();
            assert_same(&ours, &theirs, &config);
            *rows.last_mut().unwrap() = certain.clone();
            assert_eq!(sampler.sample(&certain, &[], []).unwrap(), 5);
        }
    }
}

#[test]
fn the_default_chain_leaves_the_same() {
    let usual = GenerationConfig {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        repeat_penalty: 1.1,
        ..off()
    };
    let penalties = GenerationConfig {
        presence_penalty: 0.5,
        frequency_penalty: 0.2,
        penalty_last_n: -1,
        dry_multiplier: 0.8,
        ..usual.clone()
    };
    let everything = GenerationConfig {
        typical_p: 0.9,
        xtc_probability: 1.0,
        xtc_threshold: 0.08,
        dynatemp_range: 0.4,
        dynatemp_exponent: 1.5,
        ..penalties.clone()
    };
    compare(&[
        usual.clone(),
        GenerationConfig { top_k: 0, ..usual.clone() },
        GenerationConfig { top_k: 0, top_p: 1.0, ..usual.clone() },
        GenerationConfig { top_n_sigma: 1.5, ..usual.clone() },
        GenerationConfig { top_n_sigma: 1.5, top_k: 0, ..usual.clone() },
        GenerationConfig { temperature: 0.0, ..usual },
        GenerationConfig { temperature: 0.0, top_k: 0, ..penalties.clone() },
        penalties,
        GenerationConfig { top_k: 300, ..everything.clone() },
        GenerationConfig { temperature: 0.0, dynatemp_range: 0.0, ..everything.clone() },
        everything,
    ]);
}

#[test]
fn dry_knows_the_same_breakers() {
    let vocabulary = vocabulary();
    let texts =
        ["one, two\none, two\none, two", "a: \"b\" a: \"b\" a: \"b\"", "the end. the end. the"];
    let strings =
        ["\n", ":", "\"", ". t", "wo\no", "é", "一二三四五六七八九十一二三四五六七八九十"];
    let mut dice = Rng::with_seed(3);
    for count in 0..strings.len() {
        let dry_sequence_breakers: Vec<String> =
            strings[..=count].iter().map(|&s| s.into()).collect();
        let config = GenerationConfig {
            dry_multiplier: 1.0,
            dry_allowed_length: 1,
            dry_sequence_breakers,
            ..off()
        };
        let strings: Vec<CString> = config
            .dry_sequence_breakers
            .iter()
            .map(|s| CString::new(s.as_str()).unwrap())
            .collect();
        let breakers = Arc::new(dry_breakers(&config.dry_sequence_breakers, vocabulary).unwrap());
        for text in texts {
            let tokens = vocabulary.tokenize(text, false, false).unwrap();
            let row = random_row(&mut dice, vocabulary.size() as usize);
            let chain = chain_of(&config, &strings);
            let theirs =
                llama_samplers(Some(vocabulary), &chain, &tokens, std::slice::from_ref(&row))
                    .unwrap();
            let mut sampler = Sampler::new(config.clone(), breakers.clone(), N_CTX);
            assert_same(&sampler.distribution(&row, &tokens, []).unwrap(), &theirs, &config);
        }
    }
}

fn vocabulary() -> &'static Vocabulary {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    let load = || {
        let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
        model::start(folder, &usable_modules(folder).unwrap()[0].name).unwrap();
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tabagent_model/assets");
        let config = ModelConfig::new(assets.join("tiny-chat.gguf")).unwrap();
        Model::load(ModelConfig { vocab_only: true, ..config }).unwrap()
    };
    MODEL.get_or_init(load).vocabulary()
}
