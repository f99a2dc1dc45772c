"""The ledger: what each loaded model holds, as llama.cpp allocated it, and who is left after it."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tabagent_model import Model, OutOfMemoryError, WorkerCrashedError, hardware, memory
from tabagent_model.hardware import GIB, MIB, Memory
from tabagent_model.isolation import respawn, spawn, verdicts
from tabagent_model.params import BUNDLED_MODEL
from tabagent_model.placement._ledger import LEDGER

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("empty_ledger")]

KV: Any = {"n_ctx": 1024, "max_parallel": 2, "kv_type": "f16", "device": "cpu"}
APART: Any = {**KV, "isolation": "process", "n_threads": 1}

needs_workers = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


def test_a_model_is_in_the_ledger_while_it_is_loaded():
    before = memory().models
    with Model.load(**KV) as model:
        (found,) = [each for each in memory().models if each not in before]
        (share,) = found.shares
        per_token = model.info()["n_layers"] * share_of(model)
        assert (found.model, found.path) == ("tiny-chat", model.info()["path"])
        assert (share.device, share.kv) == ("cpu", 2 * 1024 * per_token)
        assert share.weights + share.mapped >= 0.9 * model.info()["size_bytes"]
        assert share.cache == 0
        model.generate("Once upon a time", max_tokens=4)
        model.pin("The cat sat on the mat")
        assert next(m for m in memory().models if m not in before).shares[0].cache > 0
    assert memory().models == before


def share_of(model: Model) -> int:
    from tabagent_model import inspect

    description = inspect(model.info()["path"])
    return description.kv_bytes_per_token // description.n_layers


def test_two_models_are_two_lines_and_one_that_nobody_holds_is_gone():
    before = len(memory().models)
    one, two = Model.load(**KV), Model.load(n_ctx=512, max_parallel=1)
    assert len(memory().models) == before + 2
    one.unload()
    assert len(memory().models) == before + 1
    del two
    gc.collect()
    assert len(memory().models) == before


def test_a_reload_replaces_the_line():
    with Model.load(**KV) as model:
        before = memory().models
        model.reload(n_ctx=512)
        after = memory().models
    assert len(after) == len(before)
    assert after[-1].shares[0].kv * 2 == before[-1].shares[0].kv


def test_a_vocabulary_alone_is_no_line():
    before = memory().models
    with Model.load(vocab_only=True) as model:
        assert model.tokenize("a")
        assert memory().models == before


def test_devices_tell_what_is_ours_and_what_is_others():
    with Model.load(**KV):
        report = memory()
    cpu, *gpus = report.devices
    assert [each.device for each in gpus] == [g.device for g in hardware.detect().usable_gpus]
    assert (cpu.device, cpu.reserved) == ("cpu", 0)
    assert cpu.models == sum(m.shares[0].own for m in report.models) > MIB
    assert 0 < cpu.free < cpu.total
    assert 0 < cpu.others < cpu.total
    assert json.loads(json.dumps(report.to_dict()))["devices"][0]["device"] == "cpu"
    lines = str(report).splitlines()
    assert lines[0].startswith("cpu: ")
    assert lines[len(report.devices)].startswith("  tiny-chat on cpu: weights ")


# Models in workers


SMALL = """
import json, sys; sys.path[:] = json.loads(sys.argv[1])
from dataclasses import replace
from tabagent_model import hardware
from tabagent_model.isolation import worker

memory = hardware.Memory(16 << 30, 300 << 20)
worker.LEDGER._detect = lambda: replace(hardware.detect(), memory=memory, gpus=())
worker.main(sys.argv[2:])
"""


@pytest.fixture
def other_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """300 MiB are free, here and as workers see it, and another load has reserved so many of
    them."""
    small = replace(hardware.detect(), memory=Memory(16 * GIB, 300 * MIB), gpus=())
    monkeypatch.setattr(LEDGER, "_detect", lambda: small)
    monkeypatch.setattr(spawn, "_PROGRAM", SMALL)
    yield lambda size: LEDGER.promise("other", {"cpu": size}, {}) and None
    LEDGER.release("other")


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "_crashes", {})
    monkeypatch.setattr(respawn, "BACKOFF_S", 0.0)


@needs_workers
def test_a_model_in_a_worker_holds_what_one_in_this_process_holds():
    with Model.load(**APART) as away, Model.load(**KV) as here:
        for model in (away, here):
            model.generate("Once upon a time", max_tokens=4)
            model.pin("The cat sat on the mat")
        there, ours = memory().models
        assert there.shares == ours.shares
        assert ours.worker is None
        assert there.worker is not None
        assert there.worker.pid == away.info()["worker_pid"]
        assert MIB < (there.worker.private or 0) < (there.worker.resident or 0) < GIB
        told = json.loads(json.dumps(memory().to_dict()["models"][0]["worker"]))
        assert told.keys() == {"pid", "resident", "private"}
        assert f"tiny-chat in process {there.worker.pid}: " in str(memory())
    assert memory().models == ()


@needs_workers
@pytest.mark.usefixtures("lenient")
def test_a_worker_that_died_is_no_line_and_the_next_one_is():
    with Model.load(**APART) as model:
        first = memory().models[0].worker
        stream = model.stream("a", max_tokens=-1, ignore_eos=True, overflow="shift")
        next(stream)
        os.kill(model.info()["worker_pid"], signal.SIGKILL)
        with pytest.raises(WorkerCrashedError):
            stream.collect()
        assert model.generate("a", max_tokens=2).tokens
        (line,) = memory().models
        assert (line.worker != first, line.shares[0].kv > 0) == (True, True)
        assert memory().devices[0].reserved == 0


@needs_workers
@pytest.mark.usefixtures("lenient")
def test_a_worker_that_hangs_is_told_of_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tabagent_model.isolation.memory.GLIMPSE_S", 0.05)
    with Model.load(**APART) as model:
        before = memory().models
        os.kill(model.info()["worker_pid"], signal.SIGSTOP)
        assert [each.shares for each in memory().models] == [each.shares for each in before]


@needs_workers
def test_a_load_in_a_worker_has_reserved_when_it_begins():
    seen: list[int] = []
    with Model.load(**APART, on_progress=lambda _: seen.append(memory().devices[0].reserved)):
        held = memory().models[0].shares[0].needed
    assert abs(seen[0] - held) < 4 * MIB
    assert memory().devices[0].reserved == 0


@needs_workers
def test_what_other_loads_have_reserved_is_not_there_for_a_worker(other_load):
    other_load(150 * MIB)
    with pytest.raises(OutOfMemoryError, match="`tiny-chat` with 32 x 2048 tokens") as caught:
        Model.load(**{**APART, "n_ctx": 2048, "max_parallel": 32})
    assert (caught.value.free, caught.value.unloading) == (150 * MIB, {})
    with Model.load(**{**APART, "n_ctx": 2048, "max_parallel": 32, "n_ctx_min": 64}) as model:
        assert model.info()["n_ctx"] < 2048
        assert model.info()["failed_rungs"][0].startswith("the CPU: needs ")
    assert [device.reserved for device in memory().devices] == [150 * MIB]


@needs_workers
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_refusal_says_what_unloading_either_kind_would_free(isolation: Any, other_load):
    with Model.load(**APART), Model.load(BUNDLED_MODEL.with_name("tiny-draft.gguf"), **KV):
        other_load(260 * MIB)
        with pytest.raises(OutOfMemoryError, match="unloading `tiny-chat` would free") as caught:
            Model.load(**{**KV, "isolation": isolation})
        held = {each.model: each.shares[0].own for each in memory().models}
        assert caught.value.unloading == held
        assert held.keys() == {"tiny-chat", "tiny-draft"}
