"""What building a backend needs and does not bring along: the sources, CMake, compilers, toolkits.

Each is looked for where people have it, and what is missing is an error that says how to get it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .. import _core
from ..errors import BuildError

CRATE, VERSION, *_ = _core.ENGINE.split()


def engine_of(sources: Path) -> str:
    """What a folder with the crate llama-cpp-sys-2 would build; rust/build.rs says the same of the
    one that this package was built from."""
    version = _found(sources / "Cargo.toml", r'^version = "([^"]+)"')
    commit = _found(sources / ".cargo_vcs_info.json", r'"sha1": "([^"]+)"')
    interface = _found(
        sources / "llama.cpp/ggml/src/ggml-backend-impl.h",
        r"^\s*#define GGML_BACKEND_API_VERSION\s+(\d+)",
    )
    return f"{CRATE} {version} ({commit:.12}), backend API {interface}"


def sources(given: str | None = None, fetch_into: Path | None = None) -> Path:
    """The folder of the crate that this package was built from: named, or in cargo's registry, or
    fetched into it with a manifest in a folder that is given for that."""
    if given is not None:
        folder = Path(given).absolute()
        if not (folder / "llama.cpp" / "CMakeLists.txt").is_file():
            raise BuildError(
                f"`{given}` does not hold the crate {CRATE}: no llama.cpp/CMakeLists.txt"
            )
        if (engine := engine_of(folder)) != _core.ENGINE:
            message = f"`{given}` is {engine}, and this package was built from {_core.ENGINE}"
            raise BuildError(message, hint=f"cargo fetches {CRATE} {VERSION} by itself")
        return folder
    registry = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo") / "registry" / "src"
    for folder in sorted(registry.glob(f"*/{CRATE}-{VERSION}")):
        if engine_of(folder) == _core.ENGINE:
            return folder
    if fetch_into is not None and shutil.which("cargo"):
        _fetch(fetch_into)
        return sources()
    raise BuildError(
        f"llama.cpp's sources are not here: no {CRATE} {VERSION} below `{registry}`",
        hint=f"install Rust, whose cargo fetches them, or give the folder of {CRATE} as `--source`",
    )


def cmake() -> str:
    return _program("CMAKE", "cmake", "pip install cmake")


def ninja() -> str | None:
    """Where there is none CMake takes make."""
    return _which("ninja")


def compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise BuildError("there is no C++ compiler", hint="apt install g++, or set CXX to one")


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: NVIDIA's own, or what their packages on PyPI put into `nvidia/cu13`."""

    nvcc: Path
    version: tuple[int, int]
    libraries: Path

    @property
    def name(self) -> str:
        return "CUDA {}.{}".format(*self.version)

    @property
    def root(self) -> Path:
        return self.nvcc.parent.parent

    def library(self, name: str) -> Path | None:
        return next(iter(sorted(self.libraries.glob(f"lib{name}.so*"))), None)

    @property
    def has_driver_stub(self) -> bool:
        """What stands in for the driver's library where one links without it."""
        return (self.libraries / "stubs" / "libcuda.so").is_file()


def cuda() -> Cuda:
    for nvcc in _nvccs():
        if shutil.which(nvcc) is None:
            continue
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"release (\d+)\.(\d+)", told.stdout)
        if version is None:
            raise BuildError(f"`{nvcc}` does not tell its version: {told.stderr[:200]}")
        root = nvcc.parent.parent
        folders = (root / "lib64", root / "lib")
        libraries = next((folder for folder in folders if folder.is_dir()), root)
        return Cuda(nvcc, (int(version[1]), int(version[2])), libraries)
    raise BuildError(
        "there is no CUDA toolkit: no nvcc in PATH, CUDA_HOME, /usr/local/cuda or from PyPI",
        hint="install NVIDIA's, or: pip install " + " ".join(PYPI_TOOLKIT),
    )


PYPI_TOOLKIT = tuple(
    f"nvidia-{name}"
    for name in ("cuda-nvcc", "cuda-crt", "cuda-cccl", "cuda-runtime", "nvvm", "cublas")
)


def rocm() -> Path:
    """The folder of ROCm."""
    roots = (os.environ.get("ROCM_PATH"), "/opt/rocm", "/usr")
    for root in map(Path, filter(None, roots)):
        if (root / "bin" / "hipconfig").is_file():
            return root
    raise BuildError(
        "there is no ROCm toolkit: no bin/hipconfig in ROCM_PATH, /opt/rocm or /usr",
        hint="install AMD's ROCm with its HIP, hipBLAS and rocBLAS packages",
    )


def glslc() -> str:
    hint = "apt install glslc libvulkan-dev spirv-headers (Debian 13), or install the Vulkan SDK"
    return _program("GLSLC", "glslc", hint)


def _fetch(folder: Path) -> None:
    (folder / "src").mkdir(parents=True, exist_ok=True)
    (folder / "src" / "lib.rs").touch()
    manifest = folder / "Cargo.toml"
    package = '[package]\nname = "sources"\nversion = "0.0.0"\n\n[workspace]\n'
    manifest.write_text(f'{package}\n[dependencies]\n{CRATE} = "={VERSION}"\n')
    done = subprocess.run(["cargo", "fetch", "--manifest-path", str(manifest)], check=False)
    if done.returncode:
        raise BuildError(f"cargo could not fetch {CRATE} {VERSION}", hint="what it wrote says why")


def _nvccs() -> list[Path]:
    named = [os.environ.get(name) for name in ("CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH")]
    roots = [Path(root) for root in named if root]
    if path := shutil.which("nvcc"):
        roots.append(Path(path).resolve().parent.parent)
    roots.append(Path("/usr/local/cuda"))
    spec = find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        roots += sorted(Path(folder).glob("cu[0-9]*"), reverse=True)
    return [root / "bin" / "nvcc" for root in roots]


def _program(variable: str, name: str, hint: str) -> str:
    if path := os.environ.get(variable) or _which(name):
        return path
    raise BuildError(f"there is no {name}", hint=hint)


def _which(name: str) -> str | None:
    """Also from a package of this Python, whose environment need not be activated."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _found(file: Path, pattern: str) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "unknown"
