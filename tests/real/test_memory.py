"""Memory comes back: weights, context and threads leave with the model (S0.7, S0.20)."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tabagent_model import Model, PyModel, memory
from tabagent_model.params import BUNDLED_MODEL

ROUNDS = 50

pytestmark = pytest.mark.model

# In a process of its own, whose memory nothing else has shaped.
PROGRAM = """
import gc, json, sys, threading
from pathlib import Path
from tabagent_model import Model

def resident_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024

def one_round():
    with Model.load(n_ctx=512, device="cpu") as model:
        model.generate("Hello", max_tokens=8, temperature=0)
    gc.collect()
    return resident_mib()

def others():
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

warm_up = [one_round() for _ in range(20)]
before = others()
after = [one_round() for _ in range(int(sys.argv[1]))]
print(json.dumps({"baseline": warm_up[-1], "after": after, "same": before == others()}))
"""


def run_rounds(**environment: str) -> dict:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROUNDS)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=100,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    low, high = min(found["after"]), max(found["after"])
    print(f"baseline {found['baseline']:.1f} MiB, then from {low:.1f} to {high:.1f} MiB")
    return found


def test_fifty_rounds_of_load_generate_unload_come_back_to_the_baseline():
    found = run_rounds()
    assert max(abs(value - found["baseline"]) for value in found["after"]) <= 100
    assert found["same"], "file descriptors or threads were left behind"


def test_fifty_rounds_have_no_slope():
    # Each thread has an arena of malloc's, which keeps a few MiB now and then; with one arena for
    # all, what is left shows what we lose ourselves.
    found = run_rounds(MALLOC_ARENA_MAX="1")
    slope = statistics.linear_regression(range(ROUNDS), found["after"]).slope
    assert abs(slope) < 0.05, "MiB per round"


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


@pytest.mark.skipif(sys.platform != "linux", reason="only there is a smaps")
@pytest.mark.parametrize("repack", [True, False])
def test_weights_are_not_in_memory_twice(repack: bool):
    path = str(BUNDLED_MODEL)
    others = resident_of(path)
    with Model.load(repack=repack, device="cpu") as model:
        (share,) = memory().models[-1].shares
        assert share.mapped + share.weights < 1.5 * model.info()["size_bytes"]
        # What tensors share pages with comes along.
        assert resident_of(path) - others <= share.mapped + 64 * 1024
        assert model.generate("Once upon a time", max_tokens=4, temperature=0).tokens


def resident_of(path: str) -> int:
    """Bytes of this file that are mapped and in memory."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    ours = [mapping for mapping in mappings if mapping.partition("\n")[0].endswith(path)]
    return sum(int(mapping.partition("\nRss:")[2].split()[0]) * 1024 for mapping in ours)
