"""How a conversation is written out: tools, thinking, template; the rest is refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ._prompt import json_text, sound_text
from .errors import InvalidRequestError

if TYPE_CHECKING:
    from .schema import Schema


@dataclass(frozen=True)
class ChatOptions:
    """The fields of ChatFields that are not about the answer's tokens. None is the default."""

    tools: Sequence[Any] = ()
    tool_choice: Any = "auto"
    parallel_tool_calls: bool | None = None
    template: str | None = None
    """Given as a path it is read."""
    enable_thinking: bool = True
    reasoning_format: str = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    schema: Schema | None = None
    """Or whatever one can be made of."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) is None and each.name in _DEFAULTS:
                self._put(each.name, _DEFAULTS[each.name])
        if self.tools != ():
            from .tools import tools_of

            self._put("tools", tuple(tool.to_dict() for tool in tools_of(self.tools)))
        self._choose_tool()
        for name in ("enable_thinking", "continue_final_message", "parallel_tool_calls"):
            if not isinstance(getattr(self, name), (bool, NoneType)):
                raise _bad(name, "True or False", getattr(self, name))
        if self.reasoning_format not in _REASONING:
            allowed = "one of " + ", ".join(map(repr, _REASONING))
            raise _bad("reasoning_format", allowed, self.reasoning_format)
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise _bad("chat_template_kwargs", "a mapping of names to values", kwargs)
        if not {"messages", "tools"}.isdisjoint(kwargs):
            allowed = "without `messages` and `tools`, which are given by themselves"
            raise _bad("chat_template_kwargs", allowed, sorted(kwargs))
        self._put("template", _template(self.template))
        if self.schema is not None:
            from .schema import Schema

            self._put("schema", Schema.of(self.schema))
        if self.schema is not None and self.tools and self.tool_choice != "none":
            message = "`schema` and `tools` both say how an answer looks; give one of them"
            raise InvalidRequestError(message, name="schema")

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> ChatOptions:
        """Takes its own fields out of the keywords of a chat."""
        own = {each.name for each in fields(cls)} & given.keys()
        return cls(**{name: given.pop(name) for name in own})

    def to_json(self) -> str:
        """As the core takes them; what is as usual is left out."""
        said: dict[str, Any] = {
            "tools": self.tools,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "enable_thinking": self.enable_thinking,
            "reasoning_format": self.reasoning_format,
            "chat_template_kwargs": self.chat_template_kwargs,
            "continue_final_message": self.continue_final_message,
        }
        named = {name: value for name, value in said.items() if value != _DEFAULTS.get(name)}
        return json_text(named, "tools" if self.tools else "chat_template_kwargs")

    def _choose_tool(self) -> None:
        """One that is named is the only one, and required."""
        choice = self.tool_choice
        if choice in ("auto", "none"):
            return
        if choice == "required":
            if not self.tools:
                raise _bad("tool_choice", "'auto' or 'none' where there are no tools", choice)
            return
        function = choice.get("function") if isinstance(choice, Mapping) else {"name": choice}
        name = function.get("name") if isinstance(function, Mapping) else None
        chosen = tuple(tool for tool in self.tools if tool["function"]["name"] == name)
        if not chosen:
            names = ", ".join(repr(tool["function"]["name"]) for tool in self.tools)
            allowed = f"'auto', 'none', 'required', or the name of one of the tools ({names})"
            raise _bad("tool_choice", allowed, choice)
        self._put("tools", chosen)
        self._put("tool_choice", "required")

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the one way into a frozen dataclass


_DEFAULTS: dict[str, Any] = {
    "tools": (),
    "tool_choice": "auto",
    "parallel_tool_calls": None,
    "enable_thinking": True,
    "reasoning_format": "auto",
    "chat_template_kwargs": {},
    "continue_final_message": False,
}
_REASONING = ("auto", "none", "deepseek", "deepseek-legacy")
_LONGEST_TEMPLATE = 1 << 18


def _template(given: Any) -> str | None:
    """The text of a template; a path is read."""
    if given is None or isinstance(given, str):
        return None if given is None else sound_text(given)
    if not isinstance(given, os.PathLike):
        raise _bad("template", "the text of a template, or the path of a file", given)
    try:
        with Path(given).open("rb") as file:
            text = file.read(_LONGEST_TEMPLATE + 1).decode()
    except (OSError, ValueError) as error:
        message = f"`template` cannot be read: {error}"
        raise InvalidRequestError(message, name="template") from None
    return text


def _bad(name: str, allowed: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` must be {allowed}, got {got!r:.60}", name=name)
