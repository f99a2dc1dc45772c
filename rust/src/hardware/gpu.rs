//! The NVIDIA GPUs of this machine, as NVML tells: a library that comes with the driver and is
//! loaded at run time.
//!
//! Without the library, the driver or a card there are no GPUs, and a reason. What a card does not
//! tell is None: a 0 that means "unknown" lets every memory check pass.

use std::sync::OnceLock;

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::{Device, Nvml};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gpus {
    pub gpus: Vec<Gpu>,
    pub driver: Option<String>,
    /// Why there are none.
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gpu {
    /// NVML's own, which is not CUDA's.
    pub index: u32,
    pub name: Option<String>,
    pub uuid: Option<String>,
    /// As llama.cpp writes it: `0000:c1:00.0`.
    pub pci_id: Option<String>,
    pub memory: Option<GpuMemory>,
    /// 8 and 6 for SM 8.6.
    pub compute_capability: Option<(i32, i32)>,
    /// Percent of the last second or less in which something ran.
    pub utilization: Option<u32>,
    pub processes: Vec<GpuProcess>,
    /// The parts that it is cut into (MIG), by their UUIDs.
    pub instances: Vec<GpuInstance>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    pub total: u64,
    pub free: u64,
    pub used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuProcess {
    pub pid: u32,
    /// None where the driver does not tell, as in some containers and on Windows.
    pub used: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuInstance {
    pub uuid: Option<String>,
    pub memory: Option<GpuMemory>,
}

/// What NVML finds now. It is loaded once and stays.
pub fn detect() -> Gpus {
    static NVML: OnceLock<Result<Nvml, String>> = OnceLock::new();
    match NVML.get_or_init(|| Nvml::init().map_err(|error| error.to_string())) {
        Ok(nvml) => look(nvml),
        Err(error) => Gpus { reason: Some(format!("no NVML: {error}")), ..Gpus::default() },
    }
}

/// NVML's numbers of a card's place on the bus, as llama.cpp writes them.
pub fn pci_id(domain: u32, bus: u32, device: u32) -> String {
    format!("{domain:04x}:{bus:02x}:{device:02x}.0")
}

fn look(nvml: &Nvml) -> Gpus {
    let count = nvml.device_count().unwrap_or(0);
    // A card that fell off the bus is counted, and cannot be asked.
    let gpus: Vec<Gpu> = (0..count)
        .filter_map(|index| nvml.device_by_index(index).ok().map(|device| gpu(index, &device)))
        .collect();
    let reason = gpus.is_empty().then(|| "NVML finds no GPU that can be used".into());
    Gpus { gpus, driver: nvml.sys_driver_version().ok(), reason }
}

fn gpu(index: u32, device: &Device<'_>) -> Gpu {
    let place = device.pci_info().ok();
    let capability = device.cuda_compute_capability().ok();
    Gpu {
        index,
        name: device.name().ok(),
        uuid: device.uuid().ok(),
        pci_id: place.map(|place| pci_id(place.domain, place.bus, place.device)),
        memory: memory(device),
        compute_capability: capability.map(|capability| (capability.major, capability.minor)),
        utilization: device.utilization_rates().ok().map(|rates| rates.gpu),
        processes: processes(device),
        instances: instances(device),
    }
}

fn memory(device: &Device<'_>) -> Option<GpuMemory> {
    let found = device.memory_info().ok()?;
    Some(GpuMemory { total: found.total, free: found.free, used: found.used })
}

fn processes(device: &Device<'_>) -> Vec<GpuProcess> {
    let found = device.running_compute_processes().unwrap_or_default();
    let plain = |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| GpuProcess {
        pid: process.pid,
        used: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    };
    found.into_iter().map(plain).collect()
}

/// Empty slots in between are no error: instances come and go.
fn instances(device: &Device<'_>) -> Vec<GpuInstance> {
    let most = device.mig_device_count().unwrap_or(0);
    let instance = |index| {
        let device = device.mig_device_by_index(index).ok()?;
        Some(GpuInstance { uuid: device.uuid().ok(), memory: memory(&device) })
    };
    (0..most).filter_map(instance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_on_the_bus_is_written_as_llama_cpp_writes_it() {
        assert_eq!(pci_id(0, 0xc1, 0), "0000:c1:00.0");
        assert_eq!(pci_id(0x10de, 1, 0x1f), "10de:01:1f.0");
    }

    #[test]
    fn without_a_gpu_there_is_a_reason() {
        let found = detect();
        assert_eq!(found.gpus.is_empty(), found.reason.is_some(), "{found:?}");
    }
}
