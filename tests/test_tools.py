"""Functions and other things as tools: what the model is told, and how they are called."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, TypedDict

import pytest
from pydantic import BaseModel, Field

from tabagent_model import InvalidRequestError
from tabagent_model.tools import Tool, tools_of

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def get_weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather of a city.

    It looks out of the window.

    Args:
        city: where, as people
            call it
        days (int, optional): how many to look ahead

    Returns:
        What to wear.
    """
    return f"{days} warm days in {city} ({unit})"


def of_numpy(city, days=1):
    """Tell the weather.

    Parameters
    ----------
    city : str
        where, as people
        call it
    days : int, optional
        how many to look ahead

    Returns
    -------
    str
    """


def of_rest(city: str, days: int):
    """Tell the weather.

    :param str city: where, as people
        call it
    :param days: how many to look ahead
    :type days: int
    :returns: what to wear
    """


def described(city: Annotated[str, "where"], days: Annotated[int, Field(description="how many")]):
    pass


@dataclass
class Place:
    name: str
    country: Optional[str] = None  # noqa: UP045 - the old way counts, too


def go(
    places: list[Place], /, by: Literal["car", "train"] | None = None, *rest, fast=False, **more
):
    return [places, by, fast]


class Account(BaseModel):
    """Somebody who pays."""

    name: str
    money: float = Field(0.0, ge=0)


class Ticket(TypedDict):
    number: int


class Clock:
    """Tells the time."""

    def __call__(self, zone: str) -> str:
        return f"noon in {zone}"

    def set(self, hour: int) -> int:
        """Set it."""
        return hour


async def wait_for(name: str) -> str:
    await asyncio.sleep(0)
    return f"{name} came"


WHERE, AHEAD = "where, as people call it", "how many to look ahead"
PARAMETERS: list[tuple[Any, str, str, dict[str, Any]]] = [
    (
        get_weather,
        "get_weather",
        "Tell the weather of a city.\n\nIt looks out of the window.",
        {
            "type": "object",
            "properties": {
                "city": {**TEXT, "description": WHERE},
                "days": {**NUMBER, "description": AHEAD, "default": 1},
                "unit": {**TEXT, "enum": ["C", "F"], "default": "C"},
            },
            "required": ["city"],
        },
    ),
    (
        of_numpy,
        "of_numpy",
        "Tell the weather.",
        {
            "type": "object",
            "properties": {
                "city": {"description": WHERE},
                "days": {**NUMBER, "description": AHEAD, "default": 1},
            },
            "required": ["city"],
        },
    ),
    (
        of_rest,
        "of_rest",
        "Tell the weather.",
        {
            "type": "object",
            "properties": {
                "city": {**TEXT, "description": WHERE},
                "days": {**NUMBER, "description": AHEAD},
            },
            "required": ["city", "days"],
        },
    ),
    (
        functools.partial(get_weather, "Rome", unit="F"),
        "get_weather",
        "Tell the weather of a city.\n\nIt looks out of the window.",
        {
            "type": "object",
            "properties": {"days": {**NUMBER, "description": AHEAD, "default": 1}},
        },
    ),
    (
        go,
        "go",
        "",
        {
            "type": "object",
            "properties": {
                "places": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": TEXT,
                            "country": {"anyOf": [TEXT, {"type": "null"}]},
                        },
                        "required": ["name"],
                    },
                },
                "by": {"anyOf": [{**TEXT, "enum": ["car", "train"]}, {"type": "null"}]},
                "fast": {"type": "boolean", "default": False},
            },
            "required": ["places"],
        },
    ),
    (
        Clock(),
        "Clock",
        "Tells the time.",
        {"type": "object", "properties": {"zone": TEXT}, "required": ["zone"]},
    ),
    (
        Clock().set,
        "set",
        "Set it.",
        {"type": "object", "properties": {"hour": NUMBER}, "required": ["hour"]},
    ),
    (
        Ticket,
        "Ticket",
        "",
        {"type": "object", "properties": {"number": NUMBER}, "required": ["number"]},
    ),
    (
        Place,
        "Place",
        "",
        {
            "type": "object",
            "properties": {"name": TEXT, "country": {"anyOf": [TEXT, {"type": "null"}]}},
            "required": ["name"],
        },
    ),
    (
        {"type": "function", "function": {"name": "a-1", "parameters": {"type": "object"}}},
        "a-1",
        "",
        {"type": "object"},
    ),
    ({"name": "b", "description": "Does b."}, "b", "Does b.", {"type": "object", "properties": {}}),
]


@pytest.mark.parametrize(
    ("given", "name", "description", "parameters"), PARAMETERS, ids=lambda value: str(value)[:20]
)
def test_what_is_given_describes_itself(
    given: Any, name: str, description: str, parameters: dict[str, Any]
):
    (tool,) = tools_of([given])
    function = {"name": name, "description": description, "parameters": parameters}
    assert tool.to_dict() == {"type": "function", "function": function}
    assert Tool.of(tool) is tool


def test_a_type_may_bring_its_description():
    properties = Tool.of(described).parameters["properties"]
    assert (properties["city"], properties["days"]["description"]) == (
        {**TEXT, "description": "where"},
        "how many",
    )


def test_a_model_of_pydantic_is_a_tool_that_gives_an_object():
    tool = Tool.of(Account)
    assert (tool.name, tool.description) == ("Account", "Somebody who pays.")
    assert tool.parameters["properties"]["money"]["minimum"] == 0
    assert tool.call('{"name": "Ann", "money": 3}') == Account(name="Ann", money=3)


CALLED: list[tuple[Any, str, Any]] = [
    (get_weather, '{"city": "Rome", "unit": "F"}', "1 warm days in Rome (F)"),
    (functools.partial(get_weather, "Rome", unit="F"), "", "1 warm days in Rome (F)"),
    (go, '{"places": [{"name": "Rome"}], "by": "car"}', [[Place("Rome")], "car", False]),
    (Clock(), '{"zone": "UTC"}', "noon in UTC"),
    (Clock().set, '{"hour": 5.0}', 5),
    (Place, '{"name": "Rome"}', Place("Rome")),
    (Ticket, '{"number": 5}', {"number": 5}),
    (wait_for, '{"name": "Ann"}', "Ann came"),
    (functools.partial(wait_for, "Ann"), "{}", "Ann came"),
    (Tool("greet", parameters={"required": ["name"]}, function="hello {name}".format),
     '{"name": "Ann"}', "hello Ann"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "arguments", "expected"), CALLED, ids=lambda v: str(v)[:20])
async def test_arguments_become_objects_of_the_hinted_types(
    given: Any, arguments: str, expected: Any
):
    tool = Tool.of(given)
    assert await asyncio.to_thread(tool.call, arguments) == expected
    assert await tool.call_async(arguments) == expected
    assert await tool.call_async(json.loads(arguments or "{}")) == expected


@pytest.mark.parametrize(
    ("given", "arguments", "name", "message"),
    [
        (get_weather, "{", "arguments", "`arguments` is no JSON"),
        (get_weather, "[1]", "arguments", r"`arguments` must be an object, got \[1\]"),
        (get_weather, "[" * 100_000, "arguments", "nested too deeply"),
        (get_weather, "{}", "city", "`city` is missing"),
        (get_weather, '{"city": 5}', "city", "`city` must be a string, got 5"),
        (get_weather, '{"city": "a", "days": "3"}', "days", "`days` must be a whole number, got"),
        (get_weather, '{"city": "a", "unit": "K"}', "unit", '`unit` must be one of "C", "F"'),
        (get_weather, '{"town": "a"}', "town",
         "`town` is no field here; there are `city`, `days`, `unit`"),
        (go, '{"places": [{"name": "a"}, {}]}', "places[1].name", r"`places\[1\].name` is miss"),
        (Account, '{"name": "Ann", "money": -1}', "money", "`money` was refused: Input should be"),
        (Tool("t", parameters={"required": ["a"]}, function=print), "{}", "a", "`a` is missing"),
        ({"name": "b"}, "{}", "tools", "`b` has no function to call"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(given: Any, arguments: str, name: str, message: str):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        Tool.of(given).call(arguments)
    assert caught.value.name == name


def unhinted_type(number: complex): ...


def lost_hint(number: Nowhere): ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("get_weather", "`tools` must be a list of tools, got 'get_weather'"),
        ({"name": "a"}, "`tools` must be a list of tools"),
        (get_weather, "`tools` must be a list of tools"),
        ([{"name": "a"}] * 129, "`tools` must be at most 128 tools"),
        (
            [get_weather, 5],
            r"`tools\[1\]` must be a function, or a mapping with a `function`, got 5",
        ),
        ([get_weather, get_weather], "`tools` must be tools of different names"),
        ([{"type": "retrieval"}], r"`tools\[0\]` must be a function, or a mapping"),
        ([{"type": "function", "function": 5}], r"`tools\[0\]` must be a function, or a mapping"),
        ([{"name": "a b"}], r"`tools\[0\]\.function\.name` must be 1 to 128 letters"),
        ([{"description": "a"}], r"`tools\[0\]\.function\.name` must be .* got None"),
        ([{"name": "a", "description": 5}], r"`tools\[0\]\.function\.description` must be text"),
        ([{"name": "a", "parameters": [5]}], r"function\.parameters` must be a JSON schema"),
        ([{"name": "a", "parameters": {"a": object()}}], "must hold what JSON can hold"),
        ([lambda city: city], "a lambda has no name"),
        ([unhinted_type], r"type `complex` \(at `unhinted_type\.number`\)"),
        ([lost_hint], "type hints of `lost_hint` cannot be read.*Nowhere"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_tool_is_refused(given: Any, message: str):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        tools_of(given)
    assert caught.value.name.startswith("tools")


def test_a_tool_of_ones_own_is_checked_too():
    with pytest.raises(InvalidRequestError, match=r"`Tool\.function` must be a function"):
        Tool("a", function=5)  # type: ignore[arg-type]
