//! What this machine is and has, as plain values.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::{self, guarded};
use crate::hardware::gpu::{self, Gpu, GpuMemory};
use crate::hardware::{self, cpu, memory, modules};
use crate::model::{self as core, backend_devices};

#[pyfunction]
pub(super) fn detect_cpu(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let cpu = guarded(py, cpu::detect)?;
    let facts = PyDict::new(py);
    facts.set_item("vendor", cpu.id.vendor)?;
    facts.set_item("brand", cpu.id.brand)?;
    facts.set_item("family", cpu.id.family)?;
    facts.set_item("model", cpu.id.model)?;
    facts.set_item("stepping", cpu.id.stepping)?;
    facts.set_item("logical_cores", cpu.logical_cores)?;
    facts.set_item("physical_cores", cpu.physical_cores)?;
    facts.set_item("usable_cores", cpu.usable_cores)?;
    facts.set_item("affinity", cpu::allowed_processors().map(|allowed| allowed.len()))?;
    facts.set_item("quota", cpu::quota())?;
    facts.set_item("default_threads", cpu::default_threads())?;
    facts.set_item("features", cpu.id.features)?;
    Ok(facts)
}

#[pyfunction]
pub(super) fn memory_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let facts = PyDict::new(py);
    facts.set_item("total", memory::total_bytes())?;
    facts.set_item("available", memory::available_bytes())?;
    facts.set_item("limit", memory::limit_bytes())?;
    facts.set_item("resident", memory::resident_bytes())?;
    facts.set_item("private", memory::private_bytes())?;
    Ok(facts)
}

#[pyfunction]
pub(super) fn detect_gpus(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = guarded(py, || Ok(gpu::detect()))?;
    let facts = PyDict::new(py);
    let gpus = found.gpus.iter().map(|gpu| gpu_facts(py, gpu)).collect::<PyResult<Vec<_>>>()?;
    facts.set_item("gpus", gpus)?;
    facts.set_item("driver", found.driver)?;
    facts.set_item("reason", found.reason)?;
    Ok(facts)
}

fn gpu_facts<'py>(py: Python<'py>, gpu: &Gpu) -> PyResult<Bound<'py, PyDict>> {
    let facts = memory_facts(py, gpu.memory)?;
    facts.set_item("index", gpu.index)?;
    facts.set_item("name", &gpu.name)?;
    facts.set_item("uuid", &gpu.uuid)?;
    facts.set_item("pci_id", &gpu.pci_id)?;
    facts.set_item("compute_capability", gpu.compute_capability)?;
    facts.set_item("utilization", gpu.utilization)?;
    let processes: Vec<_> = gpu.processes.iter().map(|one| (one.pid, one.used)).collect();
    facts.set_item("processes", processes)?;
    let instance = |one: &gpu::GpuInstance| {
        let facts = memory_facts(py, one.memory)?;
        facts.set_item("uuid", &one.uuid)?;
        Ok(facts)
    };
    let instances = gpu.instances.iter().map(instance).collect::<PyResult<Vec<_>>>()?;
    facts.set_item("instances", instances)?;
    Ok(facts)
}

fn memory_facts(py: Python<'_>, memory: Option<GpuMemory>) -> PyResult<Bound<'_, PyDict>> {
    let facts = PyDict::new(py);
    facts.set_item("total", memory.map(|memory| memory.total))?;
    facts.set_item("free", memory.map(|memory| memory.free))?;
    facts.set_item("used", memory.map(|memory| memory.used))?;
    Ok(facts)
}

#[pyfunction]
pub(super) fn list_devices(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let found = guarded(py, || Ok(backend_devices()))?;
    let plain = |device: core::Device| {
        let facts = PyDict::new(py);
        facts.set_item("name", device.name)?;
        facts.set_item("description", device.description)?;
        facts.set_item("is_gpu", device.is_gpu)?;
        facts.set_item("pci_id", device.pci_id)?;
        facts.set_item("total", device.memory.map(|(total, _)| total))?;
        facts.set_item("free", device.memory.map(|(_, free)| free))?;
        Ok(facts)
    };
    found.into_iter().map(plain).collect()
}

/// Which kernels of ours CPU modules get.
#[pyfunction]
pub(super) fn kernels() -> Option<&'static str> {
    modules::kernels()
}

/// The types of weights that the CPU module lays out anew, each with how large a byte of it becomes; and
/// whether K-quants stay as they are all the same.
#[pyfunction]
pub(super) fn weight_layouts(py: Python<'_>) -> PyResult<(Bound<'_, PyDict>, bool)> {
    let found = guarded(py, || Ok((core::relaid_types(), core::k_quants_stay())))?;
    let factors = PyDict::new(py);
    for (name, factor) in found.0 {
        factors.set_item(name, factor)?;
    }
    Ok((factors, found.1))
}

#[pyfunction]
pub(super) fn process_rss_mb() -> Option<f64> {
    memory::resident_bytes().map(convert::mib)
}

#[pyfunction]
pub(super) fn cpu_modules(py: Python<'_>, folder: &str) -> PyResult<Vec<(String, i32)>> {
    let found = guarded(py, || modules::usable_modules(Path::new(folder)))?;
    Ok(found.into_iter().map(|module| (module.name, module.score)).collect())
}

#[pyfunction]
pub(super) fn probe_cpu_module(py: Python<'_>, folder: &str, module: &str) -> PyResult<()> {
    guarded(py, || core::probe(Path::new(folder), module))
}

#[pyfunction]
pub(super) fn load_gpu_backend(py: Python<'_>, library: PathBuf) -> PyResult<Vec<String>> {
    guarded(py, || core::load_gpu_backend(&library))
}

#[pyfunction]
pub(super) fn probe_gpu_backend(py: Python<'_>, library: PathBuf) -> PyResult<()> {
    guarded(py, || core::probe_gpu_backend(&library))
}

#[pyfunction]
pub(super) fn get_cpu_variant(py: Python<'_>) -> PyResult<&'static str> {
    guarded(py, || Ok(hardware::variant_name(&cpu::detect()?.id)))
}

#[pyfunction]
#[pyo3(signature = (binary_name=None, *, base_path="BitNet/Release", platform=None, must_exist=false))]
pub(super) fn get_optimal_binary(
    py: Python<'_>,
    binary_name: Option<&str>,
    base_path: &str,
    platform: Option<&str>,
    must_exist: bool,
) -> PyResult<String> {
    let found = guarded(py, || {
        let variant = hardware::variant_name(&cpu::detect()?.id);
        let base = Path::new(base_path);
        hardware::get_optimal_binary(base, platform, binary_name, variant, must_exist)
    })?;
    Ok(found.to_string_lossy().into_owned())
}
