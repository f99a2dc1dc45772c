//! The processor: who made it, what it can do, and how many cores this process may use.

use crate::error::Result;

/// More threads than this gain little on a CPU and starve everything else on it.
const MAX_THREADS: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    pub id: CpuId,
    /// Processors that are online in this machine.
    pub logical_cores: usize,
    /// Cores among the processors this process may run on.
    pub physical_cores: usize,
    /// See [`usable_cores()`].
    pub usable_cores: usize,
}

/// Who the processor is. On ARM `family` is the architecture, and `model` the part number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuId {
    /// `GenuineIntel`, `AuthenticAMD`, `HygonGenuine`, `Apple`, `ARM`, …; empty if unknown.
    pub vendor: String,
    pub brand: String,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    /// Linux's names, and only what the operating system has enabled as well.
    pub features: Vec<&'static str>,
}

impl CpuId {
    pub fn has(&self, feature: &str) -> bool {
        self.features.contains(&feature)
    }
}

pub fn detect() -> Result<CpuInfo> {
    let id = identify()?;
    let (logical_cores, physical_cores) = os::cores();
    Ok(CpuInfo { id, logical_cores, physical_cores, usable_cores: usable_cores() })
}

/// The threads of a context that was not told how many: one per core, because llama.cpp's barrier
/// spins, and two spinning threads on one core wait for each other.
pub fn default_threads() -> usize {
    let (_, physical) = os::cores();
    threads_for(physical, usable_cores())
}

pub fn threads_for(physical_cores: usize, usable_cores: usize) -> usize {
    physical_cores.min(usable_cores).clamp(1, MAX_THREADS)
}

/// How many processors this process may keep busy. The standard library heeds the affinity mask
/// and, on Linux, the cgroup's quota.
pub fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The processors that this process may run on; None where nobody tells.
pub fn allowed_processors() -> Option<Vec<usize>> {
    os::allowed_processors()
}

/// How many processors' time a cgroup allows this process; None without a quota.
pub fn quota() -> Option<f64> {
    os::quota()
}

#[cfg(target_arch = "x86_64")]
fn identify() -> Result<CpuId> {
    Ok(super::cpuid::read())
}

#[cfg(not(target_arch = "x86_64"))]
fn identify() -> Result<CpuId> {
    os::identify()
}

#[cfg(target_os = "linux")]
mod os {
    use std::collections::HashSet;
    use std::fs::read_to_string;
    use std::path::Path;

    use crate::hardware::{cgroup, cpuinfo};

    /// Processors online, and cores that this process may use.
    pub fn cores() -> (usize, usize) {
        let text = read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut online = cpuinfo::processors_online(&text);
        if online.is_empty() {
            online = (0..super::usable_cores()).collect();
        }
        let logical = online.len();
        // The mask may name processors that this machine could have but has not.
        let mask = allowed_processors().unwrap_or_default();
        let mut allowed: Vec<usize> = online.iter().copied().filter(|n| mask.contains(n)).collect();
        if allowed.is_empty() {
            allowed = online;
        }
        let physical = sibling_groups(&allowed)
            .or_else(|| cpuinfo::count_cores(&text, &allowed))
            .unwrap_or(allowed.len() / 2);
        (logical, physical.max(1))
    }

    pub fn allowed_processors() -> Option<Vec<usize>> {
        let status = read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        cpuinfo::parse_cpu_list(line)
    }

    pub fn quota() -> Option<f64> {
        let groups = read_to_string("/proc/self/cgroup").ok()?;
        cgroup::cpu_quota(&groups, Path::new("/sys/fs/cgroup"))
    }

    /// Processors of one core name the same siblings. Surer than core ids, which begin anew in
    /// each cluster of some ARM machines.
    fn sibling_groups(allowed: &[usize]) -> Option<usize> {
        let siblings = |processor: &usize| {
            let folder = format!("/sys/devices/system/cpu/cpu{processor}/topology");
            read_to_string(format!("{folder}/thread_siblings_list")).ok()
        };
        let groups = allowed.iter().map(siblings).collect::<Option<HashSet<_>>>()?;
        cpuinfo::plausible(groups.len(), allowed.len()).then_some(groups.len())
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn identify() -> crate::error::Result<super::CpuId> {
        let unreadable = |e: std::io::Error| crate::error::Error::Hardware {
            what: format!("`/proc/cpuinfo` cannot be read: {e}"),
        };
        cpuinfo::parse_cpuinfo(&read_to_string("/proc/cpuinfo").map_err(unreadable)?)
    }
}

#[cfg(target_os = "macos")]
mod os {
    use std::ffi::{CStr, c_char, c_int, c_void};

    unsafe extern "C" {
        fn sysctlbyname(
            name: *const c_char,
            old: *mut c_void,
            old_length: *mut usize,
            new: *mut c_void,
            new_length: usize,
        ) -> c_int;
    }

    pub fn allowed_processors() -> Option<Vec<usize>> {
        None
    }

    pub fn quota() -> Option<f64> {
        None
    }

    /// macOS has no affinity masks: all cores are ours.
    pub fn cores() -> (usize, usize) {
        let logical = number(c"hw.logicalcpu").unwrap_or_else(super::usable_cores);
        (logical, number(c"hw.physicalcpu").unwrap_or(logical / 2).max(1))
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn identify() -> super::Result<super::CpuId> {
        let brand =
            value(c"machdep.cpu.brand_string").ok_or_else(|| crate::error::Error::Hardware {
                what: "sysctl does not tell the processor's name".into(),
            })?;
        let brand = String::from_utf8_lossy(&brand).trim_end_matches('\0').to_owned();
        let has = |name| number(name).is_some_and(|value| value != 0);
        let optional = [
            (c"hw.optional.arm.FEAT_DotProd", "asimddp"),
            (c"hw.optional.arm.FEAT_I8MM", "i8mm"),
            (c"hw.optional.arm.FEAT_BF16", "bf16"),
            (c"hw.optional.arm.FEAT_SME", "sme"),
        ];
        let optional =
            optional.into_iter().filter(|(name, _)| has(name)).map(|(_, feature)| feature);
        let features = ["asimd"].into_iter().chain(optional).collect();
        Ok(super::CpuId { vendor: "Apple".into(), brand, features, ..Default::default() })
    }

    fn number(name: &CStr) -> Option<usize> {
        let value = value(name)?;
        Some(i32::from_ne_bytes(value.get(..4)?.try_into().ok()?) as usize)
    }

    fn value(name: &CStr) -> Option<Vec<u8>> {
        let mut buffer = vec![0u8; 256];
        let mut length = buffer.len();
        // SAFETY: the name ends with a zero, and `length` is the room in `buffer`.
        let status = unsafe {
            let old = buffer.as_mut_ptr().cast();
            sysctlbyname(name.as_ptr(), old, &mut length, std::ptr::null_mut(), 0)
        };
        buffer.truncate(length);
        (status == 0).then_some(buffer)
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod os {
    pub fn allowed_processors() -> Option<Vec<usize>> {
        None
    }

    pub fn quota() -> Option<f64> {
        None
    }

    pub fn cores() -> (usize, usize) {
        let logical = super::usable_cores();
        (logical, (logical / 2).max(1))
    }

    /// An unknown processor: it gets what runs everywhere.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn identify() -> super::Result<super::CpuId> {
        Ok(super::CpuId::default())
    }
}
