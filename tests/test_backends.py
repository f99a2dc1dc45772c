"""GPU backends: found, compared with this package, tried in a child process, and refused in words.

What stands in for llama.cpp's backends here are small C libraries: they must not run before they
are known to fit, and must not take the process along when they die.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import machines
from tabagent_model import InvalidRequestError, _core, backends, hardware
from tabagent_model.backends import Backend
from tabagent_model.backends._note import Note, path_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="backends were never built elsewhere"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make backends with"),
]

# Leaves a file when it is opened, by whomever.
OPENED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void opened(void) {
    const char * trace = getenv("TRACE");
    if (trace) fclose(fopen(trace, "w"));
}
"""
DEADLY = OPENED + "void * ggml_backend_init(void) { abort(); }"
# ggml's struct of a backend that has no devices.
EMPTY = (
    OPENED
    + """
static const char * name(void * r) { return "CUDA"; }
static size_t count(void * r) { return 0; }
static void * none(void * r, ...) { return NULL; }
static struct { int version; void * calls[4]; void * context; } registry = {
    VERSION, {name, count, none, none}, NULL};
void * ggml_backend_init(void) { return &registry; }
""".replace("VERSION", _core.ENGINE.split()[-1])
)
EVERYWHERE = dict(architectures=("50",), toolkit="cc")


def compiled(source: str, library: Path) -> Path:
    library.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    return library


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user's folder of his own, in which nothing lies yet."""
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TRACE", str(tmp_path / "opened"))
    return tmp_path


@pytest.fixture
def cuda(home) -> Backend:
    """One that was built from the right sources, and dies when it is used."""
    library = compiled(DEADLY, home / "backends" / "cuda" / "libggml-cuda.so")
    Note.of(library, **EVERYWHERE).write(library)
    return Backend("cuda", library)


def doctor(home: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tabagent_model", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def driver(home: Path) -> str:
    """The path of a folder with a library that is called like NVIDIA's driver."""
    compiled("int cuInit(int x) { return 0; }", home / "driver" / "libcuda.so.1")
    return str(home / "driver")


def test_a_backend_from_other_sources_is_refused_before_it_runs(home, cuda):
    note = dataclasses.replace(Note.beside(cuda.library), engine="llama-cpp-sys-2 0.1.1 (abc)")
    note.write(cuda.library)
    assert backends.refusal(cuda) == (
        "it was built from llama-cpp-sys-2 0.1.1 (abc), and this package from"
        f" {_core.ENGINE}; build or install it anew"
    )
    refused = (
        f"cuda backend       {cuda.library}: it was built from llama-cpp-sys-2 0.1.1 (abc), and"
    )
    assert refused in doctor(home, LD_LIBRARY_PATH=driver(home))
    assert not (home / "opened").exists()


def test_a_backend_that_nobody_wrote_a_note_about_is_refused(home, cuda):
    path_of(cuda.library).unlink()
    refused = f"no note lies beside `{cuda.library}` that says what it was built from"
    assert backends.refusal(cuda) == refused


def test_a_backend_that_is_not_the_one_that_was_noted_is_refused(home, cuda):
    refused = f"`{cuda.library}` is not the file that the note beside it describes"
    content = cuda.library.read_bytes()
    for other in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        cuda.library.write_bytes(other)
        assert backends.refusal(cuda) == refused


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"engine": 5}',
        b'{"engine": "a", "sha256": "b", "size": 1, "architectures": 5}',
        b"[" * 100_000,
    ],
)
def test_a_note_that_makes_no_sense_is_a_refusal(cuda, content):
    path_of(cuda.library).write_bytes(content)
    refused = backends.refusal(cuda) or ""
    assert refused.startswith(f"the note beside `{cuda.library}` ")


def test_without_a_driver_a_backend_is_not_even_opened(home, cuda):
    if backends.missing_driver("cuda") is None:
        pytest.skip("NVIDIA's driver is here")
    refused = backends.refusal(cuda) or ""
    assert refused.startswith("there is no NVIDIA driver here: libcuda.so.1: ")
    told = doctor(home)
    assert f"cuda backend       {cuda.library}: {refused}\n" in told
    assert f"no GPU in use      the cuda backend is not loaded: {refused}\n" in told
    assert not (home / "opened").exists()


@pytest.mark.parametrize(
    ("kind", "name", "refused"),
    [
        ("metal", "metal", "Metal is Apple's"),
        ("rocm", "hip", "there is no AMD driver here: no /dev/kfd"),
    ],
)
def test_each_kind_has_a_driver_of_its_own(home, kind, name, refused):
    if backends.missing_driver(kind) is None:
        pytest.skip("its driver is here")
    library = compiled(DEADLY, home / "backends" / kind / f"libggml-{name}.so")
    Note.of(library).write(library)
    assert backends.load() == (Backend(kind, library, refused=refused),)


@pytest.mark.skipif(bool(_core.detect_gpus()["gpus"]), reason="NVIDIA's driver is here")
@pytest.mark.parametrize(
    ("source", "refused"),
    [
        (DEADLY, "SIGABRT ended its trial, "),
        (EMPTY, "the backend finds no GPU here\n"),
    ],
    ids=["deadly", "empty"],
)
def test_a_backend_that_fails_in_its_trial_takes_nobody_along(home, cuda, source, refused):
    compiled(source, cuda.library)
    Note.of(cuda.library, **EVERYWHERE).write(cuda.library)
    line = f"cuda backend       {cuda.library}: {refused}"
    assert line in doctor(home, LD_LIBRARY_PATH=driver(home))
    (home / "opened").unlink()  # so it was opened
    assert line in doctor(home, LD_LIBRARY_PATH=driver(home))
    assert not (home / "opened").exists()


def test_the_users_own_backend_comes_before_one_from_a_wheel(home, cuda, monkeypatch):
    site = home / "site"
    folders = {kind: site / f"tabagent_model_{kind}" for kind in ("cuda", "vulkan")}
    for kind, folder in folders.items():
        compiled(EMPTY, folder / f"libggml-{kind}.so")
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(site))
    assert backends.found() == [
        cuda,
        Backend("cuda", folders["cuda"] / "libggml-cuda.so"),
        Backend("vulkan", folders["vulkan"] / "libggml-vulkan.so"),
    ]


def test_a_folder_that_cannot_be_looked_into_has_no_backends(monkeypatch):
    monkeypatch.setenv("TABAGENT_HOME", "/" + "x" * 300)
    assert not [each for each in backends.found() if "xxx" in str(each.library)]
    assert backends.built_cpu_module("x64", "") is None


def test_a_user_without_a_home_has_no_backends_of_his_own(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("TABAGENT_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert backends.built_cpu_module("x64", "") is None
    own = {Path(each.library).parent.name for each in backends.found()}
    assert own <= {f"tabagent_model_{kind}" for kind in backends.KINDS}


def test_a_wheel_of_a_backend_installs_and_is_found(home, cuda, monkeypatch):
    script = Path(__file__).parent.parent / "scripts" / "cuda_wheel.py"
    write_wheel = runpy.run_path(str(script))["write_wheel"]
    files = {path.name: path.read_bytes() for path in (cuda.library, path_of(cuda.library))}
    wheel = write_wheel(home / "out", files, ("nvidia-cublas>=13,<14",))
    site = home / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    shutil.rmtree(home / "backends")
    monkeypatch.syspath_prepend(str(site))
    (found,) = backends.found()
    assert found == Backend("cuda", site / "tabagent_model_cuda" / "libggml-cuda.so")
    assert Note.beside(found.library).check(found.library) is None
    assert metadata.distribution("tabagent-model-cuda").requires == [
        f"tabagent-model=={_core.__version__}",
        "nvidia-cublas>=13,<14",
    ]


@pytest.mark.parametrize(
    ("choice", "refused"),
    [("none", "`TABAGENT_GPU_BACKEND` is none"), ("vulkan", "`TABAGENT_GPU_BACKEND` is vulkan")],
)
def test_the_environment_chooses_a_kind(cuda, monkeypatch, choice, refused):
    monkeypatch.setenv("TABAGENT_GPU_BACKEND", choice)
    assert backends.load() == (dataclasses.replace(cuda, refused=refused),)


def test_a_kind_that_there_is_not_is_refused(home, monkeypatch):
    monkeypatch.setenv("TABAGENT_GPU_BACKEND", "abacus")
    with pytest.raises(InvalidRequestError) as caught:
        backends.load()
    assert caught.value.message == (
        "`TABAGENT_GPU_BACKEND` must be one of auto, none, cuda, rocm, metal, vulkan, got abacus"
    )


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["75-real"], (7, 5), True),
        (["80-real"], (8, 6), True),  # of the same generation, and newer
        (["86-real"], (8, 0), False),
        (["80-real"], (9, 0), False),  # machine code is for one generation
        (["80"], (9, 0), True),  # PTX is translated for what is newer
        (["80-virtual"], (12, 0), True),
        (["90-virtual"], (8, 9), False),
        (["120a-real"], (12, 0), True),
        (["120a"], (12, 1), False),  # for one number only
        (["75-real", "90"], (8, 9), False),
        (["75-real", "90"], (10, 0), True),
        (["gfx1100", "nonsense", ""], (8, 9), False),
    ],
)
def test_what_a_card_runs_depends_on_what_was_compiled(architectures, capability, runs):
    assert backends.runs_on(architectures, capability) is runs


def test_cards_that_nothing_was_compiled_for_are_named_with_the_cure():
    old, new = machines.GTX_1660, machines.RTX_4090 | {"name": "Ada"}
    refused = (
        "it was compiled for 80-real, 89, which is not for GTX 1660 (SM 7.5);"
        " build it with `--arch 75`"
    )
    assert backends.no_code(["80-real", "89"], [old, new]) == refused
    assert backends.no_code(["80-real", "89"], [old, new], all) is None
    assert backends.no_code(["80-real", "89"], [old], all) == refused
    assert backends.no_code(["75-real", "89"], [old, new]) is None
    unknown = old | {"compute_capability": None}
    assert backends.no_code(["80"], [unknown]) is None


REFUSED = Backend("cuda", Path("libggml-cuda.so"), refused="there is no NVIDIA driver here")


@pytest.mark.parametrize(
    ("machine", "nvml", "lying", "reason"),
    [
        (machines.CARD_24, None, [], None),
        (machines.NO_GPU, "no NVML", [], "no NVML"),
        (
            machines.NO_GPU,
            "no NVML",
            [REFUSED],
            f"the cuda backend is not loaded: {REFUSED.refused}",
        ),
        (
            machines.UNUSED_GPU,
            None,
            [],
            "GTX 1660 cannot be used: there is no GPU backend in this installation;"
            " `tabagent-model build-backend` compiles one",
        ),
        (
            machines.UNUSED_GPU,
            None,
            [REFUSED],
            f"GTX 1660 cannot be used, as the cuda backend is not loaded: {REFUSED.refused}",
        ),
    ],
)
def test_why_no_gpu_computes_is_said_with_all_that_is_known(machine, nvml, lying, reason):
    assert hardware.why_no_gpu(machine.gpus, nvml, lying) == reason


def test_a_note_survives_being_written(cuda):
    note = Note.of(cuda.library, architectures=("75-real", "80"), toolkit="CUDA 13.0")
    note.write(cuda.library)
    assert Note.beside(cuda.library) == note
    assert json.loads(path_of(cuda.library).read_text())["engine"] == _core.ENGINE
