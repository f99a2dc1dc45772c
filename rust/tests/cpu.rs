//! The processor tables against `/proc/cpuinfo` excerpts (two to eight processors each, flags
//! shortened; `vm-firecracker-epyc` is whole), and the CPU modules of this build.

use std::fs;
use std::path::{Path, PathBuf};

use tabagent_model::hardware::cpu::{CpuId, default_threads, detect, threads_for};
use tabagent_model::hardware::cpuid::{self, AMX_STATE, AVX_STATE, AVX512_STATE};
use tabagent_model::hardware::cpuinfo::{
    count_cores, parse_cpu_list, parse_cpuinfo, processors_online,
};
use tabagent_model::hardware::modules::{find, needed_state, runnable, usable_modules};
use tabagent_model::hardware::variant::{get_optimal_binary, variant_name};

/// Fixture, family, model, variant.
const PROCESSORS: [(&str, u32, u32, &str); 28] = [
    ("ryzen-7-1700", 0x17, 0x01, "bitnet-amd-zen1"),
    ("ryzen-7-2700x", 0x17, 0x08, "bitnet-amd-zen1"),
    ("hygon-c86-7185", 0x18, 0x00, "bitnet-amd-zen1"),
    ("epyc-7702", 0x17, 0x31, "bitnet-amd-zen2"),
    ("vm-stepping-unknown", 0x17, 0x31, "bitnet-amd-zen2"),
    ("epyc-7713", 0x19, 0x01, "bitnet-amd-zen3"),
    ("ryzen-7-5800x", 0x19, 0x21, "bitnet-amd-zen3"),
    ("epyc-9354", 0x19, 0x11, "bitnet-amd-zen4"),
    ("ryzen-9-7950x", 0x19, 0x61, "bitnet-amd-zen4"),
    ("vm-firecracker-epyc", 0x19, 0x11, "bitnet-amd-zen4"),
    ("ryzen-9-9950x", 0x1a, 0x44, "bitnet-amd-zen5"),
    ("xeon-e5-2680-v3", 6, 0x3f, "bitnet-intel-haswell"),
    ("xeon-e5-2680-v4", 6, 0x4f, "bitnet-intel-broadwell"),
    ("vm-qemu-broadwell", 6, 0x3d, "bitnet-intel-broadwell"),
    ("xeon-gold-6148", 6, 0x55, "bitnet-intel-skylake"),
    ("core-i7-8700k", 6, 0x9e, "bitnet-intel-skylake"),
    ("sandbox-all-on-core-0", 6, 0x55, "bitnet-intel-skylake"),
    ("xeon-platinum-8380", 6, 0x6a, "bitnet-intel-icelake"),
    ("core-i7-1165g7", 6, 0x8c, "bitnet-intel-icelake"),
    ("core-i7-11700k", 6, 0xa7, "bitnet-intel-rocketlake"),
    ("core-i9-12900k", 6, 0x97, "bitnet-intel-alderlake"),
    // No build of their own.
    ("core-i9-13900k", 6, 0xb7, "bitnet-portable"),
    ("xeon-platinum-8480", 6, 0x8f, "bitnet-portable"),
    // A Skylake without AVX.
    ("pentium-g4400", 6, 0x5e, "bitnet-portable"),
    ("graviton-2", 8, 0xd0c, "bitnet-portable"),
    ("apple-m1-asahi", 8, 0x022, "bitnet-portable"),
    ("raspberry-pi-4", 8, 0xd08, "bitnet-portable"),
    ("riscv-visionfive-2", 0, 0, "bitnet-portable"),
];

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust/tests/fixtures/cpuinfo");
    fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap()
}

#[test]
fn every_processor_gets_its_variant() {
    for (name, family, model, variant) in PROCESSORS {
        let id = parse_cpuinfo(&fixture(name)).unwrap();
        assert_eq!((id.family, id.model, variant_name(&id)), (family, model, variant), "{name}");
    }
}

#[test]
fn a_cpuinfo_tells_who_the_processor_is_and_what_it_can_do() {
    let expected = CpuId {
        vendor: "GenuineIntel".into(),
        brand: "12th Gen Intel(R) Core(TM) i9-12900K".into(),
        family: 6,
        model: 0x97,
        stepping: 2,
        features: vec!["sse4_2", "popcnt", "avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni"],
    };
    assert_eq!(parse_cpuinfo(&fixture("core-i9-12900k")).unwrap(), expected);

    let expected = CpuId {
        vendor: "Apple".into(),
        brand: String::new(),
        family: 8,
        model: 0x022,
        stepping: 1,
        features: vec!["asimd", "asimdhp", "asimddp"],
    };
    assert_eq!(parse_cpuinfo(&fixture("apple-m1-asahi")).unwrap(), expected);
}

#[test]
fn a_text_without_processors_is_an_error() {
    for text in ["", "\n\n", &fixture("garbage")] {
        let error = parse_cpuinfo(text).unwrap_err().to_string();
        assert!(error.contains("does not name any processor"), "{error}");
    }
    let error =
        parse_cpuinfo("processor: 0\nvendor_id: GenuineIntel\ncpu family: six\n").unwrap_err();
    assert!(error.to_string().contains("`cpu family`"), "{error}");
}

#[test]
fn the_marketing_name_does_not_matter() {
    let mut epyc = parse_cpuinfo(&fixture("epyc-7702")).unwrap();
    for brand in ["AMD EPYC 9654 96-Core Processor", "Intel(R) Xeon(R)", ""] {
        epyc.brand = brand.into();
        assert_eq!(variant_name(&epyc), "bitnet-amd-zen2");
    }
}

#[test]
fn a_virtual_machine_that_hides_instructions_gets_the_portable_build() {
    for hidden in [" avx2", " avx512f", " avx512_vnni"] {
        let text = fixture("epyc-9354").replace(hidden, "");
        assert_eq!(variant_name(&parse_cpuinfo(&text).unwrap()), "bitnet-portable");
    }
}

#[test]
fn every_model_of_a_generation_is_known() {
    let variant = |vendor: &str, family, model| {
        let features = cpuid::feature_names().collect();
        let id = CpuId { vendor: vendor.into(), family, model, features, ..Default::default() };
        variant_name(&id)
    };
    let amd = |family, model| variant("AuthenticAMD", family, model);
    assert_eq!([0x00, 0x11, 0x18, 0x20, 0x50].map(|m| amd(0x17, m)), ["bitnet-amd-zen1"; 5]);
    assert_eq!(
        [0x31, 0x47, 0x60, 0x68, 0x71, 0x90, 0xa0].map(|m| amd(0x17, m)),
        ["bitnet-amd-zen2"; 7]
    );
    assert_eq!([0x00, 0x08, 0x21, 0x44, 0x50].map(|m| amd(0x19, m)), ["bitnet-amd-zen3"; 5]);
    assert_eq!(
        [0x10, 0x18, 0x61, 0x74, 0x78, 0x90, 0xa0, 0xaf].map(|m| amd(0x19, m)),
        ["bitnet-amd-zen4"; 8]
    );
    assert_eq!([0x02, 0x11, 0x24, 0x44, 0x60, 0x70].map(|m| amd(0x1a, m)), ["bitnet-amd-zen5"; 6]);
    // Zen 6, Bulldozer, a family to come.
    assert_eq!(
        [(0x1a, 0x50), (0x15, 0x02), (0x1b, 0x00)].map(|(f, m)| amd(f, m)),
        ["bitnet-portable"; 3]
    );

    let intel = |model| variant("GenuineIntel", 6, model);
    assert_eq!([0x3c, 0x3f, 0x45, 0x46].map(intel), ["bitnet-intel-haswell"; 4]);
    assert_eq!([0x3d, 0x47, 0x4f, 0x56].map(intel), ["bitnet-intel-broadwell"; 4]);
    assert_eq!([0x4e, 0x5e, 0x55, 0x8e, 0x9e, 0xa5, 0xa6].map(intel), ["bitnet-intel-skylake"; 7]);
    assert_eq!([0x6a, 0x6c, 0x7d, 0x7e, 0x8c, 0x8d, 0x9d].map(intel), ["bitnet-intel-icelake"; 7]);
    assert_eq!([0x97, 0x9a, 0xbe].map(intel), ["bitnet-intel-alderlake"; 3]);
    // Ivy Bridge, Raptor Lake, Emerald Rapids, Meteor Lake, Granite Rapids.
    assert_eq!([0x3a, 0xba, 0xbf, 0xcf, 0xaa, 0xad].map(intel), ["bitnet-portable"; 6]);
    assert_eq!(variant("GenuineIntel", 0xf, 0x3f), "bitnet-portable");
    assert_eq!(variant("CentaurHauls", 6, 0x3f), "bitnet-portable");
}

#[test]
fn cores_are_counted_among_the_processors_we_may_use() {
    let epyc = fixture("epyc-7702"); // processors 0, 1 and their siblings 64, 65
    assert_eq!(processors_online(&epyc), [0, 1, 64, 65]);
    assert_eq!(count_cores(&epyc, &[0, 1, 64, 65]), Some(2));
    assert_eq!(count_cores(&epyc, &[0, 64]), Some(1));
    assert_eq!(count_cores(&epyc, &[65]), Some(1));
    assert_eq!(count_cores(&epyc, &[7]), None);
    let two_sockets = fixture("xeon-gold-6148");
    assert_eq!(count_cores(&two_sockets, &[0, 1, 40, 41]), Some(2));
    let hybrid = fixture("core-i9-12900k");
    assert_eq!(count_cores(&hybrid, &[0, 1, 16, 17]), Some(3));
}

#[test]
fn cores_stay_unknown_where_the_text_does_not_tell_or_cannot_be_right() {
    assert_eq!(count_cores(&fixture("vm-qemu-broadwell"), &[0]), None);
    assert_eq!(count_cores(&fixture("graviton-2"), &[0, 1]), None);
    assert_eq!(count_cores(&fixture("sandbox-all-on-core-0"), &[0, 1, 2, 3, 4, 5, 6, 7]), None);
    assert_eq!(count_cores(&fixture("garbage"), &[0]), None);
    assert_eq!(processors_online(&fixture("raspberry-pi-4")), [0, 1]);
    assert!(processors_online(&fixture("garbage")).is_empty());
}

#[test]
fn processor_lists_are_read_as_the_kernel_writes_them() {
    assert_eq!(parse_cpu_list("\t0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
    assert_eq!(parse_cpu_list("5"), Some(vec![5]));
    for wrong in ["", "a", "3-1", "0-99999999999", "1,,2", "-"] {
        assert_eq!(parse_cpu_list(wrong), None, "{wrong}");
    }
}

#[test]
fn threads_are_one_per_core_at_least_one_at_most_eight() {
    let cases = [(4, 8, 4), (64, 128, 8), (64, 2, 2), (1, 1, 1), (0, 0, 1)];
    for (physical, usable, threads) in cases {
        assert_eq!(threads_for(physical, usable), threads);
    }
}

#[test]
fn this_machine_is_known() {
    let cpu = detect().unwrap();
    assert!(cpu.physical_cores >= 1 && cpu.physical_cores <= cpu.logical_cores);
    assert!(cpu.usable_cores >= 1 && cpu.usable_cores <= cpu.logical_cores);
    assert!((1..=8).contains(&default_threads()));
    assert!(variant_name(&cpu.id).starts_with("bitnet-"));
    // Two ways to the same answer. Linux hides what it has not enabled, as we do.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    {
        let told = parse_cpuinfo(&fs::read_to_string("/proc/cpuinfo").unwrap()).unwrap();
        let who = |id: &CpuId| (id.vendor.clone(), id.family, id.model);
        assert_eq!(who(&cpu.id), who(&told));
        let missing = |id: &CpuId| told.features.iter().find(|f| !id.has(f)).copied();
        assert_eq!(missing(&cpu.id), None);
    }
}

/// A Sapphire Rapids' CPUID, leaves 0, 1, 7 and the brand.
fn sapphire_rapids(leaf: u32, subleaf: u32) -> [u32; 4] {
    let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
    match (leaf, subleaf) {
        (0, _) => [0x20, word(b"Genu"), word(b"ntel"), word(b"ineI")],
        (1, _) => [0x000806f8, 0, 0x7ffefbff, 0xbfebfbff],
        (7, 0) => [1, 0xf3bfbfbf, 0xfb417ffe, 0xffdd4432],
        (7, 1) => [0x00001c30, 0, 0, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0002, _) => [word(b"Inte"), word(b"l Xe"), word(b"on 8"), word(b"480+")],
        _ => [0; 4],
    }
}

#[test]
fn cpuid_tells_who_the_processor_is() {
    let id = cpuid::decode(sapphire_rapids, u64::MAX);
    assert_eq!((id.vendor.as_str(), id.brand.as_str()), ("GenuineIntel", "Intel Xeon 8480+"));
    assert_eq!((id.family, id.model, id.stepping), (6, 0x8f, 8));
    assert!(id.has("amx_int8") && id.has("avx512_bf16") && id.has("avx_vnni"));

    let zen4 = |leaf, _| {
        if leaf == 1 { [0x00a1_0f11, 0, 0, 0] } else { [1, 0, 0, 0] }
    };
    let id = cpuid::decode(zen4, 0);
    assert_eq!((id.family, id.model, id.stepping), (0x19, 0x11, 1));
}

#[test]
fn a_feature_counts_only_if_the_operating_system_saves_its_registers() {
    let features = |xcr0| cpuid::decode(sapphire_rapids, xcr0).features;
    assert_eq!(features(0), ["sse4_2", "popcnt", "bmi2"]);
    let avx = features(AVX_STATE);
    assert!(avx.contains(&"avx2") && !avx.contains(&"avx512f"));
    let avx512 = features(AVX512_STATE);
    assert!(avx512.contains(&"avx512_bf16") && !avx512.contains(&"amx_tile"));
    // Half a state is none.
    assert!(!features(AVX512_STATE & !(1 << 6)).contains(&"avx512f"));
}

#[test]
fn a_module_runs_only_if_the_operating_system_saves_its_registers() {
    let everything = AVX512_STATE | AMX_STATE;
    // Module, and whether it runs with: nothing, AVX, AVX-512, AMX without and with permission.
    let expected = [
        ("x64", [true; 5]),
        ("sse42", [true; 5]),
        ("haswell", [false, true, true, true, true]),
        ("alderlake", [false, true, true, true, true]),
        ("zen4", [false, false, true, true, true]),
        ("sapphirerapids", [false, false, false, false, true]),
        ("armv8.2_1", [true; 5]),
    ];
    for (name, runs) in expected {
        let found = [
            runnable(name, 0, true),
            runnable(name, AVX_STATE, true),
            runnable(name, AVX512_STATE, true),
            runnable(name, everything, false),
            runnable(name, everything, true),
        ];
        assert_eq!(found, runs, "{name}");
    }
}

fn built_libraries() -> &'static Path {
    Path::new(env!("TABAGENT_BUILT_LIBRARIES"))
}

#[test]
fn every_x86_module_of_this_build_is_in_the_table_of_needed_registers() {
    let names = fs::read_dir(built_libraries()).unwrap().flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        Some(name.split_once("ggml-cpu-")?.1.rsplit_once('.')?.0.to_owned())
    });
    let mut without_needs: Vec<String> = names.filter(|name| needed_state(name) == 0).collect();
    without_needs.sort();
    if cfg!(target_arch = "x86_64") {
        assert_eq!(without_needs, ["sse42", "x64"]);
    }
}

#[test]
fn the_modules_of_this_build_are_scored_best_first() {
    let modules = usable_modules(built_libraries()).unwrap();
    assert!(modules.is_sorted_by(|a, b| a.score >= b.score));
    for module in &modules {
        assert!(module.score > 0);
        assert_eq!(&find(built_libraries(), &module.name).unwrap(), module);
    }
    if cfg!(target_arch = "x86_64") {
        assert_eq!(modules.last().unwrap().name, "x64");
    }
}

#[test]
fn an_unknown_module_is_refused_with_the_names_there_are() {
    for name in ["pentium", "", "../x64"] {
        let error = find(built_libraries(), name).unwrap_err().to_string();
        assert!(error.contains("TABAGENT_CPU_VARIANT") && error.contains("`x64`"), "{error}");
    }
}

#[test]
fn a_folder_without_a_usable_module_says_what_it_found() {
    let folder = scratch("modules");
    let message = || usable_modules(&folder).unwrap_err().to_string();
    assert!(message().contains("no file there is called"), "{}", message());

    let (prefix, extension) = if cfg!(windows) { ("", "dll") } else { ("lib", "so") };
    fs::write(folder.join(format!("{prefix}ggml-cpu-x64.{extension}")), "no library").unwrap();
    assert!(message().contains("`x64` cannot be loaded"), "{}", message());

    fs::remove_dir_all(&folder).unwrap();
    assert!(message().contains("the folder cannot be read"), "{}", message());
}

/// A fresh folder for one test.
fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("tabagent-cpu-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

const ZEN4: &str = "bitnet-amd-zen4";

#[test]
fn a_binary_lies_in_its_platforms_and_variants_folder() {
    let path =
        |platform, name| get_optimal_binary(Path::new("B/R"), platform, name, ZEN4, false).unwrap();
    assert_eq!(path(Some("linux"), None), Path::new("B/R/cpu/linux/bitnet-amd-zen4/llama-server"));
    assert_eq!(
        path(Some("Windows"), None),
        Path::new("B/R/cpu/windows/bitnet-amd-zen4/llama-server.exe")
    );
    assert_eq!(
        path(Some("MACOS"), Some("llama-cli")),
        Path::new("B/R/cpu/macos/bitnet-amd-zen4/llama-cli")
    );
    let here = Path::new("B/R/cpu").join(std::env::consts::OS).join(ZEN4).join("llama.so");
    assert_eq!(path(None, Some("llama.so")), here);
}

#[test]
#[cfg(target_os = "linux")] // elsewhere file names have no case of their own
fn another_spelling_of_the_platform_is_taken_only_if_it_is_the_one_there() {
    let base = scratch("spelling");
    let path = || get_optimal_binary(&base, Some("windows"), None, ZEN4, false).unwrap();
    let below =
        |platform: &str| base.join("cpu").join(platform).join(ZEN4).join("llama-server.exe");
    assert_eq!(path(), below("windows"));
    fs::create_dir_all(base.join("cpu/Windows")).unwrap();
    assert_eq!(path(), below("Windows"));
    fs::create_dir_all(base.join("cpu/windows")).unwrap();
    assert_eq!(path(), below("windows"));
    fs::remove_dir_all(base).unwrap();
}

#[test]
fn a_binary_that_must_exist_falls_back_to_portable_and_then_to_standard() {
    let base = scratch("fallback");
    let find = || get_optimal_binary(&base, Some("linux"), None, ZEN4, true);
    let error = find().unwrap_err().to_string();
    for build in [ZEN4, "bitnet-portable", "standard"] {
        let path = base.join("cpu/linux").join(build).join("llama-server");
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    for build in ["standard", "bitnet-portable", ZEN4] {
        let path = base.join("cpu/linux").join(build).join("llama-server");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(find().unwrap(), path);
    }
    fs::remove_dir_all(base).unwrap();
}

#[test]
fn a_binary_is_a_file_name_and_a_platform_one_of_three() {
    let find = |platform, name| {
        get_optimal_binary(Path::new("B"), Some(platform), Some(name), ZEN4, false)
    };
    for name in ["", ".", "..", "a/b", "..\\b", "/bin/sh", "a\0b"] {
        let error = find("linux", name).unwrap_err().to_string();
        assert!(error.contains("binary_name"), "{error}");
    }
    let error = find("beos", "llama-server").unwrap_err().to_string();
    assert_eq!(error, "`platform` must be `windows`, `linux` or `macos`, got beos");
}
