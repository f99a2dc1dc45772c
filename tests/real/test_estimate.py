"""What is estimated from the header, against what llama.cpp allocates and the process then has.

Five shapes, as different as their costs are, in three contexts. The files are hollow, but they are
really loaded, and a prompt of a full pass is really read.
"""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from gguf_shapes import Shape, hollow_gguf
from tabagent_model import Model, ModelConfig, _core, estimate, hardware, memory
from tabagent_model.hardware import MIB
from tabagent_model.placement._estimate import Estimate, Share

pytestmark = pytest.mark.model

SHAPES = {
    "a large vocabulary": Shape(896, 6, 4864, 14, 2, 151_936, "q4_0", "q8_0", "", "qwen2"),
    "all heads have keys": Shape(1024, 4, 2816, 16, 16, 32_000, "q8_0", "q8_0", "q8_0"),
    "deep and narrow": Shape(512, 20, 1536, 8, 2, 32_000, "f16"),
    "wide heads": Shape(1024, 6, 3072, 16, 8, 32_768, "q4_k", "q4_k", "q6_k", "qwen3", 128),
    "wide layers": Shape(2048, 2, 8192, 32, 8, 65_536, "q4_0", "q6_k"),
}
CONTEXTS: list[dict[str, Any]] = [
    {"n_ctx": 512, "max_parallel": 1},
    {"n_ctx": 4096, "max_parallel": 2},
    {"n_ctx": 16384, "max_parallel": 1, "flash_attn": "on", "kv_type": "q8_0"},
]


def close(estimated: float, found: float) -> bool:
    return abs(estimated - found) <= 0.1 * found + 16 * MIB


@pytest.fixture(scope="module", params=SHAPES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    return hollow_gguf(folder / "hollow.gguf", SHAPES[request.param])


@pytest.mark.parametrize("fields", CONTEXTS, ids=str)
def test_the_estimate_is_what_it_takes(file: Path, fields: dict[str, Any]):
    # What the allocator kept of earlier models would be taken again, and not be seen.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        expected, share, taken = fresh.submit(what_it_takes, file, fields).result()
    told = {
        name: (round(getattr(expected, name) / MIB, 1), round(getattr(share, name) / MIB, 1))
        for name in ("weights", "mapped", "kv", "compute")
    }
    print(
        f"{fields}: estimated and allocated {told}, estimated {expected.needed / MIB:.1f},"
        f" taken {taken / MIB:.1f}"
    )
    assert expected.weights == pytest.approx(share.weights, rel=0.001, abs=MIB)
    assert expected.kv == share.kv
    assert close(expected.mapped, share.mapped)
    assert close(expected.compute, share.compute)
    assert close(expected.needed, taken)


def what_it_takes(file: Path, fields: dict[str, Any]) -> tuple[Share, Share, int]:
    config = ModelConfig(file, n_threads=2, warmup=True, device="cpu", **fields)
    with Model.load(config):  # so that attention is measured, and libraries have their own
        pass
    gc.collect()
    before = private()
    expected = estimate(config).on("cpu")
    with Model.load(config) as model:
        (found,) = [m for m in memory().models if m.path == str(file)]
        # Without flash attention there is a score for each cell, and what no pass has touched of a
        # buffer is allocated, but not there yet.
        is_flash = model.info()["flash_attn"] == "on"
        model.generate([1] * min(config.n_ctx - 2, 520 if is_flash else config.n_ctx), max_tokens=1)
        return expected, found.shares[0], private() - before


def private() -> int:
    size = _core.memory_info()["private"]
    assert size is not None
    return size


def test_an_estimate_is_of_the_context_that_is_made(file: Path):
    with Model.load(file, n_ctx=2048):  # which measures attention, if nobody has so far
        pass
    planned = estimate(file, n_ctx=2048)
    with Model.load(file, n_ctx=2048) as model:
        info = model.info()
    assert planned_facts(planned) == {name: info[name] for name in planned_facts(planned)}


def planned_facts(planned: Estimate) -> dict[str, Any]:
    names = ("n_ctx", "max_parallel", "flash_attn", "kv_type", "gpu_layers")
    return {name: getattr(planned, name) for name in names}


def test_looking_takes_less_than_loading(file: Path):
    machine = hardware.detect()
    before = private()
    for _ in range(3):
        estimate(file, machine=machine)
    assert private() - before < 32 * MIB
