"""Memory comes back: weights, context and threads leave with the model (S0.7, S0.20)."""

from __future__ import annotations

import gc
import statistics
import threading
from pathlib import Path

import pytest

from tabagent_model import Model, PyModel

ROUNDS = 50
WARM_UP = 20  # until the allocator has an arena for every thread there may be

pytestmark = pytest.mark.model


def resident_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def slope(values: list[float]) -> float:
    """MiB per round, by least squares."""
    line = statistics.linear_regression(range(len(values)), values)
    return line.slope


def one_round() -> float:
    with Model.load(n_ctx=512) as model:
        model.generate("Hello", max_tokens=8, temperature=0)
    gc.collect()
    return resident_mib()


def test_fifty_rounds_of_load_generate_unload_leave_nothing_behind():
    for _ in range(WARM_UP):
        one_round()
    baseline, files, threads = resident_mib(), open_files(), threading.active_count()
    after = [one_round() for _ in range(ROUNDS)]
    print(f"baseline {baseline:.1f} MiB, after: {min(after):.1f} to {max(after):.1f} MiB")
    assert max(abs(value - baseline) for value in after) <= 100
    assert slope(after) < 0.1
    assert (open_files(), threading.active_count()) == (files, threads)


def test_unload_says_what_came_back_and_a_second_one_does_nothing():
    model = Model.load(n_ctx=2048, max_parallel=4)
    path = model.config.model_path or Model.load().info()["path"]
    model.unload()
    native = PyModel()
    native.load(model_path=str(path))
    native.create_context(n_ctx=2048, n_seq_max=4)
    report = native.unload()
    assert report["was_loaded"] is True
    assert report["freed_mb"] == pytest.approx(report["rss_before_mb"] - report["rss_after_mb"])
    assert native.unload()["was_loaded"] is False
