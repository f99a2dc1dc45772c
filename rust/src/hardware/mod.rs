//! What this machine is and has: its processor, the ggml module that suits it, its memory, its GPUs.

pub mod cgroup;
pub mod cpu;
pub mod cpuid;
pub mod cpuinfo;
pub mod gpu;
pub mod memory;
pub mod modules;
pub mod variant;

pub use cpu::{CpuId, CpuInfo, default_threads, detect};
pub use modules::CpuModule;
pub use variant::{get_optimal_binary, variant_name};
