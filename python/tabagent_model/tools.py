"""What a model may call: functions, and whatever describes one.

    def get_weather(city: str, days: int = 1) -> str:
        '''Tell the weather.

        Args:
            city: where
        '''

The name, the docstring and the type hints are what the model is told; what it calls the function
with is checked against them and becomes objects of those types.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._prompt import json_text, sound_text
from .errors import InvalidRequestError
from .schema._docstring import Docstring
from .schema._hints import Kinds, description_of
from .schema._json import Mismatch, must_be, read
from .schema._kinds import MISSING, Anything, Field, Record

Bind = Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Tool:
    """One thing that a model may call. `function` is None if somebody else answers the calls."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {**_NO_PARAMETERS})
    """A JSON schema of an object."""
    function: Callable[..., Any] | None = None
    _bind: Bind | None = field(default=None, repr=False, compare=False)
    """Makes a call of JSON arguments; without it they are checked and given as keywords."""

    def __post_init__(self) -> None:
        parameters = _checked("Tool", self.name, self.description, self.parameters)
        if self.function is not None and not callable(self.function):
            raise _bad("Tool.function", "a function or None", self.function)
        object.__setattr__(self, "parameters", parameters)

    @classmethod
    def of(cls, given: Any, place: str = "tool") -> Tool:
        """A function or another callable, a tool in OpenAI's shape, or a class with fields: what
        is called then is the class, and what comes back is an object of it."""
        if isinstance(given, Tool):
            return given
        if isinstance(given, Mapping):
            return _of_mapping(given, place)
        if isinstance(given, type) and _has_fields(given):
            return _of_class(given)
        if callable(given):
            return _of_function(given)
        raise _bad(place, "a function, or a mapping with a `function`", given)

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}

    def bound(self, arguments: str | Mapping[str, Any]) -> Callable[[], Any]:
        """The call with these arguments, as JSON; an InvalidRequestError names what is wrong."""
        if self.function is None:
            message = f"`{self.name}` has no function to call"
            raise InvalidRequestError(message, name="tools")
        try:
            given = arguments
            if isinstance(arguments, str):
                given = read(arguments, "arguments") if arguments.strip() else {}
            if not isinstance(given, Mapping):
                raise must_be("arguments", "an object", given)
            return (self._bind or self._bind_keywords)(dict(given))
        except Mismatch as error:
            raise InvalidRequestError(str(error), name=error.where or "arguments") from None

    def call(self, arguments: str | Mapping[str, Any] = "") -> Any:
        """Call it here and now. An async function gets an event loop of its own."""
        result = self.bound(arguments)()
        if inspect.isawaitable(result):
            import asyncio

            return asyncio.run(_awaited(result))
        return result

    async def call_async(self, arguments: str | Mapping[str, Any] = "") -> Any:
        """Call it without holding up the event loop: what is not async, in a thread of its own."""
        call = self.bound(arguments)
        result = call() if self._is_async else await in_thread(call)
        return await result if inspect.isawaitable(result) else result

    def _bind_keywords(self, given: dict[str, Any]) -> Callable[[], Any]:
        assert self.function is not None
        Anything(dict(self.parameters)).read(given)
        return functools.partial(self.function, **given)

    @property
    def _is_async(self) -> bool:
        called = getattr(type(self.function), "__call__", None)  # noqa: B004 - the method itself
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(called)


def tools_of(given: Sequence[Any]) -> list[Tool]:
    """Tools of whatever `Tool.of` takes."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise _bad("tools", "a list of tools", given)
    if len(given) > _MOST_TOOLS:
        raise _bad("tools", f"at most {_MOST_TOOLS} tools", f"{len(given)} of them")
    tools = [Tool.of(each, f"tools[{index}]") for index, each in enumerate(given)]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise _bad("tools", "tools of different names", f"{name!r} twice")
    return tools


async def in_thread(function: Callable[[], Any]) -> Any:
    """What a function gives, called in a thread that nobody has to wait for.

    The threads of an executor would be waited for when Python ends, however long a tool takes.
    """
    import asyncio
    import contextvars

    loop = asyncio.get_running_loop()
    future = loop.create_future()
    context = contextvars.copy_context()

    def settle(set_it: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_it(outcome)

    def run() -> None:
        try:
            news: tuple[Any, Any] = (future.set_result, context.run(function))
        except StopIteration as error:  # no future takes it
            news = (future.set_exception, RuntimeError(f"StopIteration was raised: {error}"))
        except BaseException as error:
            news = (future.set_exception, error)
        try:
            loop.call_soon_threadsafe(settle, *news)
        except RuntimeError:  # the loop is closed, nobody waits any more
            return

    threading.Thread(target=run, name="tabagent-tool", daemon=True).start()
    return await future


async def _awaited(result: Any) -> Any:
    return await result


# ---------------------------------------------------------------- what is made a tool of


def _of_mapping(given: Mapping[str, Any], place: str) -> Tool:
    """OpenAI's shape, or what stands under its `function`."""
    function = given.get("function", given)
    if not isinstance(function, Mapping) or given.get("type", "function") != "function":
        raise _bad(place, "a function, or a mapping with a `function`", given)
    name, description = function.get("name"), function.get("description") or ""
    parameters = function.get("parameters") or _NO_PARAMETERS
    parameters = _checked(f"{place}.function", name, description, parameters)
    return Tool(str(name), description, parameters)


def _of_class(given: Any) -> Tool:
    """A pydantic model, dataclass, TypedDict or NamedTuple."""
    kinds = Kinds("tools")
    kind = kinds.of(given, given.__name__)
    schema = {**kinds.schema(kind)}
    if name := schema.pop("$ref", "").rpartition("/")[2]:  # it has itself inside
        schema = {**schema["$defs"][name], **schema}
    said = schema.pop("description", "")
    schema.pop("title", None)

    def bind(arguments: Any) -> Callable[[], Any]:
        made = kind.read(arguments)
        return lambda: made

    return Tool(given.__name__, said, schema, given, bind)


def _of_function(given: Callable[..., Any]) -> Tool:
    function, bound_names = _unwrapped(given)
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        message = "a lambda has no name that the model could call it by"
        raise InvalidRequestError(message, hint="use `Tool(name=…, function=…)`", name="tools")
    told = Docstring.of(inspect.getdoc(function if hasattr(function, "__name__") else given))
    kinds = Kinds("tools")
    parameters = [each for each in _parameters_of(given, name) if each.name not in bound_names]
    hints = _hints_of(function, kinds, name)
    fields = {
        each.name: _field(each, hints.get(each.name, each.empty), kinds, name, told)
        for each in parameters
    }
    positional = [each for each in parameters if each.kind is each.POSITIONAL_ONLY]

    def bind(arguments: Any) -> Callable[[], Any]:
        named = kind.read(arguments)
        first = [named.pop(each.name) for each in positional if each.name in named]
        return functools.partial(given, *first, **named)

    kind = Record(fields, dict)
    return Tool(name, told.description, kinds.schema(kind), given, bind)


def _field(
    parameter: inspect.Parameter, hint: Any, kinds: Kinds, function: str, told: Docstring
) -> Field:
    has_default = parameter.default is not parameter.empty
    if hint is parameter.empty and type(parameter.default) in (str, int, float, bool):
        hint = type(parameter.default)
    said = description_of(hint) or told.parameters.get(parameter.name)
    default = parameter.default if has_default else MISSING
    return Field(kinds.of(hint, f"{function}.{parameter.name}"), not has_default, said, default)


def _unwrapped(given: Callable[..., Any]) -> tuple[Callable[..., Any], set[str]]:
    """The function inside of partials, and the names of what they have decided."""
    names: set[str] = set()
    while isinstance(given, functools.partial):
        names |= set(given.keywords)
        given = given.func
    return given, names


def _parameters_of(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    """What can be given by name, or has a place before that."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        message = f"`{name}` does not tell its parameters"
        hint = "use `Tool(name=…, parameters=…, function=…)`"
        raise InvalidRequestError(message, hint=hint, name="tools") from None
    return [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _hints_of(function: Callable[..., Any], kinds: Kinds, name: str) -> dict[str, Any]:
    if isinstance(function, type):
        return kinds.hints(function.__init__, name)  # type: ignore[misc]
    is_plain = inspect.isroutine(function)
    return kinds.hints(function if is_plain else type(function).__call__, name)


def _has_fields(given: type) -> bool:
    marks = ("__dataclass_fields__", "__required_keys__", "_field_defaults", "model_fields")
    return any(hasattr(given, mark) for mark in marks)


def _checked(place: str, name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    """The parameters as a copy that is JSON, whatever becomes of the original."""
    import json

    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{place}.name", "1 to 128 letters, digits and `_.:-`", name)
    if not isinstance(description, str):
        raise _bad(f"{place}.description", "text", description)
    sound_text(description)
    if not isinstance(parameters, Mapping):
        raise _bad(f"{place}.parameters", "a JSON schema of an object", parameters)
    copied: dict[str, Any] = json.loads(json_text(parameters, f"{place}.parameters"))
    return copied


def _bad(name: str, allowed: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` must be {allowed}, got {got!r:.60}", name=name)


_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_MOST_TOOLS = 128
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
