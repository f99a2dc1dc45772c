"""Models in workers whose engine is scripted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tabagent_model import Model
from tabagent_model.isolation import respawn, spawn, verdicts
from workers import WORKER


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """The workers of a test are scripted, and may do something more when they load."""
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "_crashes", {})
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(verdicts, "_resting", {})
    monkeypatch.setattr(respawn, "BACKOFF_S", 0.0)

    def loading(what: str) -> None:
        monkeypatch.setattr(spawn, "_PROGRAM", WORKER.replace("LOADING", what))

    loading("pass")
    return loading


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.load(isolation="process", queue_size=4) as model:
        yield model
