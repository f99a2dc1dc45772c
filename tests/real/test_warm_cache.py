"""What is remembered changes no answer, in whichever way a model remembers (P17, X01, X02, X09).

Each answer is compared with that of a context which has seen nothing before. Not every kind can
take back the end of what it has read, or give a part of it to another request; what cannot be
reused has to be computed again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from gguf_files import Gguf
from gguf_memories import N_CTX, WINDOW, tiny_cohere2, tiny_command_r, tiny_jamba, tiny_mamba
from tabagent_model import Completion, Model, PyModel

pytestmark = pytest.mark.model

KINDS: dict[str, Callable[[], Gguf]] = {
    "attention": tiny_command_r,
    "window": tiny_cohere2,
    "recurrent": tiny_mamba,
    "hybrid": tiny_jamba,
}
GREEDY: dict[str, Any] = {
    "max_tokens": 8,
    "temperature": 0,
    "repeat_penalty": 1.0,
    "ignore_eos": True,
}
LONG = GREEDY | {"max_tokens": -1}

Ids = list[int]


# What lies in one batch is summed up in another order than what lies in several. In these numbers
# that is never enough for another word; in f16, or with flash attention, it is now and then.
EXACT: dict[str, Any] = {"n_threads": 1, "kv_type": "f32", "flash_attn": "off"}


@pytest.fixture(scope="module", params=KINDS)
def weights(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[PyModel]:
    path = tmp_path_factory.mktemp("memories") / f"{request.param}.gguf"
    path.write_bytes(KINDS[request.param]().to_bytes())
    with PyModel() as weights:
        weights.load(str(path))
        yield weights


@pytest.fixture
def model(weights: PyModel) -> Iterator[Model]:
    with Model(weights.create_context(1024, n_seq_max=4, **EXACT)) as model:
        yield model


@pytest.fixture(scope="module")
def cold(weights: PyModel) -> Callable[[Ids], Completion]:
    """The answer of a context that has seen nothing else."""

    @cache
    def answer(prompt: tuple[int, ...]) -> Completion:
        context = weights.create_context(1024, n_seq_max=1, warmup=False, **EXACT)
        with Model(context) as fresh:
            return fresh.generate(prompt, **GREEDY)

    return lambda prompt: answer(tuple(prompt))


def text(seed: int, length: int) -> Ids:
    return random.Random(seed).choices(range(290), k=length)


BEGINNING = text(1, 6 * WINDOW)


@pytest.mark.parametrize("weights", ["recurrent", "hybrid"], indirect=True)
def test_a_prompt_that_cannot_be_interrupted_is_read_in_short_steps(model: Model):
    before = model.metrics()["steps"]
    assert len(model.generate(text(2, 400), **GREEDY | {"max_tokens": 1}).tokens) == 1
    assert model.metrics()["steps"] - before == 4


def test_an_answer_depends_on_the_whole_prompt(cold: Any):
    """Otherwise nothing below would show anything."""
    others = []
    for at in range(0, len(BEGINNING), WINDOW):
        changed = [*BEGINNING[:at], *text(2, 10), *BEGINNING[at + 10 :]]
        others.append(cold(changed))
    assert cold(BEGINNING) not in others


def test_a_beginning_that_is_shared_and_then_parts(model: Model, cold: Any):
    ends = [text(seed, 30) for seed in range(10, 13)]
    for end in [*ends, *ends[::-1]]:
        assert model.generate(BEGINNING + end, **GREEDY) == cold(BEGINNING + end)
    for length in (WINDOW // 2, WINDOW, 3 * WINDOW, 5 * WINDOW + 1):
        part = BEGINNING[:length]
        assert model.generate(part, **GREEDY) == cold(part)
        assert model.generate(part + ends[0], **GREEDY) == cold(part + ends[0])
    assert model.generate(BEGINNING, **GREEDY) == cold(BEGINNING)


def test_a_conversation_that_grows_computes_each_token_once(model: Model, cold: Any):
    history: Ids = []
    for turn in range(6):
        history += text(20 + turn, WINDOW)
        answer = model.generate(history, **GREEDY)
        assert answer == cold(history)
        if turn:
            # All but the new question and the last token of the answer before.
            assert answer.usage.cached_tokens == len(history) - WINDOW - 1
        history += answer.tokens


def test_a_fork_of_a_conversation(model: Model, cold: Any):
    history = BEGINNING + list(cold(BEGINNING).tokens)
    branches = [history + text(30 + branch, 20) for branch in range(6)]
    assert model.generate(BEGINNING, **GREEDY) == cold(BEGINNING)
    with model.stream(history, **LONG) as stem:
        next(stem)
        for branch in branches:  # while the stem grows
            assert model.generate(branch, **GREEDY) == cold(branch)
    assert model.generate(branches, **GREEDY) == [cold(branch) for branch in branches]


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_x01_a_request_that_was_cancelled_and_then_comes_again(
    model: Model, cold: Any, pieces: int
):
    for seed in range(40, 44):
        prompt = text(seed, 4 * WINDOW)
        with model.stream(prompt, **LONG) as stream:
            for _ in range(pieces):
                next(stream)
        longer = prompt + text(seed + 10, 8)
        assert model.generate(longer, **GREEDY) == cold(longer)
        assert model.generate(prompt, **GREEDY) == cold(prompt)


def test_a_context_that_was_full_to_the_last_token(model: Model, cold: Any):
    full = model.generate(BEGINNING, **LONG)
    assert full.usage.total_tokens == model.n_ctx
    for length in (len(BEGINNING), 3 * WINDOW):
        part = BEGINNING[:length]
        assert model.generate(part, **GREEDY) == cold(part)


def test_a_crowd_with_one_beginning(model: Model, cold: Any):
    prompts = [BEGINNING + text(50 + number, 3 + 5 * number) for number in range(12)]
    expected = [cold(prompt) for prompt in prompts]
    assert model.generate(prompts, **GREEDY) == expected
    assert model.generate(prompts[::-1], **GREEDY) == expected[::-1]


def test_x02_x09_a_prompt_that_is_cancelled_in_the_middle(weights: PyModel, cold: Any):
    """Neither who shares the interrupted step nor who comes with the same prompt hears of it."""
    endless = text(60, N_CTX - 200)
    with Model(weights.create_context(N_CTX, n_seq_max=3, **EXACT)) as model:
        with ThreadPoolExecutor(2) as pool:
            for turn in range(4):
                neighbour = pool.submit(model.generate, BEGINNING + text(61, turn), **GREEDY)
                for _ in range(8):
                    model.stream(endless, **LONG).close()
                assert neighbour.result() == cold(BEGINNING + text(61, turn))
        assert model.metrics()["running"] == 0
        part = endless[: 5 * WINDOW]
        assert model.generate(part, **GREEDY) == cold(part)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_came_before(model: Model, cold: Any, seed: int):
    """A crowd of users who begin alike, go on as they like, and leave when they like."""
    chance = random.Random(seed)
    stems = [text(100 + number, 3 * WINDOW) for number in range(3)]

    def use(number: int) -> None:
        chance = random.Random(1000 * seed + number)
        for _ in range(6):
            stem = chance.choice(stems)[: chance.choice([WINDOW // 2, 2 * WINDOW, 3 * WINDOW])]
            prompt = stem + text(chance.randrange(4), chance.choice([1, 9, WINDOW]))
            if chance.random() < 0.3:
                with model.stream(prompt, **LONG) as stream:
                    for _ in range(chance.randrange(20)):
                        next(stream, None)
            else:
                assert model.generate(prompt, **GREEDY) == cold(prompt)

    users = list(range(6))
    chance.shuffle(users)
    with ThreadPoolExecutor(len(users)) as pool:
        list(pool.map(use, users))
