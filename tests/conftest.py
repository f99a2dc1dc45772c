"""What tests share: the two faces behind one interface, and the bundled model."""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from tabagent_model import (
    AsyncChatStream,
    AsyncModel,
    AsyncTextStream,
    ChatStream,
    Model,
    TextStream,
    _attention,
    _layouts,
)
from tabagent_model.placement._ledger import LEDGER
from tabagent_model.testing import ScriptedContext

# A run in the background begins with Ctrl-C ignored, and so would the children of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


Stream = TextStream | AsyncTextStream | ChatStream | AsyncChatStream


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schemas", type=int, default=500, help="random schemas to answer to")


@pytest.fixture
def num_schemas(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--schemas"))


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home in which nothing was measured, and a process that has not asked yet."""
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.delenv("TABAGENT_CALIBRATE", raising=False)
    monkeypatch.setattr(_attention, "_known", {})
    monkeypatch.setattr(_layouts, "_known", {})


class Face:
    """Model or AsyncModel, so that one test body runs on both."""

    def __init__(self, model: Model | AsyncModel) -> None:
        self.model = model

    async def call(self, name: str, *args: Any, **fields: Any) -> Any:
        method = functools.partial(getattr(self.model, name), *args, **fields)
        return await (method() if isinstance(self.model, AsyncModel) else asyncio.to_thread(method))

    async def generate(self, *args: Any, **fields: Any) -> Any:
        return await self.call("generate", *args, **fields)

    async def pieces(self, stream: Stream) -> AsyncIterator[Any]:
        if isinstance(stream, (AsyncTextStream, AsyncChatStream)):
            async for piece in stream:
                yield piece
        else:
            while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                yield piece

    async def close(self, stream: Stream) -> None:
        if isinstance(stream, (AsyncTextStream, AsyncChatStream)):
            await stream.aclose()
        else:
            await asyncio.to_thread(stream.close)


@pytest.fixture(params=[Model, AsyncModel], ids=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[Callable[[ScriptedContext], Face]]:
    contexts: list[ScriptedContext] = []

    def make(context: ScriptedContext) -> Face:
        contexts.append(context)
        return Face(request.param(context))

    yield make
    for context in contexts:
        context.close()
    gc.collect()


@pytest.fixture(scope="session")
def tiny_model() -> Iterator[Model]:
    with Model.load(n_ctx=512, max_parallel=4) as model:
        yield model


@pytest.fixture
def empty_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no other test had a model that stays loaded."""
    monkeypatch.setattr(LEDGER, "_entries", WeakKeyDictionary())
    monkeypatch.setattr(LEDGER, "_reserved", {})
