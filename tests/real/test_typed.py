"""The bundled model answers in types."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest
from pydantic import BaseModel

from chat_templates import HERMES
from tabagent_model import AsyncModel, InvalidRequestError, Model

pytestmark = pytest.mark.model

ASKED = "Give name, age and city as JSON: Anna is 31 years old and lives in Rome."
TEXT = '{"name": "Anna", "age": 31, "city": "Rome"}'


class Person(BaseModel):
    name: str
    age: int
    city: str


@dataclass
class Citizen:
    name: str
    age: int
    city: Literal["Paris", "Rome"]


class Entry(TypedDict):
    name: str
    age: int
    city: str


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


ANNA: list[tuple[Any, Any]] = [
    (Person, Person(name="Anna", age=31, city="Rome")),
    (Citizen, Citizen("Anna", 31, "Rome")),
    (Entry, {"name": "Anna", "age": 31, "city": "Rome"}),
    (dict[str, str | int], {"name": "Anna", "age": 31, "city": "Rome"}),
    (Person.model_json_schema(), {"name": "Anna", "age": 31, "city": "Rome"}),
]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(n_ctx=1024, max_parallel=2) as model:
        yield model


@pytest.mark.parametrize(("schema", "expected"), ANNA, ids=lambda value: str(value)[:30])
def test_an_answer_is_an_object(model: Model, schema: Any, expected: Any):
    answer = model.chat(ASKED, schema=schema, temperature=0)
    assert (answer.parsed, answer.parse_error) == (expected, None)
    assert json.loads(answer.text) == json.loads(TEXT)


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (["left", "right"], str),
        (Side, Side),
        (Literal[1, 2, 30], int),
        (list[Citizen], list),
        (int, int),
        (bool, bool),
        ({"regex": "[0-9]{4}-[0-9]{2}"}, str),
        ({"lark": 'start: "left" | "right"'}, str),
        ({"grammar": 'root ::= "left" | "right"'}, str),
        (Person | None, (Person, type(None))),
    ],
    ids=lambda value: str(value)[:30],
)
def test_whatever_the_model_would_say_it_keeps_to_the_type(model: Model, schema: Any, kind: Any):
    for seed in range(5):
        answer = model.chat("Hello!", schema=schema, temperature=1.5, seed=seed, max_tokens=256)
        if answer.finish_reason == "stop":
            assert isinstance(answer.parsed, kind), answer.text
            assert answer.parse_error is None


def test_an_answer_that_was_cut_short_is_no_object(model: Model):
    answer = model.chat(ASKED, schema=Person, temperature=0, max_tokens=8)
    assert (answer.finish_reason, answer.parsed) == ("length", None)
    assert answer.parse_error and "cut short" in answer.parse_error
    assert TEXT.startswith(answer.text)


def test_an_object_grows(model: Model):
    grown = list(model.stream_chat(ASKED, schema=Person, temperature=0).partial())
    assert grown[0].name in (None, "")
    assert grown[-1] == Person(name="Anna", age=31, city="Rome")
    assert [person.age for person in grown] == sorted(
        (person.age for person in grown), key=lambda age: age is not None
    )
    assert "Anna" in [person.name for person in grown if person.age is None]


async def test_an_object_grows_in_an_event_loop():
    async with await AsyncModel.load(n_ctx=1024, max_parallel=1) as model:
        stream = model.stream_chat(ASKED, schema=Citizen, temperature=0)
        grown = [citizen async for citizen in stream.partial()]
        assert grown[-1] == Citizen("Anna", 31, "Rome")
        assert (await model.chat(ASKED, schema=Citizen, temperature=0)).parsed == grown[-1]


def test_leaving_a_growing_object_ends_the_answer(model: Model):
    stream = model.stream_chat(ASKED, schema={"regex": "(la ){9999}"}, max_tokens=-1)
    for text in stream.partial():
        assert "la la la".startswith(text)
        break
    assert stream.result.finish_reason == "cancelled"


THOUGHT = "<think>Hm, {.</think>\n\n"


@pytest.mark.parametrize(
    ("schema", "kind"),
    [(Person, Person), (["left", "right"], str), ({"regex": "a/b|c"}, str), (tuple[Side], tuple)],
)
@pytest.mark.parametrize("thinks", [True, False])
def test_an_answer_is_an_object_behind_what_the_model_thought(
    model: Model, schema: Any, kind: Any, thinks: bool
):
    forced = model.tokenize(THOUGHT, add_bos=False) if thinks else []

    def hook(tokens: list[int], logits: memoryview[float]) -> None:
        if forced:
            logits[forced.pop(0)] = 1e9

    answer = model.chat(
        ASKED, template=HERMES, schema=schema, temperature=0, logits_hook=hook, max_tokens=64
    )
    assert isinstance(answer.parsed, kind), answer.text
    assert answer.text.startswith(THOUGHT if thinks else answer.content)
    assert answer.reasoning == ("Hm, {." if thinks else None)
    assert not isinstance(answer.parsed, str) or answer.parsed == answer.parsed.strip()


def test_what_is_no_schema_is_refused(model: Model):
    with pytest.raises(InvalidRequestError, match="complex") as caught:
        model.chat(ASKED, schema=complex)
    assert caught.value.name == "schema"
