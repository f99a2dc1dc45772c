import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from conftest import Face
from tabagent_model import (
    AsyncModel,
    GenerationCancelled,
    Model,
    ModelNotLoadedError,
    SamplingError,
    TabAgentModelError,
)
from tabagent_model.serve.service import Service
from tabagent_model.testing import ScriptedContext

MakeFace = Callable[[ScriptedContext], Face]


def endless(prompt: Any) -> Iterator[str]:
    return itertools.repeat("la ")


def is_idle(context: ScriptedContext) -> bool:
    metrics = context.metrics()
    return (metrics["running"], metrics["waiting"]) == (0, 0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def context() -> Iterator[ScriptedContext]:
    context = ScriptedContext(endless, delay=0.001, n_seq_max=1)
    yield context
    context.close()


async def test_pieces_join_to_the_answer(face: MakeFace):
    model = face(ScriptedContext(["Be", "", "cause", "!"]))
    stream = model.model.stream("Why?")
    pieces = [piece async for piece in model.pieces(stream)]
    assert pieces == ["Be", "cause", "!"]
    assert stream.result == await model.generate("Why?")
    assert (stream.text, stream.tokens) == (stream.result.text, stream.result.tokens)
    assert stream.usage == stream.result.usage
    assert [piece async for piece in model.pieces(stream)] == []


async def test_generate_can_give_a_stream(face: MakeFace):
    model = face(ScriptedContext(["a", "b"]))
    stream = await model.generate("x", stream=True)
    assert [piece async for piece in model.pieces(stream)] == ["a", "b"]


async def test_a_stream_can_be_collected(face: MakeFace):
    model = face(ScriptedContext(["a", "b"]))
    heard: list[str] = []
    collected = model.model.stream("x").collect(heard.append)
    answer = await collected if isinstance(model.model, AsyncModel) else collected
    assert (answer.text, heard) == ("ab", ["a", "b"])


async def test_there_is_no_result_before_the_end(face: MakeFace, context: ScriptedContext):
    model = face(context)
    stream = model.model.stream("x")
    async for _ in model.pieces(stream):
        break
    with pytest.raises(TabAgentModelError, match="not complete yet"):
        _ = stream.result
    assert stream.text.startswith("la ")
    await model.close(stream)
    assert stream.result.finish_reason == "cancelled"


async def test_leaving_early_aborts_the_request(context: ScriptedContext):
    with Model(context).stream("Why?") as pieces:
        for _ in pieces:
            break
    assert context.aborted == [pieces.request_id]
    assert is_idle(context)
    assert pieces.result.finish_reason == "cancelled"


async def test_leaving_early_aborts_the_request_async(context: ScriptedContext):
    async with AsyncModel(context).stream("Why?") as pieces:
        async for _ in pieces:
            break
    assert context.aborted == [pieces.request_id]
    assert is_idle(context)
    assert pieces.result.finish_reason == "cancelled"


async def test_a_stream_that_was_read_to_its_end_aborts_nothing(face: MakeFace):
    context = ScriptedContext()
    model = face(context)
    stream = model.model.stream("x")
    assert len([piece async for piece in model.pieces(stream)]) == 2
    await model.close(stream)
    await model.close(stream)
    assert context.aborted == []


async def test_break_and_aclose_free_the_place(context: ScriptedContext):
    async with aclosing(AsyncModel(context).stream("x")) as pieces:
        async for _ in pieces:
            break
    assert is_idle(context)


async def test_an_error_in_the_middle_comes_after_the_pieces_before_it(face: MakeFace):
    context = ScriptedContext(["a", "b", SamplingError("no token is left")])
    model = face(context)
    stream, pieces = model.model.stream("x"), []
    with pytest.raises(SamplingError, match="no token is left"):
        async for piece in model.pieces(stream):
            pieces.append(piece)
    assert (pieces, stream.text, context.aborted) == (["a", "b"], "ab", [])
    with pytest.raises(SamplingError):
        _ = stream.result
    await model.close(stream)


async def test_cancel_ends_the_iteration(face: MakeFace, context: ScriptedContext):
    model = face(context)
    stream = model.model.stream("x")
    async for _ in model.pieces(stream):
        stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert is_idle(context)


async def test_an_unload_ends_the_streams(face: MakeFace, context: ScriptedContext):
    model = face(context)
    stream = model.model.stream("x")
    with pytest.raises((GenerationCancelled, ModelNotLoadedError)):
        async for _ in model.pieces(stream):
            await model.call("unload")
    await model.close(stream)


async def test_a_context_that_dies_ends_every_stream(face: MakeFace):
    class Dying(ScriptedContext):
        def next_events(self) -> Any:
            if self.submitted:
                raise SamplingError("the engine is broken")
            return super().next_events()

        def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
            super().submit(request_id, prompt, params, *chat)

    context = Dying(endless, delay=0.001)
    model = face(context)
    for _ in range(2):
        with pytest.raises(SamplingError, match="the engine is broken"):
            await model.generate("x")


async def test_a_stream_that_is_dropped_frees_its_place(face: MakeFace, context: ScriptedContext):
    model = face(context)
    stream = model.model.stream("x")
    async for _ in model.pieces(stream):
        break
    request_id = stream.request_id
    del stream, _
    gc.collect()
    await until(lambda: is_idle(context))
    assert context.aborted == [request_id]


async def test_an_async_stream_is_submitted_when_it_is_first_read(context: ScriptedContext):
    stream = AsyncModel(context).stream("x")
    assert context.submitted == []
    await anext(stream)
    assert [submitted.prompt for submitted in context.submitted] == ["x"]
    await stream.aclose()


async def test_an_async_stream_that_was_never_read_submits_nothing(context: ScriptedContext):
    stream = AsyncModel(context).stream("x")
    await stream.aclose()
    assert [piece async for piece in stream] == []
    assert context.submitted == []


# Where a request may be when it is cancelled, and how.


async def reading(model: AsyncModel) -> None:
    async for _ in model.stream("x"):
        pass


async def reading_in_a_block(model: AsyncModel) -> None:
    async with model.stream("x") as pieces:
        async for _ in pieces:
            pass


async def generating(model: AsyncModel) -> None:
    await model.generate("x")


async def generating_many(model: AsyncModel) -> None:
    await model.generate(["x", "y", "z"])


WAYS = [reading, reading_in_a_block, generating, generating_many]


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_cancelled_in_decode_leaves_its_place_free(way: Any, context: ScriptedContext):
    task = asyncio.create_task(way(AsyncModel(context)))
    await until(lambda: context.metrics()["generated_tokens"] > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_idle(context)


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_cancelled_in_the_queue_is_never_decoded(way: Any, context: ScriptedContext):
    model = AsyncModel(context)
    async with model.stream("occupies the only place", max_tokens=-1) as other:
        await anext(other)
        task = asyncio.create_task(way(model))
        await until(lambda: len(context.submitted) > 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (context.metrics()["running"], context.metrics()["waiting"]) == (1, 0)
        assert context.metrics()["prompt_tokens"] == len(
            context.tokenize("occupies the only place")
        )


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_cancelled_while_a_step_takes_long_waits_for_its_place(
    way: Any, context: ScriptedContext
):
    task = asyncio.create_task(way(AsyncModel(context)))
    await until(lambda: context.metrics()["generated_tokens"] > 2)
    context.abort = lambda request_id: None  # type: ignore[method-assign]  # not noticed yet
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()  # impatience changes nothing
    del context.abort
    for submitted in context.submitted:
        context.abort(submitted.request_id)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_idle(context)


class SlowSubmit(ScriptedContext):
    """Its `submit` stands for the tokenizing of a very long prompt."""

    def __init__(self) -> None:
        super().__init__(endless, delay=0.001, n_ctx=100_000)
        self.began, self.go_on = threading.Event(), threading.Event()

    def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
        self.began.set()
        assert self.go_on.wait(10)
        super().submit(request_id, prompt, params, *chat)


LONG = "word " * 5000


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.generate(LONG),
        lambda model: model.generate([LONG, LONG]),
        lambda model: anext(model.stream(LONG)),
    ],
    ids=["generate", "generate_many", "stream"],
)
async def test_a_task_cancelled_while_it_is_submitting_leaks_nothing(use: Any):
    context = SlowSubmit()
    async with AsyncModel(context) as model:
        task = asyncio.ensure_future(use(model))
        await until(context.began.is_set)
        task.cancel()
        await asyncio.sleep(0.005)
        assert not task.done()
        context.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_idle(context)
        assert sorted(context.aborted) == [s.request_id for s in context.submitted]


async def test_a_long_prompt_does_not_hold_up_the_event_loop():
    context = SlowSubmit()
    async with AsyncModel(context) as model:
        task = asyncio.create_task(model.generate(LONG, max_tokens=3))
        await until(context.began.is_set)  # the loop runs, while the submit does not go on
        context.go_on.set()
        assert (await task).text == "la la la "


async def test_a_refused_long_prompt_is_an_error_and_can_be_cancelled():
    context = SlowSubmit()
    context.n_ctx = 10
    async with AsyncModel(context) as model:
        stream = model.stream(LONG)
        task = asyncio.ensure_future(anext(stream))
        await until(context.began.is_set)
        task.cancel()
        context.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TabAgentModelError, match="does not fit"):
            await model.generate(LONG)


async def test_a_timeout_frees_the_place(context: ScriptedContext):
    model = AsyncModel(context)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(model.generate("x", max_tokens=-1), 0.02)
    assert is_idle(context)
    if hasattr(asyncio, "timeout"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), model.stream("x", max_tokens=-1) as pieces:
                async for _ in pieces:
                    pass
        assert is_idle(context)


async def test_cancelling_at_every_moment_leaks_nothing(context: ScriptedContext):
    """Each round lets the event loop turn once more before the cancel strikes."""
    model = AsyncModel(context)
    for way, turns in itertools.product(WAYS, range(12)):
        task = asyncio.create_task(way(model))
        for _ in range(turns):
            await asyncio.sleep(0.0003)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_idle(context)


async def test_a_cancelled_stream_can_be_closed_again(context: ScriptedContext):
    async with AsyncModel(context).stream("x") as pieces:
        task = asyncio.ensure_future(pieces.collect())
        await until(lambda: pieces.text != "")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert pieces.result.finish_reason == "cancelled"


async def test_another_task_may_close_a_stream_that_is_being_read(context: ScriptedContext):
    pieces = AsyncModel(context).stream("x")
    task = asyncio.ensure_future(pieces.collect())
    await until(lambda: pieces.text != "")
    await pieces.aclose()
    assert is_idle(context)
    assert (await task).finish_reason == "cancelled"


async def test_two_who_read_a_chat_together_hear_its_end_once():
    lines = ['<tool_call>{"name": "f", "arguments": {"city": "Rome"}}', "</tool_call>"]
    context = ScriptedContext(lines, delay=0.001)
    stream = AsyncModel(context).stream_chat("x")
    heard: list[str] = []

    async def read() -> None:
        async for delta in stream:
            if delta.tool_call is not None:
                heard.append(delta.tool_call.arguments)

    await asyncio.gather(read(), read())
    assert heard == ['{"city": "Rome"}']
    context.close()


async def test_only_who_watches_a_chat_has_it_read_in_pieces():
    told: list[int] = []

    class Noting(ScriptedContext):
        def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
            told.extend(chat[1:])
            super().submit(request_id, prompt, params, *chat)

    at_the_end, in_pieces = 2**32 - 1, 50
    async with AsyncModel(Noting()) as model:
        await model.chat("x")
        async with model.stream_chat("x") as deltas:
            assert [delta async for delta in deltas]
    assert told == [at_the_end, in_pieces]
    async with AsyncModel(Noting()) as model:
        service = Service({"x": model})
        await service.chat("x").collect()
        async with service.chat("x") as answers:
            assert [item async for item in answers]
    assert told == [at_the_end, in_pieces] * 2


async def test_who_leaves_while_waiting_for_a_thread_waits_no_longer():
    """All threads that submit are kept by a worker that hangs, say."""
    context, go_on = ScriptedContext(), threading.Event()
    model = AsyncModel(context)
    kept = [model._open_courier.in_thread(lambda: assert_set(go_on)) for _ in range(8)]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(model.generate(LONG), 0.01)
    stream = model.stream(LONG)
    task = asyncio.ensure_future(stream.collect())
    await asyncio.sleep(0.001)
    await stream.aclose()
    go_on.set()
    for job in kept:
        job.result(10)
    with pytest.raises(TabAgentModelError, match="not complete"):
        await task
    assert context.submitted == []
    assert (await model.generate("x")).text == "Hello!"
    context.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


def test_another_thread_may_close_a_stream_that_is_being_read(context: ScriptedContext):
    pieces = Model(context).stream("x")
    next(pieces)
    closer = threading.Thread(target=pieces.close)
    closer.start()
    answer = pieces.collect()
    closer.join()
    assert answer.finish_reason == "cancelled"
    assert is_idle(context)


def test_streams_of_several_loops_in_several_threads():
    context = ScriptedContext(lambda prompt: [prompt, "!"], n_seq_max=3)
    model, texts = AsyncModel(context), {}

    async def read_all(name: str) -> None:
        async def read(prompt: str) -> None:
            async with model.stream(prompt) as pieces:
                texts[prompt] = "".join([piece async for piece in pieces])

        await asyncio.gather(*(read(f"{name}{number}") for number in range(10)))

    def run(name: str) -> None:
        asyncio.run(read_all(name))

    threads = [threading.Thread(target=run, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {f"{name}{n}": f"{name}{n}!" for name in "abcd" for n in range(10)}
    context.close()


def test_a_loop_that_is_closed_mid_stream_frees_the_place(context: ScriptedContext):
    model = AsyncModel(context)
    loop = asyncio.new_event_loop()
    stream = model.stream("x")
    loop.run_until_complete(anext(stream))
    loop.close()
    asyncio.run(until(lambda: is_idle(context)))
    assert context.aborted == [stream.request_id]
    assert asyncio.run(model.generate("y", max_tokens=2)).text == "la la "


def test_the_end_of_a_program_cancels_its_streams(context: ScriptedContext):
    async def main() -> None:
        task = asyncio.create_task(AsyncModel(context).generate("x"))
        await until(lambda: context.metrics()["generated_tokens"] > 0)
        del task

    asyncio.run(main())
    assert is_idle(context)


async def test_garbage_leaves_no_complaints(
    context: ScriptedContext, caplog: pytest.LogCaptureFixture
):
    model = AsyncModel(context)
    stream = model.stream("x")
    context.pause()
    waiting = stream.__anext__()
    waiting.send(None)  # somewhere inside, and never driven on
    waiting.close()
    del waiting, stream
    gc.collect()
    await until(lambda: is_idle(context))
    assert caplog.records == []
