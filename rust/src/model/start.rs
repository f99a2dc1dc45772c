//! llama.cpp's backends: one CPU module, and what else is asked for; loaded by path, once per process,
//! and never unloaded.

use std::ffi::{CStr, CString};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_sys_2 as sys;

use crate::error::{Error, Result};
use crate::hardware::modules;
use crate::{ffi, log};

static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// One that llama.cpp can compute on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `CPU`, `CUDA0`, …
    pub name: String,
    pub description: String,
    /// llama.cpp puts layers on it.
    pub is_gpu: bool,
    pub is_integrated: bool,
    /// Its place on the bus, `0000:c1:00.0`, where it has one.
    pub pci_id: Option<String>,
    /// What can be allocated on it, all and now; None where llama.cpp does not know.
    pub memory: Option<(u64, u64)>,
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

/// Loads one more backend, and says which devices it brought. What it was built from is the caller's
/// to check before: a library runs code of its own as soon as it is opened.
pub fn load_gpu_backend(library: &Path) -> Result<Vec<String>> {
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    backend()?;
    let known = backend_devices().len();
    load_library(library)?;
    Ok(backend_devices().into_iter().skip(known).map(|device| device.name).collect())
}

/// Proves a GPU backend by use, like `probe`.
pub fn probe_gpu_backend(library: &Path) -> Result<()> {
    log::install();
    let complaints = load_library(library)?;
    log::uninstall();
    ffi::probe_gpus().map_err(|error| match complaints.is_empty() {
        true => error,
        false => Error::Hardware { what: format!("{error}: {}", complaints.join("; ")) },
    })
}

/// What llama.cpp can compute on, in its own order. It must have started; else there is nothing.
pub fn backend_devices() -> Vec<Device> {
    // SAFETY: it only counts what is registered.
    let count = if BACKEND.get().is_some() { unsafe { sys::ggml_backend_dev_count() } } else { 0 };
    let mut devices: Vec<Device> = (0..count).map(device).collect();
    // llama.cpp takes those that are part of a processor only where there are no others.
    if devices.iter().any(|device| device.is_gpu && !device.is_integrated) {
        for device in devices.iter_mut().filter(|device| device.is_integrated) {
            device.is_gpu = false;
        }
    }
    devices
}

fn device(index: usize) -> Device {
    // SAFETY: the index is below the count, the properties are plain numbers and pointers, which may be
    // zero, and its texts live as long as the device, which is never unregistered.
    let found = unsafe {
        let mut found: sys::ggml_backend_dev_props = std::mem::zeroed();
        sys::ggml_backend_dev_get_props(sys::ggml_backend_dev_get(index), &mut found);
        found
    };
    let text = |text: *const std::ffi::c_char| {
        // SAFETY: NULL, or zero-terminated.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let (total, free) = (found.memory_total as u64, found.memory_free as u64);
    let kind = found.type_;
    Device {
        name: text(found.name).unwrap_or_default(),
        description: text(found.description).unwrap_or_default(),
        is_gpu: kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU
            || kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
        is_integrated: kind == sys::GGML_BACKEND_DEVICE_TYPE_IGPU,
        pci_id: text(found.device_id),
        memory: (total > 0).then_some((total, free)),
    }
}

pub(super) fn backend() -> Result<&'static LlamaBackend> {
    BACKEND.get().ok_or_else(|| Error::ModelNotLoaded { what: "llama.cpp's backend".into() })
}

fn load_module(folder: &Path, module: &str) -> Result<()> {
    let module = modules::find(folder, module)?;
    load_library(&module.path)?;
    modules::add_kernels(&module);
    Ok(())
}

/// What it complained of, though it was loaded.
fn load_library(library: &Path) -> Result<Vec<String>> {
    let folder = library.parent().unwrap_or(library).to_path_buf();
    let no_backend = |found: String| Error::NoBackend { folder, found };
    let Some(path) = library.to_str().and_then(|path| CString::new(path).ok()) else {
        return Err(no_backend("a path that is not UTF-8".into()));
    };
    let (loaded, errors) = log::listen(|| ffi::load_backend(&path));
    if loaded.is_err() {
        let said = errors.join("; ");
        let already = format!("load_backend: failed to load {}: ", library.display());
        let said = said.strip_prefix(&already).unwrap_or(&said);
        return Err(no_backend(format!("`{}` does not load: {said}", library.display())));
    }
    Ok(errors)
}
