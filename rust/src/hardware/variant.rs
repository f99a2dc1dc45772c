//! The twelve builds of BitNet's llama.cpp: which one this processor runs, and where it lies.
//!
//! Chosen by family and model number, never by the name on the box: an EPYC 7702 and an EPYC 7713
//! are two generations.

use std::path::{Path, PathBuf};

use super::cpu::CpuId;
use crate::error::{Error, Result};

/// Runs on everything, and stands in where a processor has no build of its own.
pub const PORTABLE: &str = "bitnet-portable";

/// What builds for these generations use without asking. A virtual machine may hide some of it,
/// and Pentiums and Celerons of the same models never had it.
const AVX2: &[&str] = &["avx2", "fma", "f16c", "bmi2"];
const AVX512: &[&str] = &[
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx512f",
    "avx512cd",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
];

pub fn variant_name(cpu: &CpuId) -> &'static str {
    let found = match cpu.vendor.as_str() {
        "AuthenticAMD" => amd(cpu.family, cpu.model),
        // Hygon's Dhyana is a licensed Zen 1.
        "HygonGenuine" if cpu.family == 0x18 => Some(("bitnet-amd-zen1", AVX2)),
        "GenuineIntel" if cpu.family == 6 => intel(cpu.model),
        _ => None,
    };
    match found {
        Some((name, needs)) if needs.iter().all(|feature| cpu.has(feature)) => name,
        _ => PORTABLE,
    }
}

type Variant = (&'static str, &'static [&'static str]);

/// Ranges as in Linux, arch/x86/kernel/cpu/amd.c, and all of family 0x17 from 0x60 on. Zen+ (0x08,
/// 0x18) is Zen 1 there and here; the models of family 0x1A that are missing are Zen 6.
fn amd(family: u32, model: u32) -> Option<Variant> {
    Some(match (family, model) {
        (0x17, 0x00..=0x2f | 0x50..=0x5f) => ("bitnet-amd-zen1", AVX2),
        (0x17, 0x30..=0x4f | 0x60..=0xff) => ("bitnet-amd-zen2", AVX2),
        (0x19, 0x00..=0x0f | 0x20..=0x5f) => ("bitnet-amd-zen3", AVX2),
        (0x19, 0x10..=0x1f | 0x60..=0xaf) => ("bitnet-amd-zen4", AVX512),
        (0x1a, 0x00..=0x2f | 0x40..=0x4f | 0x60..=0x7f) => ("bitnet-amd-zen5", AVX512),
        _ => return None,
    })
}

/// Family 6, models as in Linux, arch/x86/include/asm/intel-family.h. Raptor Lake (0xB7, 0xBA,
/// 0xBF) and Sapphire Rapids (0x8F) have no build.
fn intel(model: u32) -> Option<Variant> {
    Some(match model {
        0x3c | 0x3f | 0x45 | 0x46 => ("bitnet-intel-haswell", AVX2),
        0x3d | 0x47 | 0x4f | 0x56 => ("bitnet-intel-broadwell", AVX2),
        // Skylake, its server (Cascade and Cooper Lake too), Kaby, Coffee, Comet Lake.
        0x4e | 0x5e | 0x55 | 0x8e | 0x9e | 0xa5 | 0xa6 => ("bitnet-intel-skylake", AVX2),
        // Ice Lake: client, server, NNP-I; Tiger Lake.
        0x7d | 0x7e | 0x6a | 0x6c | 0x9d | 0x8c | 0x8d => ("bitnet-intel-icelake", AVX512),
        0xa7 => ("bitnet-intel-rocketlake", AVX512),
        // The last is Alder Lake-N: efficiency cores only, the same instructions.
        0x97 | 0x9a | 0xbe => ("bitnet-intel-alderlake", AVX2),
        _ => return None,
    })
}

/// Where a binary of `variant` lies: `{base}/cpu/{platform}/{variant}/{name}`.
///
/// With `must_exist` the portable and the standard build stand in, and nothing at all is an error.
pub fn get_optimal_binary(
    base: &Path,
    platform: Option<&str>,
    name: Option<&str>,
    variant: &str,
    must_exist: bool,
) -> Result<PathBuf> {
    let platform = known_platform(platform.unwrap_or(std::env::consts::OS))?;
    let name = name.unwrap_or(match platform {
        "windows" => "llama-server.exe",
        _ => "llama-server",
    });
    if matches!(name, "" | "." | "..") || name.contains(['/', '\\', '\0']) {
        return Err(Error::invalid("binary_name", format!("{name:?}"), "a file name"));
    }
    let folder = platform_folder(&base.join("cpu"), platform);
    if !must_exist {
        return Ok(folder.join(variant).join(name));
    }
    let tried = [variant, PORTABLE, "standard"].map(|build| folder.join(build).join(name));
    let found = tried.iter().find(|path| path.is_file());
    found.cloned().ok_or(Error::BinaryNotFound { tried: tried.into() })
}

fn known_platform(platform: &str) -> Result<&'static str> {
    ["windows", "linux", "macos"]
        .into_iter()
        .find(|known| platform.eq_ignore_ascii_case(known))
        .ok_or_else(|| Error::invalid("platform", platform, "`windows`, `linux` or `macos`"))
}

/// The lower-case folder, unless only another spelling is there: BitNet's own releases say
/// `Windows`.
fn platform_folder(cpu: &Path, platform: &str) -> PathBuf {
    let lower_case = cpu.join(platform);
    if lower_case.is_dir() {
        return lower_case;
    }
    let spelled_otherwise = |path: &PathBuf| {
        path.is_dir() && path.file_name().is_some_and(|name| name.eq_ignore_ascii_case(platform))
    };
    let entries = cpu.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(spelled_otherwise).min().unwrap_or(lower_case)
}
