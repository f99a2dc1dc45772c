//! From a path to open weights: look at the file first, then let llama.cpp read it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::{LlamaModelParams, LlamaSplitMode};

use super::{Model, start, tokenizer::Vocabulary};
use crate::config::{ModelConfig, SplitMode};
use crate::error::{Error, Result};
use crate::hardware::memory;
use crate::{gguf, log};

pub(super) fn load(
    mut config: ModelConfig,
    mut progress: impl FnMut(f32) -> bool + 'static,
) -> Result<Arc<Model>> {
    config.context.validate()?;
    if config.path.to_str().is_none() {
        let shown = config.path.display();
        return Err(Error::invalid("model_path", shown, "a path of Unicode characters"));
    }
    let backend = start::backend()?;
    let inspect = if config.vocab_only { gguf::inspect_vocabulary } else { gguf::inspect };
    let description = inspect(&config.path)?;
    if config.mlock || !config.mmap {
        check_memory(&description)?;
    }

    let begun = Instant::now();
    let percent = Arc::new(AtomicU32::new(0));
    let stopped = Arc::new(AtomicBool::new(false));
    let (seen, asked) = (percent.clone(), stopped.clone());
    let gpu_layers = gpu_layers(&mut config, &description);
    let params = parameters(&config).with_progress_callback(move |fraction| {
        seen.store((fraction * 100.0) as u32, Ordering::Relaxed);
        let go_on = progress(fraction);
        asked.store(!go_on, Ordering::Relaxed);
        go_on
    });

    let (loaded, errors) =
        log::listen(|| LlamaModel::load_from_file(backend, &config.path, &params));
    drop(params);
    let weights = loaded.map_err(|_| {
        let path = config.path.clone();
        if stopped.load(Ordering::Relaxed) {
            Error::LoadCancelled { path, percent: percent.load(Ordering::Relaxed) }
        } else {
            Error::ModelCorrupted { path, what: reason(&errors) }
        }
    })?;
    let vocabulary = Vocabulary::of(&weights, &description)?;
    Ok(Arc::new(Model {
        vocabulary,
        weights,
        config,
        description,
        gpu_layers,
        load_time: begun.elapsed(),
        process: std::process::id(),
        creating: Mutex::new(()),
        contexts: Mutex::new(Vec::new()),
    }))
}

/// llama.cpp's handle to the weights. llama-cpp-2 keeps it to itself, but the shim needs it.
pub(super) fn pointer(weights: &LlamaModel) -> *mut llama_cpp_sys_2::llama_model {
    const {
        assert!(size_of::<LlamaModel>() == size_of::<*mut llama_cpp_sys_2::llama_model>());
    }
    // SAFETY: at this pinned version LlamaModel is `repr(transparent)` around a non-null pointer.
    unsafe { *std::ptr::from_ref(weights).cast() }
}

fn parameters(config: &ModelConfig) -> LlamaModelParams {
    let mut params = LlamaModelParams::default()
        .with_main_gpu(config.main_gpu)
        .with_vocab_only(config.vocab_only)
        .with_use_mmap(config.mmap)
        .with_use_mlock(config.mlock)
        .with_split_mode(match config.split_mode {
            SplitMode::None => LlamaSplitMode::None,
            SplitMode::Layer => LlamaSplitMode::Layer,
            SplitMode::Row => LlamaSplitMode::Row,
        });
    if let Ok(layers) = u32::try_from(config.gpu_layers) {
        params = params.with_n_gpu_layers(layers);
    }
    params
}

/// How many layers will lie on a GPU; the output layer counts as one.
fn gpu_layers(config: &mut ModelConfig, description: &gguf::Description) -> u32 {
    if !start::backend_devices().iter().any(|device| device.is_gpu) {
        if config.gpu_layers > 0 {
            let line = format!("no GPU backend: {} layers stay on the CPU", config.gpu_layers);
            log::note(log::Level::Warning, line);
        }
        config.gpu_layers = 0;
        return 0;
    }
    let all = description.n_layers + 1;
    u32::try_from(config.gpu_layers).map_or(all, |layers| layers.min(all))
}

/// Weights that are not mapped, or are locked, must fit into memory as they are.
fn check_memory(description: &gguf::Description) -> Result<()> {
    let needed = description.size_bytes;
    match memory::available_bytes() {
        Some(free) if free < needed => {
            let what = format!("`{}`", description.path.display());
            Err(Error::OutOfMemory { what, needed, free })
        }
        _ => Ok(()),
    }
}

/// The last lines are summaries ("failed to load model"); the first says what it was.
fn reason(errors: &[String]) -> String {
    match errors.first() {
        Some(line) => format!("llama.cpp says: {}", line.trim_start_matches("llama_model_load: ")),
        None => "llama.cpp could not load it and gave no reason".into(),
    }
}
