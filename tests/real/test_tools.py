"""The bundled model calls functions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tabagent_model import AsyncModel, Model
from tabagent_model.tools import Tool

pytestmark = pytest.mark.model

ASKED = "What is the weather in Rome?"


def get_weather(city: str) -> dict[str, Any]:
    """Get the weather in a city."""
    return {"temperature": 21, "sky": "sunny", "city": city}


async def get_time(city: str) -> str:
    """Get the time in a city."""
    return "12:30"


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(n_ctx=1024, max_parallel=2) as model:
        yield model


def test_a_question_becomes_a_call(model: Model):
    answer = model.chat(ASKED, tools=[get_weather, add], temperature=0)
    (call,) = answer.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Rome"})
    assert (answer.finish_reason, answer.content) == ("tool_calls", "")
    assert '"get_weather"' in answer.text


@pytest.mark.parametrize(
    ("question", "tools", "expected"),
    [
        (ASKED, [get_weather], "It is 21 degrees and sunny in Rome."),
        ("What time is it in Paris?", [get_time], "It is 12:30 in Paris."),
        ("What is 120 plus 17?", [add], "The result is 137."),
    ],
)
def test_a_function_is_called_and_its_result_told(
    model: Model, question: str, tools: list[Any], expected: str
):
    run = model.run_tools(question, tools, temperature=0)
    assert (run.answer.content, run.rounds, run.outcome) == (expected, 2, "stop")
    assert [message["role"] for message in run.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


async def test_a_function_is_called_from_an_event_loop():
    async with await AsyncModel.load(n_ctx=1024, max_parallel=1) as model:
        run = await model.run_tools(ASKED, [get_weather, get_time], temperature=0)
        assert run.answer.content == "It is 21 degrees and sunny in Rome."
        messages = [*run.messages, {"role": "user", "content": "Hello!"}]
        again = await model.run_tools(messages, [get_weather, get_time], temperature=0)
        assert again.messages[:-1] == messages


def test_one_of_many_tools_can_be_demanded(model: Model):
    for choice in ("add", {"type": "function", "function": {"name": "add"}}):
        answer = model.chat(ASKED, tools=[get_weather, add], tool_choice=choice, temperature=0)
        (call,) = answer.tool_calls
        assert call.name == "add"
        assert set(json.loads(call.arguments)) == {"a", "b"}


def test_no_tool_can_be_demanded(model: Model):
    answer = model.chat(ASKED, tools=[get_weather], tool_choice="none", temperature=0)
    assert answer.tool_calls == ()


def test_arguments_that_were_demanded_keep_to_the_schema(model: Model):
    """The grammar allows for words before the call, so an answer may be cut short among them."""
    asked, fields = "What is 3 plus 4?", {"tools": [add], "tool_choice": "required"}
    answers = [
        model.chat(asked, **fields, temperature=1.5, seed=seed, max_tokens=64) for seed in range(20)
    ]
    assert {answer.finish_reason for answer in answers} <= {"tool_calls", "length"}
    made = [answer for answer in answers if answer.finish_reason == "tool_calls"]
    sums = [Tool.of(add).call(call.arguments) for answer in made for call in answer.tool_calls]
    assert sums and all(isinstance(each, int) for each in sums)
