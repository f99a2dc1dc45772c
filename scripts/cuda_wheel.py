"""Compiles the CUDA backend and packs it as the wheel `tabagent-model-cuda`.

    python scripts/cuda_wheel.py [--arch 75,80,86,89,90] [--out dist/cuda]

The wheel holds one package, `tabagent_model_cuda`: the library, the note of what it was built from,
and nothing that runs. CUDA's own libraries come from NVIDIA's packages, which it requires; the
library looks for them beside itself in site-packages.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import platform
import sys
import tempfile
import zipfile
from pathlib import Path

from tabagent_model import TabAgentModelError, _core
from tabagent_model.backends import _tools
from tabagent_model.backends._build import ARCHITECTURES, Plan
from tabagent_model.backends._note import path_of

PACKAGE = "tabagent_model_cuda"
INIT = f'"""llama.cpp\'s CUDA backend for tabagent-model {_core.__version__}, which loads it."""\n'

# By CUDA's major version: where NVIDIA's packages put their libraries, and what they are called. A
# runtime that is older than the compiler may lack what that takes from it.
LAYOUTS = {
    12: (
        ("cuda_runtime", "cublas"),
        ("nvidia-cuda-runtime-cu12>=12.{minor},<13", "nvidia-cublas-cu12>=12,<13"),
    ),
    13: (("cu13",), ("nvidia-cuda-runtime>=13.{minor},<14", "nvidia-cublas>=13,<14")),
}


def main() -> None:
    try:
        print(build(arguments()))
    except TabAgentModelError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default=ARCHITECTURES["cuda"][1])
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--source")
    parser.add_argument("--build-dir")
    parser.add_argument("--out", default="dist/cuda")
    return parser.parse_args()


def build(asked: argparse.Namespace) -> str:
    major, minor = _tools.cuda().version
    folders, packages = LAYOUTS[major]
    requirements = tuple(package.format(minor=minor) for package in packages)
    rpath = ":".join(f"$ORIGIN/../nvidia/{folder}/lib" for folder in folders)
    plan = Plan(
        "cuda",
        architectures=asked.arch,
        source=asked.source,
        jobs=asked.jobs,
        folder=asked.build_dir,
        rpath=rpath,
    )
    print(plan, flush=True)
    if plan.missing:
        raise plan.missing[0]
    plan.build()
    with tempfile.TemporaryDirectory() as folder:
        library = plan.install(Path(folder))
        files = {path.name: path.read_bytes() for path in (library, path_of(library))}
    wheel = write_wheel(Path(asked.out), files, requirements)
    return f"{wheel}, {wheel.stat().st_size / 1e6:.0f} MB"


def write_wheel(out: Path, files: dict[str, bytes], requirements: tuple[str, ...]) -> Path:
    """A wheel is a zip file with a list of hashes."""
    version = _core.__version__
    tag = f"py3-none-manylinux_{'_'.join(platform.libc_ver()[1].split('.'))}_{platform.machine()}"
    info = f"{PACKAGE}-{version}.dist-info"
    required = (f"tabagent-model=={version}", *requirements)
    metadata = "".join(
        f"{line}\n"
        for line in (
            "Metadata-Version: 2.1",
            "Name: tabagent-model-cuda",
            f"Version: {version}",
            "Summary: llama.cpp's CUDA backend for tabagent-model",
            "License: MIT",
            "Requires-Python: >=3.10",
            *(f"Requires-Dist: {one}" for one in required),
        )
    )
    about = f"Wheel-Version: 1.0\nGenerator: tabagent_model\nRoot-Is-Purelib: false\nTag: {tag}\n"
    members = {f"{PACKAGE}/__init__.py": INIT.encode()}
    members |= {f"{PACKAGE}/{name}": content for name, content in files.items()}
    members |= {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": about.encode()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{PACKAGE}-{version}-{tag}.whl"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.writerow((name, f"sha256={digest.decode()}", len(content)))
            wheel.writestr(name, content)
        rows.writerow((f"{info}/RECORD", "", ""))
        wheel.writestr(f"{info}/RECORD", record.getvalue())
    return path


if __name__ == "__main__":
    main()
