"""Requests that are left at every possible moment, on a real model (fault cases X01 to X09).

After each case the reference prompt still gets the reference answer, and nobody is left inside.
What the loops and threads of Python make of it is tested with a scripted engine in `test_stream`,
Ctrl-C (X06) in `test_courier` and `test_life`, and what cancelling does to a cache (X09) in
`test_warm_cache`.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_memories import N_CTX, tiny_command_r
from tabagent_model import AsyncModel, AsyncTextStream, Completion, Model
from tabagent_model.errors import ModelNotLoadedError

pytestmark = pytest.mark.model

SLOTS = 2
REFERENCE = "Once upon a time"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = GREEDY | {"max_tokens": -1}
SHORT: dict[str, Any] = GREEDY | {"max_tokens": 24}
CONFIG: dict[str, Any] = {"n_ctx": 1024, "max_parallel": SLOTS, "n_threads": 1}


@pytest.fixture(scope="module")
def reference() -> Completion:
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1) as fresh:
        return fresh.generate(REFERENCE, **GREEDY)


@pytest.fixture
def model(reference: Completion) -> Iterator[Model]:
    with Model.load(**CONFIG) as model:
        yield model
        assert until(lambda: is_idle(model))
        assert model.generate([REFERENCE] * 4, **GREEDY) == [reference] * 4


@pytest.fixture
def async_model(reference: Completion) -> Iterator[AsyncModel]:
    model = asyncio.run(AsyncModel.load(**CONFIG))
    yield model
    assert until(lambda: is_idle(model))
    assert asyncio.run(model.generate([REFERENCE] * 4, **GREEDY)) == [reference] * 4
    asyncio.run(model.close())


def is_idle(model: Model | AsyncModel) -> bool:
    metrics = model.metrics()
    return (metrics["running"], metrics["waiting"]) == (0, 0)


def until(is_so: Callable[[], bool]) -> bool:
    for _ in range(20_000):
        if is_so():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.parametrize("pieces", [0, 1, 20])
def test_x01_a_stream_that_is_left_is_cancelled_once_and_its_place_is_free(
    model: Model, pieces: int
):
    with model.stream(REFERENCE, **LONG) as stream:
        for _ in range(pieces):
            next(stream)
    assert is_idle(model)
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.tokens) >= pieces
    left = stream.result
    for again in (stream.cancel, stream.close, stream.cancel):
        again()
    assert stream.result is left
    assert list(stream) == []


def test_x01_cancelling_after_the_end_changes_nothing(model: Model, reference: Completion):
    stream = model.stream(REFERENCE, **GREEDY)
    assert stream.collect() == reference
    stream.cancel()
    stream.close()
    assert stream.result == reference


def test_x02_a_long_prompt_is_given_up_in_the_middle(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_command_r().to_bytes())
    with Model.load(path, n_ctx=N_CTX, n_batch=64, max_parallel=1, n_threads=1) as model:
        before = model.generate(REFERENCE, **GREEDY)
        steps = model.metrics()["steps"]
        with model.stream([7] * (N_CTX - 8), **GREEDY):
            assert until(lambda: model.metrics()["steps"] > steps)
        assert is_idle(model)
        assert model.metrics()["steps"] - steps < (N_CTX - 8) // 64
        # Nothing of it is in the way: there is room for as many tokens as ever.
        assert len(model.generate([5] * (N_CTX - 8), **LONG).tokens) == 8
        assert model.generate(REFERENCE, **GREEDY) == before


async def by_task(model: AsyncModel) -> None:
    task = asyncio.ensure_future(model.generate(REFERENCE, **LONG))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_wait_for(model: AsyncModel) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(model.generate(REFERENCE, **LONG), 0.005)


async def by_break(model: AsyncModel) -> None:
    async with model.stream(REFERENCE, **LONG) as stream:
        async for _ in stream:
            break


async def by_aclose(model: AsyncModel) -> None:
    stream = model.stream(REFERENCE, **LONG)
    await anext(stream)
    await stream.aclose()


async def by_crowd(model: AsyncModel) -> None:
    task = asyncio.ensure_future(model.generate([REFERENCE] * 6, **LONG))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


WAYS = [by_task, by_wait_for, by_break, by_aclose, by_crowd]


@pytest.mark.parametrize("way", WAYS)
def test_x03_whichever_way_it_is_left_its_place_is_free(async_model: AsyncModel, way: Any):
    async def leave() -> None:
        await way(async_model)
        assert is_idle(async_model)  # already when the `await` is over

    asyncio.run(leave())


def test_x03_a_stream_that_nobody_holds_any_more_is_given_up(
    async_model: AsyncModel, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("WARNING", logger="asyncio")  # "Task was destroyed but it is pending"

    async def drop() -> None:
        stream: AsyncTextStream | None = async_model.stream(REFERENCE, **LONG)
        await anext(stream)
        stream = None
        gc.collect()

    asyncio.run(drop())
    assert until(lambda: is_idle(async_model))
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_x04_a_request_that_is_cancelled_in_the_queue_is_never_computed(model: Model):
    running = [model.stream(REFERENCE, **LONG) for _ in range(SLOTS)]
    for stream in running:
        next(stream)
    computed = model.metrics()["prompt_tokens"]
    waiting = [model.stream("The cat", **LONG) for _ in range(5)]
    assert model.metrics()["waiting"] == 5
    for stream in waiting:
        stream.close()
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.usage.completion_tokens == 0
    assert (model.metrics()["running"], model.metrics()["waiting"]) == (SLOTS, 0)
    for stream in running:
        stream.close()
    assert model.metrics()["prompt_tokens"] == computed


async def test_x05_an_unload_whose_task_is_cancelled_is_an_unload_all_the_same():
    model = await AsyncModel.load(**CONFIG)
    stream = model.stream(REFERENCE, **LONG)
    await anext(stream)
    task = asyncio.ensure_future(model.unload())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ModelNotLoadedError):
        await stream.collect()
    await model.unload()
    assert not model.is_loaded


def test_x07_a_thousand_cancels_at_random_moments_lose_no_place(model: Model):
    chance = random.Random(7)
    for _ in range(250):
        prompts = [REFERENCE[: chance.randint(1, 16)] for _ in range(4)]
        streams = [model.stream(prompt, **SHORT) for prompt in prompts]
        chance.shuffle(streams)
        for stream in streams:
            for _ in range(chance.choice((0, 0, 1, 3))):
                next(stream, None)
            stream.cancel()
            if chance.random() < 0.5:
                stream.close()
        for stream in streams:
            stream.close()
    assert is_idle(model)
    # Each place is there, and each is whole.
    crowd = [model.stream("The cat", **LONG) for _ in range(SLOTS)]
    for stream in crowd:
        next(stream)
    assert model.metrics()["running"] == SLOTS
    assert {stream.collect().usage.total_tokens for stream in crowd} == {model.n_ctx}
