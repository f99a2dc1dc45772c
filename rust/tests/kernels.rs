//! The kernels of `rust/kernels/` against the same in double precision, and how fast they are. ggml's
//! attention is off by 4e-3 here; what has no kernel of ours is not asked.

use std::path::Path;
use std::sync::Arc;

use tabagent_model::config::{ContextConfig, FlashAttention, KvType, ModelConfig};
use tabagent_model::context::runner::{Interrupt, LlamaRunner, Outcome, Row, Runner};
use tabagent_model::ffi::{Attended, Product, attend, multiply};
use tabagent_model::hardware::modules::{has_kernels, usable_modules};
use tabagent_model::model::{self, Model};

/// ggml's numbers of the types that have a layout of ours.
const TYPES: [(&str, u32); 6] =
    [("Q4_0", 2), ("Q5_0", 6), ("Q8_0", 8), ("Q4_K", 12), ("Q5_K", 13), ("Q6_K", 14)];
const OURS: u32 = 1;

/// The module for this processor, if it has kernels of ours.
fn start() -> Option<()> {
    let folder = Path::new(env!("TABAGENT_BUILT_LIBRARIES"));
    let module = &usable_modules(folder).unwrap()[0].name;
    model::start(folder, module).unwrap();
    let is_for_one = ["cascadelake", "icelake", "cooperlake", "zen4"].contains(&module.as_str());
    assert_eq!(
        has_kernels(),
        is_for_one,
        "{module}: `cargo clean -p llama-cpp-sys-2`, if it is older"
    );
    has_kernels().then_some(())
}

#[test]
fn products_are_right_with_any_number_of_rows() {
    let Some(()) = start() else { return };
    for (name, kind) in TYPES {
        for (batch, threads) in (1..=33).map(|batch| (batch, 1)).chain([(100, 2), (1, 2), (33, 3)])
        {
            for experts in [0, 5] {
                let asked = Product { columns: 768, rows: 80, batch, experts, times: 1, threads };
                let found = multiply(kind, OURS, asked).unwrap().unwrap();
                assert!(found.error < 1e-5, "{name}, {asked:?}: {found:?}");
            }
        }
    }
}

#[test]
fn attention_is_right_for_every_shape_of_heads() {
    let Some(()) = start() else { return };
    for dim in [32, 64, 80, 96, 128, 256] {
        for (n_head, n_head_kv) in [(14, 2), (4, 4), (3, 1)] {
            for (n_tokens, n_cells) in [(1, 256), (1, 700), (2, 77), (5, 100), (33, 120)] {
                for (is_causal, has_sinks, max_bias) in [
                    (true, false, 0.0),
                    (false, false, 0.0),
                    (false, true, 0.0),
                    (true, false, 8.0),
                ] {
                    let asked = Attended {
                        dim,
                        n_head,
                        n_head_kv,
                        n_tokens,
                        n_cells,
                        n_streams: 1 + n_tokens % 2,
                        threads: 1 + n_cells % 3,
                        is_causal,
                        has_sinks,
                        max_bias,
                    };
                    let off = attend(asked).unwrap();
                    assert!(off < 1e-5, "{off:e}: {asked:?}");
                }
            }
        }
    }
}

/// The bits of the logits after each of `tokens`, read in steps of so many, beside so many others.
fn logits(
    model: &Arc<Model>,
    tokens: &[i32],
    at_once: usize,
    others: u32,
    threads: u32,
) -> Vec<u32> {
    let config = ContextConfig {
        n_ctx: 512,
        n_seq_max: 1 + others,
        flash_attn: FlashAttention::On,
        kv_type: KvType::F16,
        ..ContextConfig::default()
    };
    let n_slots = 1 + others;
    let mut runner =
        LlamaRunner::new(model.clone(), &config, n_slots, threads, Interrupt::default()).unwrap();
    for (n, piece) in tokens.chunks(at_once).enumerate() {
        let rows: Vec<Row> = (0..n_slots)
            .flat_map(|slot| {
                let row = move |(i, &token): (usize, &i32)| Row {
                    token: token + slot as i32, // the others read something else
                    position: n * at_once + i,
                    slot: slot as usize,
                    wants_logits: slot == 0 && n * at_once + i + 1 == tokens.len(),
                };
                piece.iter().enumerate().map(row)
            })
            .collect();
        // A step that somebody busy keeps from its threads is given up, and begins again with fewer.
        let mut outcome = runner.run(&rows);
        while outcome == Outcome::Aborted {
            assert!((0..n_slots as usize).all(|slot| runner.forget(slot, n * at_once)));
            outcome = runner.run(&rows);
        }
        assert_eq!(outcome, Outcome::Done);
    }
    let last = (tokens.len() - 1) % at_once;
    runner.logits(last).unwrap().iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn an_answer_is_the_same_to_the_last_bit_whoever_else_is_computed() {
    let Some(()) = start() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("python/tabagent_model/assets/tiny-chat.gguf");
    let model = Model::load(ModelConfig::new(path).unwrap()).unwrap();
    let tokens: Vec<i32> = (0..300).map(|i| 300 + i * 7 % 400).collect();
    let alone = logits(&model, &tokens, 1, 0, 1);
    for (at_once, others, threads) in [(300, 0, 1), (1, 0, 2), (77, 0, 2), (19, 3, 2), (1, 7, 2)] {
        let found = logits(&model, &tokens, at_once, others, threads);
        assert!(found == alone, "{at_once} tokens at once, beside {others}, {threads} threads");
    }
}

#[test]
#[ignore = "takes a minute, and a machine with nobody else on it"]
fn how_fast_products_are() {
    let Some(()) = start() else { return };
    for (name, kind) in TYPES {
        for batch in [1, 2, 4, 7, 8, 16, 64, 256] {
            let asked =
                Product { columns: 2048, rows: 4096, batch, experts: 0, times: 20, threads: 1 };
            let times = (0..3).map(|layout| multiply(kind, layout, asked).unwrap());
            let gflops = |seconds: f64| 2e-9 * (2048 * 4096 * batch) as f64 / seconds;
            let line: Vec<String> = times
                .map(|found| found.map_or("-".into(), |f| format!("{:.0}", gflops(f.seconds))))
                .collect();
            println!("{name} {batch:4} rows: as in the file, ours, ggml's: {}", line.join(", "));
        }
    }
}
