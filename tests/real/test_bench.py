"""The benchmarks on tiny models, and a swap where there is memory for one of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_gguf
from tabagent_model import ModelManager, estimate, hardware
from tabagent_model.bench import Report, concurrency, gpu_vs_cpu, main, named, spike3, standard
from tabagent_model.hardware import GIB, MIB, Memory
from tabagent_model.params import BUNDLED_MODEL
from tabagent_model.placement import _ledger
from tabagent_model.placement._ledger import Ledger

pytestmark = pytest.mark.model

BUNDLED = named(BUNDLED_MODEL, "--model")
PHASE = ["load", "warm-up", "classification", "short generation"]
UNLOADED = ["RSS after unload", "VRAM after unload"]
SWAP = ["out of memory", "3B → 7B"]
ROWS = [
    *(f"{phase} {what}" for phase in ("3B", "7B") for what in PHASE + UNLOADED),
    *(f"swap {what}" for what in SWAP + UNLOADED),
]
needs_no_gpu = pytest.mark.skipif(
    bool(hardware.detect().usable_gpus), reason="tells what is said without a GPU"
)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "other.gguf")


def passed(told: dict[str, Any]) -> dict[str, bool | None]:
    return {row["name"]: row["passed"] for row in told["results"]}


@needs_no_gpu
def test_the_whole_spike_on_two_tiny_models(other: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--model-3b", str(BUNDLED_MODEL), "--model-7b", str(other)]
    exit_code = main(["spike3", *files, "--n-ctx", "512", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert exit_code == told["exit_code"] in (1, 3)  # how fast it is depends on the machine
    assert [row["name"] for row in told["results"]] == ROWS
    found = passed(told)
    for phase in ("3B", "7B", "swap"):
        assert found[f"{phase} RSS after unload"] is True
        assert found[f"{phase} VRAM after unload"] is None
    assert found["swap out of memory"] is True
    unmeasured = [row["name"] for row in told["results"] if row["value"] is None]
    assert unmeasured == [name for name in ROWS if "VRAM" in name]
    assert set(told["facts"]) >= {"machine", "GPU", "3B", "7B", "3B is on", "7B is on"}
    assert list(told["memory_bytes"])[:3] == ["cold", "warm", "3B loaded"]


@needs_no_gpu
def test_the_table_is_for_people_and_the_progress_beside_it(
    other: Path, capsys: pytest.CaptureFixture[str]
):
    files = ["--model-3b", str(other), "--model-7b", str(BUNDLED_MODEL)]
    main(["spike3", *files, "--n-ctx", "512", "--n-gpu-layers", "0", "--no-mmap"])
    out, err = capsys.readouterr()
    assert "n_gpu_layers 0, n_ctx 512, no mmap" in out
    assert "swap out of memory" in out and "✓" in out and "not measured" in out
    assert err.splitlines()[0] == "warming up with the bundled model"


def test_a_model_that_finds_no_memory_fails_its_gates_and_the_rest_goes_on(
    other: Path, monkeypatch: pytest.MonkeyPatch
):
    scarce = replace(hardware.detect(), memory=Memory(16 * GIB, 150 * MIB), gpus=())
    monkeypatch.setattr(_ledger, "LEDGER", Ledger(lambda: scarce))
    wide = tiny_gguf(other.with_name("wide.gguf"), keys={"llama.context_length": 1 << 20})
    told = spike3(named(other, "a"), named(wide, "b"), n_ctx=1 << 19).to_dict()
    rows = {row["name"]: row for row in told["results"]}
    assert rows["3B load"]["passed"] is True
    assert (rows["7B load"]["value"], rows["7B load"]["passed"]) == (None, False)
    assert "but 150 MiB is free" in rows["7B load"]["note"]
    assert rows["7B short generation"]["note"] == "the model could not be loaded"
    assert rows["7B RSS after unload"]["passed"] is True
    assert (rows["swap out of memory"]["value"], told["verdict"]) == (1.0, "failed")


def names(report: Report) -> list[str]:
    return [result.name for result in report.results]


def test_a_crowd_gets_whole_answers():
    report = concurrency(BUNDLED, 4, n_ctx=512)
    assert (report.verdict, report.results[0].value) == ("passed", 4)
    assert None not in [result.value for result in report.results]


@needs_no_gpu
def test_without_a_gpu_there_is_no_speed_up():
    report = gpu_vs_cpu(BUNDLED, n_ctx=512)
    assert (report.verdict, report.exit_code) == ("undecided", 3)
    unmeasured = [result for result in report.results if result.value is None]
    assert len(unmeasured) == 4
    assert {result.note for result in unmeasured} == {"no GPU can be used here"}


@needs_no_gpu
def test_the_standard_stands_beside_what_was_expected_once():
    report = standard(BUNDLED, n_ctx=512, rounds=2)
    assert names(report) == [
        *("load", "first token", "256 tokens", "writing"),
        *("model RSS after unload", "model VRAM after unload"),
    ]
    load, _, _, writing, rss, vram = report.results
    assert load.note == "seed: 1 to 3 s"
    assert writing.note.endswith("; seed: 10 to 50 tok/s")
    assert (rss.passed, vram.passed) == (True, None)


def test_a_context_too_small_for_the_figures_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["standard", "--model", str(BUNDLED_MODEL), "--n-ctx", "256"]) == 2
    assert "`n_ctx` must be a whole number between 512 and" in capsys.readouterr().err


# A swap with memory for one of two


def test_a_budget_for_one_lets_the_first_leave_before_the_second_comes():
    fields: Any = {"n_ctx": 1024, "max_parallel": 4}
    draft = BUNDLED_MODEL.with_name("tiny-draft.gguf")
    needs = [estimate(path, **fields).needed for path in (BUNDLED_MODEL, draft)]
    steps: list[tuple[str, str, float]] = []
    with ModelManager(
        max_loaded=2,
        max_bytes=sum(needs) - 1,
        estimate=lambda config: estimate(config).needed,
        on_event=lambda event: steps.append((event.model, event.step, event.progress)),
    ) as models:
        models.register_model("3B", **fields)
        models.register_model("7B", draft, **fields)
        for name in ("3B", "7B", "3B"):
            assert models.swap(name).generate("One, two,", max_tokens=4).tokens
    whole = [
        (model, step) for model, step, progress in steps if progress == 1.0 and step != "drain"
    ]
    assert whole[:5] == [
        *(("3B", "load"), ("3B", "unload"), ("7B", "load")),
        *(("7B", "unload"), ("3B", "load")),
    ]


# The system gives out memory for one and a half of them. The manager may hold two, so it hears of
# that from the load alone.
PROGRAM = """
import resource
from pathlib import Path
from tabagent_model import Model, ModelManager, OutOfMemoryError
from tabagent_model.errors import ContextTooSmallError

FIELDS = {"n_ctx": 2048, "max_parallel": 24, "kv_type": "f32", "prompt_cache_mb": 0}
FIELDS["device"] = "cpu"

def size():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0]) * 1024

def num_written(model):
    return len(model.generate("Hello", max_tokens=8, ignore_eos=True).tokens)

with Model.load(**FIELDS) as model:
    num_written(model)
    with_one = size()
room = with_one - size()
resource.setrlimit(resource.RLIMIT_AS, (with_one + room // 2, resource.RLIM_INFINITY))
with Model.load(**FIELDS):
    try:
        Model.load(**FIELDS)
    except (OutOfMemoryError, ContextTooSmallError):
        print("there is no room for both")
with ModelManager(max_loaded=2) as models:
    models.register_model("3B", **FIELDS)
    models.register_model("7B", **FIELDS)
    for name in ("3B", "7B") * 3:
        written = num_written(models.swap(name))
        loaded = [each.name for each in models.list_models() if each.state == "loaded"]
        print(name, written, loaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_where_the_system_has_memory_for_one_a_swap_still_works():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # others are reserved, and never used
    )
    assert ran.returncode == 0, ran.stderr
    both, *swaps = ran.stdout.splitlines()
    assert both == "there is no room for both"
    assert swaps == ["3B 8 ['3B']", "7B 8 ['7B']"] * 3
