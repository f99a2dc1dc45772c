"""Rubbish in environment variables (fault case C13): a typed error that names the variable, or it
counts for nothing. Each in a process of its own, which answers afterwards as any other does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tabagent_model import Completion, Model

pytestmark = pytest.mark.model

# What a load says, in an environment as it is; and an answer when what was wrong with it is gone.
PROGRAM = """
import logging, os, sys
from tabagent_model import Model, TabAgentModelError
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
fields = dict(n_ctx=256, n_threads=1)
try:
    Model.load(**fields, **FIELDS).unload()
    print("loaded")
except TabAgentModelError as error:
    print(type(error).__name__, getattr(error, "name", ""))
    for name in WRONG:
        os.environ.pop(name)
with Model.load(**fields) as model:
    print(model.generate("Once upon a time", max_tokens=12, temperature=0, ignore_eos=True).text)
"""
OURS = ("HOME", "CPU_VARIANT", "CALIBRATE", "GPU_BACKEND", "KERNELS", "API_KEYS")
EMPTY = {f"TABAGENT_{name}": "" for name in OURS}
STRANGE = {
    "TABAGENT_HOME": "/dev/null/nowhere",  # nothing can be remembered there
    "TABAGENT_KERNELS": "many",
    "GGML_SCHED_DEBUG": "x" * 10_000,
    "GGML_BACKEND_PATH": "/nowhere/libggml.so",
    "GGML_CUDA_NO_PINNED": "?",
    "LLAMA_KV_CACHE_DEBUG": "🙂",
    "LLAMA_GRAPH_REUSE_DISABLE": "",
    "OMP_NUM_THREADS": "-3",
}
NOWHERE = {name: "99" for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")}


@pytest.fixture(scope="module")
def reference() -> str:
    with Model.load(n_ctx=256, n_threads=1) as model:
        answer: Completion = model.generate(
            "Once upon a time", max_tokens=12, temperature=0, ignore_eos=True
        )
    return answer.text


Said = Callable[..., list[str]]


@pytest.fixture(scope="module")
def said_by(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """The lines of a load and an answer in such an environment."""
    folder = tmp_path_factory.mktemp("environment")
    return partial(_said_by, folder)


def _said_by(folder: Path, environment: dict[str, str], **fields: object) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", f"FIELDS = {fields}\nWRONG = {[*environment]}\n{PROGRAM}"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder), **environment},
        cwd=folder,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.mark.parametrize("environment", [EMPTY, STRANGE], ids=["empty", "strange"])
def test_c13_what_is_empty_or_means_nothing_counts_for_nothing(
    said_by: Said, reference: str, environment: dict[str, str]
):
    assert "\n".join(said_by(environment)) == f"loaded\n{reference}"


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"TABAGENT_CPU_VARIANT": "486"}, "cpu_variant"),
        ({"TABAGENT_CALIBRATE": "perhaps"}, "TABAGENT_CALIBRATE"),
        ({"TABAGENT_GPU_BACKEND": "voodoo"}, "TABAGENT_GPU_BACKEND"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_c13_what_cannot_be_meant_is_refused_by_name_until_it_is_gone(
    said_by: Said, reference: str, environment: dict[str, str], name: str
):
    said = said_by(environment)
    assert "\n".join(said) == f"InvalidRequestError {name}\n{reference}"


def test_c13_a_gpu_that_the_environment_hides_is_an_error_where_it_is_insisted_on(
    said_by: Said, reference: str
):
    said = said_by(NOWHERE, device="cuda")
    assert "\n".join(said[-1 - reference.count("\n") :]) == reference
    assert said[-2 - reference.count("\n")] == "GpuNotAvailableError "


def test_c13_layers_for_a_gpu_that_the_environment_hides_stay_on_the_cpu_with_a_warning(
    said_by: Said, reference: str
):
    said = "\n".join(said_by(NOWHERE, gpu_layers=5))
    assert "`tiny-chat` is loaded on the CPU: " in said
    assert said.endswith(f"loaded\n{reference}")
