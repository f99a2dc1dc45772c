"""What is remembered of files in workers: of which, for what they are computed with, how long."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tabagent_model import (
    Model,
    ModelConfig,
    ModelQuarantinedError,
    WorkerCrashedError,
    backends,
)
from tabagent_model.backends._note import library_name
from tabagent_model.isolation import verdicts
from tabagent_model.isolation.verdicts import Verdict
from tabagent_model.params import BUNDLED_MODEL
from workers import ANSWER

needs_workers = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


def verdict() -> Verdict:
    return Verdict(ModelConfig(), [str(BUNDLED_MODEL)])


def is_quarantined() -> bool:
    """As another process hears of it, which has only what was written down."""
    for here in (verdicts._crashes, verdicts._verdicts, verdicts._resting):
        here.clear()
    try:
        verdict().check()
    except ModelQuarantinedError:
        return True
    return False


def death(how: str) -> WorkerCrashedError:
    signal = {"hung": "SIGKILL", "no memory": "SIGABRT"}.get(how, how)
    words = "memory allocation of 39 bytes failed" if how == "no memory" else None
    return WorkerCrashedError(
        f"it died of {how}", signal=signal, was_hanging=how == "hung", last_line=words
    )


# Which deaths are remembered


@pytest.mark.parametrize(
    ("deaths", "is_of_the_file"),
    [
        (["SIGSEGV", "SIGABRT", "SIGSEGV"], True),
        (["hung", "hung", "SIGBUS"], True),
        (["SIGKILL", "SIGKILL", "SIGKILL"], False),
        (["SIGSEGV", "SIGTERM", "SIGSEGV"], False),
        (["no memory", "no memory", "no memory"], False),
    ],
    ids=str,
)
def test_only_deaths_that_the_file_may_be_to_blame_for_are_remembered(
    deaths: list[str], is_of_the_file: bool
):
    first, second, refusal = [verdict().note_crash(death(how)) for how in deaths]
    assert (first, second) == (None, None)
    assert isinstance(refusal, ModelQuarantinedError)
    assert refusal.retry_after_s == (None if is_of_the_file else 60.0)
    with pytest.raises(ModelQuarantinedError, match=f"it died of {deaths[-1]}"):
        verdict().check()
    assert is_quarantined() == is_of_the_file


@needs_workers
def test_a_worker_that_the_system_kills_thrice_rests_and_is_tried_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verdicts, "REST_S", 1.0)
    for _ in range(3):
        with pytest.raises(WorkerCrashedError, match="SIGKILL"):
            model.generate("SIGKILL")
    for use in (lambda: model.generate("Count"), lambda: Model.load(model.config)):
        with pytest.raises(ModelQuarantinedError, match="is not started for 1 s") as caught:
            use()
        assert 0 < (caught.value.retry_after_s or 0) <= 1.0
    time.sleep(1.1)
    assert model.generate("Count").text == ANSWER
    assert not is_quarantined()
    with Model.load(model.config) as other:
        assert other.generate("Count").text == ANSWER


@needs_workers
def test_a_probe_that_goes_well_ends_a_rest(model: Model):
    for _ in range(3):
        with pytest.raises(WorkerCrashedError):
            model.generate("SIGKILL")
    with pytest.raises(ModelQuarantinedError):
        Model.load(model.config)
    with Model.load(model.config, probe=True) as again:
        assert again.generate("Count").text == ANSWER


# What a verdict holds for


@pytest.fixture
def backend(tmp_path: Path) -> Path:
    """A file where a GPU backend would lie. It is looked at, and not opened."""
    library = tmp_path / "backends" / "cuda" / library_name("cuda")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a backend")
    return library


def cards(driver: str, *uuids: str) -> dict[str, Any]:
    found = [{"name": "RTX 4090", "uuid": uuid} for uuid in uuids]
    return {"gpus": found, "driver": driver, "reason": None}


def test_a_verdict_of_the_cpu_is_none_of_a_backend_that_was_installed_since(tmp_path: Path):
    verdict().passed()
    assert verdict().is_tried
    library = tmp_path / "backends" / "vulkan" / library_name("vulkan")
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a backend")
    assert not verdict().is_tried
    library.unlink()
    assert verdict().is_tried


def test_a_quarantine_ends_with_the_backend_that_was_the_cause(backend: Path):
    verdict().quarantine(death("SIGSEGV"))
    assert is_quarantined()
    backend.write_bytes(b"a better one")
    assert not is_quarantined()


@pytest.mark.parametrize(
    "other", [cards("590.1", "GPU-1"), cards("580.65", "GPU-2")], ids=["driver", "card"]
)
def test_another_driver_or_card_is_another_matter(
    backend: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends._core, "detect_gpus", lambda: cards("580.65", "GPU-1"))
    verdict().quarantine(death("SIGSEGV"))
    assert is_quarantined()
    monkeypatch.setattr(backends._core, "detect_gpus", lambda: other)
    assert not is_quarantined()


@pytest.mark.parametrize("name", ["TABAGENT_GPU_BACKEND", "CUDA_VISIBLE_DEVICES"])
@pytest.mark.usefixtures("backend")
def test_a_choice_of_another_backend_or_card_is_another_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(name, raising=False)
    verdict().quarantine(death("SIGSEGV"))
    assert is_quarantined()
    monkeypatch.setenv(name, "none")
    assert not is_quarantined()


def test_another_cpu_module_is_another_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TABAGENT_CPU_VARIANT", raising=False)
    verdict().quarantine(death("SIGILL"))
    assert is_quarantined()
    monkeypatch.setenv("TABAGENT_CPU_VARIANT", "x64")
    assert not is_quarantined()
    monkeypatch.delenv("TABAGENT_CPU_VARIANT")
    assert is_quarantined()
    module = tmp_path / "backends" / "cpu" / library_name("cpu-x64")
    module.parent.mkdir(parents=True)
    module.write_bytes(b"one that was compiled here")
    assert not is_quarantined()


def test_what_a_verdict_holds_for_is_told_without_opening_a_library(backend: Path):
    backend.chmod(0)
    changed = backend.stat().st_mtime_ns
    assert backends.traces()[0] == f"cuda {backend.name} of 9 bytes, changed at {changed}"
