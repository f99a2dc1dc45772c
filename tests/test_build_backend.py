"""`build-backend`: what would be compiled and how, what is missing, and where the result goes.

One test compiles: `TABAGENT_BUILD_BACKEND=cpu python -m pytest tests/test_build_backend.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tabagent_model import BuildError, InvalidRequestError, _core, _native, backends
from tabagent_model.backends import _build, _tools
from tabagent_model.backends._build import Plan
from tabagent_model.backends._note import Note

ROOT = Path(__file__).parent.parent
PACKAGE = Path(_native.__file__).parent
MODULE = _native.choose()
COMMIT = re.findall(r"\((.*)\)", _core.ENGINE)[0]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the package was never built elsewhere"
)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """A folder with sources of the right names, and programs that only tell their versions."""
    sources = tmp_path / "sources"
    header = sources / "llama.cpp/ggml/src/ggml-backend-impl.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"    #define GGML_BACKEND_API_VERSION {_core.ENGINE.split()[-1]}\n")
    (sources / "llama.cpp/CMakeLists.txt").touch()
    (sources / "Cargo.toml").write_text(f'[package]\nversion = "{_tools.VERSION}"\n')
    (sources / ".cargo_vcs_info.json").write_text(f'{{"git": {{\n"sha1": "{COMMIT}0123"}}}}')
    for name in ("cmake", "c++", "ninja", "glslc", "cuda/bin/nvcc", "rocm/bin/hipconfig"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
        program.chmod(0o755)
    for name in ("cudart.so.13", "cublas.so.13", "cublasLt.so.13"):
        library = tmp_path / "bin/cuda/lib" / f"lib{name}"
        library.parent.mkdir(exist_ok=True)
        library.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "bin" / "cuda"))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "bin" / "rocm"))
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path / "home"))
    for name in ("CMAKE", "CXX", "GLSLC", "CUDAToolkit_ROOT", "CUDA_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def dry_run(bench: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tabagent_model", "build-backend", *arguments, "--dry-run"]
    return subprocess.run(
        [*command, "--jobs", "3"], capture_output=True, text=True, timeout=60, check=False
    )


def told(bench: Path, ran: subprocess.CompletedProcess[str]) -> tuple[dict[str, str], list[str]]:
    """Facts and commands, without the paths of this machine."""
    assert (ran.returncode, ran.stderr) == (0, "")
    text = ran.stdout.replace(str(bench), "…").replace(str(PACKAGE), "package")
    lines = [line for line in text.splitlines() if not line.startswith("$")]
    commands = [line[2:] for line in text.splitlines() if line.startswith("$")]
    return dict(line.split(maxsplit=1) for line in lines), commands


OFF = ["GGML_NATIVE", "GGML_OPENMP", "GGML_CCACHE", "LLAMA_BUILD_COMMON"]
OFF += [f"LLAMA_BUILD_{part}" for part in ("APP", "EXAMPLES", "SERVER", "TESTS", "TOOLS")]
OWN = {
    "cpu": [
        "-DGGML_CPU_ALL_VARIANTS=ON",
        "-DCMAKE_C_FLAGS=-march=native",
        "-DCMAKE_CXX_FLAGS=-march=native",
    ],
    "cuda": [
        "-DGGML_CPU=OFF",
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_NCCL=OFF",
        "'-DCMAKE_CUDA_ARCHITECTURES=75-real;80-real;86-real;89-real;90'",
        "-DTABAGENT_RPATH=…/bin/cuda/lib",
        "-DCUDAToolkit_ROOT=…/bin/cuda",
        "-DCMAKE_CUDA_COMPILER=…/bin/cuda/bin/nvcc",
        "-DCMAKE_CUDA_HOST_COMPILER=…/bin/c++",
        "-DCUDA_cudart_LIBRARY=…/bin/cuda/lib/libcudart.so.13",
        "-DCUDA_cublas_LIBRARY=…/bin/cuda/lib/libcublas.so.13",
        "-DCUDA_cublasLt_LIBRARY=…/bin/cuda/lib/libcublasLt.so.13",
        "-DCUDA_CUDART=…/bin/cuda/lib/libcudart.so.13",
        "-DCUDA_cuda_driver_LIBRARY=…/home/build/cuda/libcuda.so",
    ],
    "rocm": [
        "-DGGML_CPU=OFF",
        "-DGGML_HIP=ON",
        "'-DCMAKE_HIP_ARCHITECTURES=gfx908;gfx90a;gfx1030;gfx1100;gfx1101;gfx1102'",
        "-DTABAGENT_RPATH=…/bin/rocm/lib",
        "-DCMAKE_PREFIX_PATH=…/bin/rocm",
    ],
    "vulkan": [
        "-DGGML_CPU=OFF",
        "-DGGML_VULKAN=ON",
        "-DVulkan_GLSLC_EXECUTABLE=…/bin/glslc",
    ],
}
ARCHITECTURES = {
    "cuda": "75-real, 80-real, 86-real, 89-real, 90",
    "rocm": "gfx908, gfx90a, gfx1030, gfx1100, gfx1101, gfx1102",
}
TOOLKITS = {
    "cpu": "-march=native, …/bin/c++",
    "cuda": "CUDA 13.0, …/bin/cuda",
    "rocm": "ROCm, …/bin/rocm",
    "vulkan": "glslc, …/bin/glslc",
}


@pytest.mark.skipif(bool(_core.detect_gpus()["gpus"]), reason="the cards here are compiled for")
@pytest.mark.parametrize("kind", OWN)
def test_a_dry_run_says_what_would_be_done(bench, kind):
    facts, commands = told(bench, dry_run(bench, kind, "--source", str(bench / "sources")))
    target = {"cpu": f"ggml-cpu-{MODULE}", "rocm": "ggml-hip"}.get(kind, f"ggml-{kind}")
    architectures = {"architectures": ARCHITECTURES[kind]} if kind in ARCHITECTURES else {}
    base = "package/lib/tabagent-libggml-base.so"
    assert facts == architectures | {
        "backend": f"{kind}, as asked for",
        "built": f"from     {_core.ENGINE}",
        "sources": "…/sources",
        "toolkit": TOOLKITS[kind],
        "linked": f"with    {base}",
        "goes": f"to        …/home/backends/{kind}/lib{target}.so",
    }
    *before, configure, build = commands
    common = [
        "…/bin/cmake -S …/sources/llama.cpp -B …/home/build/" + kind,
        "-G Ninja -DCMAKE_MAKE_PROGRAM=…/bin/ninja",
        "-DCMAKE_PROJECT_INCLUDE=package/backends/cmake/backend.cmake",
        f"-DTABAGENT_GGML_BASE={base} -DTABAGENT_TARGET={target}",
        "-DCMAKE_CXX_COMPILER=…/bin/c++ -DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON",
        *(f"-D{name}=OFF" for name in OFF),
    ]
    assert configure == " ".join([*common, *OWN[kind]])
    assert build == f"…/bin/cmake --build …/home/build/{kind} --target {target} -j 3"
    assert [line.split(" -shared")[0] for line in before] == (
        ["…/bin/c++ -x c"] if kind == "cuda" else []
    )
    assert not (bench / "home" / "backends").exists()


def test_metal_is_only_for_a_mac(bench):
    ran = dry_run(bench, "metal", "--source", str(bench / "sources"))
    assert ran.returncode == 1
    assert ran.stderr == "BuildError: Metal is Apple's\n\nhint: build it on a Mac\n"


@pytest.mark.skipif(
    bool(_core.detect_gpus()["gpus"]) or Path("/dev/kfd").exists(), reason="there is a GPU here"
)
def test_the_kind_is_chosen_by_what_is_here(bench):
    chosen = dict.fromkeys(("vulkaninfo", "rocm-smi", "nvidia-smi"))
    assert _build.suits_here()[0] == "cpu"
    for name in chosen:
        shutil.copy(bench / "bin" / "cmake", bench / "bin" / name)
        chosen[name] = _build.suits_here()[0]
    assert chosen == {"vulkaninfo": "vulkan", "rocm-smi": "rocm", "nvidia-smi": "cuda"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cuda", "--arch", "8.6"), "`--arch` must be names like 75,80,86,89,90, got '8.6'"),
        (("cuda", "--arch", "80,"), "`--arch` must be names like 75,80,86,89,90, got ''"),
        (("cuda", "--arch", "80;rm"), "`--arch` must be names like 75,80,86,89,90, got '80;rm'"),
        (
            ("cuda", "--arch", "gfx1100"),
            "`--arch` must be names like 75,80,86,89,90, got 'gfx1100'",
        ),
        (("vulkan", "--arch", "80"), "`--arch` is for cuda and rocm, not for vulkan"),
    ],
)
def test_architectures_that_there_are_not_are_refused(bench, arguments, message):
    ran = dry_run(bench, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"InvalidRequestError: {message}\n"


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ("86", ("86",)),
        ("90,75,80,75", ("90", "75-real", "80-real")),
        ("80-virtual, 120a", ("80-virtual", "120a")),
        ("120a-real,89", ("120a-real", "89")),
    ],
)
def test_the_newest_card_that_was_named_leaves_code_for_newer_ones(given, checked):
    assert _build.checked_architectures("cuda", given) == checked


def test_no_number_of_compilers_below_1(bench):
    with pytest.raises(InvalidRequestError, match="`--jobs` must be 1 or more, got 0"):
        Plan("vulkan", jobs=0)


@pytest.mark.parametrize(
    ("gone", "kind", "message", "hint"),
    [
        ("bin/cmake", "vulkan", "there is no cmake", "pip install cmake"),
        ("bin/glslc", "vulkan", "there is no glslc", "apt install glslc libvulkan-dev"),
        (
            "bin/cuda",
            "cuda",
            "there is no CUDA toolkit: no nvcc in PATH",
            "pip install nvidia-cuda-nvcc",
        ),
        ("bin/rocm", "rocm", "there is no ROCm toolkit", "install AMD's ROCm"),
    ],
)
def test_what_is_missing_is_named_with_the_cure(bench, monkeypatch, gone, kind, message, hint):
    shutil.rmtree(bench / gone) if (bench / gone).is_dir() else (bench / gone).unlink()
    monkeypatch.setenv("PATH", str(bench / "bin"))
    monkeypatch.setattr(sys, "executable", str(bench / "bin" / "python"))
    plan = Plan(kind, source=str(bench / "sources"))
    if not plan.missing:
        pytest.skip("it is somewhere else on this machine")
    (missing,) = plan.missing
    assert missing.message.startswith(message)
    assert hint in (missing.hint or "")
    assert f"missing        {missing.message}" in str(plan)


def test_without_sources_it_says_where_it_looked(bench, monkeypatch):
    monkeypatch.setenv("CARGO_HOME", str(bench / "cargo"))
    (missing,) = Plan("vulkan", may_fetch=False).missing
    registry = bench / "cargo" / "registry" / "src"
    crate = f"llama-cpp-sys-2 {_tools.VERSION}"
    assert missing.message == f"llama.cpp's sources are not here: no {crate} below `{registry}`"
    shutil.copytree(bench / "sources", registry / "index" / crate.replace(" ", "-"))
    assert Plan("vulkan", may_fetch=False).missing == []


@pytest.mark.parametrize(
    ("file", "before", "after", "is_now"),
    [
        (".cargo_vcs_info.json", COMMIT, "0" * 12, _core.ENGINE.replace(COMMIT, "0" * 12)),
        ("Cargo.toml", _tools.VERSION, "0.1.1", _core.ENGINE.replace(_tools.VERSION, "0.1.1")),
    ],
)
def test_other_sources_are_refused(bench, file, before, after, is_now):
    path = bench / "sources" / file
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(BuildError) as caught:
        Plan("vulkan", source=str(bench / "sources"))
    assert caught.value.message == (
        f"`{bench / 'sources'}` is {is_now}, and this package was built from {_core.ENGINE}"
    )


def test_a_folder_without_sources_is_refused(bench):
    with pytest.raises(BuildError, match=r"does not hold the crate llama-cpp-sys-2: no llama.cpp/"):
        Plan("vulkan", source=str(bench / "bin"))


def test_a_compiler_that_fails_ends_the_build_with_its_command(bench):
    plan = Plan("vulkan", source=str(bench / "sources"))
    Path(plan.cmake).write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(BuildError, match=r"cmake -S .* ended with 3"):
        plan.build()


def test_cmake_s_settings_are_in_the_package():
    names = {path.name for path in (PACKAGE / "backends" / "cmake").iterdir()}
    assert names == {path.name for path in (ROOT / "rust" / "cmake").iterdir()}


def sources() -> Path:
    try:
        return _tools.sources()
    except BuildError as error:
        pytest.skip(error.message)


def test_both_sides_say_the_same_of_the_sources():
    assert _tools.engine_of(sources()) == _core.ENGINE


def test_the_driver_s_stub_has_all_the_names_that_the_backend_takes():
    folder = sources() / "llama.cpp/ggml/src/ggml-cuda"
    code = "".join(path.read_text() for path in (*folder.glob("*.cu"), *folder.glob("*.cuh")))
    used = set(re.findall(r"\bcu(?:Device|Get|Mem|Ctx|Init|Stream|Module|Launch)\w*(?=\()", code))
    stub = (PACKAGE / "backends" / "libcuda.c").read_text()
    assert set(re.findall(r"NAME\((cu\w+)\)", stub)) == used


def test_a_cpu_module_that_was_built_here_is_used_and_one_for_another_machine_is_not(bench):
    plan = Plan("cpu", source=str(bench / "sources"))
    plan.library.parent.mkdir(parents=True)
    shutil.copy(_native.LIBRARIES / plan.library.name, plan.library)
    library = plan.install(backends.data_folder() / "cpu")
    assert plan.tried(library) == "it computes"
    assert backends.built_cpu_module(MODULE, _native.machine()) == library.parent
    assert backends.built_cpu_module(MODULE, "another") is None
    assert backends.built_cpu_module("x64", _native.machine()) is None
    program = (
        "import re; from pathlib import Path; from tabagent_model import Model\n"
        "with Model.load(n_ctx=256) as model: model.generate('Hello', max_tokens=2)\n"
        "maps = Path('/proc/self/maps').read_text()\n"
        f"print(*set(re.findall(r'/\\S*ggml-cpu-{MODULE}.so', maps)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"{library}\n"


def test_the_script_is_the_same_command(bench):
    script = ROOT / "scripts" / "build_llamacpp.sh"
    if (ROOT / ".venv/bin/python").absolute() != Path(sys.executable).absolute():
        pytest.skip("the script takes the Python of .venv, and this is another one")
    arguments = ("vulkan", "--source", str(bench / "sources"), "--dry-run", "--jobs", "3")
    ran = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    assert ran.stdout == dry_run(bench, *arguments[:3]).stdout
    wrong = subprocess.run([script, "abacus"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    kinds = "auto, cpu, cuda, rocm, vulkan, metal"
    message = f"the kind of a backend must be one of {kinds}, got 'abacus'"
    assert wrong.stderr == f"InvalidRequestError: {message}\n"


@pytest.mark.timeout(3600)
def test_a_real_build_computes(tmp_path, monkeypatch):
    kind = os.environ.get("TABAGENT_BUILD_BACKEND")
    if not kind:
        pytest.skip("compiling takes minutes: TABAGENT_BUILD_BACKEND names a kind to build")
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    command = [sys.executable, "-m", "tabagent_model", "build-backend", kind]
    subprocess.run(command, check=True)
    library = backends.data_folder() / kind / Plan(kind).library.name
    assert Note.beside(library) == Note.of(
        library,
        architectures=Plan(kind).architectures,
        toolkit=Plan(kind).recipe.toolkit,
        machine=_native.machine() if kind == "cpu" else "",
    )
