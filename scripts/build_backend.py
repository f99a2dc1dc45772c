"""The PEP 517 backend: puts the build tools in place, then hands over to maturin.

llama.cpp needs cmake, ninja and libclang. pip brings them as wheels, but into a folder that is
another one each time and gone afterwards, while CMake and cargo remember the paths they were
built with. So the tools are copied once to `target/tools`, where `.cargo/config.toml` points.

Also a command: `python scripts/build_backend.py` does only that copying, for `cargo test`.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "target" / "tools"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    import maturin

    prepare()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    import maturin

    return maturin.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_sdist(sdist_directory, config_settings=None):
    import maturin

    return maturin.build_sdist(sdist_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    import maturin

    prepare()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare() -> None:
    """Check for the two things that pip cannot bring, and copy those that it did."""
    compiler = find_compiler()
    if shutil.which("cargo") is None:
        sys.exit("tabagent_model needs Rust to build: install it with rustup, then try again.")

    versions = {name: importlib.metadata.version(name) for name in ("cmake", "ninja", "libclang")}
    stamp = "".join(f"{name} {version}\n" for name, version in versions.items())
    stamp_file = TOOLS / "versions.txt"
    if stamp_file.exists() and stamp_file.read_text() == stamp:
        return

    shutil.rmtree(TOOLS, ignore_errors=True)
    (TOOLS / "bin").mkdir(parents=True)
    (TOOLS / "lib").mkdir()
    copy_cmake()
    copy_installed("ninja", "ninja", TOOLS / "bin")
    copy_installed("libclang", "libclang", TOOLS / "lib")
    link_builtin_headers(compiler)
    stamp_file.write_text(stamp)


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++", "cl"):
        if name and (path := shutil.which(name)):
            return path
    sys.exit(
        "tabagent_model needs a C++ compiler to build llama.cpp and found none: install one "
        "(Debian and Ubuntu: `apt install g++`), or set CXX to it."
    )


def copy_cmake() -> None:
    # The cmake command of the wheel is a Python script; the program is in the package's data.
    for file in importlib.metadata.files("cmake") or ():
        if file.stem == "cmake" and file.parent.name == "bin" and "data" in file.parts:
            shutil.copytree(Path(file.locate()).parent.parent, TOOLS / "cmake")
            return
    sys.exit("the installed `cmake` package does not hold the cmake program")


def copy_installed(package: str, stem: str, folder: Path) -> None:
    for file in importlib.metadata.files(package) or ():
        path = Path(file.locate())
        is_program = path.suffix in ("", ".exe", ".so", ".dll", ".dylib") and path.is_file()
        if path.stem == stem and is_program:
            shutil.copy2(path, folder)
            return
    sys.exit(f"the installed `{package}` package does not hold {stem}")


def link_builtin_headers(compiler: str) -> None:
    """libclang's wheel has no stddef.h and the like; the compiler's own serve as well."""
    asked = subprocess.run([compiler, "-print-file-name=include"], capture_output=True, text=True)
    headers = asked.stdout.strip()
    if asked.returncode == 0 and Path(headers).is_dir():  # not so with MSVC, nor needed there
        (TOOLS / "include").symlink_to(headers)


if __name__ == "__main__":
    prepare()
