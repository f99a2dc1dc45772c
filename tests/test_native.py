"""Which CPU module computes: the best one that survives a trial, from the package's own folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tabagent_model
from tabagent_model import _native

PACKAGE = Path(tabagent_model.__file__).parent
USABLE = [name for name, _ in _native.core.cpu_modules(str(_native.LIBRARIES))]

# A module that announces itself as the best and dies when it is used.
DEADLY = """
int ggml_backend_score(void) { return 1000000; }
void *ggml_backend_init(void) { __builtin_trap(); }
"""


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the installed package that a test may damage."""
    shutil.copytree(PACKAGE, tmp_path / "tabagent_model")
    return tmp_path


def run(program: str, copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=copy,
        env={
            **os.environ,
            "PYTHONPATH": str(copy),
            "XDG_CACHE_HOME": str(copy / "cache"),
            **environment,
        },
        timeout=60,
        check=False,
    )


START = "from tabagent_model import _native; print(_native.start())"


def module(copy: Path, name: str) -> Path:
    (path,) = (copy / "tabagent_model" / "lib").glob(f"libggml-cpu-{name}.*")
    return path


def test_the_best_module_is_tried_once_and_the_verdict_is_kept(copy):
    assert run(START, copy).stdout == f"{USABLE[0]}\n"
    verdicts = copy / "cache" / "tabagent_model" / "cpu-modules.json"
    assert f'"{USABLE[0]}": true' in verdicts.read_text()

    verdicts.write_text(verdicts.read_text().replace("true", "false"))
    assert run(START, copy).stdout == f"{USABLE[1]}\n"


def test_a_module_that_dies_in_its_trial_is_passed_over_and_named_in_the_log(copy):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make a deadly module with")
    deadly = module(copy, USABLE[0])
    deadly.unlink()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(deadly)],
        input=DEADLY,
        text=True,
        check=True,
    )
    ran = run(f"import logging; logging.basicConfig(); {START}", copy)
    assert ran.stdout == f"{USABLE[1]}\n"
    assert f"the CPU module {USABLE[0]} died in its trial" in ran.stderr


def test_the_environment_names_a_module(copy):
    assert run(START, copy, TABAGENT_CPU_VARIANT=USABLE[-1]).stdout == f"{USABLE[-1]}\n"


def test_an_unknown_module_is_refused_with_those_there_are(copy):
    ran = run(START, copy, TABAGENT_CPU_VARIANT="pentium")
    assert ran.returncode == 1
    message = f"`TABAGENT_CPU_VARIANT` must be one of {', '.join(USABLE)}, got pentium"
    assert ran.stderr.splitlines()[-1].endswith(f"InvalidRequestError: {message}")


def test_a_cache_that_cannot_be_written_costs_only_time(copy):
    (copy / "file").touch()
    assert run(START, copy, XDG_CACHE_HOME=str(copy / "file")).stdout == f"{USABLE[0]}\n"


def test_a_folder_without_modules_is_an_import_error_that_names_it(copy):
    folder = copy / "tabagent_model" / "lib"
    for path in folder.glob("libggml-cpu-*"):
        path.unlink()
    program = "try:\n import tabagent_model\nexcept ImportError as error:\n print(error)"
    found = ", ".join(sorted(path.name for path in folder.iterdir()))
    assert run(program, copy).stdout == (
        f"no usable llama.cpp backend in `{folder}`: found {found}\n"
    )


def test_modules_in_the_working_directory_are_not_looked_at(copy):
    (copy / "libggml-cpu-evil.so").write_bytes(b"no library")
    (copy / "libggml-evil.so").write_bytes(b"no library")
    assert run(START, copy).stdout == f"{USABLE[0]}\n"
