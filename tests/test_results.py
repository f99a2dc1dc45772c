import copy
import pickle
from dataclasses import replace

import pytest

from tabagent_model import (
    Completion,
    InferenceMetrics,
    Model,
    TokenLogprob,
    Usage,
    inspect,
)
from tabagent_model.testing import ScriptedContext


def test_two_completions_that_say_the_same_are_equal_whatever_they_cost():
    cheap = Completion("yes", (1, 2), "stop", metrics=InferenceMetrics(inference_time_ms=1))
    dear = Completion("yes", (1, 2), "stop", metrics=InferenceMetrics(inference_time_ms=9), seed=5)
    assert cheap == dear
    assert hash(cheap) == hash(dear)
    assert cheap != Completion("yes", (1, 2), "length")
    assert pickle.loads(pickle.dumps(dear)) == copy.copy(dear)


def test_a_completion_is_its_text_and_has_the_fields_of_the_origin():
    metrics = InferenceMetrics(
        time_to_first_token_ms=5.0, inference_time_ms=20.0, tokens_per_second=100.0
    )
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5, cached_tokens=1)
    answer = Completion("yes", (1, 2), "stop", usage, metrics)
    assert str(answer) == answer.content == "yes"
    assert (
        answer.tokens_generated,
        answer.tokens_prompt,
        answer.time_to_first_token_ms,
        answer.total_time_ms,
        answer.tokens_per_second,
    ) == (2, 3, 5.0, 20.0, 100.0)


def test_an_answer_knows_what_it_cost():
    with Model(ScriptedContext(["Be", "cause", "!"])) as model:
        answer = model.generate("Why is that so?", seed=42)
    assert answer.usage == Usage(prompt_tokens=5, completion_tokens=3, total_tokens=8)
    assert answer.seed == 42
    metrics = answer.metrics
    assert (metrics.prompt_tokens, metrics.generated_tokens) == (5, 3)
    assert 0 < metrics.time_to_first_token_ms <= metrics.inference_time_ms
    assert metrics.tokens_per_second > 0
    assert f"request {metrics.request_id}: 5 prompt tokens" in metrics.summary()


def test_an_answer_tells_how_likely_its_tokens_were_if_asked():
    with Model(ScriptedContext(["Be", "cause"])) as model:
        assert model.generate("Why?").logprobs is None
        answer = model.generate("Why?", logprobs=1)
        with model.stream("Why?", logprobs=0) as pieces:
            told = [(piece, len(pieces.logprobs or ())) for piece in pieces]
    assert told == [("Be", 1), ("cause", 2)]
    assert answer.logprobs == tuple(
        TokenLogprob(token, text, 0.0, (TokenLogprob(token, text, 0.0),))
        for token, text in zip(answer.tokens, ["Be", "cause"], strict=True)
    )
    assert pieces.result.logprobs == tuple(replace(one, top=()) for one in answer.logprobs)
    assert pickle.loads(pickle.dumps(answer)).logprobs == answer.logprobs


@pytest.mark.model
def test_the_bundled_model_can_be_inspected():
    from tabagent_model.params import BUNDLED_MODEL

    description = inspect(BUNDLED_MODEL)
    assert description.path == str(BUNDLED_MODEL)
    assert description.size_bytes == BUNDLED_MODEL.stat().st_size
    assert description.has_chat_template
    assert description.n_params > 0
