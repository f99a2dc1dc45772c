//! What CPUID says of an x86 processor, less what the operating system has not enabled.
//!
//! A processor may have AVX-512 or AMX while the kernel or the hypervisor does not save those
//! registers: CPUID still shows the feature, and the first instruction of it is a SIGILL. XCR0
//! says what is saved.

use super::cpu::CpuId;

/// Bits of XCR0: the registers that the operating system saves for us.
pub const AVX_STATE: u64 = 1 << 1 | 1 << 2;
pub const AVX512_STATE: u64 = AVX_STATE | 1 << 5 | 1 << 6 | 1 << 7;
pub const AMX_STATE: u64 = 1 << 17 | 1 << 18;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Name, (leaf, subleaf), register, bit, and the XCR0 bits that it needs.
type Feature = (&'static str, (u32, u32), usize, u32, u64);

const FEATURES: [Feature; 21] = [
    ("sse4_2", (1, 0), ECX, 20, 0),
    ("popcnt", (1, 0), ECX, 23, 0),
    ("avx", (1, 0), ECX, 28, AVX_STATE),
    ("f16c", (1, 0), ECX, 29, AVX_STATE),
    ("fma", (1, 0), ECX, 12, AVX_STATE),
    ("bmi2", (7, 0), EBX, 8, 0),
    ("avx2", (7, 0), EBX, 5, AVX_STATE),
    ("avx_vnni", (7, 1), EAX, 4, AVX_STATE),
    ("avx512f", (7, 0), EBX, 16, AVX512_STATE),
    ("avx512cd", (7, 0), EBX, 28, AVX512_STATE),
    ("avx512bw", (7, 0), EBX, 30, AVX512_STATE),
    ("avx512dq", (7, 0), EBX, 17, AVX512_STATE),
    ("avx512vl", (7, 0), EBX, 31, AVX512_STATE),
    ("avx512vbmi", (7, 0), ECX, 1, AVX512_STATE),
    ("avx512_vnni", (7, 0), ECX, 11, AVX512_STATE),
    ("avx512_bf16", (7, 1), EAX, 5, AVX512_STATE),
    ("avx512_fp16", (7, 0), EDX, 23, AVX512_STATE),
    ("amx_tile", (7, 0), EDX, 24, AMX_STATE),
    ("amx_int8", (7, 0), EDX, 25, AMX_STATE),
    ("amx_bf16", (7, 0), EDX, 22, AMX_STATE),
    ("amx_fp16", (7, 1), EAX, 21, AMX_STATE),
];

pub fn feature_names() -> impl Iterator<Item = &'static str> {
    FEATURES.iter().map(|feature| feature.0)
}

#[cfg(target_arch = "x86_64")]
pub fn read() -> CpuId {
    decode(query, enabled_state())
}

/// XCR0 of this machine; 0 where there is none.
#[cfg(target_arch = "x86_64")]
pub fn enabled_state() -> u64 {
    let osxsave = query(1, 0)[ECX] >> 27 & 1 == 1;
    // SAFETY: OSXSAVE says that XGETBV may be used.
    if osxsave { unsafe { std::arch::x86_64::_xgetbv(0) } } else { 0 }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn enabled_state() -> u64 {
    0
}

#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // the function became safe after Rust 1.85
fn query(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 processor has CPUID.
    let answer = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// `cpuid(leaf, subleaf)` gives EAX, EBX, ECX, EDX: the processor's own, or recorded ones.
pub fn decode(cpuid: impl Fn(u32, u32) -> [u32; 4], xcr0: u64) -> CpuId {
    let [highest, ebx, ecx, edx] = cpuid(0, 0);
    let signature = if highest >= 1 { cpuid(1, 0)[EAX] } else { 0 };
    let (family, model) = family_and_model(signature);
    CpuId {
        vendor: text(&[ebx, edx, ecx]),
        brand: brand(&cpuid),
        family,
        model,
        stepping: signature & 0xf,
        features: enabled_features(&cpuid, highest, xcr0),
    }
}

/// The extended parts count only where the base family says so; see Intel's manual, CPUID leaf 1.
fn family_and_model(signature: u32) -> (u32, u32) {
    let base_family = signature >> 8 & 0xf;
    let base_model = signature >> 4 & 0xf;
    let family = if base_family == 0xf { 0xf + (signature >> 20 & 0xff) } else { base_family };
    let has_extended_model = base_family == 0x6 || base_family == 0xf;
    let extended_model = if has_extended_model { signature >> 16 & 0xf } else { 0 };
    (family, extended_model << 4 | base_model)
}

fn enabled_features(
    cpuid: &impl Fn(u32, u32) -> [u32; 4],
    highest: u32,
    xcr0: u64,
) -> Vec<&'static str> {
    // An unknown leaf or subleaf may answer with another one's registers.
    let highest_of_7 = if highest >= 7 { cpuid(7, 0)[EAX] } else { 0 };
    let answers = |(leaf, subleaf)| leaf <= highest && (leaf != 7 || subleaf <= highest_of_7);
    FEATURES
        .iter()
        .filter(|(_, at, register, bit, state)| {
            xcr0 & state == *state && answers(*at) && cpuid(at.0, at.1)[*register] >> bit & 1 == 1
        })
        .map(|feature| feature.0)
        .collect()
}

fn brand(cpuid: &impl Fn(u32, u32) -> [u32; 4]) -> String {
    if cpuid(0x8000_0000, 0)[EAX] < 0x8000_0004 {
        return String::new();
    }
    let words: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpuid(leaf, 0)).collect();
    text(&words)
}

fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
}
