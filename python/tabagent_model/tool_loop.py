"""Ask, run what the model calls, answer it, until the model has said what it wanted to say."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ._prompt import Messages, checked_messages
from .errors import InvalidRequestError, TabAgentModelError
from .params import checked_whole
from .tools import tools_of

if TYPE_CHECKING:
    from .model import AsyncModel, Model
    from .results import ChatCompletion, ToolCall

Outcome = Literal["stop", "length", "max_rounds", "unanswered", "cancelled"]


@dataclass(frozen=True)
class ToolEvent:
    """A step: the model has answered, a call begins, and it ends with a result or an error."""

    kind: Literal["answer", "call", "result", "error"]
    round: int
    """Counted from 1."""
    answer: ChatCompletion | None = None
    call: ToolCall | None = None
    result: Any = None
    error: BaseException | None = None


OnEvent = Callable[[ToolEvent], Any]


@dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    call: ToolCall
    round: int
    content: str
    """What the model is told."""
    value: Any = None
    error: BaseException | None = None

    @property
    def message(self) -> dict[str, Any]:
        about = {"role": "tool", "tool_call_id": self.call.id, "name": self.call.name}
        return {**about, "content": self.content}

    @property
    def event(self) -> ToolEvent:
        kind: Literal["result", "error"] = "error" if self.error else "result"
        return ToolEvent(kind, self.round, None, self.call, self.value, self.error)


@dataclass(frozen=True)
class ToolRun:
    """A conversation with calls, up to its last answer."""

    messages: list[dict[str, Any]]
    """All of it, ready to go on with."""
    answer: ChatCompletion
    rounds: int
    """How many answers it took."""
    calls: tuple[ToolResult, ...]
    outcome: Outcome
    """`stop`: the model has said what it wanted; `length`: its last answer was cut short;
    `max_rounds`: it wanted to call more; `unanswered`: it calls a tool that has no function, and
    `answer.tool_calls` wait for their results; `cancelled`: `on_event` returned False."""

    def __str__(self) -> str:
        return str(self.answer)


def run_tools(
    model: Model,
    messages: Messages,
    tools: Sequence[Any],
    *,
    max_rounds: int = 8,
    tool_timeout_s: float | None = None,
    on_event: OnEvent | None = None,
    **fields: Any,
) -> ToolRun:
    """See `Model.run_tools`."""
    _check_on_event(on_event)
    rounds = _Rounds(messages, tools, max_rounds, tool_timeout_s, fields)

    def tell(event: ToolEvent) -> None:
        if on_event is not None and on_event(event) is False:
            raise _Stopped

    with contextlib.suppress(_Stopped):
        while rounds.outcome is None:
            rounds.add(model.chat(rounds.messages, **rounds.fields))
            for event in rounds.begun():
                tell(event)
            with contextlib.closing(_from_outside(rounds)) as results:
                for result in results:
                    tell(result.event)
            rounds.close()
    return rounds.result()


async def arun_tools(
    model: AsyncModel,
    messages: Messages,
    tools: Sequence[Any],
    *,
    max_rounds: int = 8,
    tool_timeout_s: float | None = None,
    on_event: OnEvent | None = None,
    **fields: Any,
) -> ToolRun:
    """See `AsyncModel.run_tools`."""
    _check_on_event(on_event)
    rounds = _Rounds(messages, tools, max_rounds, tool_timeout_s, fields)

    async def tell(event: ToolEvent) -> None:
        wish: Any = None if on_event is None else on_event(event)
        if hasattr(wish, "__await__"):
            wish = await wish
        if wish is False:
            raise _Stopped

    with contextlib.suppress(_Stopped):
        while rounds.outcome is None:
            rounds.add(await model.chat(rounds.messages, **rounds.fields))
            for event in rounds.begun():
                await tell(event)
            async with contextlib.aclosing(rounds.run()) as results:
                async for result in results:
                    await tell(result.event)
            rounds.close()
    return rounds.result()


class _Stopped(Exception):  # noqa: N818 - no error
    """`on_event` returned False."""


class _Rounds:
    """The conversation so far, and what is still to be done in this round."""

    def __init__(
        self,
        messages: Messages,
        tools: Sequence[Any],
        max_rounds: int,
        timeout_s: float | None,
        fields: Mapping[str, Any],
    ) -> None:
        self.messages = [dict(message) for message in checked_messages(messages)]
        self.calls: Sequence[ToolCall] = ()
        """Those of this round that are to be run."""
        self.outcome: Outcome | None = None
        self._tools = {tool.name: tool for tool in tools_of(tools)}
        self.fields = {**fields, "tools": list(self._tools.values())}
        self._max_rounds = checked_whole("max_rounds", max_rounds, 1, 1000)
        self._timeout_s = _checked_timeout(timeout_s)
        self._number = 0
        self._answer: ChatCompletion | None = None
        self._open: Sequence[ToolCall] = ()
        """Those that the conversation has no answer to yet."""
        self._results: dict[int, ToolResult] = {}
        """Of this round, by the place of the call: they end in another order than they began."""
        self._done: list[ToolResult] = []

    def add(self, answer: ChatCompletion) -> None:
        """Begin a round with what the model says."""
        self._number += 1
        self._answer = answer
        self.messages.append(answer.message)
        self.outcome = self._outcome_of(answer)
        self.calls = answer.tool_calls if self.outcome is None else ()
        self._open = answer.tool_calls if self.outcome != "unanswered" else ()
        # A model that had to call a tool would have to call one for ever.
        if self.fields.get("tool_choice") not in (None, "auto", "none"):
            self.fields["tool_choice"] = "auto"

    def begun(self) -> Iterator[ToolEvent]:
        yield ToolEvent("answer", self._number, answer=self._answer)
        for call in self.calls:
            yield ToolEvent("call", self._number, call=call)

    async def run(self) -> AsyncGenerator[ToolResult, None]:
        """What comes of the calls, in the order in which they end. Leaving cancels the others."""
        import asyncio

        turns = asyncio.Semaphore(_TOGETHER)

        async def run(place: int, call: ToolCall) -> ToolResult:
            async with turns:
                self._results[place] = result = await self._run(call)
            return result

        tasks = [asyncio.ensure_future(run(*each)) for each in enumerate(self.calls)]
        try:
            for ended in asyncio.as_completed(tasks):
                yield await ended
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Every call gets an answer, or the conversation could not go on."""
        for place, call in enumerate(self._open):
            result = self._results.get(place)
            self._done += [result] if result else []
            told = result or ToolResult(call, self._number, _told_error("it was not run"))
            self.messages.append(told.message)
        self._results, self._open = {}, ()

    def result(self) -> ToolRun:
        assert self._answer is not None
        self.close()
        outcome = self.outcome or "cancelled"
        return ToolRun(self.messages, self._answer, self._number, tuple(self._done), outcome)

    def _outcome_of(self, answer: ChatCompletion) -> Outcome | None:
        if answer.finish_reason in ("length", "cancelled"):
            return "length" if answer.finish_reason == "length" else "cancelled"
        if not answer.tool_calls:
            return "stop"
        tools = [self._tools.get(call.name) for call in answer.tool_calls]
        if any(tool is not None and tool.function is None for tool in tools):
            return "unanswered"
        return "max_rounds" if self._number == self._max_rounds else None

    async def _run(self, call: ToolCall) -> ToolResult:
        import asyncio

        task = asyncio.ensure_future(self._value_of(call))
        try:
            await asyncio.wait({task}, timeout=self._timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        if not task.done():
            task.cancel()  # a thread goes on, but nobody waits for it
            error: BaseException = TimeoutError(f"no end within {self._timeout_s} s")
        elif task.cancelled():
            error = RuntimeError("the call was cancelled")
        else:
            value, told, failure = task.result()
            return ToolResult(call, self._number, told, value, failure)
        return ToolResult(call, self._number, _told_error(error), error=error)

    async def _value_of(self, call: ToolCall) -> tuple[Any, str, BaseException | None]:
        try:
            if (tool := self._tools.get(call.name)) is None:
                names = ", ".join(f"`{name}`" for name in self._tools)
                message = f"there is no tool `{call.name:.64}`; there are {names}"
                raise InvalidRequestError(message, name="tools")
            value = await tool.call_async(call.arguments)
            return value, _told(value), None
        except (Exception, SystemExit) as error:  # a tool must not end what it was called by
            return None, _told_error(error), error


def _from_outside(rounds: _Rounds) -> Generator[ToolResult, None, None]:
    """`rounds.run()` in an event loop of another thread. This one can be interrupted meanwhile."""
    if not rounds.calls:
        return
    import asyncio
    import queue

    arrived: queue.SimpleQueue[ToolResult | BaseException | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async for result in rounds.run():
            arrived.put(result)

    task = loop.create_task(run())

    def run_loop() -> None:
        end: BaseException | None = None
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            end = error
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        arrived.put(end)

    try:  # already here: Ctrl-C may strike while the thread starts
        threading.Thread(target=run_loop, name="tabagent-tools", daemon=True).start()
        while isinstance(news := arrived.get(), ToolResult):
            yield news
        if news is not None:
            raise news
    finally:
        with contextlib.suppress(RuntimeError):  # it is closed already
            loop.call_soon_threadsafe(task.cancel)


def _told(value: Any) -> str:
    """What a function gave, as the model reads it: text as it is, everything else as JSON."""
    import json

    try:
        is_text = isinstance(value, str)
        text = value if is_text else json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    told: str = text.encode(errors="replace").decode()  # half a character is no text for the model
    return told


def _told_error(error: BaseException | str) -> str:
    said = str(error)
    if isinstance(error, TabAgentModelError):
        said = error.message
    elif isinstance(error, BaseException):
        said = f"{type(error).__name__}: {said}"
    return _told({"error": said})


def _plain(value: Any) -> Any:
    """What JSON has no form for, as something that it has one for."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (AbstractSet, Sequence)) else str(value)


def _checked_timeout(timeout_s: Any) -> float | None:
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is None or (is_number and 0 < timeout_s <= 1e9):
        return timeout_s  # type: ignore[no-any-return]
    message = f"`tool_timeout_s` must be a number of seconds above 0, got {timeout_s!r:.60}"
    raise InvalidRequestError(message, name="tool_timeout_s")


def _check_on_event(on_event: Any) -> None:
    if on_event is not None and not callable(on_event):
        message = f"`on_event` must be a function of a ToolEvent, got {on_event!r:.60}"
        raise InvalidRequestError(message, name="on_event")


# Each call of a function that is not async has a thread.
_TOGETHER = 32
