//! The only code that knows Python exists: the module `tabagent_model._core`.

mod chat;
mod context;
mod convert;
mod error;
mod file;
mod hardware;
mod hook;
mod model;
#[cfg(unix)]
mod wire;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::context::{Heads, LayoutPace, measure, measure_layouts as layouts};
use crate::{ffi, gguf, log, model as core};
use convert::guarded;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::chat::{ChatParser, ChatPrompt};
    #[pymodule_export]
    use super::context::{PyContext, PyEvent};
    #[pymodule_export]
    use super::file::ModelFile;
    #[pymodule_export]
    use super::hardware::{
        cpu_modules, detect_cpu, detect_gpus, get_cpu_variant, get_optimal_binary, kernels,
        list_devices, load_gpu_backend, memory_info, probe_cpu_module, probe_gpu_backend,
        process_rss_mb, weight_layouts,
    };
    #[pymodule_export]
    use super::model::PyModel;
    #[cfg(unix)]
    #[pymodule_export]
    use super::wire::PyWire;
    use super::*;
    #[pymodule_export]
    use super::{
        inject, inspect_gguf, keep_last_line, measure_attention, measure_layouts, put_log, start,
        stop_log, take_log,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        log::install_panic_hook();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("LLAMA_CPP_VERSION", core::llama_version())?;
        module.add("ENGINE", core::ENGINE)
    }
}

#[pyfunction]
fn inspect_gguf(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let found = guarded(py, || gguf::inspect(&path))?;
    convert::description(py, &found)
}

#[pyfunction]
fn start(py: Python<'_>, folder: &str, module: &str) -> PyResult<()> {
    guarded(py, || core::start(Path::new(folder), module))
}

/// Microseconds of one layer for a token of a prompt and for one of the answer, by choice.
#[pyfunction]
fn measure_attention<'py>(
    py: Python<'py>,
    head_dim: u32,
    n_head: u32,
    n_head_kv: u32,
    n_ctx: u32,
    n_threads: u32,
) -> PyResult<Option<Bound<'py, PyDict>>> {
    let heads = Heads { dim: head_dim, count: n_head, count_kv: n_head_kv };
    let Some(measured) = guarded(py, || measure(heads, n_ctx, n_threads))? else {
        return Ok(None);
    };
    let times = PyDict::new(py);
    for timing in measured {
        let choice = (timing.attention.flash_attn.name(), timing.attention.kv_type.name());
        times.set_item(choice, (micros(timing.prompt_token), micros(timing.answer_token)))?;
    }
    Ok(Some(times))
}

/// Microseconds of a mebibyte of weights for a token of a prompt and for one of the answer, by type: as in
/// the file, and laid out anew.
#[pyfunction]
fn measure_layouts(
    py: Python<'_>,
    types: Vec<String>,
    n_threads: u32,
) -> PyResult<Option<Bound<'_, PyDict>>> {
    let Some(measured) = guarded(py, || layouts(&types, n_threads))? else {
        return Ok(None);
    };
    let times = PyDict::new(py);
    for timing in measured {
        let pair = |pace: LayoutPace| (micros(pace.prompt_token), micros(pace.answer_token));
        times.set_item(timing.type_name, (pair(timing.as_in_file), pair(timing.anew)))?;
    }
    Ok(Some(times))
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[pyfunction]
fn take_log(py: Python<'_>) -> PyResult<Vec<(&'static str, String)>> {
    let lines = guarded(py, || Ok(log::take()))?;
    Ok(lines.into_iter().map(|(level, line)| (convert::level(level), line)).collect())
}

/// A line of another process, into the same stream.
#[pyfunction]
fn put_log(level: &str, line: String) {
    log::note(convert::level_named(level), line);
}

#[cfg(unix)]
#[pyfunction]
fn keep_last_line(descriptor: i32) -> PyResult<()> {
    Ok(log::keep_last_line(descriptor)?)
}

#[pyfunction]
fn stop_log() {
    log::stop();
}

/// For tests of the border.
#[pyfunction]
#[pyo3(name = "_inject")]
fn inject(py: Python<'_>, fault: &str) -> PyResult<()> {
    guarded(py, || match fault {
        "throw" => ffi::throw(),
        _ => panic!("asked to panic"),
    })
}
