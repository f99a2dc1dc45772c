//! From a path to open weights: look at the file first, then let llama.cpp read it.

use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_sys_2 as sys;

use super::{Model, start, tokenizer::Vocabulary};
use crate::config::{ModelConfig, SplitMode};
use crate::constraint::Constraints;
use crate::error::{Error, Result};
use crate::hardware::{memory, modules};
use crate::{ffi, gguf, log};

pub(super) fn load(
    mut config: ModelConfig,
    inspected: Option<gguf::Description>,
    mut progress: impl FnMut(f32) -> bool + 'static,
) -> Result<Arc<Model>> {
    config.validate()?;
    if config.path.to_str().is_none() {
        let shown = config.path.display();
        return Err(Error::invalid("model_path", shown, "a path of Unicode characters"));
    }
    start::backend()?;
    let inspect = if config.vocab_only { gguf::inspect_vocabulary } else { gguf::inspect };
    let description = inspected.map_or_else(|| inspect(&config.path), Ok)?;
    let gpu_layers = gpu_layers(&mut config, &description);
    if config.mlock || !config.mmap {
        check_memory(&description, gpu_layers)?;
    }

    let begun = Instant::now();
    let (percent, stopped) = (Cell::new(0), Cell::new(false));
    let mut hear = |fraction: f32| {
        percent.set((fraction * 100.0) as u32);
        stopped.set(true); // also by a panic
        stopped.set(!progress(fraction));
        !stopped.get()
    };
    let repack = config.repack.unwrap_or_else(|| repack_pays(&description));
    let (loaded, errors) = log::listen(|| read(&config, repack, &mut hear));
    let weights = loaded?.ok_or_else(|| {
        let path = config.path.clone();
        if stopped.get() {
            Error::LoadCancelled { path, percent: percent.get() }
        } else {
            Error::ModelCorrupted { path, what: reason(&errors) }
        }
    })?;
    if config.mmap && !config.mlock {
        ffi::forget_mapped(pointer(&weights));
    }
    let vocabulary = Vocabulary::of(&weights, &description)?;
    Ok(Arc::new(Model {
        vocabulary,
        weights,
        config,
        description,
        gpu_layers,
        is_repacked: repack,
        load_time: begun.elapsed(),
        process: std::process::id(),
        creating: Mutex::new(()),
        constraints: Constraints::default(),
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

/// Lets llama.cpp read the file. llama-cpp-2 would do that as well, but not say how to place weights.
fn read(
    config: &ModelConfig,
    repack: bool,
    hear: &mut dyn FnMut(f32) -> bool,
) -> Result<Option<LlamaModel>> {
    let Some(path) = config.path.to_str().and_then(|path| CString::new(path).ok()) else {
        return Ok(None);
    };
    let mut hear = hear;
    // SAFETY: it has no preconditions.
    let mut split = vec![0.0f32; unsafe { sys::llama_max_devices() }];
    for (share, given) in split.iter_mut().zip(&config.tensor_split) {
        *share = *given;
    }
    // A list that is empty, so that what stays on the CPU does not need a GPU's memory at all.
    let mut no_devices = [std::ptr::null_mut()];
    // SAFETY: it has no preconditions.
    let mut params = unsafe { sys::llama_model_default_params() };
    params.n_gpu_layers = config.gpu_layers;
    params.main_gpu = config.main_gpu;
    if !config.tensor_split.is_empty() {
        params.tensor_split = split.as_ptr();
    }
    params.vocab_only = config.vocab_only;
    params.use_extra_bufts = repack;
    params.load_mode = match (config.mmap, config.mlock) {
        (false, false) => sys::LLAMA_LOAD_MODE_NONE,
        (true, false) => sys::LLAMA_LOAD_MODE_MMAP,
        (false, true) => sys::LLAMA_LOAD_MODE_MLOCK,
        (true, true) => sys::LLAMA_LOAD_MODE_MMAP_MLOCK,
    };
    params.split_mode = match config.split_mode {
        SplitMode::None => sys::LLAMA_SPLIT_MODE_NONE,
        SplitMode::Layer => sys::LLAMA_SPLIT_MODE_LAYER,
        SplitMode::Row => sys::LLAMA_SPLIT_MODE_ROW,
    };
    if config.gpu_layers == 0 {
        params.devices = no_devices.as_mut_ptr();
        params.split_mode = sys::LLAMA_SPLIT_MODE_LAYER; // another one would look for the main GPU
    }
    params.progress_callback = Some(heard);
    params.progress_callback_user_data = std::ptr::from_mut(&mut hear).cast();
    // SAFETY: the backend has started, and what the parameters point to outlives the call.
    let weights = unsafe { ffi::load_model(&path, &params) }?;
    // SAFETY: see `pointer`; the model is ours alone from here on.
    Ok(NonNull::new(weights).map(|weights| unsafe { std::mem::transmute(weights) }))
}

/// A panic must not cross llama.cpp; it ends the load.
unsafe extern "C" fn heard(fraction: f32, hear: *mut c_void) -> bool {
    // SAFETY: `read` hands it over, and waits.
    let hear = unsafe { &mut *hear.cast::<&mut dyn FnMut(f32) -> bool>() };
    catch_unwind(AssertUnwindSafe(|| hear(fraction))).unwrap_or(false)
}

/// Whether weights are better laid out anew for the CPU, where nothing was measured (`_layouts.py`).
///
/// They are, except K-quants with AVX512_VNNI where our own layouts are turned off: left as they are,
/// ggml's tiled kernels read prompts 1.8 to 2.6 times as fast, while a single row takes 1.04 to 1.19 times
/// as long (docs/performance.md); and loading copies nothing, and processes share the file's memory.
/// AMX has a layout of its own, which we had no processor to compare with.
fn repack_pays(description: &gguf::Description) -> bool {
    !(k_quants_stay() && description.quantization.contains("_K"))
}

/// See `repack_pays`.
pub fn k_quants_stay() -> bool {
    ffi::cpu_has(c"AVX512_VNNI") && !ffi::cpu_has(c"AMX_INT8") && !modules::has_kernels()
}

/// The types of weights that are laid out anew for the CPU, and into how many bytes each byte of them.
pub fn relaid_types() -> Vec<(&'static str, f64)> {
    let relaid = |(number, name)| Some((name, ffi::relaid(number)?));
    gguf::weight_types().filter_map(relaid).collect()
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

/// Weights that are not mapped, or are locked, must fit into memory as they are: those of the layers that
/// stay there, all of which count the same here.
fn check_memory(description: &gguf::Description, gpu_layers: u32) -> Result<()> {
    let all = u64::from(description.n_layers) + 1;
    let needed = description.size_bytes - description.size_bytes / all * u64::from(gpu_layers);
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
