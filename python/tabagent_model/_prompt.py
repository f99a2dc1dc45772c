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
    """Messages in OpenAI's shape; a text alone is one of the user."""
    if isinstance(messages, str):
        return [{"role": "user", "content": sound_text(messages)}]
    if isinstance(messages, (bytes, Mapping)) or not isinstance(messages, Sequence):
        raise _bad_message("messages", "a list of messages", messages)
    many: list[Any] = list(messages)
    if not 1 <= len(many) <= _MOST_MESSAGES:
        message = f"`messages` must hold 1 to {_MOST_MESSAGES} messages, got {len(many)}"
        raise InvalidRequestError(message, name="messages")
    for index, said in enumerate(many):
        _check_message(said, f"messages[{index}]")
    return many


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, Mapping):
        raise _bad_message(name, "a mapping with `role` and `content`", message)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise _bad_message(f"{name}.role", "a word like `user`", role)
    if content is None and "tool_calls" in message:
        return
    if isinstance(content, str):
        sound_text(content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        for part in content:
            is_text = isinstance(part, Mapping) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise _bad_message(f"{name}.content", "text, or a list of text parts", part)
            sound_text(part["text"])
    else:
        raise _bad_message(f"{name}.content", "text, or a list of text parts", content)


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
