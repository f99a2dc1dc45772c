//! Which attention a context computes with, what it costs, and what it does to the answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tabagent_model::config::{ContextConfig, FlashAttention, KvType, ModelConfig};
use tabagent_model::context::runner::{Interrupt, LlamaRunner, Outcome, Row, Runner};
use tabagent_model::context::{ATTENTIONS, Attention, Heads, Timing, measure};
use tabagent_model::hardware::modules::usable_modules;
use tabagent_model::model::{self, Model};

const STORY: &str = "Once upon a time there was a little cat who lived in a small house by the sea. \
    Every morning she went down to the water and looked at the boats. One day a big storm came, and \
    all the boats went home but one. The cat saw it far out in the waves. She ran to the old man who \
    kept the light, and pulled at his coat until he came with her. He lit the great lamp, and the \
    boat found its way back. The sailor thanked them both, and gave the cat a fish. From that day on \
    she sat next to the lamp each night, and no boat was ever lost again. When the children asked \
    the old man who had saved the sailor, he smiled, and pointed at the cat, who was asleep.";

fn bundled() -> Arc<Model> {
    let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    model::start(folder, &usable_modules(folder).unwrap()[0].name).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("python/tabagent_model/assets/tiny-chat.gguf");
    Model::load(ModelConfig::new(path).unwrap()).unwrap()
}

fn config(flash_attn: FlashAttention, kv_type: KvType) -> ContextConfig {
    ContextConfig { n_ctx: 512, n_seq_max: 1, flash_attn, kv_type, ..ContextConfig::default() }
}

/// The logarithms of all probabilities, after each token of the story's later part. The first part is
/// read as a prompt, all at once.
fn log_probabilities(model: &Arc<Model>, attention: Attention) -> Vec<Vec<f64>> {
    let config = config(attention.flash_attn, attention.kv_type);
    let mut runner = LlamaRunner::new(model.clone(), &config, 1, 1, Interrupt::default()).unwrap();
    let tokens = model.vocabulary().tokenize(STORY, true, false).unwrap();
    let row = |position| Row { token: tokens[position], position, slot: 0, wants_logits: true };
    let prompt: Vec<Row> = (0..80).map(|i| Row { wants_logits: false, ..row(i) }).collect();
    assert_eq!(runner.run(&prompt), Outcome::Done);
    let one_more = |position| {
        assert_eq!(runner.run(&[row(position)]), Outcome::Done);
        log_softmax(runner.logits(0).unwrap())
    };
    (prompt.len()..tokens.len()).map(one_more).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - most - sum.ln()).collect()
}

/// How far apart two such are: the mean divergence, and the largest difference at any token that has
/// a chance of one in a thousand.
fn distance(exact: &[Vec<f64>], found: &[Vec<f64>]) -> (f64, f64) {
    let pairs = || exact.iter().flatten().zip(found.iter().flatten());
    let divergence: f64 = pairs().map(|(x, y)| x.exp() * (x - y)).sum();
    let likely = pairs().filter(|(x, _)| x.exp() > 1e-3);
    let largest = likely.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    (divergence / exact.len() as f64, largest)
}

fn attention_of(flash_attn: FlashAttention, kv_type: KvType) -> (&'static str, &'static str) {
    let context = bundled().create_context_with(&config(flash_attn, kv_type)).unwrap();
    let Attention { flash_attn, kv_type } = context.attention();
    (flash_attn.name(), kv_type.name())
}

/// Nearly all of it comes from the weights: products with quantised weights round what they multiply
/// to 8 bits, and the smallest change tips a few of these roundings.
#[test]
fn no_choice_moves_the_probabilities_far() {
    let model = bundled();
    let exact = log_probabilities(&model, ATTENTIONS[3]);
    assert!(exact.len() > 120);
    for attention in ATTENTIONS {
        let (divergence, largest) = distance(&exact, &log_probabilities(&model, attention));
        println!("{attention:?}: divergence {divergence:.1e}, largest difference {largest:.2}");
        assert!(divergence < 1e-3 && largest < 0.5, "{attention:?}: {divergence}, {largest}");
    }
}

#[test]
fn what_was_asked_for_is_what_computes() {
    use FlashAttention::{Auto, Off, On};
    assert_eq!(attention_of(On, KvType::F16), ("on", "f16"));
    assert_eq!(attention_of(On, KvType::Bf16), ("on", "bf16"));
    assert_eq!(attention_of(Off, KvType::F32), ("off", "f32"));
    // Only one of those that keep the quality goes with it.
    assert_eq!(attention_of(Auto, KvType::F32), ("off", "f32"));
    assert_eq!(attention_of(Auto, KvType::Bf16), ("off", "bf16"));
    assert_eq!(attention_of(On, KvType::Auto), ("on", "f16"));
    // A cache of 8 bits is nobody's but the user's choice, and llama.cpp knows what goes with it.
    assert_eq!(attention_of(Auto, KvType::Q8_0), ("auto", "q8_0"));
}

#[test]
fn what_was_left_open_is_settled_without_a_measurement() {
    let chosen = attention_of(FlashAttention::Auto, KvType::Auto);
    assert!([("on", "f16"), ("off", "bf16")].contains(&chosen), "{chosen:?}");
    let chosen = attention_of(FlashAttention::Off, KvType::Auto);
    assert!([("off", "f16"), ("off", "bf16")].contains(&chosen), "{chosen:?}");
}

#[test]
fn a_measurement_times_every_choice_or_says_that_the_machine_is_busy() {
    drop(bundled());
    let heads = Heads { dim: 64, count: 4, count_kv: 2 };
    if let Some(timings) = measure(heads, 100, 1).unwrap() {
        assert_eq!(timings.iter().map(|timing| timing.attention).collect::<Vec<_>>(), ATTENTIONS);
        for Timing { prompt_token, answer_token, .. } in timings {
            assert!(!prompt_token.is_zero() && answer_token < Duration::from_secs(1));
        }
    }
}

#[test]
fn heads_that_ggml_would_abort_on_are_refused() {
    drop(bundled());
    for (dim, count, count_kv) in [(0, 4, 2), (64, 0, 1), (64, 4, 0), (64, 4, 3), (1 << 20, 4, 2)] {
        let error = measure(Heads { dim, count, count_kv }, 512, 1).unwrap_err();
        let allowed = "1 to 4096 each, the second a multiple of the third";
        assert_eq!(
            error.to_string(),
            format!("`heads` must be {allowed}, got {dim}, {count}, {count_kv}")
        );
    }
}
