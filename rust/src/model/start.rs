//! llama.cpp's backend: one CPU module, loaded by path, once per process and never unloaded.

use std::ffi::CString;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use llama_cpp_2::llama_backend::LlamaBackend;

use crate::error::{Error, Result};
use crate::hardware::modules;
use crate::{ffi, log};

static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub description: String,
    pub is_gpu: bool,
}

/// Loads the CPU module called `module` from `folder` and starts llama.cpp. Later calls do nothing.
///
/// The module comes first: a backend that starts with nothing registered would look for libraries
/// in the working directory.
pub fn start(folder: &Path, module: &str) -> Result<()> {
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if BACKEND.get().is_some() {
        return Ok(());
    }
    log::install();
    load_module(folder, module)?;
    let backend = LlamaBackend::init().map_err(|error| Error::internal(error.to_string()))?;
    let _ = BACKEND.set(backend);
    Ok(())
}

/// Proves a module by use. It dies where the module does, so a child process calls it.
pub fn probe(folder: &Path, module: &str) -> Result<()> {
    log::install();
    load_module(folder, module)?;
    ffi::probe_cpu()
}

pub fn backend_devices() -> Vec<Device> {
    use llama_cpp_2::LlamaBackendDeviceType::{Gpu, IntegratedGpu};
    let devices = llama_cpp_2::list_llama_ggml_backend_devices();
    let plain = |device: llama_cpp_2::LlamaBackendDevice| Device {
        is_gpu: matches!(device.device_type, Gpu | IntegratedGpu),
        name: device.name,
        description: device.description,
    };
    devices.into_iter().map(plain).collect()
}

pub(super) fn backend() -> Result<&'static LlamaBackend> {
    BACKEND.get().ok_or_else(|| Error::ModelNotLoaded { what: "llama.cpp's backend".into() })
}

fn load_module(folder: &Path, module: &str) -> Result<()> {
    let module = modules::find(folder, module)?;
    let no_backend = |found: String| Error::NoBackend { folder: folder.to_path_buf(), found };
    let path = module.path.to_str().and_then(|path| CString::new(path).ok());
    let path = path.ok_or_else(|| no_backend("a path that is not UTF-8".into()))?;
    let (loaded, errors) = log::listen(|| ffi::load_backend(&path));
    loaded.map_err(|_| {
        no_backend(format!("`{}` does not load: {}", module.path.display(), errors.join("; ")))
    })
}
