import asyncio
import itertools
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from conftest import Face
from tabagent_model import (
    AsyncModel,
    Completion,
    ContextLimitExceededError,
    GenerationCancelled,
    GenerationConfig,
    GenerationTimeoutError,
    InvalidRequestError,
    Model,
    ModelConfig,
    ModelNotLoadedError,
    QueueFullError,
    SamplingError,
    TokenizationError,
)
from tabagent_model.testing import ScriptedContext, Submitted

MakeFace = Callable[[ScriptedContext], Face]


def echo(prompt: Any) -> list[str]:
    return [f"<{prompt}", ">"]


def endless(prompt: Any) -> Any:
    return itertools.repeat("la ")


async def test_the_answer_is_what_was_spoken(face: MakeFace):
    context = ScriptedContext(["Be", "cause", "!"])
    answer = await face(context).generate("Why?")
    assert answer == Completion("Because!", tuple(context.tokenize("Be cause !")[1:]), "stop") or (
        answer.text,
        len(answer.tokens),
        answer.finish_reason,
    ) == ("Because!", 3, "stop")


async def test_keywords_change_the_config_and_reach_the_engine(face: MakeFace):
    context = ScriptedContext()
    model = face(context)
    await model.generate("a", GenerationConfig(top_k=5, seed=1), seed=2, stop="END", timeout_s=9)
    chosen = GenerationConfig(top_k=5, seed=2, stop="END", timeout_s=9)
    expected = {name: value for name, value in vars(chosen).items() if value is not None}
    (submitted,) = context.submitted
    assert submitted == Submitted(submitted.request_id, "a", expected)


async def test_fields_that_are_none_are_not_sent(face: MakeFace):
    context = ScriptedContext()
    await face(context).generate("a")
    assert "timeout_s" not in context.submitted[0].params


async def test_a_list_of_ids_is_one_prompt(face: MakeFace):
    context = ScriptedContext(echo)
    model = face(context)
    assert (await model.generate([1, 2])).text == "<[1, 2]>"
    assert (await model.generate((3, 4))).text == "<[3, 4]>"
    assert (await model.generate(numpy.array([5, 6]))).text == "<[5, 6]>"
    assert [type(token) for token in context.submitted[-1].prompt] == [int, int]


async def test_a_list_of_prompts_is_answered_in_its_order(face: MakeFace):
    model = face(ScriptedContext(echo, n_seq_max=2))
    prompts = ["a", "b", "c", "d", "e"]
    answers = await model.generate(prompts)
    assert [answer.text for answer in answers] == [f"<{prompt}>" for prompt in prompts]
    assert answers == [await model.generate(prompt) for prompt in prompts]
    assert [a.text for a in await model.generate([[1, 2], [3]])] == ["<[1, 2]>", "<[3]>"]
    assert [a.text for a in await model.generate(("x",))] == ["<x>"]


async def test_a_crowd_larger_than_the_queue_goes_in_by_and_by(face: MakeFace):
    model = face(ScriptedContext(echo, n_seq_max=2, queue_size=3))
    prompts = [str(number) for number in range(50)]
    answers = await model.generate(prompts)
    assert [answer.text for answer in answers] == [f"<{prompt}>" for prompt in prompts]


async def test_a_full_queue_refuses_a_single_request(face: MakeFace):
    context = ScriptedContext(endless, n_seq_max=1, queue_size=1)
    context.pause()
    model = face(context)
    waiting = asyncio.create_task(model.generate("a"))
    while not context.submitted:
        await asyncio.sleep(0.001)
    with pytest.raises(QueueFullError):
        await model.generate("b")
    context.abort(context.submitted[0].request_id)
    with pytest.raises(GenerationCancelled):
        await waiting


async def test_if_one_of_a_crowd_fails_the_others_are_ended(face: MakeFace):
    def script(prompt: str) -> Any:
        return ["x", SamplingError("no token is left")] if prompt == "bad" else endless(prompt)

    context = ScriptedContext(script, delay=0.001)
    with pytest.raises(SamplingError, match="no token is left"):
        await face(context).generate(["a", "bad", "b"])
    assert (context.metrics()["running"], context.metrics()["waiting"]) == (0, 0)
    submitted = {s.prompt: s.request_id for s in context.submitted}
    assert sorted(context.aborted) == [submitted["a"], submitted["b"]]


async def test_a_cancel_while_a_failed_crowd_is_cleared_away_is_not_swallowed():
    def script(prompt: str) -> Any:
        return [SamplingError("no token is left")] if prompt == "bad" else endless(prompt)

    context = ScriptedContext(script, delay=0.001)
    abort, aborted = context.abort, threading.Event()
    context.abort = lambda request_id: aborted.set()  # type: ignore[method-assign]
    async with AsyncModel(context) as model:
        task = asyncio.create_task(model.generate(["a", "bad"]))
        while not aborted.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        abort(context.submitted[0].request_id)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_crowd_with_a_prompt_that_is_refused_leaves_nothing_behind(face: MakeFace):
    context = ScriptedContext(endless, n_ctx=8, delay=0.001)
    with pytest.raises(ContextLimitExceededError) as caught:
        await face(context).generate(["a", "b c d e f g h i j"], max_tokens=-1)
    assert (caught.value.max, caught.value.required) == (8, 11)
    assert context.metrics()["running"] == 0


async def test_several_answers_are_asked_for_with_a_seed_each(face: MakeFace):
    context = ScriptedContext({"a": ["A"], "b": ["B"]})
    model = face(context)
    last = 2**63 - 1
    assert [str(answer) for answer in await model.generate("a", n=3, seed=last)] == ["A"] * 3
    assert [str(answer) for answer in await model.generate(["a", "b"], n=2)] == ["A", "A", "B", "B"]
    seeds = [submitted.params["seed"] for submitted in context.submitted]
    assert seeds == [last, 0, 1, -1, -1, -1, -1]


@pytest.mark.parametrize("n", [0, -1, 129, 1000, "3", True, 1.0])
async def test_a_wrong_number_of_answers_is_refused(face: MakeFace, n: Any):
    with pytest.raises(InvalidRequestError, match="`n` must be a whole number between 1 and 128"):
        await face(ScriptedContext()).generate("a", n=n)


async def test_a_stream_is_one_answer(face: MakeFace):
    model = face(ScriptedContext()).model
    with pytest.raises(InvalidRequestError, match="a stream is one answer, and `n` asks for"):
        model.stream("a", n=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequestError, match="single prompt and one answer"):
        await face(ScriptedContext()).generate("a", n=3, stream=True)


async def test_streams_and_callbacks_are_for_single_prompts(face: MakeFace):
    model = face(ScriptedContext())
    for fields in ({"stream": True}, {"on_token": print}, {"on_token": print, "n": 2}):
        with pytest.raises(InvalidRequestError, match="single prompt"):
            await model.generate(["a", "b"], **fields)


async def test_the_callback_gets_every_piece(face: MakeFace):
    pieces: list[str] = []
    answer = await face(ScriptedContext(["a", "", "b"])).generate("x", on_token=pieces.append)
    assert (pieces, answer.text) == (["a", "b"], "ab")


async def test_a_callback_that_raises_ends_the_request(face: MakeFace):
    def broken(piece: str) -> None:
        raise ZeroDivisionError

    context = ScriptedContext(endless, delay=0.001)
    with pytest.raises(ZeroDivisionError):
        await face(context).generate("x", on_token=broken)
    assert context.aborted == [context.submitted[0].request_id]
    assert context.metrics()["running"] == 0


async def test_a_callback_that_returns_false_ends_the_answer(face: MakeFace):
    heard: list[str] = []

    def enough(piece: str) -> bool:
        heard.append(piece)
        return len(heard) < 3

    context = ScriptedContext(endless, delay=0.001)
    answer = await face(context).generate("x", on_token=enough)
    assert (len(heard), answer.finish_reason) == (3, "cancelled")
    assert context.metrics()["running"] == 0


async def test_an_async_callback_is_awaited():
    pieces: list[str] = []

    async def hear(piece: str) -> bool:
        await asyncio.sleep(0)
        pieces.append(piece)
        return len(pieces) < 2

    async with AsyncModel(ScriptedContext(endless, delay=0.001)) as model:
        answer = await model.generate("x", on_token=hear)
    assert (pieces, answer.finish_reason) == (["la ", "la "], "cancelled")


def test_a_callback_may_ask_the_same_model():
    with Model(ScriptedContext(echo)) as model:
        inner: list[str] = []
        model.generate("a", on_token=lambda piece: inner.append(model.generate(piece).text))
    assert inner == ["<<a>", "<>>"]


async def test_limits_of_the_request_reach_the_answer(face: MakeFace):
    model = face(ScriptedContext(endless, n_ctx=16, delay=0.0001))
    assert (await model.generate("x", max_tokens=0)).tokens == ()
    answer = await model.generate("x", max_tokens=2)
    assert (answer.text, answer.finish_reason) == ("la la ", "length")
    answer = await model.generate("x", max_tokens=-1)
    assert (answer.usage.total_tokens, answer.finish_reason) == (16, "length")


async def test_a_request_that_takes_too_long_is_an_error(face: MakeFace):
    model = face(ScriptedContext(endless, delay=0.005))
    with pytest.raises(GenerationTimeoutError) as caught:
        await model.generate("x", timeout_s=0.02)
    assert isinstance(caught.value, TimeoutError)


async def test_an_end_that_somebody_else_asked_for_is_an_error(face: MakeFace):
    context = ScriptedContext(lambda prompt: itertools.repeat("x"), delay=0.001)

    def meddle(piece: str) -> None:
        context.abort(context.submitted[0].request_id)

    with pytest.raises(GenerationCancelled):
        await face(context).generate("x", on_token=meddle)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "`prompt` must hold at least one token id"),
        ([1, -1], r"`prompt\[1\]` must be a token id, got -1"),
        ([1, 2**31], r"`prompt\[1\]` must be a token id, got 2147483648"),
        ([2**40], r"`prompt\[0\]` must be a token id"),
        ([1, True], r"`prompt\[1\]` must be a token id, got True"),
        ([1, 1.5], r"`prompt\[1\]` must be a token id, got 1.5"),
        ([1, "a"], r"`prompt\[1\]` must be a token id, got 'a'"),
        ([1, None], r"`prompt\[1\]` must be a token id, got None"),
        (b"bytes", "`prompt` must be text or a list of token ids, got a bytes"),
        (5, "`prompt` must be text or a list of token ids, got a int"),
        (None, "`prompt` must be text or a list of token ids, got a NoneType"),
        ({"a": 1}, "`prompt` must be text or a list of token ids, got a dict"),
        ({1, 2}, "`prompt` must be text or a list of token ids, got a set"),
        (["a", b"b"], "`prompt` must be text or a list of token ids, got a bytes"),
        (["a", 5], "`prompt` must be text or a list of token ids, got a int"),
    ],
    ids=repr,
)
async def test_a_prompt_of_the_wrong_kind_is_refused(face: MakeFace, prompt: Any, problem: str):
    context = ScriptedContext()
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        await face(context).generate(prompt)
    assert (caught.value.name, context.submitted) == ("prompt", [])


async def test_half_a_surrogate_pair_is_refused(face: MakeFace):
    model = face(ScriptedContext())
    for prompt in ("a\ud800", ["fine", "a\ud800"]):
        with pytest.raises(TokenizationError, match="surrogate pair at index 1"):
            await model.generate(prompt)
    with pytest.raises(TokenizationError):
        await model.call("tokenize", "a\ud800")


async def test_unknown_keywords_and_wrong_values_are_refused_before_anything_is_sent(
    face: MakeFace,
):
    context = ScriptedContext()
    model = face(context)
    with pytest.raises(InvalidRequestError, match="did you mean `max_tokens`"):
        await model.generate("a", max_token=5)
    with pytest.raises(InvalidRequestError, match="`top_p` must be a number between 0"):
        await model.generate("a", top_p=2)
    with pytest.raises(
        InvalidRequestError, match="`config` must be a GenerationConfig, got a dict"
    ):
        await model.generate("a", {"top_p": 1})
    assert context.submitted == []


async def test_text_becomes_ids_and_ids_become_text(face: MakeFace):
    context = ScriptedContext()
    model = face(context)
    for text in ("two words", "word " * 5000):
        ids = await model.call("tokenize", text)
        assert ids == context.tokenize(text)
        assert await model.call("tokenize", text, add_bos=False) == ids[1:]
        assert await model.call("detokenize", ids) == text
    assert await model.call("detokenize", []) == ""
    with pytest.raises(InvalidRequestError, match=r"`tokens\[0\]` must be a token id, got -1"):
        await model.call("detokenize", [-1])
    with pytest.raises(InvalidRequestError, match="`text` must be a string, got a int"):
        await model.call("tokenize", 5)


async def test_the_model_tells_about_itself(face: MakeFace):
    model = face(ScriptedContext(n_ctx=100, n_seq_max=3)).model
    assert (model.is_loaded, model.n_ctx, model.context_length) == (True, 100, 100)
    assert model.load_time_ms == 0.0
    assert model.info() == {
        "model": "",
        "is_loaded": True,
        "n_ctx": 100,
        "n_batch": 512,
        "n_threads": 1,
        "max_parallel": 3,
        "flash_attn": "on",
        "kv_type": "f16",
    }
    assert model.metrics()["running"] == 0
    assert model.config == ModelConfig()
    assert repr(model) == f"<{type(model).__name__} scripted>"


async def test_an_unloaded_model_refuses_everything(face: MakeFace):
    model = face(ScriptedContext())
    assert (await model.call("unload"))["was_loaded"] is True
    assert (await model.call("unload"))["was_loaded"] is False
    await model.call("close")
    assert not model.model.is_loaded
    with pytest.raises(ModelNotLoadedError, match="hint: load it again"):
        await model.generate("a")
    for use in (lambda: model.model.n_ctx, model.model.metrics, lambda: model.model.stream("a")):
        with pytest.raises(ModelNotLoadedError):
            use()
    with pytest.raises(ModelNotLoadedError):
        await model.call("tokenize", "a")


async def test_a_with_block_unloads():
    context = ScriptedContext()
    with Model(context) as model:
        assert model.generate("a").text == "Hello!"
    assert context.is_closed
    context = ScriptedContext()
    async with AsyncModel(context) as other:
        assert (await other.generate("a")).text == "Hello!"
    assert context.is_closed


def test_a_model_that_is_dropped_closes_its_context():
    context = ScriptedContext()
    model = Model(context)
    assert model.generate("a").text == "Hello!"
    del model
    assert context.is_closed


def test_a_model_lives_as_long_as_its_streams():
    context = ScriptedContext(["a", "b", "c"])
    stream = Model(context).stream("x")
    assert "".join(stream) == "abc"
    assert not context.is_closed
    del stream
    assert context.is_closed


async def test_a_model_cannot_be_pickled_and_says_why(face: MakeFace):
    with pytest.raises(TypeError, match="cannot be pickled; send its `config`"):
        pickle.dumps(face(ScriptedContext()).model)


def test_many_threads_share_a_model():
    with Model(ScriptedContext(echo, n_seq_max=4)) as model:
        answers: dict[str, str] = {}

        def ask(prompt: str) -> None:
            answers[prompt] = model.generate(prompt).text

        prompts = [str(number) for number in range(64)]
        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {prompt: f"<{prompt}>" for prompt in prompts}


async def test_two_hundred_async_streams_wake_the_loop_once_per_step(
    caplog: pytest.LogCaptureFixture,
):
    class Counting(ScriptedContext):
        lists = 0

        def next_events(self) -> Any:
            events = super().next_events()
            self.lists += bool(events)
            return events

    loop, wakes = asyncio.get_running_loop(), 0
    plain = loop.call_soon_threadsafe

    def counted(*args: Any, **fields: Any) -> Any:
        nonlocal wakes
        wakes += threading.current_thread().name == "tabagent-courier"
        return plain(*args, **fields)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    loop.set_debug(True)
    context = Counting(lambda prompt: [f"{prompt}:{n} " for n in range(20)], n_seq_max=200)
    async with AsyncModel(context) as model:

        async def read(prompt: str) -> str:
            async with model.stream(prompt) as stream:
                return "".join([piece async for piece in stream])

        prompts = [str(number) for number in range(200)]
        with caplog.at_level(logging.WARNING, logger="asyncio"):
            texts = await asyncio.gather(*map(read, prompts))
    assert texts == ["".join(f"{prompt}:{n} " for n in range(20)) for prompt in prompts]
    assert 0 < wakes <= context.lists
    assert [record.message for record in caplog.records if "took" in record.message] == []


@pytest.mark.parametrize("kind", [Model, AsyncModel])
def test_a_model_without_a_context_can_only_tokenize(kind: type[Model] | type[AsyncModel]):
    model = kind(None)
    assert not model.is_loaded
    with pytest.raises(ModelNotLoadedError, match="vocab_only"):
        model.stream("a")
