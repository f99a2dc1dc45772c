"""What only a machine with a GPU can show. It was never run so far: no machine of ours has one."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tabagent_model import Model, _native, estimate, hardware, memory
from tabagent_model.hardware import MIB, Gpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> Gpu:
    machine = hardware.detect()
    if not machine.usable_gpus:
        pytest.skip(f"no GPU can be used: {machine.reason}")
    return machine.usable_gpus[0]


def test_the_backend_in_use_brought_the_devices(gpu: Gpu):
    (used,) = [backend for backend in _native.gpu_backends() if backend.refused is None]
    assert gpu.device in used.devices
    assert hardware.kind_of(gpu.device) == used.kind


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_the_answer_is_the_one_of_the_cpu(gpu: Gpu, isolation: str):
    def answer(**where: Any) -> str:
        with Model.load(n_ctx=512, isolation=isolation, **where) as model:
            return str(model.chat("What is the capital of France?", temperature=0, max_tokens=24))

    assert answer(gpu_layers="all", device="gpu") == answer(device="cpu")


@pytest.mark.parametrize("split_mode", ["layer", "row"])
def test_two_cards_share_a_model(gpu: Gpu, split_mode: Any):
    if len(hardware.detect().usable_gpus) < 2:
        pytest.skip("there is only one GPU that can be used")
    with Model.load(n_ctx=512, split_mode=split_mode, tensor_split=[1, 1]) as model:
        assert model.generate("Hello", max_tokens=4)
        (found,) = memory().models
        assert sum(share.weights > 0 for share in found.shares if share.device != "cpu") >= 2


def test_both_sources_speak_of_the_same_card(gpu: Gpu):
    if hardware.kind_of(gpu.device or "") != "cuda":
        pytest.skip(f"{gpu.name} is no card of NVIDIA's")
    assert gpu.uuid is not None
    assert gpu.compute_capability is not None
    assert gpu.total is not None
    assert gpu.free is not None
    assert 0 < gpu.free <= gpu.total


def test_a_model_takes_what_was_estimated(gpu: Gpu):
    fields = {"n_ctx": 2048, "max_parallel": 2}
    assert gpu.device is not None
    expected = estimate(**fields).on(gpu.device)
    with Model.load(**fields) as model:
        assert model.info()["placement"]["device"] == gpu.device
        (found,) = memory().models
        share = next(each for each in found.shares if each.device == gpu.device)
    assert (share.kv, share.weights) == (expected.kv, pytest.approx(expected.weights, rel=0.02))
    assert share.compute == pytest.approx(expected.compute, rel=0.1, abs=32 * MIB)


def test_unloading_gives_the_memory_back(gpu: Gpu):
    def free() -> int:
        size = hardware.detect().usable_gpus[0].free
        assert size is not None
        return size

    with Model.load(n_ctx=512):
        pass
    warm = free()
    for _ in range(5):
        with Model.load(n_ctx=512) as model:
            model.generate("Hello", max_tokens=4)
        assert abs(free() - warm) <= 100 * MIB


def test_our_process_is_among_those_of_the_card(gpu: Gpu):
    with Model.load(n_ctx=512):
        processes = hardware.detect().usable_gpus[0].processes
    if not processes:
        pytest.skip("the driver does not tell of processes")
    assert os.getpid() in [each.pid for each in processes]
