"""`tabagent-model build-backend`: one more backend, compiled here from this package's own sources.

    auto    what suits this machine
    cpu     the package's CPU module for this processor, compiled for exactly this one
    cuda    NVIDIA's cards; needs a CUDA toolkit, but no card
    rocm    AMD's cards; needs ROCm
    vulkan  most others; needs glslc and Vulkan's headers
    metal   Apple's

Only the backend itself is compiled. It is linked with the package's libggml-base, tried in a child
process, and put where the package looks for it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .. import _core, _native, _trial
from ..backends import CUDA_ARCHITECTURE, KINDS, Backend, data_folder, missing_driver, refusal
from ..errors import BuildError, InvalidRequestError
from . import _tools
from ._note import Note, library_name, path_of

T = TypeVar("T")

# Which architectures there may be, and those that are usual.
ARCHITECTURES = {
    "cuda": (CUDA_ARCHITECTURE, "75,80,86,89,90"),
    "rocm": (re.compile(r"gfx[0-9a-f]{3,4}"), "gfx908,gfx90a,gfx1030,gfx1100,gfx1101,gfx1102"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", nargs="?", default="auto", help=", ".join(("auto", "cpu", *KINDS)))
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--arch",
        metavar="75,80,…",
        help="the cards to compile for; else those that are here, or all usual ones",
    )
    parser.add_argument("--source", metavar="DIR", help=f"the sources: a folder of {_tools.CRATE}")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at the same time")
    parser.add_argument("--build-dir", metavar="DIR", help="where what was compiled is kept")


def run(asked: argparse.Namespace) -> int:
    plan = Plan(
        asked.kind,
        architectures=asked.arch,
        source=asked.source,
        may_fetch=not asked.dry_run,
        jobs=asked.jobs,
        folder=asked.build_dir,
    )
    print(plan, flush=True)
    if plan.missing:
        raise plan.missing[0]
    if not asked.dry_run:
        plan.build()
        library = plan.install(data_folder() / plan.kind)
        print(f"installed      {library}, {library.stat().st_size / 1e6:.0f} MB")
        print(f"tried          {plan.tried(library)}")
    return 0


class Plan:
    """All that will be done, and what is missing for it."""

    def __init__(
        self,
        kind: str = "auto",
        *,
        architectures: str | None = None,
        source: str | None = None,
        may_fetch: bool = True,
        jobs: int | None = None,
        folder: str | None = None,
        rpath: str | None = None,
    ) -> None:
        if jobs is not None and jobs < 1:
            raise InvalidRequestError(f"`--jobs` must be 1 or more, got {jobs}", name="jobs")
        if kind != "auto" and kind not in _RECIPES:
            allowed = ", ".join(("auto", *_RECIPES))
            message = f"the kind of a backend must be one of {allowed}, got {kind!r:.60}"
            raise InvalidRequestError(message, name="kind")
        self.missing: list[BuildError] = []
        self.kind, self.because = suits_here() if kind == "auto" else (kind, "as asked for")
        self.architectures = checked_architectures(self.kind, architectures)
        self.jobs = jobs or _core.detect_cpu()["usable_cores"]
        self.folder = Path(folder).absolute() if folder else _cache() / self.kind
        self.rpath = rpath
        self.module = _native.choose() if self.kind == "cpu" else ""
        self.cmake = self._or_missing(_tools.cmake) or "cmake"
        self.compiler = self._or_missing(_tools.compiler) or "c++"
        recipe = _RECIPES[self.kind]
        self.recipe = self._or_missing(lambda: recipe(self)) or Recipe("none that is here")
        self.source = self._source(source, self.folder / "sources" if may_fetch else None)

    @property
    def target(self) -> str:
        name = f"cpu-{self.module}" if self.kind == "cpu" else self.kind
        return Path(library_name(name)).stem.removeprefix("lib")

    @property
    def library(self) -> Path:
        """Where the compiler leaves it."""
        return self.folder / "bin" / f"lib{self.target}.so"

    @property
    def commands(self) -> list[list[str]]:
        configure = [self.cmake, "-S", str(self.source / "llama.cpp"), "-B", str(self.folder)]
        build = [self.cmake, "--build", str(self.folder), "--target", self.target]
        return [
            *self.recipe.before,
            [*configure, *self._settings(), *self.recipe.settings],
            [*build, "-j", str(self.jobs)],
        ]

    def __str__(self) -> str:
        facts = {
            "backend": f"{self.kind}, {self.because}",
            "built from": _core.ENGINE,
            "sources": str(self.source),
            "toolkit": ", ".join(filter(None, (self.recipe.toolkit, self.recipe.where))),
            "architectures": ", ".join(self.architectures),
            "linked with": str(packaged_base()),
            "goes to": str(data_folder() / self.kind / self.library.name),
        }
        lines = [f"{name:14} {fact}" for name, fact in facts.items() if fact]
        lines += [f"$ {shlex.join(command)}" for command in self.commands]
        lines += [f"missing        {error.message}" for error in self.missing]
        return "\n".join(lines)

    def build(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for command in self.commands:
            done = subprocess.run(command, check=False)
            if done.returncode:
                message = f"`{shlex.join(command)}` ended with {done.returncode}"
                raise BuildError(message, hint="what it wrote above says why")

    def install(self, folder: Path) -> Path:
        """Copies the library, and writes what it was built from beside it. In between there is no
        note, which is refused, rather than one of another library."""
        library = folder / self.library.name
        folder.mkdir(parents=True, exist_ok=True)
        path_of(library).unlink(missing_ok=True)
        part = library.with_suffix(".part")
        shutil.copyfile(self.library, part)
        part.replace(library)
        note = Note.of(
            library,
            architectures=self.architectures,
            toolkit=self.recipe.toolkit,
            machine=_native.machine() if self.kind == "cpu" else "",
        )
        note.write(library)
        return library

    def tried(self, library: Path) -> str:
        """Whether it loads and computes, in a child process."""
        if self.kind == "cpu":
            trial = _trial.call("probe_cpu_module", str(library.parent), self.module)
            why = None if trial.survived else trial.told
        elif driver := missing_driver(self.kind):
            return f"not here: {driver}"
        else:
            why = refusal(Backend(self.kind, library), anew=True)
        if why:
            raise BuildError(f"`{library}` was built, and cannot be used: {why}")
        return "it computes"

    def _or_missing(self, find: Callable[[], T]) -> T | None:
        try:
            return find()
        except BuildError as error:
            self.missing.append(error)
            return None

    def _source(self, given: str | None, fetch_into: Path | None) -> Path:
        if given is not None:
            return _tools.sources(given)
        nowhere = Path(f"{_tools.CRATE}-{_tools.VERSION}")
        return self._or_missing(lambda: _tools.sources(None, fetch_into)) or nowhere

    def _settings(self) -> list[str]:
        ninja = _tools.ninja()
        parts = ("COMMON", "APP", "EXAMPLES", "SERVER", "TESTS", "TOOLS")
        off = ["GGML_NATIVE", "GGML_OPENMP", "GGML_CCACHE", *(f"LLAMA_BUILD_{p}" for p in parts)]
        if self.kind != "cpu":
            off.append("GGML_CPU")
        return [
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DCMAKE_PROJECT_INCLUDE={Path(__file__).parent / 'cmake' / 'backend.cmake'}",
            f"-DTABAGENT_GGML_BASE={packaged_base()}",
            f"-DTABAGENT_TARGET={self.target}",
            f"-DCMAKE_CXX_COMPILER={self.compiler}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON",
            "-DGGML_BACKEND_DL=ON",
            *(f"-D{name}=OFF" for name in off),
        ]


@dataclass(frozen=True)
class Recipe:
    """What is particular to a kind."""

    toolkit: str
    where: str = ""
    settings: tuple[str, ...] = ()
    before: tuple[list[str], ...] = ()


def suits_here() -> tuple[str, str]:
    """The kind for this machine, and why."""
    if _core.detect_gpus()["gpus"] or shutil.which("nvidia-smi"):
        return "cuda", "as there is an NVIDIA card"
    if Path("/dev/kfd").exists() or shutil.which("rocm-smi"):
        return "rocm", "as there is an AMD card"
    if sys.platform == "darwin":
        return "metal", "as this is a Mac"
    if shutil.which("vulkaninfo"):
        return "vulkan", "as there is Vulkan"
    return "cpu", "as no GPU was found"


def checked_architectures(kind: str, given: str | None) -> tuple[str, ...]:
    """Those that were named, those of the cards that are here, or all usual ones.

    Of plain numbers the highest is compiled to PTX as well, for cards that are newer; the others
    are only machine code, since a driver that is older than the toolkit takes nothing else.
    """
    if kind not in ARCHITECTURES:
        if given is not None:
            raise InvalidRequestError(f"`--arch` is for cuda and rocm, not for {kind}", name="arch")
        return ()
    pattern, usual = ARCHITECTURES[kind]
    asked = given if given is not None else _here(kind) or usual
    names = list(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if not pattern.fullmatch(name):
            message = f"`--arch` must be names like {usual}, got {name!r:.40}"
            raise InvalidRequestError(message, name="arch")
    plain = [name for name in names if name.isdigit()]
    newest = max(plain, key=int, default="")
    return tuple(f"{n}-real" if n in plain and n != newest else n for n in names)


def packaged_base() -> Path:
    return next(iter(sorted(_native.LIBRARIES.glob("*ggml-base.*"))))


def _cpu(plan: Plan) -> Recipe:
    flags = [f"-DCMAKE_{language}_FLAGS=-march=native" for language in ("C", "CXX")]
    settings = ("-DGGML_CPU_ALL_VARIANTS=ON", *flags)
    return Recipe("-march=native", plan.compiler, settings)


def _cuda(plan: Plan) -> Recipe:
    cuda = _tools.cuda()
    settings = [
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_NCCL=OFF",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(plan.architectures)}",
        f"-DTABAGENT_RPATH={plan.rpath or cuda.libraries}",
        f"-DCUDAToolkit_ROOT={cuda.root}",
        f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
        f"-DCMAKE_CUDA_HOST_COMPILER={plan.compiler}",
    ]
    # PyPI's packages lack the links without a version that CMake looks for, and the driver's stub.
    for name in ("cudart", "cublas", "cublasLt"):
        if library := cuda.library(name):
            settings.append(f"-DCUDA_{name}_LIBRARY={library}")
    if library := cuda.library("cudart"):
        settings.append(f"-DCUDA_CUDART={library}")
    if cuda.has_driver_stub:
        return Recipe(cuda.name, str(cuda.root), tuple(settings))
    source, stub = Path(__file__).parent / "libcuda.c", plan.folder / "libcuda.so"
    compile_stub = [plan.compiler, "-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    settings.append(f"-DCUDA_cuda_driver_LIBRARY={stub}")
    before = ([*compile_stub, str(source), "-o", str(stub)],)
    return Recipe(cuda.name, str(cuda.root), tuple(settings), before)


def _rocm(plan: Plan) -> Recipe:
    root = _tools.rocm()
    settings = (
        "-DGGML_HIP=ON",
        f"-DCMAKE_HIP_ARCHITECTURES={';'.join(plan.architectures)}",
        f"-DTABAGENT_RPATH={plan.rpath or root / 'lib'}",
        f"-DCMAKE_PREFIX_PATH={root}",
    )
    return Recipe("ROCm", str(root), settings)


def _vulkan(plan: Plan) -> Recipe:
    glslc = _tools.glslc()
    settings = ("-DGGML_VULKAN=ON", f"-DVulkan_GLSLC_EXECUTABLE={glslc}")
    return Recipe("glslc", glslc, settings)


def _metal(plan: Plan) -> Recipe:
    if sys.platform != "darwin":
        raise BuildError("Metal is Apple's", hint="build it on a Mac")
    return Recipe("Xcode", settings=("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"))


_RECIPES: dict[str, Callable[[Plan], Recipe]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "rocm": _rocm,
    "vulkan": _vulkan,
    "metal": _metal,
}


def _here(kind: str) -> str:
    """Of the cards in this machine; of AMD's nobody tells."""
    cards = _core.detect_gpus()["gpus"] if kind == "cuda" else []
    found = {card["compute_capability"] for card in cards if card["compute_capability"]}
    return ",".join("{}{}".format(*capability) for capability in sorted(found))


def _cache() -> Path:
    """Half an hour's work is kept between two runs."""
    home = os.environ.get("TABAGENT_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tabagent_model"
    return (Path(home) if home else cache) / "build"
