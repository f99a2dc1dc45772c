"""The ledger: what each loaded model holds, as llama.cpp allocated it, and who is left after it."""

from __future__ import annotations

import gc
import json

import pytest

from tabagent_model import Model, memory
from tabagent_model.hardware import MIB

pytestmark = pytest.mark.model

KV = {"n_ctx": 1024, "max_parallel": 2, "kv_type": "f16"}


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
    (cpu,) = report.devices
    assert (cpu.device, cpu.reserved) == ("cpu", 0)
    assert cpu.models == sum(m.shares[0].own for m in report.models) > MIB
    assert 0 < cpu.free < cpu.total
    assert 0 < cpu.others < cpu.total
    assert json.loads(json.dumps(report.to_dict()))["devices"][0]["device"] == "cpu"
    first, second, *_ = str(report).splitlines()
    assert first.startswith("cpu: ")
    assert second.startswith("  tiny-chat on cpu: weights ")
