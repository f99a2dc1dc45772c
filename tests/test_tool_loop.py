"""The loop that runs what a model calls, over an engine that says what it is told to."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from conftest import Face
from tabagent_model import AsyncModel, InvalidRequestError, Model
from tabagent_model.testing import ScriptedContext
from tabagent_model.tool_loop import ToolEvent, ToolRun

Said = str | Sequence[tuple[str, dict[str, Any]]]
MakeFace = Callable[[ScriptedContext], Face]
NOT_RUN = '{"error": "it was not run"}'


def get_weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"{days} warm days in {city}"


def double(number: int) -> int:
    return number * 2


@dataclass
class Place:
    name: str
    country: str | None = None


class Account(BaseModel):
    name: str
    money: float = 0.0


class Speaker(ScriptedContext):
    """Says one thing after the other: a text, or calls of tools."""

    def __init__(self, *said: Said) -> None:
        self.options: list[dict[str, Any]] = []
        """What each answer was asked for with."""
        texts = iter(said)
        super().__init__(lambda prompt: [written(next(texts)), " "])

    def render_chat(self, *args: Any, **kwargs: Any) -> Any:
        self.options.append(json.loads(args[3]))
        return super().render_chat(*args, **kwargs)


def written(said: Said) -> str:
    if isinstance(said, str):
        return said
    calls = [json.dumps({"name": name, "arguments": given}) for name, given in said]
    return "".join(f"<tool_call>{call}</tool_call>" for call in calls)


async def run_tools(face: Face, tools: Sequence[Any], **fields: Any) -> ToolRun:
    done = await face.call("run_tools", "Go!", tools, **fields)
    assert isinstance(done, ToolRun)
    return done


def told(done: ToolRun) -> list[Any]:
    """What the model was told by tools."""
    return [message["content"] for message in done.messages if message["role"] == "tool"]


async def test_calls_are_answered_until_the_model_stops(face: MakeFace):
    speaker = Speaker([("get_weather", {"city": "Rome"})], "It is warm.")
    done = await run_tools(face(speaker), [get_weather], seed=3)
    (result,) = done.calls
    assert done.messages == [
        {"role": "user", "content": "Go!"},
        {"role": "assistant", "content": " ", "tool_calls": [result.call.to_dict()]},
        {
            "role": "tool",
            "tool_call_id": result.call.id,
            "name": "get_weather",
            "content": "1 warm days in Rome",
        },
        {"role": "assistant", "content": "It is warm. "},
    ]
    assert (str(done), done.rounds, done.outcome) == ("It is warm. ", 2, "stop")
    assert (result.call.name, result.value, result.error, result.round) == (
        "get_weather",
        "1 warm days in Rome",
        None,
        1,
    )
    assert [request.params["seed"] for request in speaker.submitted] == [3, 3]
    names = [[t["function"]["name"] for t in given["tools"]] for given in speaker.options]
    assert names == [["get_weather"]] * 2


async def test_a_conversation_can_go_on_after_calls(face: MakeFace):
    spoken = face(
        Speaker([("double", {"number": 1})], "Two.", [("double", {"number": 2})], "Four.")
    )
    done = await run_tools(spoken, [double])
    messages = [*done.messages, {"role": "user", "content": "Again!"}]
    again = await spoken.call("run_tools", messages, [double])
    assert [message["role"] for message in again.messages] == [
        *("user", "assistant", "tool", "assistant"),
        *("user", "assistant", "tool", "assistant"),
    ]
    assert len(messages) == 5


async def test_parallel_calls_run_together_and_are_answered_in_order(face: MakeFace):
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

    names = ["wait", "meet", "meet", "come"]
    calls = [(name, {"name": letter}) for name, letter in zip(names, "abcd", strict=True)]
    done = await run_tools(face(Speaker(calls, "Done.")), [meet, come, wait])
    assert told(done) == ["a", "b", "c", "d"]
    assert [result.value for result in done.calls] == ["a", "b", "c", "d"]


async def test_more_calls_than_threads_all_run(face: MakeFace):
    calls = [("double", {"number": number}) for number in range(100)]
    done = await run_tools(face(Speaker(calls, "Done.")), [double])
    assert told(done) == [str(number * 2) for number in range(100)]


async def test_what_goes_wrong_in_a_tool_is_told_to_the_model(face: MakeFace):
    def fails(how: str) -> None:
        raise {
            "key": KeyError("a"),
            "exit": SystemExit(3),
            "stop": StopIteration("end"),
            "own": InvalidRequestError("`a` is wrong", hint="try b", name="a"),
        }[how]

    async def is_cancelled() -> None:
        raise asyncio.CancelledError

    calls: list[tuple[str, dict[str, Any]]]
    calls = [("fails", {"how": how}) for how in ("key", "exit", "stop", "own")]
    calls += [("is_cancelled", {}), ("nothing", {}), ("fails", {"what": 1}), ("fails", {"how": 1})]
    done = await run_tools(face(Speaker(calls, "Oh.")), [fails, is_cancelled])
    assert [json.loads(content)["error"] for content in told(done)] == [
        "KeyError: 'a'",
        "SystemExit: 3",
        "RuntimeError: StopIteration was raised: end",
        "`a` is wrong",
        "RuntimeError: the call was cancelled",
        "there is no tool `nothing`; there are `fails`, `is_cancelled`",
        "`what` is no field here; there are `how`",
        "`how` must be a string, got 1",
    ]
    assert [type(result.error) for result in done.calls[:2]] == [KeyError, SystemExit]
    assert done.outcome == "stop"


async def test_a_tool_that_takes_too_long_is_left_behind(face: MakeFace):
    released, cancelled = threading.Event(), threading.Event()

    def blocks() -> None:
        released.wait(20)

    async def sleeps() -> None:
        try:
            await asyncio.sleep(20)
        finally:
            cancelled.set()

    calls: Said = [("blocks", {}), ("sleeps", {}), ("double", {"number": 1})]
    tools = [blocks, sleeps, double]
    done = await run_tools(face(Speaker(calls, "Oh.")), tools, tool_timeout_s=0.2)
    released.set()
    late = '{"error": "TimeoutError: no end within 0.2 s"}'
    assert told(done) == [late, late, "2"]
    assert cancelled.wait(5)


async def test_each_step_is_an_event(face: MakeFace):
    def fails() -> None:
        raise ValueError("no")

    seen: list[ToolEvent] = []
    speaker = Speaker([("double", {"number": 1})], [("fails", {})], "Done.")
    done = await run_tools(face(speaker), [double, fails], on_event=seen.append)
    first, second = done.calls
    assert [(event.kind, event.round) for event in seen] == [
        *[("answer", 1), ("call", 1), ("result", 1)],
        *[("answer", 2), ("call", 2), ("error", 2)],
        ("answer", 3),
    ]
    assert [event.call for event in seen[1:3]] == [first.call] * 2
    assert (seen[2].result, seen[5].error) == (2, second.error)
    assert seen[-1].answer is done.answer


@pytest.mark.parametrize("kind", ["answer", "call", "result"])
async def test_an_event_can_end_the_run(face: MakeFace, kind: str):
    ran = []

    def note(name: str) -> str:
        ran.append(name)
        return "noted"

    spoken = face(Speaker([("note", {"name": "a"})]))
    done = await run_tools(spoken, [note], on_event=lambda event: event.kind != kind)
    has_run = kind == "result"
    assert (done.outcome, done.rounds, ran) == ("cancelled", 1, ["a"] if has_run else [])
    assert told(done) == ["noted" if has_run else NOT_RUN]


async def test_an_event_that_fails_ends_the_run_with_its_error(face: MakeFace):
    def on_event(event: ToolEvent) -> None:
        if event.kind == "call":
            raise ZeroDivisionError

    spoken = face(Speaker([("double", {"number": 1})]))
    with pytest.raises(ZeroDivisionError):
        await run_tools(spoken, [double], on_event=on_event)


async def test_an_event_may_be_awaited():
    seen = []

    async def on_event(event: ToolEvent) -> bool:
        await asyncio.sleep(0)
        seen.append(event.kind)
        return event.kind != "call"

    async with AsyncModel(Speaker([("double", {"number": 1})])) as model:
        done = await model.run_tools("Go!", [double], on_event=on_event)
    assert (seen, done.outcome) == (["answer", "call"], "cancelled")


async def test_rounds_are_limited(face: MakeFace):
    speaker = Speaker(*[[("double", {"number": 1})]] * 5)
    done = await run_tools(face(speaker), [double], max_rounds=2)
    assert (done.rounds, done.outcome, len(done.calls)) == (2, "max_rounds", 1)
    assert told(done) == ["2", NOT_RUN]
    assert done.answer.tool_calls[0].name == "double"


async def test_a_call_of_an_answer_that_was_cut_short_is_not_run(face: MakeFace):
    speaker = Speaker([("double", {"number": 1})])
    done = await run_tools(face(speaker), [double], max_tokens=1)
    assert (done.outcome, done.calls, told(done)) == ("length", (), [NOT_RUN])


async def test_calls_of_a_tool_without_a_function_are_left_to_the_caller(face: MakeFace):
    speaker = Speaker([("double", {"number": 1}), ("b", {})])
    done = await run_tools(face(speaker), [double, {"type": "function", "function": {"name": "b"}}])
    assert (done.outcome, done.calls, told(done)) == ("unanswered", (), [])
    assert [call.name for call in done.answer.tool_calls] == ["double", "b"]


@pytest.mark.parametrize("choice", ["required", "double"])
async def test_a_tool_has_to_be_called_only_once(face: MakeFace, choice: str):
    speaker = Speaker([("double", {"number": 1})], "Done.")
    await run_tools(face(speaker), [double, get_weather], tool_choice=choice)
    assert [given.get("tool_choice") for given in speaker.options] == ["required", None]
    asked, after = ([t["function"]["name"] for t in given["tools"]] for given in speaker.options)
    both = ["double", "get_weather"]
    assert (asked, after) == (both if choice == "required" else ["double"], both)


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
async def test_a_result_is_told_as_text(face: MakeFace, value: Any, content: str):
    def give() -> Any:
        return value

    assert told(await run_tools(face(Speaker([("give", {})], "Done.")), [give])) == [content]


async def test_a_tool_sees_the_context_of_its_caller(face: MakeFace):
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    user.set("Ann")

    def who() -> str:
        return user.get()

    async def who_async() -> str:
        return user.get()

    speaker = Speaker([("who", {}), ("who_async", {})], "Done.")
    assert told(await run_tools(face(speaker), [who, who_async])) == ["Ann", "Ann"]


async def test_cancelling_the_task_cancels_the_calls():
    begun, ended = asyncio.Event(), []

    async def sleeps() -> None:
        begun.set()
        try:
            await asyncio.sleep(20)
        finally:
            ended.append("sleeps")

    async with AsyncModel(Speaker([("sleeps", {})])) as model:
        task = asyncio.create_task(model.run_tools("Go!", [sleeps]))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["sleeps"]


def test_an_interrupt_cancels_the_calls():
    ended = threading.Event()

    async def sleeps() -> None:
        _thread.interrupt_main()  # Ctrl-C, as the main thread gets it
        try:
            await asyncio.sleep(20)
        finally:
            ended.set()

    with Model(Speaker([("sleeps", {})])) as model, pytest.raises(KeyboardInterrupt):
        model.run_tools("Go!", [sleeps])
    assert ended.wait(5)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_rounds": 0}, "max_rounds"),
        ({"max_rounds": True}, "max_rounds"),
        ({"tool_timeout_s": 0}, "tool_timeout_s"),
        ({"tool_timeout_s": "1"}, "tool_timeout_s"),
        ({"on_event": 5}, "on_event"),
        ({"temperature": "hot"}, "temperature"),
        ({"tool_choice": "other"}, "tool_choice"),
        ({"schema": dict}, "schema"),
    ],
)
async def test_what_makes_no_sense_is_refused(face: MakeFace, fields: dict[str, Any], name: str):
    speaker = Speaker("Hello.")
    with pytest.raises(InvalidRequestError) as caught:
        await run_tools(face(speaker), [get_weather], **fields)
    assert (caught.value.name, speaker.submitted) == (name, [])
