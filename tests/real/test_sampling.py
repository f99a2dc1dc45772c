"""Sampling with the bundled model: what each choice does to an answer, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from gguf_files import array, tiny_gguf
from tabagent_model import (
    AsyncModel,
    GenerationConfig,
    InvalidRequestError,
    Model,
    ModelBusyError,
    SamplingError,
)

pytestmark = pytest.mark.model

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "repeat_penalty": 1.0}
HOT: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0}


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.mark.parametrize(
    "fields",
    [
        {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
        {"typical_p": 0.9},
        {"top_n_sigma": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"dry_multiplier": 0.8, "dry_penalty_last_n": -1},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 3.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95, "dry_multiplier": 1.0},
        {"presence_penalty": 1.0, "frequency_penalty": 1.0, "penalty_last_n": -1},
    ],
    ids=str,
)
def test_every_sampler_reproduces_its_answer_with_the_seed(model: Model, fields: dict[str, Any]):
    hot = {**HOT, **fields, "seed": 11}
    answer = model.generate(PROMPT, **hot)
    assert answer.tokens
    assert model.generate([PROMPT] * 3, **hot) == [answer] * 3


def test_what_the_model_suppresses_is_never_generated(tmp_path: Path):
    def tokens_of(*suppressed: int) -> tuple[int, ...]:
        keys = {"tokenizer.ggml.suppress_tokens": array("i32", [*suppressed, 10**6])}
        path = tiny_gguf(tmp_path / f"{len(suppressed)}.gguf", keys=keys)
        with Model.load(path, n_ctx=64) as model:
            return model.generate(PROMPT, **GREEDY, ignore_eos=True).tokens

    free = tokens_of()
    without = tokens_of(*free)
    assert len(free) == len(without) == 12
    assert free and not {*free} & {*without}


@pytest.mark.parametrize(
    "extremes",
    [
        {"temperature": 100, "top_p": 1e-30, "min_p": 0.999, "typical_p": 1e-30},
        {"temperature": 1e-30, "repeat_penalty": 1e-30, "frequency_penalty": 2},
        {"top_k": 2**31 - 1, "top_n_sigma": 1e-9, "xtc_probability": 1, "xtc_threshold": 0},
        {"dry_multiplier": 100, "dry_base": 100, "dry_allowed_length": 0, "dry_penalty_last_n": -1},
        {"dry_multiplier": 100, "dry_penalty_last_n": 2**24, "penalty_last_n": 2**24},
        {"mirostat": 1, "mirostat_tau": 0, "mirostat_eta": 10},
        {"mirostat": 2, "mirostat_tau": 0, "mirostat_eta": 10},
        {"mirostat": 2, "mirostat_tau": 100, "temperature": 1e-30},
        {"dynatemp_range": 100, "dynatemp_exponent": 100},
    ],
    ids=str,
)
def test_no_extreme_leaves_no_token(model: Model, extremes: dict[str, Any]):
    answer = model.generate(PROMPT, **{**HOT, **extremes})
    assert len(answer.tokens) == 12 or answer.finish_reason == "stop"


def test_a_bias_makes_a_token_come_and_a_ban_keeps_it_away(model: Model):
    (token,) = model.tokenize("!", add_bos=False)
    answer = model.generate(PROMPT, **GREEDY, logit_bias={str(token): 1000.0})
    assert set(answer.tokens) == {token}
    first = model.generate(PROMPT, **GREEDY).tokens[0]
    assert first not in model.generate(PROMPT, **GREEDY, banned_tokens=[first]).tokens
    both = model.generate(PROMPT, **GREEDY, logit_bias={token: 1000.0}, banned_tokens=[token])
    assert token not in both.tokens


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(model: Model):
    whole = model.generate(PROMPT, **GREEDY)
    stop = whole.tokens[3]
    answer = model.generate(PROMPT, **GREEDY, stop_tokens=[stop])
    assert answer.tokens == whole.tokens[: whole.tokens.index(stop)]
    assert answer.finish_reason == "stop"
    late = model.generate(PROMPT, **GREEDY, stop_tokens=[stop], min_tokens=8)
    assert len(late.tokens) >= 8
    assert stop not in late.tokens[:8]


@pytest.mark.parametrize("name", ["banned_tokens", "stop_tokens"])
def test_ids_that_the_vocabulary_does_not_have_are_refused_by_index(model: Model, name: str):
    size = model.info()["vocab_size"]
    with pytest.raises(InvalidRequestError) as caught:
        model.generate(PROMPT, **{name: [0, size]})
    assert (
        caught.value.message == f"`{name}[1]` must be a token id from 0 to {size - 1}, got {size}"
    )
    with pytest.raises(InvalidRequestError, match=f"got {size}"):
        model.generate(PROMPT, logit_bias={1: 1.0, size: 1.0})


def test_with_every_token_banned_the_request_fails_and_the_next_one_works(model: Model):
    everything = range(model.info()["vocab_size"])
    for fields in ({}, {"temperature": 0}, {"top_k": 0}, {"mirostat": 1}, {"mirostat": 2}):
        with pytest.raises(SamplingError, match="no token is left to choose from"):
            model.generate(PROMPT, banned_tokens=everything, **fields)
    assert model.generate(PROMPT, **GREEDY).tokens


def test_logprobs_are_of_the_model_whatever_the_samplers_do(model: Model):
    answer = model.generate(PROMPT, **GREEDY, logprobs=20)
    assert answer.logprobs is not None
    assert tuple(one.token for one in answer.logprobs) == answer.tokens
    assert "".join(one.text for one in answer.logprobs) == answer.text
    for one in answer.logprobs:
        assert one.top[0] == type(one)(one.token, one.text, one.logprob)
        chances = [math.exp(other.logprob) for other in one.top]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1.0001
    first = answer.logprobs[0]
    odd = model.generate(
        PROMPT, max_tokens=1, temperature=2, logit_bias={first.top[5].token: 500}, logprobs=20
    )
    assert odd.logprobs is not None
    assert odd.logprobs[0].logprob == pytest.approx(first.top[5].logprob, abs=1e-3)
    assert [one.token for one in odd.logprobs[0].top[:3]] == [one.token for one in first.top[:3]]
    assert model.generate(PROMPT, **GREEDY).logprobs is None


def test_several_answers_to_one_prompt_take_seeds_in_a_row(model: Model):
    answers = model.generate(PROMPT, n=3, seed=7, **HOT)
    assert [answer.seed for answer in answers] == [7, 8, 9]
    assert answers == [model.generate(PROMPT, seed=seed, **HOT) for seed in (7, 8, 9)]
    assert len(model.generate(PROMPT, n=1, **HOT)) == 1
    assert len({answer.seed for answer in model.generate(PROMPT, n=4, **HOT)}) == 4
    two_each = model.generate([PROMPT, "The cat"], n=2, seed=1, **HOT)
    assert two_each == [*model.generate(PROMPT, n=2, seed=1, **HOT),
                        *model.generate("The cat", n=2, seed=1, **HOT)]  # fmt: skip


def test_a_hook_decides(model: Model):
    (token,) = model.tokenize("!", add_bos=False)
    heard: list[list[int]] = []

    def only_this(tokens: list[int], logits: memoryview[float]) -> None:
        heard.append(tokens)
        array = numpy.asarray(logits)
        assert (array.dtype, array.shape) == (numpy.float32, (model.info()["vocab_size"],))
        array[:] = -math.inf
        array[token] = 0.0

    config = GenerationConfig(max_tokens=3, logits_hook=only_this)
    assert model.generate(PROMPT, config).tokens == (token,) * 3
    prompt = model.tokenize(PROMPT)
    assert heard == [prompt + [token] * count for count in range(3)]


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"temperature": 0}, {"mirostat": 2}], ids=str)
def test_what_a_hook_forbids_never_comes(model: Model, fields: dict[str, Any]):
    allowed = {*model.tokenize("a b c d e f", add_bos=False)}

    def forbid(tokens: list[int], logits: memoryview[float]) -> None:
        for token in range(len(logits)):
            if token not in allowed:
                logits[token] = -math.inf

    answer = model.generate(PROMPT, **{**HOT, **fields}, logits_hook=forbid)
    assert {*answer.tokens} <= allowed


def test_a_hook_that_raises_ends_its_own_request_only(model: Model):
    class MineError(Exception):
        pass

    def fail(tokens: list[int], logits: memoryview[float]) -> None:
        raise MineError("so it is")

    alone = model.generate(PROMPT, **GREEDY)
    with model.stream(PROMPT, **GREEDY) as neighbour:
        with pytest.raises(MineError, match="so it is"):
            model.generate(PROMPT, logits_hook=fail)
        neighbour_text = "".join(neighbour)
    assert neighbour_text == alone.text
    assert model.generate(PROMPT, **GREEDY) == alone


@pytest.mark.parametrize(
    ("hook", "kind", "message"),
    [
        (lambda tokens, logits: logits, TypeError, "in place, and returns nothing"),
        (lambda tokens, logits: logits.__setitem__(3, math.nan), SamplingError, "token 3"),
        (lambda tokens, logits: logits.__setitem__(3, math.inf), SamplingError, "token 3"),
        (lambda: None, TypeError, "argument"),
    ],
)
def test_a_hook_that_does_wrong_is_told(
    model: Model, hook: Any, kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        model.generate(PROMPT, logits_hook=hook)


def test_what_a_hook_keeps_is_dead_or_memory_of_its_own(model: Model):
    kept: list[memoryview[float]] = []
    arrays: list[Any] = []

    def keep(tokens: list[int], logits: memoryview[float]) -> None:
        kept.append(logits)

    def keep_array(tokens: list[int], logits: memoryview[float]) -> None:
        arrays.append(numpy.asarray(logits))

    plain = model.generate(PROMPT, **GREEDY)
    assert model.generate(PROMPT, **GREEDY, logits_hook=keep) == plain
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0]
    assert model.generate(PROMPT, **GREEDY, logits_hook=keep_array) == plain
    gc.collect()
    assert [int(array.argmax()) for array in arrays] == list(plain.tokens)


ASKS: list[Callable[[Model], Any]] = [
    lambda model: model.generate(PROMPT, max_tokens=1),
    lambda model: model.generate([PROMPT, PROMPT], max_tokens=1),
    lambda model: model.stream(PROMPT),
    lambda model: model.unload(),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_hook_cannot_ask_the_model_that_waits_for_it(model: Model, ask: Callable[[Model], Any]):
    def hook(tokens: list[int], logits: memoryview[float]) -> None:
        ask(model)

    with pytest.raises(ModelBusyError, match="cannot be called from a logits hook"):
        model.generate(PROMPT, max_tokens=1, logits_hook=hook)
    assert model.generate(PROMPT, **GREEDY).tokens


def test_a_hook_cannot_wait_for_a_stream_that_is_open_already(model: Model):
    said: list[str] = []
    with model.stream("Once", max_tokens=-1, ignore_eos=True) as other:

        def hook(tokens: list[int], logits: memoryview[float]) -> None:
            for wait in (lambda: next(other), other.close):
                with pytest.raises(ModelBusyError, match="cannot be called from a logits hook"):
                    wait()
            said.append("both")

        model.generate(PROMPT, max_tokens=1, logits_hook=hook)
        assert next(other)
    assert said == ["both"]


def test_a_hook_can_ask_another_model(model: Model):
    with Model.load(n_ctx=256, max_parallel=1) as other:
        (token,) = other.tokenize("!", add_bos=False)

        def hook(tokens: list[int], logits: memoryview[float]) -> None:
            assert other.generate(PROMPT, max_tokens=1).tokens
            logits[token] = 1000.0

        assert model.generate(PROMPT, max_tokens=2, logits_hook=hook).tokens == (token,) * 2


async def test_a_hook_serves_asyncio_too():
    async with await AsyncModel.load(n_ctx=256) as model:
        (token,) = await model.tokenize("!", add_bos=False)

        def hook(tokens: list[int], logits: memoryview[float]) -> None:
            logits[token] = 1000.0

        asked = [model.generate(PROMPT, max_tokens=3, logits_hook=hook) for _ in range(3)]
        answers = await asyncio.gather(*asked)
        assert [answer.tokens for answer in answers] == [(token,) * 3] * 3


def test_a_model_can_be_dropped_while_its_hook_runs():
    begun = threading.Event()

    def hook(tokens: list[int], logits: memoryview[float]) -> None:
        begun.set()

    model = Model.load(n_ctx=256, max_parallel=1)
    stream = model.stream(PROMPT, max_tokens=-1, logits_hook=hook)
    assert begun.wait(10)
    native = model._native
    assert native is not None
    native.unload()
    stream.close()
    del stream, model, native
    gc.collect()
