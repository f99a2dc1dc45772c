//! What Linux writes in `/proc/cpuinfo`, and how it lists processors. Texts in, values out.

use std::collections::HashSet;

use super::cpu::CpuId;
use super::cpuid;
use crate::error::{Error, Result};

const ARM_FEATURES: [&str; 8] =
    ["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"];

/// Reads the first processor of a `/proc/cpuinfo`. A processor we do not know is no error; a text
/// that names none is.
pub fn parse_cpuinfo(text: &str) -> Result<CpuId> {
    let first = processors(text).next().ok_or_else(|| Error::Hardware {
        what: "`/proc/cpuinfo` does not name any processor".into(),
    })?;
    if let Some(vendor) = first.text("vendor_id") {
        return x86_from_cpuinfo(&first, vendor);
    }
    Ok(CpuId {
        vendor: first.text("CPU implementer").map(arm_vendor).unwrap_or_default().into(),
        brand: first.text("model name").unwrap_or_default().into(),
        family: first.number("CPU architecture").unwrap_or_default(),
        model: first.number("CPU part").unwrap_or_default(),
        stepping: first.number("CPU revision").unwrap_or_default(),
        features: known_features(first.text("Features"), ARM_FEATURES),
    })
}

fn x86_from_cpuinfo(first: &Processor, vendor: &str) -> Result<CpuId> {
    let number = |key: &str| {
        let missing =
            || Error::Hardware { what: format!("`/proc/cpuinfo` has no number for `{key}`") };
        first.number(key).ok_or_else(missing)
    };
    Ok(CpuId {
        vendor: vendor.into(),
        brand: first.text("model name").unwrap_or_default().into(),
        family: number("cpu family")?,
        model: number("model")?,
        // Some hypervisors hide it: "unknown".
        stepping: first.number("stepping").unwrap_or_default(),
        features: known_features(first.text("flags"), cpuid::feature_names()),
    })
}

fn known_features(
    listed: Option<&str>,
    known: impl IntoIterator<Item = &'static str>,
) -> Vec<&'static str> {
    let listed: HashSet<&str> = listed.unwrap_or_default().split_whitespace().collect();
    known.into_iter().filter(|name| listed.contains(name)).collect()
}

fn arm_vendor(implementer: &str) -> &'static str {
    match implementer {
        "0x41" => "ARM",
        "0x42" => "Broadcom",
        "0x43" => "Cavium",
        "0x46" => "Fujitsu",
        "0x48" => "HiSilicon",
        "0x4e" => "NVIDIA",
        "0x51" => "Qualcomm",
        "0x61" => "Apple",
        "0xc0" => "Ampere",
        _ => "",
    }
}

/// Counts the cores among the `allowed` processors; None if the text does not tell.
pub fn count_cores(cpuinfo: &str, allowed: &[usize]) -> Option<usize> {
    let mut cores = HashSet::new();
    let mut seen = 0;
    for processor in processors(cpuinfo) {
        if allowed.contains(&(processor.number("processor")? as usize)) {
            cores.insert((processor.number("physical id")?, processor.number("core id")?));
            seen += 1;
        }
    }
    plausible(cores.len(), seen).then_some(cores.len())
}

pub fn processors_online(cpuinfo: &str) -> Vec<usize> {
    let numbers = processors(cpuinfo).filter_map(|processor| processor.number("processor"));
    numbers.map(|number| number as usize).collect()
}

/// SMT never has more threads per core on what we run on. Some sandboxes call every processor
/// "core 0", and then this limit is how we notice.
const MAX_THREADS_PER_CORE: usize = 4;

pub fn plausible(cores: usize, processors: usize) -> bool {
    processors > 0 && processors <= cores * MAX_THREADS_PER_CORE
}

/// `0-3,8` as the kernel writes sets of processors.
pub fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut processors = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // No kernel is built for more; a wrong number must not fill the memory.
        if first > last || last > 65_535 {
            return None;
        }
        processors.extend(first..=last);
    }
    Some(processors)
}

/// One block of `/proc/cpuinfo`.
struct Processor<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Processor<'a> {
    fn text(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(name, _)| *name == key).map(|(_, value)| *value)
    }

    fn number(&self, key: &str) -> Option<u32> {
        let text = self.text(key)?;
        match text.strip_prefix("0x") {
            Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok(),
            None => text.parse().ok(),
        }
    }
}

/// The blocks that begin with `processor : 0`, `1`, …; ARM ends the text with one about the board.
fn processors(cpuinfo: &str) -> impl Iterator<Item = Processor<'_>> {
    cpuinfo
        .split("\n\n")
        .map(|block| {
            let fields = block.lines().filter_map(|line| line.split_once(':'));
            Processor(fields.map(|(key, value)| (key.trim(), value.trim())).collect())
        })
        .filter(|processor| processor.number("processor").is_some())
}
