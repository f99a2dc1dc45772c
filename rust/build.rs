//! Collects llama.cpp's libraries for the wheel and compiles the shim against its headers.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // The output folder of llama-cpp-sys-2's own build script.
    let root = PathBuf::from(env::var("DEP_LLAMA_ROOT")?);
    let backends = PathBuf::from(env::var("DEP_LLAMA_BACKENDS_DIR")?);
    let libraries = out.join("lib");
    let llama = llama_source(&root)?;
    collect_libraries(&root, &backends, &libraries)?;
    check_kernels(&libraries)?;
    collect_cmake(&out.join("cmake"))?;
    compile_shim(&llama);

    // Tests load the CPU modules from here; the package loads them from its own folder.
    println!("cargo:rustc-env=TABAGENT_BUILT_LIBRARIES={}", libraries.display());
    println!("cargo:rustc-env=TABAGENT_ENGINE={}", engine(&llama)?);
    println!("cargo:rustc-link-search=native={}", libraries.display());
    if env::var("CARGO_CFG_TARGET_OS")? == "linux" {
        println!("cargo:rustc-link-arg-cdylib=-Wl,-rpath,$ORIGIN/lib,--enable-new-dtags");
    }
    println!("cargo:rerun-if-changed=rust/build.rs");
    println!("cargo:rustc-env=TABAGENT_KERNELS_VERSION={:016x}", hash(Path::new("rust/kernels"))?);
    println!("cargo:rerun-if-changed=rust/cmake");
    println!("cargo:rerun-if-changed=rust/kernels");
    println!("cargo:rerun-if-changed=rust/shim");
    Ok(())
}

/// Copies what the wheel ships to one folder: `libX.so` as `tabagent-libX.so`, which is the name
/// that rust/cmake/llama.cmake gives it, and the CPU modules under their own names.
fn collect_libraries(root: &Path, backends: &Path, to: &Path) -> io::Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir_all(to)?;
    let rename = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    for (folder, prefix) in
        [(root.join("lib"), if rename { "tabagent-" } else { "" }), (backends.to_path_buf(), "")]
    {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let is_library =
                path.extension().is_some_and(|e| e == "so" || e == "dll" || e == "dylib");
            if is_library {
                let name = path.file_name().expect("it has an extension").to_string_lossy();
                fs::copy(&path, to.join(format!("{prefix}{name}")))?;
            }
        }
    }
    Ok(())
}

/// cargo does not build llama.cpp again when `rust/kernels/` or `rust/cmake/` change.
fn check_kernels(libraries: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let name = b"tabagent_add_kernels";
    match fs::read(libraries.join("libggml-cpu-zen4.so")) {
        Ok(module) if !module.windows(name.len()).any(|bytes| bytes == name) => Err(
            "llama.cpp was built without rust/kernels/: cargo clean --release -p llama-cpp-sys-2"
                .into(),
        ),
        _ => Ok(()), // it is there, or this is no build for Linux on x86-64
    }
}

/// What `tabagent-model build-backend` needs to build one more backend like these.
fn collect_cmake(to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for name in ["backend.cmake", "gcc_amx.h", "llama.cmake"] {
        fs::copy(Path::new("rust/cmake").join(name), to.join(name))?;
    }
    Ok(())
}

/// Of all files there (FNV-1a): what was found out about a machine holds for these kernels.
fn hash(folder: &Path) -> io::Result<u64> {
    let mut paths: Vec<_> =
        fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    paths.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for path in paths {
        for byte in fs::read(path)? {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    Ok(hash)
}

/// What a backend must be built from to be loaded beside these libraries; `engine_of` in
/// python/tabagent_model/backends/_build.py says the same of a folder with sources.
fn engine(llama: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let package = llama.parent().ok_or("llama.cpp lies nowhere")?;
    let found = |file: PathBuf, before: &str, after: char| {
        let text = fs::read_to_string(&file).ok()?;
        let rest = &text[text.find(before)? + before.len()..];
        Some(rest[..rest.find(after)?].trim().to_owned())
    };
    let version = found(package.join("Cargo.toml"), "\nversion = \"", '"');
    let commit = found(package.join(".cargo_vcs_info.json"), "\"sha1\": \"", '"');
    let interface =
        found(llama.join("ggml/src/ggml-backend-impl.h"), "#define GGML_BACKEND_API_VERSION", '\n');
    Ok(format!(
        "llama-cpp-sys-2 {} ({:.12}), backend API {}",
        version.ok_or("llama-cpp-sys-2 does not tell its version")?,
        commit.as_deref().unwrap_or("unknown"),
        interface.ok_or("ggml does not tell the version of its backend API")?,
    ))
}

/// `common/` and `vendor/` are not installed, and no variable names them: CMake's cache does.
fn llama_source(root: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let cache = fs::read_to_string(root.join("build/CMakeCache.txt"))?;
    let source = cache
        .lines()
        .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))
        .ok_or("CMakeCache.txt does not name llama.cpp's sources")?;
    Ok(PathBuf::from(source))
}

fn compile_shim(llama: &Path) {
    let mut shim = cc::Build::new();
    for folder in ["", "include", "ggml/include", "common", "vendor"] {
        shim.include(llama.join(folder));
    }
    // Last: src/ is named with its folder, because common/ has headers of the same names.
    shim.include(llama);
    shim.cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(true)
        .define("NDEBUG", None) // as llama.cpp itself is compiled
        .flag_if_supported("-fno-gnu-unique") // see rust/cmake/llama.cmake
        .flag_if_supported("-Wno-unused-function") // in llama.cpp's headers
        .files(
            [
                "answer",
                "attention",
                "chat",
                "chat_options",
                "grammar",
                "layouts",
                "llama",
                "probe",
                "samplers",
                "template_limits",
                "template_marks",
            ]
            .map(|name| format!("rust/shim/{name}.cpp")),
        )
        .compile("tabagent_shim");
}
