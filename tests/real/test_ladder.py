"""Loads that cannot have what was asked for: refused with figures, or something less is said."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from machines import CARD_6, FULL_GPU, NO_GPU
from tabagent_model import Model, ModelConfig, hardware
from tabagent_model.errors import GpuNotAvailableError, OutOfMemoryError
from tabagent_model.hardware import GIB, MIB, Machine, Memory
from tabagent_model.placement import _ledger
from tabagent_model.placement._ledger import Ledger

pytestmark = pytest.mark.model

GREEDY = {"max_tokens": 8, "temperature": 0}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Load as if this machine were another one."""

    def machine(recorded: Machine) -> None:
        monkeypatch.setattr(_ledger, "LEDGER", Ledger(lambda: recorded))

    return machine


def with_free(size: int) -> Machine:
    """This machine, with less memory."""
    return replace(hardware.detect(), memory=Memory(16 * GIB, size), gpus=(), reason="no GPU")


def test_what_was_loaded_says_where_it_is_and_why():
    with Model.load(n_ctx=256, max_parallel=1, kv_type="f16", device="cpu") as model:
        info = model.info()
    assert info["placement"] == {"device": "cpu", "gpu_layers": 0, "kv_type": "f16", "n_ctx": 256}
    assert (info["reason"], info["failed_rungs"]) == ("the CPU, as asked", [])


@pytest.mark.skipif(bool(hardware.detect().usable_gpus), reason="tells what is said without a GPU")
def test_where_no_gpu_can_be_used_the_reason_is_told():
    with Model.load(n_ctx=256) as model:
        assert model.info()["placement"]["device"] == "cpu"
        assert model.info()["reason"] == f"the CPU: {hardware.detect().reason}"


def test_a_model_in_a_worker_says_so_too():
    fields = {"n_ctx": 256, "max_parallel": 1}
    with Model.load(isolation="process", **fields) as away, Model.load(**fields) as here:
        told = away.info()
        assert told["placement"] == here.info()["placement"]
        assert (told["reason"], told["failed_rungs"]) == (here.info()["reason"], [])


def test_an_estimate_that_does_not_fit_is_refused_before_anything_is_loaded(on):
    on(with_free(100 * MIB))
    with pytest.raises(OutOfMemoryError, match="`tiny-chat` with 8 x 2048 tokens") as caught:
        Model.load(n_ctx=2048, max_parallel=8)
    error = caught.value
    assert (error.free, error.device, error.unloading) == (100 * MIB, "cpu", {})
    assert error.needed > error.free
    assert len(error.rungs) == 1


def test_a_refusal_says_what_unloading_another_model_would_free(on):
    on(with_free(300 * MIB))
    with Model.load(n_ctx=1024, max_parallel=2) as model:
        with pytest.raises(OutOfMemoryError, match="unloading `tiny-chat` would free") as caught:
            Model.load(n_ctx=2048, max_parallel=64)
        assert caught.value.unloading == {"tiny-chat": held(model)}
        assert model.generate("Hello", **GREEDY).text


def held(model: Model) -> int:
    (found,) = _ledger.memory().models
    return found.shares[0].own


def test_a_smaller_context_is_taken_only_when_it_may_be_and_is_told(on, caplog):
    on(with_free(105 * MIB))
    with pytest.raises(OutOfMemoryError):
        Model.load(n_ctx=2048, max_parallel=8)
    with (
        caplog.at_level(logging.WARNING, "tabagent_model"),
        Model.load(n_ctx=2048, max_parallel=8, n_ctx_min=256) as model,
    ):
        info = model.info()
        assert info["n_ctx"] == info["placement"]["n_ctx"] < 2048
        assert len(info["failed_rungs"]) >= 1
        assert info["failed_rungs"][0].startswith("the CPU: needs ")
        assert info["reason"].startswith(f"the CPU, n_ctx {info['n_ctx']}, since what was")
        assert "`tiny-chat` is loaded otherwise than asked" in caplog.text
        assert model.generate("Hello", **GREEDY).text


def test_a_full_gpu_is_no_reason_not_to_load_on_the_cpu(on, caplog):
    on(FULL_GPU)
    with (
        caplog.at_level(logging.WARNING, "tabagent_model"),
        Model.load(n_ctx=256, max_parallel=1) as model,
    ):
        info = model.info()
        assert info["placement"]["device"] == "cpu"
        assert info["failed_rungs"][0].startswith("all 5 layers on CUDA0: needs ")
        assert "is loaded otherwise than asked" in caplog.text
        assert model.generate("Hello", **GREEDY).text
    with pytest.raises(OutOfMemoryError, match="on CUDA0, but 200 MiB is free") as caught:
        Model.load(n_ctx=256, fallback="partial")
    assert caught.value.device == "CUDA0"


def test_layers_for_a_gpu_that_is_not_there_stay_on_the_cpu_with_a_warning(on, caplog):
    on(NO_GPU)
    with (
        caplog.at_level(logging.WARNING, "tabagent_model"),
        Model.load(n_ctx=256, gpu_layers=5) as model,
    ):
        assert model.info()["gpu_layers"] == 0
    assert "`tiny-chat` is loaded on the CPU: no NVML" in caplog.text


def test_a_gpu_that_is_insisted_on_and_not_there_is_an_error(on):
    on(NO_GPU)
    with pytest.raises(GpuNotAvailableError, match="`device` is 'cuda'") as caught:
        Model.load(device="cuda")
    assert caught.value.device == "cuda"
    on(CARD_6)
    with pytest.raises(GpuNotAvailableError):
        Model.load(device="cuda:3")


def test_two_loads_at_a_time_do_not_count_on_the_same_memory():
    ledger = Ledger(lambda: with_free(1 * GIB))
    estimate = _estimate_of(ModelConfig(n_ctx=256))
    rung = replace(_rung(), estimate=estimate)
    before = ledger.machine().memory.available
    with ledger.reserved(lambda machine: rung):
        assert ledger.machine().memory.available == before - estimate.needed
        assert ledger.memory().devices[0].reserved == estimate.needed
    assert ledger.machine().memory.available == before


def _rung():
    from tabagent_model.placement import rungs_of

    return rungs_of(n_ctx=256, machine=NO_GPU)[0]


def _estimate_of(config: ModelConfig):
    from tabagent_model import estimate

    return estimate(config, machine=NO_GPU)


# The address space ends in the middle of a load, which the estimate could not know.
PROGRAM = """
import resource, sys
from pathlib import Path
from tabagent_model import Model
Model.load(n_ctx=256, max_parallel=1, device="cpu").unload()
size = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), resource.RLIM_INFINITY))
fields = dict(n_ctx=2048, max_parallel=64, kv_type="f32", n_ctx_min=256, device="cpu")
with Model.load(**fields) as model:
    info = model.info()
    print(info["n_ctx"], len(info["failed_rungs"]))
    print(model.generate("Hello", max_tokens=8, temperature=0).finish_reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_the_system_refuses_after_all_leads_to_the_next_rung():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    sizes, reason = ran.stdout.split("\n")[:2]
    n_ctx, failed = map(int, sizes.split())
    assert (n_ctx < 2048, failed >= 1) == (True, True)
    assert reason in ("length", "stop")
