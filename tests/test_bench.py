"""The benchmarks without a model: what is told of figures, and which files are taken."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import entry_points
from math import nan
from pathlib import Path

import pytest

import machines
from gguf_files import tiny_gguf
from gguf_shapes import SHAPES, hollow_gguf
from tabagent_model import hardware
from tabagent_model.bench import BenchmarkResult, Reading, Report, Target, main
from tabagent_model.bench._files import LARGE, SMALL, choose, named
from tabagent_model.bench._machine import facts_of, growth, read
from tabagent_model.bench._spike3 import CONSEQUENCES, reclaimed, why_no_vram
from tabagent_model.errors import InvalidRequestError, ModelNotFoundError
from tabagent_model.hardware import GIB, Machine

GOOD = BenchmarkResult("3B load", 1.76, "s", Target("<", 10))
SLOW = BenchmarkResult("3B classification", 1620.4, "ms", Target("<", 500), "54 tokens read")
UNSEEN = BenchmarkResult("3B VRAM after unload", None, "MB", Target("±", 100), "no NVML")
TOLD = BenchmarkResult("3B short generation", 3033.0, "ms")
BROKEN = BenchmarkResult("7B load", None, "s", Target("<", 10), "needs 5 GiB", is_broken=True)


def report(*results: BenchmarkResult) -> Report:
    readings = {"cold": Reading(31_400_000, None), "3B loaded": Reading(2_100_000_000, None)}
    facts = {"GPU": "none: no NVML", "3B": "a.gguf"}
    return Report("spike3", facts, results, readings, CONSEQUENCES)


def test_the_table_has_ticks_crosses_and_what_was_not_measured():
    assert str(report(GOOD, SLOW, UNSEEN, TOLD, BROKEN)).splitlines() == [
        "GPU       none: no NVML",
        "3B        a.gguf",
        "",
        "Benchmark                   Result    Target  Pass",
        "--------------------------------------------------",
        "3B load                     1.76 s    < 10 s   ✓",
        "3B classification         1,620 ms  < 500 ms   ✗    54 tokens read",
        "3B VRAM after unload  not measured   ±100 MB   -    no NVML",
        "3B short generation       3,033 ms",
        "7B load                     failed    < 10 s   ✗    needs 5 GiB",
        "",
        "Memory",
        "  cold       RSS 31 MB, VRAM unknown",
        "  3B loaded  RSS 2,100 MB, VRAM unknown",
        "",
        "SOME BENCHMARKS FAILED: 1 of 4 passed, 2 failed, 1 not measured. The gate is closed:"
        " evaluate alternatives (llama.cpp's C API directly, or PyO3).",
    ]


def test_a_terminal_without_a_tick_says_yes_and_no():
    assert report(GOOD, SLOW, UNSEEN).text("ascii").splitlines()[5:8] == [
        "3B load                     1.76 s    < 10 s  yes",
        "3B classification         1,620 ms  < 500 ms   no   54 tokens read",
        "3B VRAM after unload  not measured  +-100 MB   -    no NVML",
    ]


@pytest.mark.parametrize(
    ("results", "verdict", "exit_code", "words"),
    [
        ([GOOD, TOLD], "passed", 0, "ALL BENCHMARKS PASSED: 1 of 1 passed. The gate is open"),
        ([GOOD, SLOW], "failed", 1, "SOME BENCHMARKS FAILED: 1 of 2 passed, 1 failed."),
        ([GOOD, UNSEEN], "undecided", 3, "NOT DECIDED: 1 of 2 passed, 1 not measured."),
        ([UNSEEN, BROKEN], "failed", 1, "SOME BENCHMARKS FAILED: 0 of 2 passed"),
    ],
    ids=["all", "one failed", "one not measured", "one broke"],
)
def test_the_verdict_and_the_exit_code_follow_from_the_gates(results, verdict, exit_code, words):
    found = report(*results)
    assert (found.verdict, found.exit_code) == (verdict, exit_code)
    assert words in str(found)


@pytest.mark.parametrize("sign", ["<", "≥", "±", "="])
def test_what_was_not_measured_never_passes(sign):
    target = Target(sign, 10)
    assert BenchmarkResult("load", None, "s", target).passed is None
    assert BenchmarkResult("load", None, "s", target, is_broken=True).passed is False
    assert BenchmarkResult("load", nan, "s", target).passed is False


def test_targets_are_met_or_missed_at_their_limit():
    cases = {("<", 10.0): False, ("≥", 10.0): True, ("±", -10.0): True, ("=", 10.0): True} | {
        ("<", 9.9): True,
        ("≥", 9.9): False,
        ("±", -10.1): False,
        ("=", 9.9): False,
    }
    assert {case: Target(case[0], 10).allows(case[1]) for case in cases} == cases


def test_programs_get_everything_as_json():
    told = json.loads(json.dumps(report(GOOD, UNSEEN).to_dict()))
    assert told == {
        "benchmark": "spike3",
        "verdict": "undecided",
        "exit_code": 3,
        "facts": {"GPU": "none: no NVML", "3B": "a.gguf"},
        "results": [
            {"name": "3B load", "value": 1.76, "unit": "s", "target": "< 10", "passed": True}
            | {"note": ""},
            {"name": "3B VRAM after unload", "value": None, "unit": "MB", "target": "±100"}
            | {"passed": None, "note": "no NVML"},
        ],
        "memory_bytes": {
            "cold": {"rss": 31_400_000, "vram": None},
            "3B loaded": {"rss": 2_100_000_000, "vram": None},
        },
    }


# Memory


@pytest.mark.parametrize(
    ("machine", "vram"),
    [
        (machines.NO_GPU, None),
        (machines.UNUSED_GPU, None),
        (machines.CARD_24, 1 * GIB),
        (machines.TWO_CARDS, 2 * GIB),
        (machines.machine(machines.RTX_4090 | {"used": None}), None),
    ],
    ids=["no GPU", "one that llama.cpp cannot use", "a card", "two", "one that does not tell"],
)
def test_memory_of_gpus_is_read_only_where_all_of_it_is_told(machine: Machine, vram: int | None):
    reading = read(machine)
    assert reading.vram == vram
    assert reading.rss is not None and reading.rss > 0


def grown(before: Reading, after: Reading, why_not: str = "") -> list[tuple[object, object]]:
    return [(found.value, found.passed) for found in reclaimed("3B", before, after, why_not)]


def test_memory_is_back_within_a_hundred_megabytes():
    before = Reading(50_000_000, 400_000_000)
    assert grown(before, Reading(40_000_000, 500_000_000)) == [(-10.0, True), (100.0, True)]
    assert grown(before, Reading(150_000_001, 900_000_000)) == [(100.000001, False), (500.0, False)]


def test_memory_of_a_gpu_that_nothing_was_put_on_has_not_come_back():
    before = after = Reading(50_000_000, 400_000_000)
    assert grown(before, after, "no layer was on a GPU") == [(0.0, True), (None, None)]
    assert grown(before, Reading(None, None)) == [(None, None), (None, None)]
    assert growth(None, 1) is growth(1, None) is None


def test_why_there_is_no_figure_of_a_gpu():
    assert why_no_vram(machines.CARD_6, is_on_gpu=True) == ""
    assert why_no_vram(machines.CARD_6, is_on_gpu=False) == "no layer was on a GPU"
    assert why_no_vram(machines.NO_GPU, is_on_gpu=False) == "no GPU can be used here"
    assert facts_of(machines.NO_GPU)["GPU"] == f"none: {machines.NO_GPU.reason}"
    assert facts_of(machines.CARD_6)["GPU"] == "GTX 1660 (CUDA0, 6.0 GiB)"


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the real shapes, made of holes."""
    folder = tmp_path_factory.mktemp("models")
    hollow_gguf(folder / "router.gguf", SHAPES["qwen2.5-3b"])
    hollow_gguf(folder / "reasoning.gguf", SHAPES["qwen2.5-7b"])
    tiny_gguf(folder / "7b.gguf")
    (folder / "a.gguf").write_text("<!DOCTYPE html>")
    (folder / "reasoning-00002-of-00002.gguf").write_bytes(b"the rest")
    (folder / "notes.txt").write_text("3B")
    return folder


def test_models_are_found_by_what_they_are_and_not_by_their_names(folder: Path):
    small, large = choose(SMALL, folder), choose(LARGE, folder)
    assert (Path(small.path).name, Path(large.path).name) == ("router.gguf", "reasoning.gguf")
    assert small.why == (
        "3.1 billion parameters, Q4_K_M, 1.7 GiB; the only one in"
        f" `{folder}` with 2.5 to 4 billion parameters"
    )


def test_of_several_one_of_4_bits_is_taken(tmp_path: Path):
    shape = SHAPES["qwen2.5-3b"]
    for name, weights in (("a", "q8_0"), ("c", "q4_k"), ("b", "q4_0")):
        hollow_gguf(tmp_path / f"{name}.gguf", replace(shape, weights=weights))
    chosen = choose(SMALL, tmp_path)
    assert Path(chosen.path).name == "b.gguf"
    assert "; taken before 2 more, 4 bits first in " in chosen.why


def test_a_named_file_is_taken_as_it_is(folder: Path):
    chosen = named(folder / "7b.gguf", "--model-7b")
    assert chosen.path == str(folder / "7b.gguf")
    assert chosen.why.endswith("; named by `--model-7b`")


def test_a_folder_without_such_a_model_is_told_with_what_there_is(tmp_path: Path):
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "page.gguf").write_text("<!DOCTYPE html>")
    with pytest.raises(ModelNotFoundError) as caught:
        choose(SMALL, tmp_path)
    first, *_, hint = str(caught.value).splitlines()
    assert first.startswith(f"no model in `{tmp_path}` has 2.5 to 4 billion parameters: ")
    assert "`tiny.gguf` has 39,840" in first
    assert f"`{tmp_path / 'page.gguf'}` is not a GGUF model" in first
    assert hint == (
        "hint: put `qwen2.5-3b-instruct-q4_k_m.gguf` there, or name a file with `--model-3b`"
    )


def test_a_folder_that_is_not_there_or_is_none_is_told(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"there is no folder `.*nowhere`"):
        choose(LARGE, tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"there is no `\.gguf` file"):
        choose(LARGE, tmp_path)
    file = tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(InvalidRequestError, match=r"must be a folder, and `.*` is a file"):
        choose(LARGE, file)


# The command


@pytest.mark.parametrize("benchmark", ["spike3", "standard", "gpu-vs-cpu", "concurrency 4"])
def test_without_models_the_command_says_so_and_measures_nothing(benchmark, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main([*benchmark.split(), "--model-dir", nowhere, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"ModelNotFoundError: there is no folder `{nowhere}`"


def test_a_file_that_is_no_model_is_told_before_anything_is_loaded(tmp_path, capsys):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html>")
    files = ["--model-3b", str(path), "--model-7b", str(path)]
    assert main(["spike3", *files]) == 2
    assert capsys.readouterr().err.startswith(f"InvalidFormatError: `{path}` is not a GGUF model")


@pytest.mark.parametrize("arguments", [[], ["spike4"], ["spike3", "--n-ctx", "many"]])
def test_what_cannot_be_understood_is_answered_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: tabagent-bench" in capsys.readouterr().err


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="tabagent-bench")
    assert command.load() is main


def test_what_is_measured_belongs_to_this_machine():
    assert facts_of(hardware.detect())["version"].startswith("tabagent_model ")
