"""What the engine remembers, whom it serves first, and what it tells: on the bundled model."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    GenerationTimeoutError,
    InvalidRequestError,
    Model,
    OutOfMemoryError,
    QueueTimeoutError,
)

pytestmark = pytest.mark.model

# Without penalties, so that no two tokens are nearly as likely: a prompt that is found computed is
# rounded in other places than one that is read in one piece.
GREEDY: dict[str, Any] = {
    "max_tokens": 16,
    "temperature": 0,
    "repeat_penalty": 1,
    "ignore_eos": True,
}
STORIES = [
    f"{name} went to the {place} and looked for a friend. " * 6
    for name, place in [("Tom", "lake"), ("Ann", "shop"), ("Max", "park"), ("Eva", "house")]
]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(n_ctx=256, max_parallel=2, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def alone() -> Iterator[Model]:
    """One place only."""
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1, prompt_cache_mb=8) as model:
        yield model


@pytest.fixture(scope="module")
def cold() -> dict[str, str]:
    """What each story goes on with where nothing was computed before."""
    answers = {}
    for story in STORIES:
        with Model.load(n_ctx=256, max_parallel=1, n_threads=1, prompt_cache_mb=0) as model:
            answers[story] = model.generate(story, **GREEDY).text
    return answers


def test_conversations_that_take_turns_in_one_place_are_computed_once(
    alone: Model, cold: dict[str, str]
):
    for _ in range(3):
        for story in STORIES:
            assert alone.generate(story, **GREEDY).text == cold[story]
    answer = alone.generate(STORIES[0], **GREEDY)
    assert answer.usage.cached_tokens == answer.usage.prompt_tokens - 1
    assert alone.metrics()["prompt_cache_bytes"] > 0


def test_without_a_prompt_cache_nothing_is_kept():
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1, prompt_cache_mb=0) as model:
        for story in STORIES[:2]:
            model.generate(story, **GREEDY)
        answer = model.generate(STORIES[0], **GREEDY)
        assert (model.metrics()["prompt_cache_bytes"], answer.usage.cached_tokens < 5) == (0, True)


@pytest.mark.parametrize("max_parallel", [1, 4])
def test_r10_many_long_prompts_stay_within_the_bytes_of_the_prompt_cache(
    cold: dict[str, str], max_parallel: int
):
    fields: Any = {"n_ctx": 256, "max_parallel": max_parallel, "n_threads": 1}
    with Model.load(**fields, prompt_cache_mb=1) as model:
        held = []
        for number in range(0, 300, 10):
            group = range(number, number + 10)
            prompts = [[5 + each % 90, 7 + each // 90, *[9] * 180] for each in group]
            model.generate(prompts, max_tokens=1, temperature=0)
            held.append(model.metrics()["prompt_cache_bytes"])
        assert 2**19 < held[-1] <= max(held) <= 2**20
        for story in STORIES:
            assert model.generate(story, **GREEDY).text == cold[story]


def test_a_pinned_beginning_is_found_by_everyone_until_it_is_released():
    # A megabyte is enough for a few stories only.
    with Model.load(n_ctx=256, max_parallel=1, n_threads=1, prompt_cache_mb=1) as model:
        with model.pin(STORIES[0]) as pin:
            assert pin.tokens == len(model.tokenize(STORIES[0]))
            for number in range(12):
                model.generate(f"{number} {STORIES[1]}", **GREEDY)
            answer = model.generate(STORIES[0] + "Then", **GREEDY)
            assert answer.usage.cached_tokens >= pin.tokens - 1
        for number in range(12):
            model.generate(f"{number} {STORIES[1]}", **GREEDY)
        assert model.generate(STORIES[0], **GREEDY).usage.cached_tokens < 5


async def test_what_cannot_be_pinned_says_how_much_it_needs():
    async with await AsyncModel.load(n_ctx=256, n_threads=1, prompt_cache_mb=0) as model:
        with pytest.raises(OutOfMemoryError, match=r"pinning \d+ tokens") as refused:
            await model.pin(STORIES[0])
        assert (refused.value.free, refused.value.needed > 1000) == (0, True)


def test_a_state_goes_out_and_comes_back(model: Model, cold: dict[str, str]):
    context, story = model._open_context, STORIES[2]
    tokens = model.tokenize(story)
    model.generate(story, **GREEDY)
    state = context.export_state(tokens)
    assert state is not None
    assert context.export_state([tokens[-1], 5, 6]) is None
    with Model.load(n_ctx=512, max_parallel=2, n_threads=1) as other:
        assert other._open_context.import_state(state, tokens) == len(tokens)
        answer = other.generate(story, **GREEDY)
        assert answer.text == cold[story]
        assert answer.usage.cached_tokens == len(tokens) - 1
        for damaged in (b"", state[:100], state[:-1], state[:-9] + b"x" + state[-8:]):
            with pytest.raises(InvalidRequestError, match="a state of this model"):
                other._open_context.import_state(damaged, tokens)
    for strange in ({"max_parallel": 2, "kv_type": "f32"}, {"max_parallel": 3}):
        with (
            Model.load(n_ctx=256, n_threads=1, **strange) as other,
            pytest.raises(InvalidRequestError, match="of other settings"),
        ):
            other._open_context.import_state(state, tokens)


def test_a_full_context_goes_on_where_that_is_asked_for(model: Model):
    answer = model.generate(STORIES[0], overflow="shift", **{**GREEDY, "max_tokens": 600})
    assert (len(answer.tokens), answer.finish_reason) == (600, "length")
    assert (answer.usage.n_ctx, answer.usage.dropped_tokens > 300) == (256, True)
    without = model.generate(STORIES[0], **{**GREEDY, "max_tokens": 600})
    until_full = 256 - without.usage.prompt_tokens
    assert (len(without.tokens), without.usage.dropped_tokens) == (until_full, 0)
    assert answer.tokens[:until_full] == without.tokens


def test_a_prompt_that_does_not_fit_is_cut_where_that_is_asked_for(model: Model):
    prompt = "Tell a story. " + " ".join(STORIES * 3)
    answer = model.generate(prompt, overflow="shift", n_keep=4, **GREEDY)
    tokens = model.tokenize(prompt)
    assert answer.usage.prompt_tokens == len(tokens)
    kept = len(tokens) - answer.usage.dropped_tokens
    assert 100 < kept < 256
    cut = tokens[:4] + tokens[4 - kept :]
    assert answer.text == model.generate(cut, **GREEDY).text


def test_a_deadline_is_a_moment(model: Model):
    long = {"max_tokens": -1, "ignore_eos": True, "overflow": "shift"}
    with pytest.raises(GenerationTimeoutError):
        model.generate("a", deadline=time.time() + 0.05, **long)
    with pytest.raises(GenerationTimeoutError, match="within 0 s"):
        model.generate("a", deadline=time.time() - 5, **long)
    assert model.generate("a", deadline=time.time() + 60, max_tokens=2).finish_reason


def test_who_waits_longer_than_agreed_hears_so(alone: Model):
    with (
        alone.stream("a", max_tokens=-1, ignore_eos=True, overflow="shift"),
        pytest.raises(QueueTimeoutError, match=r"no place within 0.01 s"),
    ):
        alone.generate("b", max_queue_wait_s=0.01)
    assert alone.generate("b", max_tokens=1, max_queue_wait_s=60).finish_reason


def test_low_priority_makes_way_and_says_the_same_words(alone: Model, cold: dict[str, str]):
    expected = alone.generate(STORIES[3], **{**GREEDY, "max_tokens": 90}).text
    before = alone.metrics()["preemptions"]
    with ThreadPoolExecutor() as pool:
        slow = alone.stream(STORIES[3], priority="low", **{**GREEDY, "max_tokens": 90})
        pieces = [next(slow)]
        urgent = pool.submit(alone.generate, STORIES[0], **GREEDY).result()
        pieces += slow
    assert urgent.text == cold[STORIES[0]]
    assert "".join(pieces) == expected
    assert alone.metrics()["preemptions"] in (before, before + 1)  # it may have been too quick


async def test_two_models_answer_at_the_same_time():
    # Questions with one answer: who shares a step with whom changes the last bits.
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin"}
    async with (
        await AsyncModel.load(n_ctx=256, max_parallel=2) as one,
        await AsyncModel.load(n_ctx=256, max_parallel=2) as other,
    ):
        asked = [
            model.chat(f"What is the capital of {country}?", temperature=0)
            for country in capitals
            for model in (one, other)
        ]
        answers = [answer.text for answer in await asyncio.gather(*asked)]
        told = [
            city in answer for city, answer in zip(capitals.values(), answers[::2], strict=True)
        ]
        also = [
            city in answer for city, answer in zip(capitals.values(), answers[1::2], strict=True)
        ]
        assert (told, also) == ([True] * 4, [True] * 4), answers


def test_the_metrics_say_what_was_done():
    with Model.load(n_ctx=256, max_parallel=2, n_threads=1) as model:
        model.generate(["One", "Two"], **GREEDY)
        metrics = model.metrics()
        names = ("requests", "ended_length", "generated_tokens", "running", "kv_cache_usage")
        assert [metrics[name] for name in names] == [2, 2, 32, 0, 0]
        counts = {name: m["count"] for name, m in metrics.items() if name.endswith("_s")}
        assert counts == {"queue_s": 2, "first_token_s": 2, "gap_s": 30, "request_s": 2}
        for distribution in (metrics[name] for name in counts):
            buckets = list(distribution["buckets"].values())
            assert buckets == sorted(buckets)
            assert buckets[-1] == distribution["count"]
        assert [slot["request_id"] for slot in model.slots()] == [None, None]
        assert {slot["held_tokens"] > 15 for slot in model.slots()} == {True}


def test_prometheus_reads_the_metrics():
    parser = pytest.importorskip("prometheus_client.parser")
    with Model.load(n_ctx=256, max_parallel=2, n_threads=1) as model:
        answer = model.generate("One", **GREEDY)
        families = {f.name: f for f in parser.text_string_to_metric_families(model.prometheus())}
    value = {name: family.samples[0].value for name, family in families.items()}
    assert value["llamacpp:tokens_predicted"] == value["vllm:generation_tokens"] == 16
    assert value["llamacpp:prompt_tokens"] == answer.usage.prompt_tokens
    first_token = families["vllm:time_to_first_token_seconds"]
    assert first_token.type == "histogram"
    assert first_token.samples[0].labels == {"model_name": "tiny-chat", "le": "0.001"}


def test_an_answer_tells_its_gaps(model: Model):
    metrics = model.generate("One", **GREEDY).metrics
    assert 0 < metrics.inter_token_p50_ms <= metrics.inter_token_p99_ms
