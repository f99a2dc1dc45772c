"""Functions as tools, and the loop that runs them, over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, TypedDict

import pytest
from pydantic import BaseModel, Field

from tabagent_model import InvalidRequestError
from tabagent_model.results import ChatCompletion, ToolCall
from tabagent_model.tool_loop import ToolEvent, ToolRun, arun_tools, run_tools
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


def go(places: list[Place], /, by: Literal["car", "train"] | None = None, *rest, fast=False, **more):
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
        (get_weather, '{"city": "a", "days": "3"}', "days", '`days` must be a whole number, got "3"'),
        (get_weather, '{"city": "a", "unit": "K"}', "unit", '`unit` must be one of "C", "F"'),
        (get_weather, '{"town": "a"}', "town",
         "`town` is no field here; there are `city`, `days`, `unit`"),
        (go, '{"places": [{"name": "a"}, {}]}', r"places[1].name", r"`places\[1\].name` is missing"),
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
        ("get_weather", "`tools` must be a list of functions or dicts"),
        ({"name": "a"}, "`tools` must be a list of functions or dicts"),
        (get_weather, "`tools` must be a list of functions or dicts"),
        ([5], "5 is no tool"),
        ([get_weather, get_weather], "there are 2 tools with the name `get_weather`"),
        ([{"type": "retrieval"}], "must have the type `function`"),
        ([{"type": "function", "function": 5}], "must have the type `function`"),
        ([{"name": "a b"}], "a tool's name must be 1 to 64 letters"),
        ([{"description": "a"}], "a tool's name must be 1 to 64 letters.* got None"),
        ([{"name": "a", "description": 5}], "`a`: a description must be text"),
        ([{"name": "a", "parameters": [5]}], "`a`: the parameters must be a JSON schema"),
        ([{"name": "a", "parameters": {"a": object()}}], "`a`: the parameters are no JSON"),
        ([{"name": "a", "parameters": {"a": "\ud800"}}], "`a`: the parameters are no JSON"),
        ([lambda city: city], "a lambda has no name to call it by"),
        ([unhinted_type], r"type `complex` \(at `unhinted_type\.number`\)"),
        ([lost_hint], "type hints of `lost_hint` cannot be read.*Nowhere"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_tool_is_refused(given: Any, message: str):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        tools_of(given)
    assert caught.value.name == "tools"


# ---------------------------------------------------------------- the loop


Said = str | Sequence[tuple[str, str]]


class Speaker:
    """Answers with what it is told to say: a text, or calls as names and arguments."""

    def __init__(self, *said: Said, finish_reason: str = "stop") -> None:
        self.asked: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
        self._said = iter(said)
        self._finish_reason = finish_reason

    def answer(self, messages: list[dict[str, Any]], fields: dict[str, Any]) -> ChatCompletion:
        self.asked.append(([*messages], fields))
        said = next(self._said)
        number = len(self.asked)
        if isinstance(said, str):
            return completion(said, (), self._finish_reason)
        calls = [ToolCall(f"{number}.{i}", *each) for i, each in enumerate(said)]
        reason = "tool_calls" if self._finish_reason == "stop" else self._finish_reason
        return completion("", tuple(calls), reason)


class SyncSpeaker(Speaker):
    def chat(self, messages: Any, **fields: Any) -> ChatCompletion:
        return self.answer(messages, fields)


class AsyncSpeaker(Speaker):
    async def chat(self, messages: Any, **fields: Any) -> ChatCompletion:
        return self.answer(messages, fields)


def completion(text: str, calls: tuple[ToolCall, ...], reason: str) -> ChatCompletion:
    return ChatCompletion(text, (), reason, content=text, tool_calls=calls)  # type: ignore[arg-type]


class Loop:
    """Both loops behind one interface."""

    def __init__(self, is_async: bool) -> None:
        self._is_async = is_async

    def speaker(self, *said: Said, **fields: Any) -> Any:
        return (AsyncSpeaker if self._is_async else SyncSpeaker)(*said, **fields)

    async def run(self, speaker: Any, tools: Sequence[Any], **fields: Any) -> ToolRun:
        if self._is_async:
            return await arun_tools(speaker, "Go!", tools, **fields)
        return await asyncio.to_thread(run_tools, speaker, "Go!", tools, **fields)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def loop(request: pytest.FixtureRequest) -> Loop:
    return Loop(request.param)


def told(run: ToolRun) -> list[Any]:
    """What the model was told by tools."""
    return [message["content"] for message in run.messages if message["role"] == "tool"]


async def test_calls_are_answered_until_the_model_stops(loop: Loop):
    speaker = loop.speaker([("get_weather", '{"city": "Rome"}')], "It is warm.")
    run = await loop.run(speaker, [get_weather], temperature=0)
    assert run.messages == [
        {"role": "user", "content": "Go!"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1.0",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "1.0",
            "name": "get_weather",
            "content": "1 warm days in Rome (C)",
        },
        {"role": "assistant", "content": "It is warm."},
    ]
    assert (str(run), run.rounds, run.outcome) == ("It is warm.", 2, "stop")
    (call,) = run.calls
    assert (call.call.name, call.value, call.error, call.round) == (
        "get_weather",
        "1 warm days in Rome (C)",
        None,
        1,
    )
    fields = {"temperature": 0, "tools": tools_of([get_weather])}
    assert [(len(messages), given) for messages, given in speaker.asked] == [
        (1, fields),
        (3, fields),
    ]


async def test_parallel_calls_run_together_and_are_answered_in_order(loop: Loop):
    both = threading.Barrier(2, timeout=5)
    met = asyncio.Event()

    def meet(name: str) -> str:
        both.wait()
        return name

    async def come(name: str) -> str:
        met.set()
        return name

    async def wait(name: str) -> str:
        await met.wait()
        return name

    calls = [("wait", '{"name": "a"}'), ("meet", '{"name": "b"}')]
    calls += [("meet", '{"name": "c"}'), ("come", '{"name": "d"}')]
    run = await loop.run(loop.speaker(calls, "Done."), [meet, come, wait])
    assert told(run) == ["a", "b", "c", "d"]
    assert [result.value for result in run.calls] == ["a", "b", "c", "d"]


async def test_more_calls_than_threads_all_run(loop: Loop):
    calls = [("set", f'{{"hour": {hour}}}') for hour in range(100)]
    run = await loop.run(loop.speaker(calls, "Done."), [Clock().set])
    assert told(run) == [str(hour) for hour in range(100)]


async def test_what_goes_wrong_in_a_tool_is_told_to_the_model(loop: Loop):
    def fails(how: str) -> None:
        raise {
            "key": KeyError("a"),
            "exit": SystemExit(3),
            "stop": StopIteration("end"),
            "own": InvalidRequestError("`a` is wrong", hint="try b", name="a"),
        }[how]

    async def is_cancelled() -> None:
        raise asyncio.CancelledError

    calls = [("fails", f'{{"how": "{how}"}}') for how in ("key", "exit", "stop", "own")]
    calls += [("is_cancelled", ""), ("nothing", "{}"), ("fails", '{"what": 1}'), ("fails", "{")]
    run = await loop.run(loop.speaker(calls, "Oh."), [fails, is_cancelled])
    errors = [json.loads(content)["error"] for content in told(run)]
    assert errors[:7] == [
        "KeyError: 'a'",
        "SystemExit: 3",
        "RuntimeError: StopIteration was raised: end",
        "`a` is wrong",
        "RuntimeError: the call was cancelled",
        "there is no tool `nothing`; there are `fails`, `is_cancelled`",
        "`what` is no field here; there are `how`",
    ]
    assert errors[7].startswith("`arguments` is no JSON: ")
    assert [type(result.error) for result in run.calls[:2]] == [KeyError, SystemExit]
    assert run.outcome == "stop"


async def test_a_tool_that_takes_too_long_is_left_behind(loop: Loop):
    released = threading.Event()
    cancelled = threading.Event()

    def blocks() -> None:
        released.wait(20)

    async def sleeps() -> None:
        try:
            await asyncio.sleep(20)
        finally:
            cancelled.set()

    speaker = loop.speaker([("blocks", ""), ("sleeps", ""), ("set", '{"hour": 1}')], "Oh.")
    run = await loop.run(speaker, [blocks, sleeps, Clock().set], tool_timeout_s=0.05)
    released.set()
    late = '{"error": "TimeoutError: no end within 0.05 s"}'
    assert told(run) == [late, late, "1"]
    assert cancelled.is_set()


async def test_each_step_is_an_event(loop: Loop):
    def fails() -> None:
        raise ValueError("no")

    seen: list[ToolEvent] = []
    speaker = loop.speaker([("set", '{"hour": 1}')], [("fails", "")], "Done.")
    run = await loop.run(speaker, [Clock().set, fails], on_event=seen.append)
    first, second = run.calls
    assert [(event.kind, event.round) for event in seen] == [
        *[("answer", 1), ("call", 1), ("result", 1)],
        *[("answer", 2), ("call", 2), ("error", 2)],
        ("answer", 3),
    ]
    assert [event.call for event in seen[1:3]] == [first.call] * 2
    assert (seen[2].result, seen[5].error) == (1, second.error)
    assert seen[-1].answer is run.answer


@pytest.mark.parametrize("kind", ["answer", "call", "result"])
async def test_an_event_can_end_the_run(loop: Loop, kind: str):
    ran = []
    speaker = loop.speaker([("note", '{"name": "a"}')])

    def note(name: str) -> str:
        ran.append(name)
        return "noted"

    run = await loop.run(speaker, [note], on_event=lambda event: event.kind != kind)
    has_run = kind == "result"
    assert (run.outcome, run.rounds, ran) == ("cancelled", 1, ["a"] if has_run else [])
    assert told(run) == ["noted" if has_run else '{"error": "it was not run"}']


async def test_an_event_that_fails_ends_the_run_with_its_error(loop: Loop):
    def on_event(event: ToolEvent) -> None:
        if event.kind == "call":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await loop.run(loop.speaker([("set", "")]), [Clock().set], on_event=on_event)


async def test_an_event_may_be_awaited():
    seen = []

    async def on_event(event: ToolEvent) -> bool:
        await asyncio.sleep(0)
        seen.append(event.kind)
        return event.kind != "call"

    run = await arun_tools(
        AsyncSpeaker([("set", "")]),  # type: ignore[arg-type]
        "Go!",
        [Clock().set],
        on_event=on_event,
    )
    assert (seen, run.outcome) == (["answer", "call"], "cancelled")


async def test_rounds_are_limited(loop: Loop):
    calls = [("set", '{"hour": 1}')]
    speaker = loop.speaker(*[calls] * 5)
    run = await loop.run(speaker, [Clock().set], max_rounds=2)
    assert (run.rounds, run.outcome, len(run.calls)) == (2, "max_rounds", 1)
    assert told(run) == ["1", '{"error": "it was not run"}']
    assert run.answer.tool_calls[0].name == "set"


async def test_a_call_that_was_cut_short_is_not_run(loop: Loop):
    speaker = loop.speaker([("set", '{"hour": 1}')], finish_reason="length")
    run = await loop.run(speaker, [Clock().set])
    assert (run.outcome, run.calls, told(run)) == ("length", (), ['{"error": "it was not run"}'])


async def test_calls_of_a_tool_without_a_function_are_left_to_the_caller(loop: Loop):
    speaker = loop.speaker([("set", '{"hour": 1}'), ("b", "{}")])
    run = await loop.run(speaker, [Clock().set, {"name": "b"}])
    assert (run.outcome, run.calls, told(run)) == ("unanswered", (), [])
    assert [call.name for call in run.answer.tool_calls] == ["set", "b"]


@pytest.mark.parametrize("choice", ["required", "set", {"type": "function"}])
async def test_a_tool_must_be_called_only_once(loop: Loop, choice: Any):
    speaker = loop.speaker([("set", '{"hour": 1}')], "Done.")
    await loop.run(speaker, [Clock().set], tool_choice=choice)
    assert [fields["tool_choice"] for _, fields in speaker.asked] == [choice, "auto"]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        (None, "null"),
        ({"a": (1, {2})}, '{"a": [1, [2]]}'),
        (Place("Rome é"), '{"name": "Rome é", "country": null}'),
        (Account(name="Ann"), '{"name": "Ann", "money": 0.0}'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (1j, '"1j"'),
        ("\ud800", "?"),
    ],
    ids=lambda value: ascii(value)[:20],
)
async def test_a_result_is_told_as_text(loop: Loop, value: Any, content: str):
    def give() -> Any:
        return value

    assert told(await loop.run(loop.speaker([("give", "")], "Done."), [give])) == [content]


async def test_a_tool_sees_the_context_of_its_caller(loop: Loop):
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    user.set("Ann")

    def who() -> str:
        return user.get()

    async def who_async() -> str:
        return user.get()

    speaker = loop.speaker([("who", ""), ("who_async", "")], "Done.")
    assert told(await loop.run(speaker, [who, who_async])) == ["Ann", "Ann"]


async def test_cancelling_the_task_cancels_the_calls():
    begun, ended = asyncio.Event(), []

    async def sleeps() -> None:
        begun.set()
        try:
            await asyncio.sleep(20)
        finally:
            ended.append("sleeps")

    speaker: Any = AsyncSpeaker([("sleeps", "")])
    task = asyncio.create_task(arun_tools(speaker, "Go!", [sleeps]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["sleeps"]


def test_an_interrupt_cancels_the_calls(interrupt: Callable[[], None]):
    ended = threading.Event()

    async def sleeps() -> None:
        interrupt()
        try:
            await asyncio.sleep(20)
        finally:
            ended.set()

    speaker: Any = SyncSpeaker([("sleeps", "")])
    with pytest.raises(KeyboardInterrupt):
        run_tools(speaker, "Go!", [sleeps])
    assert ended.wait(5)


@pytest.fixture
def interrupt() -> Callable[[], None]:
    """Ctrl-C, as the main thread gets it."""
    import _thread

    return _thread.interrupt_main


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_rounds": 0}, "max_rounds"),
        ({"max_rounds": True}, "max_rounds"),
        ({"tool_timeout_s": 0}, "tool_timeout_s"),
        ({"tool_timeout_s": "1"}, "tool_timeout_s"),
        ({"on_event": 5}, "on_event"),
    ],
)
async def test_what_makes_no_sense_is_refused_before_anything_is_asked(
    loop: Loop, fields: dict[str, Any], name: str
):
    speaker = loop.speaker("Hello.")
    with pytest.raises(InvalidRequestError) as caught:
        await loop.run(speaker, [get_weather], **fields)
    assert (caught.value.name, speaker.asked) == (name, [])
