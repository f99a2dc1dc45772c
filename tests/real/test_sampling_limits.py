"""The ends of what may be asked of the sampler still give tokens (fault cases S01 to S03, S06).

What lies beyond is refused before it is asked; `test_params` has the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from soak.ledger import private_mib
from tabagent_model import Completion, Model

pytestmark = pytest.mark.model

REFERENCE = "Once upon a time"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(n_ctx=256, max_parallel=2, n_threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def still_answers_as_before(model: Model) -> Iterator[Completion]:
    before = model.generate(REFERENCE, **GREEDY)
    yield before
    assert model.generate(REFERENCE, **GREEDY) == before


LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("S01", {"temperature": 100, "top_k": 0, "top_p": 1}),
    ("S01", {"temperature": 1e-30}),
    ("S02", {"top_k": 1}),
    ("S02", {"top_k": 2**31 - 1}),
    ("S02", {"top_p": 1e-30, "top_k": 0}),
    ("S02", {"min_p": 0.999999}),
    ("S02", {"top_k": 1, "top_p": 1e-30, "min_p": 0.999999, "temperature": 1e-30}),
    ("S03", {"repeat_penalty": 1e-30, "penalty_last_n": -1}),
    ("S03", {"repeat_penalty": 10, "penalty_last_n": -1}),
    ("S03", {"presence_penalty": 2, "frequency_penalty": 2, "penalty_last_n": 2**24}),
    ("S03", {"presence_penalty": -2, "frequency_penalty": -2, "repeat_penalty": 10}),
    ("S06", {"seed": 0}),
    ("S06", {"seed": 2**63 - 1}),
]


@pytest.mark.parametrize(
    "fields", [fields for _, fields in LIMITS], ids=[f"{id} {fields}" for id, fields in LIMITS]
)
def test_a_limit_gives_tokens_and_the_same_ones_again(model: Model, fields: dict[str, Any]):
    fields = {"max_tokens": 40, "ignore_eos": True, "seed": 7, "temperature": 1.0} | fields
    answer = model.generate(REFERENCE, **fields)
    assert (len(answer.tokens), answer.finish_reason) == (40, "length")
    assert model.generate(REFERENCE, **fields) == answer
    assert answer.seed == fields["seed"]


def test_s03_penalties_over_a_window_longer_than_the_context_take_no_memory(model: Model):
    fields = {"max_tokens": 4, "penalty_last_n": 2**24, "repeat_penalty": 1.5}
    before = private_mib()
    for _ in range(20):
        model.generate(REFERENCE, **fields)
    assert private_mib() - before < 10
