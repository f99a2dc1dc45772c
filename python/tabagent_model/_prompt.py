"""What may be asked: text, or a list of token ids; everything else is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequestError, TokenizationError

if TYPE_CHECKING:
    from typing import TypeGuard

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
