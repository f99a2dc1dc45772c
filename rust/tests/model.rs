//! The bundled model on the real llama.cpp, without Python: load, ask, unload.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tabagent_model::backend::{InferenceBackend, LlamaCppBackend, ModelBackend};
use tabagent_model::config::{ContextConfig, GenerationConfig, ModelConfig};
use tabagent_model::context::{Context, Prompt};
use tabagent_model::error::Error;
use tabagent_model::hardware::modules::usable_modules;
use tabagent_model::model::{self, Model};
use tabagent_model::{ffi, model::return_free_memory};

const PROMPT: &str = "Once upon a time";

/// One test at a time: the memory of one is not to be seen by another. llama.cpp runs from here on.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    model::start(folder, &usable_modules(folder).unwrap()[0].name).unwrap();
    guard
}

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tabagent_model/assets/tiny-chat.gguf")
}

fn config(n_seq_max: u32) -> ModelConfig {
    let context = ContextConfig { n_ctx: 256, n_seq_max, ..ContextConfig::default() };
    ModelConfig { context, ..ModelConfig::new(bundled()).unwrap() }
}

fn greedy(max_tokens: i64) -> GenerationConfig {
    GenerationConfig { max_tokens, temperature: 0.0, ignore_eos: true, ..Default::default() }
}

fn ask(context: &Context, prompt: &str) -> tabagent_model::error::Result<String> {
    context.generate(Prompt::Text(prompt.into()), greedy(24), |_| true, || true)
}

#[test]
fn text_becomes_tokens_and_the_same_text_again() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let vocabulary = model.vocabulary();
    let texts = [
        "Once upon a time, there was a cat.",
        "  two  spaces,\ttabs\nand lines\r\n",
        "Grüße, 你好, مرحبا, 👨‍👩‍👧!",
        "a\0b",
        "",
        "<|im_start|>system</s>[INST]",
    ];
    for text in texts {
        let tokens = vocabulary.tokenize(text, false, false).unwrap();
        assert_eq!(vocabulary.detokenize(&tokens, false).unwrap(), text);
    }
}

#[test]
fn control_tokens_in_a_text_are_text_unless_asked_for() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let vocabulary = model.vocabulary();
    let text = vocabulary.detokenize(&[vocabulary.eos()], true).unwrap();
    let plain = vocabulary.tokenize(&text, false, false).unwrap();
    assert!(plain.len() > 1 && !plain.iter().any(|&token| vocabulary.ends_generation(token)));
    assert_eq!(vocabulary.tokenize(&text, false, true).unwrap(), [vocabulary.eos()]);
}

#[test]
fn the_spike_s_trait_loads_generates_and_unloads() {
    let _alone = alone();
    let mut backend = LlamaCppBackend::default();
    backend.load(&bundled(), 0, 256).unwrap();
    let text = ModelBackend::generate(&mut backend, PROMPT, 16).unwrap();
    assert!(!text.is_empty());
    assert_eq!(ModelBackend::generate(&mut backend, PROMPT, 16).unwrap(), text);
    backend.unload().unwrap();
    backend.unload().unwrap();
    let error = ModelBackend::generate(&mut backend, PROMPT, 16).unwrap_err();
    assert_eq!(error.to_string(), "the model is not loaded");
}

#[test]
fn the_other_trait_does_the_same() {
    let _alone = alone();
    let mut backend = LlamaCppBackend::default();
    assert_eq!(
        (backend.is_loaded(), backend.context_size(), backend.thread_count()),
        (false, 0, 0)
    );
    backend.load_model(&bundled(), 256).unwrap();
    assert_eq!((backend.is_loaded(), backend.context_size()), (true, 256));
    assert!(backend.thread_count() >= 1);
    let ask = |backend: &LlamaCppBackend| InferenceBackend::generate(backend, PROMPT, 16, 0.0, 1.0);
    assert_eq!(ask(&backend).unwrap(), ask(&backend).unwrap());
    let tokens = backend.tokenize(PROMPT).unwrap();
    assert!(backend.detokenize(&tokens).unwrap().ends_with(PROMPT));
    backend.unload_model();
    backend.unload_model();
    assert!(!backend.is_loaded());
    assert!(matches!(ask(&backend), Err(Error::ModelNotLoaded { .. })));
    assert!(matches!(backend.tokenize(PROMPT), Err(Error::ModelNotLoaded { .. })));
}

#[test]
fn a_model_that_is_not_there_leaves_nothing_loaded() {
    let _alone = alone();
    let mut backend = LlamaCppBackend::default();
    backend.load_model(&bundled(), 256).unwrap();
    let error = backend.load_model(Path::new("/nowhere/model.gguf"), 256).unwrap_err();
    assert_eq!(error.to_string(), "there is no model file at `/nowhere/model.gguf`");
    assert!(!backend.is_loaded());
}

#[test]
fn a_second_time_with_everything_cached_says_the_same() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let context = model.create_context().unwrap();
    let cold = ask(&context, PROMPT).unwrap();
    assert_eq!(ask(&context, PROMPT).unwrap(), cold);
    assert!(context.metrics().cached_tokens > 0);
}

#[test]
fn a_crowd_of_threads_gets_its_answers() {
    let _alone = alone();
    let model = Model::load(config(4)).unwrap();
    let context = model.create_context().unwrap();
    let prompts = ["The cat", "A small dog", "Hello!", PROMPT, "One day", "Why", "The sun", "She"];
    std::thread::scope(|scope| {
        let asked = prompts.map(|prompt| scope.spawn(|| ask(&context, prompt)));
        for (thread, prompt) in asked.into_iter().zip(prompts) {
            let text = thread.join().unwrap().unwrap();
            assert!(!text.is_empty() && !text.contains('\u{FFFD}'), "{prompt}: {text:?}");
        }
    });
    let metrics = context.metrics();
    assert_eq!((metrics.requests, metrics.waiting, metrics.running), (8, 0, 0));
}

#[test]
fn a_panic_in_a_step_is_survived() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let context = model.create_context().unwrap();
    let before = ask(&context, PROMPT).unwrap();
    context.inject_panic();
    let error = ask(&context, PROMPT).unwrap_err();
    assert_eq!(error.to_string(), "internal error: the engine's step panicked");
    assert_eq!(ask(&context, PROMPT).unwrap(), before);
}

#[test]
fn a_closed_context_says_that_its_model_is_gone() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let contexts = [model.create_context().unwrap(), model.create_context().unwrap()];
    ask(&contexts[0], PROMPT).unwrap();
    model.close_contexts();
    model.close_contexts();
    for context in &contexts {
        assert!(context.is_closed());
        assert!(matches!(ask(context, PROMPT), Err(Error::ModelUnloaded)));
        assert!(matches!(context.tokenize(PROMPT, true), Err(Error::ModelUnloaded)));
        assert_eq!(context.next_events(), []);
    }
    // The weights are still there for another one.
    ask(&model.create_context().unwrap(), PROMPT).unwrap();
}

#[test]
fn a_context_keeps_the_weights_alive() {
    let _alone = alone();
    let model = Model::load(config(1)).unwrap();
    let context = model.create_context().unwrap();
    drop(model);
    ask(&context, PROMPT).unwrap();
    context.close();
    assert!(matches!(context.model(), Err(Error::ModelUnloaded)));
}

#[test]
fn what_cpp_throws_comes_back_as_an_error() {
    let error = ffi::throw().unwrap_err();
    assert!(matches!(error, Error::Internal { .. }));
    assert_eq!(error.to_string(), "internal error: llama.cpp threw: thrown on purpose");
}

#[test]
fn weights_say_the_same_in_either_layout() {
    let _alone = alone();
    let answers = [None, Some(true), Some(false)].map(|repack| {
        let model = Model::load(ModelConfig { repack, ..config(1) }).unwrap();
        assert_eq!(model.is_repacked(), repack.unwrap_or(true));
        ask(&model.create_context().unwrap(), PROMPT).unwrap()
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

#[test]
fn a_panic_while_loading_ends_the_load() {
    let _alone = alone();
    let error = Model::load_with(config(1), |_| panic!("on purpose")).err().unwrap();
    assert!(matches!(error, Error::LoadCancelled { percent: 0, .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn loading_and_unloading_again_and_again_keeps_no_memory() {
    let _alone = alone();
    let resident = || {
        return_free_memory();
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    };
    let round = || {
        let mut backend = LlamaCppBackend::default();
        backend.load_model(&bundled(), 256).unwrap();
        InferenceBackend::generate(&backend, PROMPT, 4, 0.0, 1.0).unwrap();
        backend.unload_model();
    };
    (0..2).for_each(|_| round());
    let before = resident();
    (0..10).for_each(|_| round());
    let grown = resident().saturating_sub(before);
    assert!(grown < 20 << 20, "{} MiB", grown >> 20);
}
