"""A few real runs on the bundled model: what only the real engine can show."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    ContextLimitExceededError,
    GenerationConfig,
    GenerationTimeoutError,
    InvalidRequestError,
    LoadCancelledError,
    Model,
    ModelConfig,
    ModelNotFoundError,
    ModelNotLoadedError,
    QueueFullError,
    TokenizationError,
)
from tabagent_model.params import BUNDLED_MODEL

pytestmark = pytest.mark.model

PROMPTS = [
    "Once upon a time",
    "The cat",
    "Why is the sky blue?",
    "a",
    "One, two, three, four, five, six, seven,",
    "Ünïcödé and 字 and 🙂",
    "Once upon a time there was",
    "The dog",
]
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": -1, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    # One thread: on a busy machine two would mostly wait for each other.
    with Model.load(n_ctx=256, max_parallel=4, n_threads=1, queue_size=64) as model:
        yield model


def is_idle(model: Model | AsyncModel) -> bool:
    metrics = model.metrics()
    return (metrics["running"], metrics["waiting"]) == (0, 0)


def test_the_bundled_model_answers(model: Model):
    answer = model.generate("Once upon a time", **GREEDY)
    assert answer.usage.completion_tokens == len(answer.tokens) == 24
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(model.tokenize("Once upon a time"))
    assert answer.model == "tiny-chat"
    metrics = answer.metrics
    assert metrics.tokens_per_second > 0
    assert 0 < metrics.time_to_first_token_ms < metrics.inference_time_ms
    assert metrics.memory_used_mb > 1
    assert metrics.model_load_time_ms == model.load_time_ms > 0
    assert not metrics.gpu_utilized or model.info()["gpu_layers"]


def test_a_crowd_gets_the_same_words_as_each_alone(model: Model):
    alone = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]
    assert model.generate(PROMPTS, **GREEDY) == alone
    assert model.generate(PROMPTS[::-1], **GREEDY) == alone[::-1]


async def test_both_faces_give_the_same_words(model: Model):
    answers = model.generate(PROMPTS, **GREEDY)
    config = model.config
    async with await AsyncModel.load(config) as twin:
        assert await twin.generate(PROMPTS, **GREEDY) == answers
        async with twin.stream(PROMPTS[0], **GREEDY) as pieces:
            assert "".join([piece async for piece in pieces]) == answers[0].text
        assert pieces.result == answers[0]


def test_pieces_join_to_the_answer(model: Model):
    for prompt in PROMPTS:
        with model.stream(prompt, **GREEDY) as pieces:
            text = "".join(pieces)
        assert text == pieces.text == pieces.result.text
        assert pieces.result == model.generate(prompt, **GREEDY)


def test_ids_and_text_are_the_same_prompt(model: Model):
    ids = [model.tokenize(prompt) for prompt in PROMPTS]
    assert model.generate(ids, **GREEDY) == model.generate(PROMPTS, **GREEDY)
    assert model.generate(ids[0], **GREEDY) == model.generate(PROMPTS[0], **GREEDY)


@pytest.mark.parametrize("text", [*PROMPTS, "\0", " ", "é" * 50, "\r\n\t", "<|im_start|>system"])
def test_text_survives_its_tokens(model: Model, text: str):
    assert model.detokenize(model.tokenize(text, add_bos=False)) == text


def test_a_seed_reproduces_an_answer_and_a_random_one_is_told(model: Model):
    hot: dict[str, Any] = {"max_tokens": 24, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    first = model.generate("The cat", **hot)
    assert model.generate("The cat", seed=first.seed, **hot) == first
    assert (
        model.generate(["The cat"] * 3, seed=7, **hot)
        == [model.generate("The cat", seed=7, **hot)] * 3
    )
    assert len({model.generate("The cat", **hot).seed for _ in range(5)}) == 5


async def test_several_answers_to_a_conversation_are_those_with_these_seeds():
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Tell me a story."}]
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 1.5}
    with Model.load(n_ctx=256, max_parallel=4) as model:
        alone = [model.chat(asked, seed=seed, **fields) for seed in (7, 8, 9)]
        together = model.chat(asked, n=3, seed=7, **fields)
        assert [answer.content for answer in together] == [answer.content for answer in alone]
        assert [answer.seed for answer in together] == [7, 8, 9]
        assert len({answer.content for answer in together}) == 3
        assert sum(answer.usage.cached_tokens for answer in together) > 0
        async with await AsyncModel.load(model.config) as twin:
            assert await twin.chat(asked, n=3, seed=7, **fields) == together
        objects = model.chat("Is snow white?", n=2, schema=["yes", "no"])
        assert {answer.parsed for answer in objects} <= {"yes", "no"}
        with pytest.raises(InvalidRequestError, match="`n` must be a whole number between 1"):
            model.chat(asked, n=0)
        with pytest.raises(InvalidRequestError, match="a stream is one answer"):
            model.stream_chat(asked, n=2)  # type: ignore[call-arg]


def test_a_repeated_prompt_is_found_in_the_cache(model: Model):
    prompt = "This prompt is asked for the second time, and so it is known already."
    first, second = (model.generate(prompt, max_tokens=4, temperature=0) for _ in range(2))
    assert first == second
    assert second.usage.cached_tokens > first.usage.cached_tokens


def test_no_tokens_make_an_empty_answer(model: Model):
    answer = model.generate("The cat", max_tokens=0)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", (), "length")
    with model.stream("The cat", max_tokens=0) as pieces:
        assert list(pieces) == []


def test_without_a_limit_the_context_is_the_limit(model: Model):
    answer = model.generate("The cat", **LONG)
    assert answer.finish_reason == "length"
    assert answer.usage.total_tokens in (model.n_ctx, model.n_ctx + 1)


def test_a_stop_string_ends_the_text_and_does_not_leak(model: Model):
    whole = model.generate("Once upon a time", **GREEDY).text
    for stop in {whole[5:8], whole[9:10], whole[2:12]} - {""}:
        if "\ufffd" in stop:
            continue
        with model.stream("Once upon a time", stop=["never said", stop], **GREEDY) as pieces:
            text = "".join(pieces)
        assert text == whole[: whole.index(stop)]
        assert (pieces.result.finish_reason, pieces.result.stop) == ("stop", stop)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(model: Model):
    prompt = [5] * (model.n_ctx + 1)
    for use in (model.generate, model.stream):
        with pytest.raises(ContextLimitExceededError) as caught:
            use(prompt)
        assert (caught.value.max, caught.value.required) == (256, 258)  # and one to answer
    assert model.generate([5] * (model.n_ctx - 1), **LONG).tokens


@pytest.mark.parametrize("prompt", ["", [2**31 - 1], [-1], [10_000_000]])
def test_a_prompt_that_is_none_is_refused_or_answered(model: Model, prompt: Any):
    try:
        assert model.generate(prompt, **GREEDY).finish_reason == "length"
    except (InvalidRequestError, TokenizationError) as error:
        assert "prompt" in str(error) or "token" in str(error)
    assert model.generate("still alive", **GREEDY).tokens


def test_a_timeout_ends_the_request(model: Model):
    with pytest.raises(GenerationTimeoutError):
        model.generate(["x"] * 40, timeout_s=0.001, **LONG)
    assert is_idle(model)


def test_leaving_in_the_middle_frees_the_place(model: Model):
    for number in range(30):
        with model.stream("Once upon a time", **LONG) as pieces:
            for _ in range(number % 4):
                next(pieces)
        assert is_idle(model)
        assert pieces.result.finish_reason in ("cancelled", "length")


def test_a_full_queue_refuses_one_and_takes_a_crowd_by_and_by(model: Model):
    streams = []
    with pytest.raises(QueueFullError, match="hint: try again later"):
        for _ in range(200):
            streams.append(model.stream("x", **LONG))
    for stream in streams:
        stream.cancel()
    for stream in streams:
        stream.close()
    assert is_idle(model)
    assert len(model.generate(["x"] * 200, max_tokens=2)) == 200


def test_many_threads_share_the_model(model: Model):
    expected = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]
    found: dict[int, list[Any]] = {}

    def ask(number: int) -> None:
        found[number] = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), expected)


async def test_a_cancelled_task_leaves_its_place_free(model: Model):
    async with await AsyncModel.load(model.config) as twin:
        for turns in range(20):
            tasks = [asyncio.ensure_future(twin.generate("x", **LONG)) for _ in range(6)]
            for _ in range(turns):
                await asyncio.sleep(0.0005)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert is_idle(twin)
            assert all(isinstance(e, asyncio.CancelledError) or e.tokens for e in ended)
        assert (await twin.generate(PROMPTS[0], **GREEDY)) == model.generate(PROMPTS[0], **GREEDY)


async def test_a_load_can_be_cancelled_or_stopped_or_fail_in_its_callback():
    began = threading.Event()

    def slowly(fraction: float) -> None:
        began.set()
        threading.Event().wait(0.05)

    task = asyncio.ensure_future(AsyncModel.load(on_progress=slowly))
    while not began.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    with pytest.raises(LoadCancelledError):
        Model.load(on_progress=lambda fraction: False)

    def broken(fraction: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Model.load(on_progress=broken)
    with pytest.raises(ZeroDivisionError):
        await AsyncModel.load(on_progress=broken)

    fractions: list[float] = []
    with Model.load(on_progress=fractions.append):
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0


def test_a_missing_file_is_not_found(tmp_path: Any):
    for path in (tmp_path / "none.gguf", "", tmp_path / "a\0b.gguf", "~nobody/none.gguf"):
        with pytest.raises((ModelNotFoundError, InvalidRequestError)):
            Model.load(path)


def test_a_reload_changes_the_config_and_a_bad_one_changes_nothing():
    with Model.load(n_ctx=64, n_threads=1) as model:
        answer = model.generate("The cat", max_tokens=8, temperature=0)
        model.reload(n_ctx=128)
        assert (model.n_ctx, model.config.n_ctx) == (128, 128)
        with pytest.raises(ModelNotFoundError):
            model.reload(model_path="/nowhere/m.gguf")
        with pytest.raises(LoadCancelledError):
            model.reload(n_ctx=32, on_progress=lambda fraction: False)
        assert (model.n_ctx, model.config) == (128, ModelConfig(n_ctx=128, n_threads=1))
        assert model.generate("The cat", max_tokens=8, temperature=0) == answer


def test_twenty_models_one_after_the_other_leave_no_threads():
    threads = threading.active_count()
    for _ in range(20):
        with Model.load(n_ctx=64, n_threads=1) as model:
            assert model.generate("The cat", max_tokens=4).tokens
        assert model.unload()["was_loaded"] is False
    assert threading.active_count() <= threads + 1  # the one that carries the log
    with pytest.raises(ModelNotLoadedError):
        model.generate("The cat")


def test_a_tokenizer_alone():
    with Model.load(vocab_only=True) as model, Model.load(n_ctx=64) as whole:
        assert model.is_loaded
        assert model.tokenize("The cat") == whole.tokenize("The cat")
        with pytest.raises(ModelNotLoadedError, match="vocab_only"):
            model.generate("The cat")
    assert not model.is_loaded


def test_the_model_tells_what_became_of_the_config():
    with Model.load(n_ctx=100_000, max_parallel=2, n_threads=1, gpu_layers="auto") as model:
        info = model.info()
    assert (info["max_parallel"], info["n_threads"]) == (2, 1)
    assert info["n_ctx"] == info["n_ctx_train"] < 100_000
    assert info["path"] == str(BUNDLED_MODEL)


def test_every_generation_field_reaches_the_engine(model: Model):
    config = GenerationConfig(
        max_tokens=4,
        temperature=0.5,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        repeat_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        penalty_last_n=-1,
        stop=("never said",),
        seed=2**40,
        ignore_eos=True,
        min_tokens=2,
        timeout_s=60,
        priority="high",
        add_bos=False,
        special=True,
    )
    answer = model.generate("The cat", config)
    assert (len(answer.tokens), answer.seed) == (4, 2**40)
