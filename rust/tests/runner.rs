//! What llama.cpp does with the memory of a sequence, as far as we depend on it.

use std::path::Path;
use std::sync::Arc;

use tabagent_model::config::{ContextConfig, ModelConfig};
use tabagent_model::context::runner::{Interrupt, LlamaRunner, Outcome, Row, Runner};
use tabagent_model::hardware::modules::usable_modules;
use tabagent_model::model::{self, Model};

fn runner() -> LlamaRunner {
    let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    model::start(folder, &usable_modules(folder).unwrap()[0].name).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("python/tabagent_model/assets/tiny-chat.gguf");
    let model: Arc<Model> = Model::load(ModelConfig::new(path).unwrap()).unwrap();
    let config = ContextConfig { n_ctx: 256, n_seq_max: 2, ..ContextConfig::default() };
    LlamaRunner::new(model, &config, 2, 1, Interrupt::default()).unwrap()
}

fn rows(slot: usize, positions: std::ops::Range<usize>) -> Vec<Row> {
    let row = |position| Row { token: 40 + position as i32, position, slot, wants_logits: false };
    positions.map(row).collect()
}

#[test]
fn a_copy_replaces_what_was_there_also_by_nothing() {
    let mut runner = runner();
    assert_eq!(runner.run(&rows(0, 0..20)), Outcome::Done);
    assert_eq!(runner.run(&rows(1, 0..30)), Outcome::Done);
    assert!(runner.copy(0, 1));
    assert_eq!(runner.run(&rows(1, 20..25)), Outcome::Done);
    assert!(runner.forget(0, 0));
    assert!(runner.copy(0, 1));
    assert_eq!(runner.run(&rows(1, 0..5)), Outcome::Done);
}

#[test]
fn a_batch_that_does_not_go_on_where_its_slot_ends_is_refused_and_harms_nothing() {
    let mut runner = runner();
    assert_eq!(runner.run(&rows(1, 0..8)), Outcome::Done);
    let refused = "llama.cpp refused a batch; slot 1 holds 8 tokens and was to go on at 3";
    assert_eq!(runner.run(&rows(1, 3..5)), Outcome::Refused(refused.into()));
    assert_eq!(runner.run(&rows(1, 8..10)), Outcome::Done);
}
