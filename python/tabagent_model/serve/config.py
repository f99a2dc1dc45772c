"""What a server allows, with every default in sight; checked once, when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InvalidRequestError
from ..params import checked_whole


@dataclass(frozen=True)
class ServerConfig:
    """The rules of a server. The last five count only where `tabagent-model serve` listens itself:
    an application that is mounted elsewhere has the connections of that other server."""

    api_keys: Iterable[str] = ()
    """Each of them opens everything; without one, no key is asked for."""
    allowed_hosts: Iterable[str] = ()
    """Names that the `Host` header may have. IP addresses and `localhost` are always good, for a
    page elsewhere cannot make a browser send them; `*` is any name."""
    allowed_origins: Iterable[str] = ()
    """Other pages and browser extensions that may ask, as `scheme://host[:port]`; `*` is any."""
    max_body_mb: int = 16
    body_timeout_s: float = 30.0
    """Until a body must be there."""
    request_timeout_s: float = 3600.0
    """Until an answer must be complete."""
    send_timeout_s: float = 60.0
    """How long a client may leave what was sent to it unread."""
    ping_s: float = 10.0
    """After so much silence a stream says `: ping`, so that nobody takes it for dead."""
    stream_batch: int = 5
    """So many pieces, or 10 ms, are sent together at most; the first one goes alone."""
    has_page: bool = True
    """`GET /` is a page to chat with."""
    max_connections: int = 512
    max_header_kb: int = 32
    header_timeout_s: float = 10.0
    keep_alive_s: float = 30.0
    """How long a connection may stay open between two requests."""
    grace_s: float = 10.0
    """How long answers that are under way may take at the end."""

    def __post_init__(self) -> None:
        for name in ("api_keys", "allowed_hosts", "allowed_origins"):
            self._put(name, _texts(name, getattr(self, name)))
        for key in self.api_keys:
            if not (key.isascii() and key.isprintable()) or " " in key:
                message = "each of `api_keys` must be printable ASCII without blanks"
                raise InvalidRequestError(message, name="api_keys")  # and never show one
        for host in self.allowed_hosts:
            if "/" in host:
                raise _refusal("allowed_hosts", "names without a scheme", host)
        self._put("allowed_hosts", tuple(host.lower() for host in self.allowed_hosts))
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise _refusal("allowed_origins", '"*" or like `https://app.example`', origin)
        for name, most in _WHOLE.items():
            checked_whole(name, getattr(self, name), 1, most)
        for field in fields(self):
            if field.name.endswith("_s"):
                self._put(field.name, _seconds(field.name, getattr(self, field.name)))
        if not isinstance(self.has_page, bool):
            raise _refusal("has_page", "True or False", self.has_page)

    def with_fields(self, **changes: Any) -> ServerConfig:
        """A copy with these fields changed."""
        return replace(self, **changes) if changes else self

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


_WHOLE = {
    "max_body_mb": 4096,
    "stream_batch": 64,
    "max_connections": 65_536,
    "max_header_kb": 1024,
}


def _texts(name: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        message = f"`{name}` must be a list of strings, got a {type(given).__name__}"
        raise InvalidRequestError(message, name=name)
    texts = tuple(given)
    if not all(isinstance(text, str) and text for text in texts):
        message = f"each of `{name}` must be a string that is not empty"
        raise InvalidRequestError(message, name=name)
    return texts


def _seconds(name: str, given: Any) -> float:
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not math.isfinite(given) or not 0 < given <= 1e9:
        raise _refusal(name, "a number of seconds above 0", given)
    return float(given)


def _refusal(name: str, allowed: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` must be {allowed}, got {got!r:.60}", name=name)
