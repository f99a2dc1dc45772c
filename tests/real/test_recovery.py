"""A model that loses its GPU answers on the CPU, with the words that the CPU has for it.

The GPU is pretended: a real engine, of which is said that it computes on one, refuses requests.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    Completion,
    ContextLimitExceededError,
    Model,
    ModelNotLoadedError,
    OutOfMemoryError,
    generate_with_fallback,
)

pytestmark = pytest.mark.model

PROMPT, INNOCENT = "Once upon a time", "The cat"
GREEDY: Any = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
FIELDS: Any = {"n_ctx": 256, "max_parallel": 2, "n_threads": 1}


class FullGpu:
    """A context that computes nothing more."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def submit(self, request_id: int, prompt: Any, *how: Any) -> None:
        if prompt == INNOCENT:
            return self._context.submit(request_id, prompt, *how)
        raise OutOfMemoryError("a buffer needs 2 GiB on CUDA0, but 1 GiB is free", device="CUDA0")


def fill_the_gpu_of(model: Model | AsyncModel) -> None:
    assert model._courier is not None
    model._courier._context = FullGpu(model._context)
    model._source = replace(model._source, gpu_utilized=True)


@pytest.fixture(scope="module")
def reference() -> Completion:
    with Model.load(device="cpu", **FIELDS) as model:
        return model.generate(PROMPT, **GREEDY)


def test_the_answer_is_the_one_of_the_cpu(reference: Completion, caplog: Any):
    with Model.load(**FIELDS) as model:
        fill_the_gpu_of(model)
        with pytest.raises(OutOfMemoryError):
            model.generate(PROMPT, **GREEDY)
        with caplog.at_level(logging.WARNING, "tabagent_model"):
            assert generate_with_fallback(model, PROMPT, **GREEDY) == reference
        assert "GPU OOM, falling back to CPU: a buffer needs 2 GiB on CUDA0" in caplog.text
        assert model.info()["reason"] == "the CPU, as asked"
        assert (model.config.device, model.config.gpu_layers) == ("cpu", 0)
        assert model.generate(PROMPT, **GREEDY) == reference


async def test_the_answer_is_the_one_of_the_cpu_for_tasks_too(reference: Completion):
    async with await AsyncModel.load(**FIELDS) as model:
        fill_the_gpu_of(model)
        assert await generate_with_fallback(model, PROMPT, **GREEDY) == reference
        assert await model.generate(PROMPT, **GREEDY) == reference


def test_who_is_in_the_middle_of_an_answer_gets_it_from_the_cpu_or_hears_of_the_unload():
    long: Any = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with Model.load(**{**FIELDS, "max_parallel": 8}) as model, ThreadPoolExecutor(8) as pool:
        whole = {prompt: model.generate(prompt, **long) for prompt in (PROMPT, INNOCENT)}
        fill_the_gpu_of(model)
        stream = model.stream(INNOCENT, **{**long, "max_tokens": -1, "overflow": "shift"})
        next(stream)
        prompts = [INNOCENT] * 5 + [PROMPT] * 2
        asked = [pool.submit(model.generate_with_fallback, prompt, **long) for prompt in prompts]
        assert [each.result(60) for each in asked] == [whole[prompt] for prompt in prompts]
        with pytest.raises(ModelNotLoadedError):
            stream.collect()


def test_a_session_goes_on_after_its_model_has_moved():
    with Model.load(**FIELDS) as model, Model.load(**FIELDS) as other:
        sessions = [each.session("Be brief.", **GREEDY) for each in (model, other)]
        begun = [session.send("Hello") for session in sessions]
        fill_the_gpu_of(model)
        generate_with_fallback(model, PROMPT, **GREEDY)
        went_on = [session.send("And then?") for session in sessions]
        assert (begun[0].text, went_on[0].text) == (begun[1].text, went_on[1].text)


def test_what_is_wrong_with_the_request_stays_an_error(reference: Completion):
    with Model.load(**FIELDS) as model:
        model._source = replace(model._source, gpu_utilized=True)
        before = model._context
        with pytest.raises(ContextLimitExceededError):
            generate_with_fallback(model, [5] * 300)
        assert model._context is before
        assert generate_with_fallback(model, PROMPT, **GREEDY) == reference
