//! Which of the ggml CPU modules in the package suits this machine.
//!
//! Each module scores itself from CPUID, and llama.cpp takes the best. That is not enough: a
//! module whose registers the operating system does not save scores well and dies at its first
//! instruction. So we ask XCR0 before we ask the module.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cpuid::{self, AMX_STATE, AVX_STATE, AVX512_STATE};
use crate::error::{Error, Result};
use crate::ffi;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModule {
    /// `zen4`, `haswell`, …
    pub name: String,
    pub path: PathBuf,
    pub score: i32,
}

/// The modules in `folder` that run here, best first.
pub fn usable_modules(folder: &Path) -> Result<Vec<CpuModule>> {
    let files = module_files(folder)?;
    let mut usable = Vec::new();
    let mut refused = Vec::new();
    for (name, path) in files {
        match examine(name, path) {
            Ok(module) => usable.push(module),
            Err(why) => refused.push(why),
        }
    }
    if usable.is_empty() {
        let found = match refused.is_empty() {
            true => format!("no file there is called `{PREFIX}….{EXTENSION}`"),
            false => refused.join("; "),
        };
        return Err(Error::NoBackend { folder: folder.into(), found });
    }
    usable.sort_by(|a, b| b.score.cmp(&a.score).then_with(|| a.name.cmp(&b.name)));
    Ok(usable)
}

/// The module of that name, if it is there and runs here.
pub fn find(folder: &Path, name: &str) -> Result<CpuModule> {
    let path = folder.join(format!("{PREFIX}{name}.{EXTENSION}"));
    let is_there = !name.contains(['/', '\\']) && path.is_file();
    if let Some(module) = is_there.then(|| examine(name.into(), path).ok()).flatten() {
        return Ok(module);
    }
    let usable = usable_modules(folder)?;
    let names: Vec<String> = usable.iter().map(|module| format!("`{}`", module.name)).collect();
    let allowed = format!("a CPU module that runs on this machine: {}", names.join(", "));
    Err(Error::invalid("TABAGENT_CPU_VARIANT", format!("`{name}`"), &allowed))
}

/// Whether the operating system saves the registers that a module uses.
pub fn runnable(name: &str, xcr0: u64, amx_permitted: bool) -> bool {
    let state = needed_state(name);
    xcr0 & state == state && (amx_permitted || state & AMX_STATE == 0)
}

/// The table of ggml/src/CMakeLists.txt, lines 493–518, in terms of XCR0. Modules for other
/// architectures ask their operating system themselves.
pub fn needed_state(name: &str) -> u64 {
    match name {
        "sandybridge" | "ivybridge" | "piledriver" | "haswell" | "alderlake" => AVX_STATE,
        "skylakex" | "cannonlake" | "cascadelake" | "icelake" | "cooperlake" | "zen4" => {
            AVX512_STATE
        }
        "sapphirerapids" => AVX512_STATE | AMX_STATE,
        _ => 0,
    }
}

const PREFIX: &str = if cfg!(windows) { "ggml-cpu-" } else { "libggml-cpu-" };
// llama.cpp builds its modules as `.so` on macOS, too.
const EXTENSION: &str = if cfg!(windows) { "dll" } else { "so" };

/// Names and paths, in the order of their names.
fn module_files(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let unreadable = |e: std::io::Error| Error::NoBackend {
        folder: folder.into(),
        found: format!("the folder cannot be read: {e}"),
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let name = stem.and_then(|stem| stem.strip_prefix(PREFIX)).map(str::to_owned);
        match name {
            Some(name) if path.extension().is_some_and(|e| e == EXTENSION) => {
                files.push((name, path));
            }
            _ => {}
        }
    }
    files.sort();
    Ok(files)
}

/// A module that runs here, or why it does not.
fn examine(name: String, path: PathBuf) -> std::result::Result<CpuModule, String> {
    let xcr0 = cpuid::enabled_state();
    // The permission is asked for only where it matters: it stays with the process.
    let wants_amx = needed_state(&name) & AMX_STATE != 0 && xcr0 & AMX_STATE == AMX_STATE;
    if !runnable(&name, xcr0, wants_amx && amx::request_permission()) {
        return Err(format!("`{name}` needs registers that the operating system does not save"));
    }
    match score(&path) {
        Ok(score) if score > 0 => Ok(CpuModule { name, path, score }),
        Ok(_) => Err(format!("`{name}` needs instructions that this processor does not have")),
        Err(e) => Err(format!("`{name}` cannot be loaded: {e}")),
    }
}

/// With the first module that is asked, ggml itself stays loaded: it sets C++'s terminate handler when
/// it comes, does not take it back when it goes, and aborts when it comes again.
static KEPT: OnceLock<libloading::Library> = OnceLock::new();

/// Which kernels of `rust/kernels/` modules get: those of this build, or none with `TABAGENT_KERNELS=0`.
pub fn kernels() -> Option<&'static str> {
    let is_off = std::env::var_os("TABAGENT_KERNELS").is_some_and(|value| value == "0");
    (!is_off).then_some(env!("TABAGENT_KERNELS_VERSION"))
}

/// Gives them to a module that llama.cpp has loaded, if it was compiled with any.
pub fn add_kernels(module: &CpuModule) {
    if kernels().is_none() {
        return;
    }
    // SAFETY: a module of our own package, which is loaded already; the function is ours, and nobody
    // computes yet.
    unsafe {
        if let Ok(library) = open(&module.path)
            && let Ok(add) = library.get::<unsafe extern "C" fn()>(b"tabagent_add_kernels\0")
        {
            add();
            HAS_KERNELS.store(true, Ordering::Relaxed);
        }
    }
}

static HAS_KERNELS: AtomicBool = AtomicBool::new(false);

/// Whether the module that computes has them.
pub fn has_kernels() -> bool {
    HAS_KERNELS.load(Ordering::Relaxed)
}

fn score(path: &Path) -> std::result::Result<i32, String> {
    // SAFETY: the modules of our own package, which llama.cpp would load and ask the same way.
    unsafe {
        let library = open(path).map_err(|e| e.to_string())?;
        let ask = library.get::<unsafe extern "C" fn() -> i32>(b"ggml_backend_score\0");
        let score = ffi::module_score(*ask.map_err(|e| e.to_string())?);
        let _ = KEPT.set(library);
        score.map_err(|e| e.to_string())
    }
}

#[cfg(not(windows))]
unsafe fn open(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    unsafe { libloading::Library::new(path) }
}

/// Windows looks for a library's neighbours beside the program, unless it is told otherwise.
#[cfg(windows)]
unsafe fn open(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    use libloading::os::windows::{LOAD_WITH_ALTERED_SEARCH_PATH, Library};
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    Ok(unsafe { Library::load_with_flags(path, LOAD_WITH_ALTERED_SEARCH_PATH) }?.into())
}

/// Linux gives the 8 KiB of AMX tiles only to processes that ask.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod amx {
    use std::ffi::c_long;

    const SYS_ARCH_PRCTL: c_long = 158;
    const ARCH_REQ_XCOMP_PERM: c_long = 0x1023;
    const XFEATURE_XTILEDATA: c_long = 18;

    unsafe extern "C" {
        fn syscall(number: c_long, ...) -> c_long;
    }

    pub fn request_permission() -> bool {
        // SAFETY: arch_prctl takes two numbers here, and no pointers.
        unsafe { syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
}

/// Windows gives them to everyone whose XCR0 has them; nobody else has AMX.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod amx {
    pub fn request_permission() -> bool {
        cfg!(windows)
    }
}
