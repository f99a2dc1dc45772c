"""Many users of one real model at once (fault cases K01 to K13).

After each case the reference prompt still gets the reference answer, and nobody is left inside.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gguf_memories import N_CTX, tiny_command_r
from tabagent_model import AsyncModel, Completion, Model, ModelConfig, PyModel
from tabagent_model.errors import ModelNotLoadedError, QueueFullError

pytestmark = pytest.mark.model

SLOTS, QUEUE = 4, 64
REFERENCE = "Once upon a time"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = GREEDY | {"max_tokens": -1}
# On a GPU larger batches have other kernels, and a near tie may fall otherwise in company.
CONFIG: dict[str, Any] = {
    **{"n_ctx": 256, "max_parallel": SLOTS, "n_threads": 1, "queue_size": QUEUE},
    "device": "cpu",
}

PROMPTS = [
    f"{beginning}{end}"
    for beginning in ("Once upon a time", "The cat", "Why is the sky", "One, two, three,")
    for end in (
        "",
        " in",
        " and the",
        " blue?",
        " four, five,",
        " there was a",
        "\n",
        " Ünïcödé 字",
    )
]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(**CONFIG) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> Completion:
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1) as fresh:
        return fresh.generate(REFERENCE, **GREEDY)


@pytest.fixture(autouse=True)
def still_answers_as_before(model: Model, reference: Completion) -> Iterator[None]:
    yield
    assert model.generate(REFERENCE, **GREEDY) == reference
    assert (model.metrics()["running"], model.metrics()["waiting"]) == (0, 0)


def in_threads(use: Callable[[int], Any], count: int) -> list[Any]:
    """All of them at the same moment; what one raises is raised."""
    all_there = threading.Barrier(count)

    def go(number: int) -> Any:
        all_there.wait(60)
        return use(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(go, range(count)))


@pytest.mark.parametrize("count", [1, SLOTS, SLOTS + 1, SLOTS + QUEUE + 1, 1000])
def test_k01_requests_at_once_are_answered_or_refused_and_none_is_lost(
    model: Model, reference: Completion, count: int
):
    streams, refused = [], 0
    for _ in range(count):
        try:
            streams.append(model.stream(REFERENCE, **GREEDY))
        except QueueFullError as error:
            assert error.hint
            refused += 1
    assert [stream.collect() for stream in streams] == [reference] * len(streams)
    assert len(streams) + refused == count
    assert len(streams) >= min(count, SLOTS + QUEUE)


async def test_k01_who_comes_first_is_served_first():
    ended: list[int] = []

    async def ask(model: AsyncModel, number: int) -> None:
        await model.generate(PROMPTS[number], **GREEDY)
        ended.append(number)

    async with await AsyncModel.load(**CONFIG | {"max_parallel": 1}) as model:
        await asyncio.gather(*(ask(model, number) for number in range(len(PROMPTS))))
    assert ended == list(range(len(PROMPTS)))


@pytest.mark.parametrize("slots", [4, 32])
def test_k02_thirty_two_prompts_together_are_answered_as_one_by_one(slots: int):
    assert len(set(PROMPTS)) == 32
    with Model.load(**CONFIG | {"max_parallel": slots}) as model:
        alone = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]
        assert model.generate(PROMPTS, **GREEDY) == alone
        assert model.generate(PROMPTS[::-1], **GREEDY) == alone[::-1]


def test_k03_sixty_four_threads_share_a_model(model: Model):
    expected = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]

    def ask(number: int) -> None:
        prompt = number % len(PROMPTS)
        assert model.generate(PROMPTS[prompt], **GREEDY) == expected[prompt]
        with model.stream(PROMPTS[prompt], **GREEDY) as stream:
            assert "".join(stream) == expected[prompt].text

    in_threads(ask, 64)


def test_k04_loops_in_several_threads_share_a_model(reference: Completion):
    model = asyncio.run(AsyncModel.load(**CONFIG))

    async def ask() -> list[Completion]:
        return await asyncio.gather(*(model.generate(REFERENCE, **GREEDY) for _ in range(8)))

    answers = in_threads(lambda _: asyncio.run(ask()), 4)
    assert answers == [[reference] * 8] * 4
    asyncio.run(model.close())


def test_k04_a_loop_that_is_closed_mid_stream_frees_the_place(reference: Completion):
    model = asyncio.run(AsyncModel.load(**CONFIG | {"max_parallel": 1, "n_ctx": 2048}))
    loop = asyncio.new_event_loop()
    stream = model.stream(REFERENCE, **LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    # The only place: it is not given to anybody before the loop is missed.
    assert asyncio.run(model.generate(REFERENCE, **GREEDY)) == reference
    assert model.metrics()["running"] == 0
    asyncio.run(model.close())


def test_k05_models_are_loaded_at_the_same_time(reference: Completion, tmp_path: Path):
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_command_r().to_bytes())

    def load(number: int) -> Completion | None:
        with Model.load(*[other] * (number % 2), n_ctx=256, n_threads=1) as model:
            answer = model.generate(REFERENCE, **GREEDY)
            return answer if number % 2 == 0 else None

    assert in_threads(load, 6) == [reference, None] * 3


@pytest.mark.parametrize("n_threads", [2, 4], ids=["halves of one thread", "halves of two"])
def test_k05_models_beside_each_other_answer_as_alone(n_threads: int):
    if n_threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"needs {n_threads} cores")
    at_length = {"max_tokens": 1200, "temperature": 0, "ignore_eos": True}
    # The longer one's turns have all threads; until some time after them nobody has half of them.
    prompts = [*PROMPTS[:3], "and so on " * 60]
    config = CONFIG | {"n_ctx": 2048, "n_threads": n_threads}

    def answers(model: Model, prompts: list[str]) -> list[str]:
        return [model.generate(prompt, **at_length).text for prompt in prompts]

    with (
        Model.load(**config) as one,
        Model.load(**config) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        alone = answers(one, prompts)
        before = one.metrics()["shared_steps"]
        beside = list(pool.map(answers, [one, other], [prompts, prompts[::-1]]))
        shared = [model.metrics()["shared_steps"] for model in (one, other)]
    assert [beside[0], beside[1][::-1]] == [alone, alone]
    assert before == 0 < min(shared)


def test_k06_an_unload_ends_whatever_runs_and_waits():
    model = Model.load(**CONFIG)
    streams = [model.stream(prompt, **LONG) for prompt in PROMPTS[:12]]
    next(streams[0])
    model.unload()
    assert [type(outcome(stream.collect)) for stream in streams] == [ModelNotLoadedError] * 12
    with pytest.raises(ModelNotLoadedError):
        model.generate(REFERENCE)


async def test_k06_an_async_unload_ends_whatever_runs_and_waits():
    model = await AsyncModel.load(**CONFIG)
    streams = [model.stream(prompt, **LONG) for prompt in PROMPTS[:12]]
    await anext(streams[0])
    readers = [asyncio.ensure_future(stream.collect()) for stream in streams]
    await asyncio.sleep(0)
    await model.unload()
    ends = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(end) for end in ends] == [ModelNotLoadedError] * 12
    with pytest.raises(ModelNotLoadedError):
        await model.generate(REFERENCE)


def test_k06_an_unload_from_many_threads_is_one():
    model = Model.load(**CONFIG)
    stream = model.stream(REFERENCE, **LONG)
    reports = in_threads(lambda _: model.unload(), 8)
    assert sorted(report["was_loaded"] for report in reports) == [False] * 7 + [True]
    assert isinstance(outcome(stream.collect), ModelNotLoadedError)


def test_k07_who_asks_during_reloads_gets_the_answer_or_hears_of_the_unload(reference: Completion):
    with Model.load(**CONFIG) as model:
        is_over = threading.Event()

        def ask(_: int) -> set[Any]:
            outcomes = set()
            while not is_over.is_set():
                answer = outcome(lambda: model.generate(REFERENCE, **GREEDY))
                outcomes.add(answer.text if answer == reference else type(answer))
            return outcomes

        with ThreadPoolExecutor(4) as pool:
            users = [pool.submit(ask, number) for number in range(4)]
            for n_ctx in range(256, 266):
                model.reload(n_ctx=n_ctx)
                assert model.n_ctx == n_ctx
            is_over.set()
        for user in users:
            assert user.result() <= {reference.text, ModelNotLoadedError}


def test_k08_long_requests_that_fill_all_memory_are_answered_as_alone(model: Model):
    prompts = PROMPTS[: 2 * SLOTS]
    alone = [model.generate(prompt, **LONG) for prompt in prompts]
    assert model.generate(prompts, **LONG) == alone
    assert {answer.finish_reason for answer in alone} == {"length"}


def test_k09_a_callback_may_ask_the_same_model(model: Model, reference: Completion):
    inner: list[Completion] = []
    ask = {"on_token": lambda piece: inner.append(model.generate(REFERENCE, **GREEDY))}
    assert model.generate(REFERENCE, **ask, **GREEDY) == reference
    assert inner
    assert inner == [reference] * len(inner)


async def test_k09_an_async_callback_may_ask_the_same_model(reference: Completion):
    inner: list[Completion] = []

    async def ask(piece: str) -> None:
        inner.append(await model.generate(REFERENCE, **GREEDY))

    # With one place only the callback has to wait until the answer it belongs to is complete.
    async with await AsyncModel.load(**CONFIG | {"max_parallel": 1}) as model:
        assert await model.generate(REFERENCE, on_token=ask, **GREEDY) == reference
    assert inner
    assert inner == [reference] * len(inner)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_k10_what_a_callback_raises_ends_that_request_only(
    model: Model, reference: Completion, error: type[BaseException]
):
    def fail(piece: str) -> None:
        raise error

    with model.stream("The cat", **LONG) as neighbour:
        next(neighbour)
        with pytest.raises(error):
            model.generate(REFERENCE, on_token=fail, **GREEDY)
        assert model.metrics()["running"] == 1
        assert next(neighbour)


def test_k10_a_callback_that_sleeps_holds_up_nobody_else(model: Model, reference: Completion):
    sleeps, wake_up = threading.Event(), threading.Event()

    def sleep(piece: str) -> None:
        sleeps.set()
        assert wake_up.wait(60)

    with ThreadPoolExecutor(1) as pool:
        sleeper = pool.submit(model.generate, REFERENCE, on_token=sleep, **GREEDY)
        assert sleeps.wait(60)
        assert [model.generate(REFERENCE, **GREEDY) for _ in range(10)] == [reference] * 10
        wake_up.set()
        assert sleeper.result() == reference


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_k11_what_the_progress_callback_raises_ends_the_load(error: type[BaseException]):
    def fail(fraction: float) -> None:
        raise error

    with pytest.raises(error):
        Model.load(on_progress=fail)


def test_k12_a_stream_keeps_its_model(reference: Completion):
    stream = Model.load(**CONFIG).stream(REFERENCE, **GREEDY)
    gc.collect()
    assert "".join(stream) == reference.text


async def test_k12_an_async_stream_keeps_its_model(reference: Completion):
    stream = (await AsyncModel.load(**CONFIG)).stream(REFERENCE, **GREEDY)
    gc.collect()
    assert "".join([piece async for piece in stream]) == reference.text


def test_k12_weights_that_are_unloaded_end_the_streams_of_their_contexts():
    with PyModel() as weights:
        weights.load(ModelConfig().path)
        model = Model(weights.create_context(256, n_threads=1))
        stream = model.stream(REFERENCE, **LONG)
        next(stream)
    assert isinstance(outcome(stream.collect), ModelNotLoadedError)


def test_k13_short_chats_do_not_wait_for_a_long_prompt(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_command_r().to_bytes())
    with (
        Model.load(path, n_ctx=N_CTX, n_batch=64, max_parallel=4, n_threads=1) as model,
        model.stream([7] * (N_CTX - 8), **GREEDY) as long,
    ):
        for number in range(5):
            assert len(model.generate([number, 1, 2], **GREEDY).tokens) == 12
        assert model.metrics()["prompt_tokens"] > N_CTX - 8  # it runs, and
        assert model.metrics()["generated_tokens"] == 5 * 12  # has nothing yet
        assert len(long.collect().tokens) == 8


def outcome(use: Callable[[], Any]) -> Any:
    try:
        return use()
    except Exception as error:
        return error
