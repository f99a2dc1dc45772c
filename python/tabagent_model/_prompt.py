"""What may be asked: text, token ids, or messages; everything else is refused by name."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequestError, TokenizationError

if TYPE_CHECKING:
    from typing import TypeGuard

Message = Mapping[str, Any]
Messages = str | Sequence[Message]
Prompt = str | Sequence[int]
Prompts = list[str] | list[list[int]] | list[str | list[int]] | tuple[str, ...]


def is_many(prompt: object) -> TypeGuard[Sequence[Prompt]]:
    """A list of ids is one prompt; a list of texts, or of lists of ids, is many."""
    if isinstance(prompt, (str, bytes)):
        return False
    try:
        first = prompt[0]  # type: ignore[index]
    except (TypeError, LookupError):
        return False
    return isinstance(first, str) or hasattr(first, "__len__")


def checked(prompt: Prompt) -> str | list[int]:
    return sound_text(prompt) if isinstance(prompt, str) else token_ids(prompt, "prompt")


def sound_text(text: str) -> str:
    """Refuse what is no text in any encoding; Rust could not take it."""
    if not isinstance(text, str):
        message = f"`text` must be a string, got a {type(text).__name__}"
        raise InvalidRequestError(message, name="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text holds half a surrogate pair at index {error.start}"
        raise TokenizationError(message) from None
    return text


def token_ids(tokens: Sequence[int], name: str = "tokens") -> list[int]:
    if isinstance(tokens, (str, bytes, dict)) or not hasattr(tokens, "__getitem__"):
        message = f"`{name}` must be text or a list of token ids, got a {type(tokens).__name__}"
        raise InvalidRequestError(message, name=name)
    ids = list(tokens)
    if name == "prompt" and not ids:
        message = "`prompt` must hold at least one token id, got an empty list"
        raise InvalidRequestError(message, name=name)
    if not set(map(type, ids)) <= {int}:
        ids = [_token_id(token, index, name) for index, token in enumerate(ids)]
    if ids and not (min(ids) >= 0 and max(ids) < 2**31):
        index, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < 2**31)
        raise _bad_token(token, index, name)
    return ids


def checked_messages(messages: Messages) -> list[Message]:
    """Messages in OpenAI's shape; a text alone is one of the user. What else a message may hold in
    other programs (`refusal`, `audio`, …) is left out."""
    if isinstance(messages, str):
        return [{"role": "user", "content": sound_text(messages)}]
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _bad_message("messages", "a list of messages", messages)
    many: list[Any] = list(messages)
    if not 1 <= len(many) <= _MOST_MESSAGES:
        message = f"`messages` must hold 1 to {_MOST_MESSAGES} messages, got {len(many)}"
        raise InvalidRequestError(message, name="messages")
    return [_checked_message(said, f"messages[{index}]") for index, said in enumerate(many)]


def _checked_message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise _bad_message(name, "a mapping with `role` and `content`", message)
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise _bad_message(f"{name}.role", "a word like `user`", role)
    checked: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    if message.get("content") is None and calls:
        checked["content"] = None
    else:
        checked["content"] = _checked_content(message.get("content"), f"{name}.content")
    if calls:
        checked["tool_calls"] = _checked_calls(calls, f"{name}.tool_calls")
    for key in ("reasoning_content", "name", "tool_call_id"):
        if message.get(key) is not None:
            checked[key] = _checked_text(message[key], f"{name}.{key}")
    if role == "tool" and "tool_call_id" not in checked:
        raise _bad_message(f"{name}.tool_call_id", "the `id` of a tool call", None)
    return checked


def _checked_content(content: Any, name: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return sound_text(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise _bad_message(name, "text, or a list of text parts", content)
    parts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise _bad_message(name, "text, or a list of text parts", part)
        parts.append({"type": "text", "text": sound_text(part["text"])})
    return parts


def _checked_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise _bad_message(name, "a list of tool calls", calls)
    return [_checked_call(call, f"{name}[{index}]") for index, call in enumerate(calls)]


def _checked_call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise _bad_message(name, "a tool call with a `function`", call)
    called = {"name": _checked_text(function.get("name"), f"{name}.function.name")}
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json_text(arguments, f"{name}.function.arguments")
    called["arguments"] = _checked_text(arguments, f"{name}.function.arguments")
    checked: dict[str, Any] = {"type": "function", "function": called}
    if call.get("id") is not None:
        checked["id"] = _checked_text(call["id"], f"{name}.id")
    return checked


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise _bad_message(name, "text", text)
    return sound_text(text)


def json_text(value: Any, name: str) -> str:
    """What is said to llama.cpp in JSON; what JSON cannot hold is refused by name."""
    import json

    try:
        text = json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"`{name}` must hold what JSON can hold: {error}"
        raise InvalidRequestError(message, name=name) from None
    return sound_text(text)


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is nothing for JSON")


def _bad_message(name: str, allowed: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` must be {allowed}, got {got!r:.40}", name=name)


_MOST_MESSAGES = 16_384
# A template may write a role between the marks of its control text, so it cannot be just any text.
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


def _token_id(token: Any, index: int, name: str) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)  # numpy's integers, too
    except TypeError:
        pass
    raise _bad_token(token, index, name)


def _bad_token(token: object, index: int, name: str) -> InvalidRequestError:
    message = f"`{name}[{index}]` must be a token id, got {token!r:.40}"
    return InvalidRequestError(message, name=name)
