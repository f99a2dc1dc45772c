"""Frames on a socket and the values in them: how a worker and its parent talk (docs/protocol.md).

Whatever arrives is checked: a length before memory is taken for it, a message before it is used.
Nothing in a frame can name code to be run, or a class that is not one of our errors.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import errors
from .._courier import Reading, begin
from ..errors import InternalError, ProtocolError, TabAgentModelError, TokenizationError
from ..results import Logprobs

if TYPE_CHECKING:
    from .. import _core

PROTOCOL = 1
MAX_FRAME = 64 * 2**20
MAX_DATA = 2**40

Message = dict[str, Any]
Answer = Callable[[Any, Exception | None], None]


class Wire:
    """One end of a connection. Any thread may send; one at a time receives.

    `through` sends in its place, where not only Python does.
    """

    def __init__(self, sock: socket.socket, through: _core.Wire | None = None) -> None:
        self._socket = sock
        self._through = through
        self._sending = threading.Lock()
        self._waits: float | None = None
        self._arrived = bytearray()
        self._wanted = _LENGTH.size
        """How much must have arrived before there is anything to do."""
        self._head: Message | None = None
        """A message whose data are still on their way."""

    def send(
        self, message: Mapping[str, Any], data: Sequence[bytes] = (), waits: bool = True
    ) -> bool:
        """False, and nothing is sent: it would have to wait, and must not."""
        if data:
            message = {**message, "data": [len(each) for each in data]}
        try:
            body = _encode(message).encode()
        except UnicodeEncodeError as error:
            said = f"the text holds half a surrogate pair at index {error.start}"
            raise TokenizationError(said) from None
        if len(body) > MAX_FRAME:
            raise ProtocolError(f"a message of {len(body)} bytes exceeds {MAX_FRAME}")
        frame = _LENGTH.pack(len(body)) + body
        if not waits:
            return not data and self._send_at_once(frame)
        # Ctrl-C in the middle of a frame would be the end of all understanding. It strikes the main
        # thread only, and never in what the system takes at once.
        is_long = data or len(frame) > _AT_ONCE
        if is_long and threading.current_thread() is threading.main_thread():
            sender = threading.Thread(target=self._send_quietly, args=(frame, data), daemon=True)
            begin(sender)
            sender.join()
        else:
            self._send(frame, data)
        return True

    def receive(self, within: float | None = None) -> Message | None:
        """The next message; None if none was complete in so many seconds; EOFError at the end."""
        while (message := self._take()) is None:
            self._wait_for(within)
            missing = self._wanted - len(self._arrived)
            try:
                chunk = self._socket.recv(min(max(missing, _CHUNK), _BIG_CHUNK))
            except BlockingIOError:
                return None
            except OSError as error:
                raise EOFError(str(error)) from None
            if not chunk:
                raise EOFError("the connection was closed")
            if not self._arrived and self._head is None and (message := _alone(chunk)):
                return message
            self._arrived += chunk
        return message

    def hang_up(self) -> None:
        """Wake whoever receives or sends here; they hear that it is over."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is over already

    def close(self) -> None:
        self.hang_up()
        with self._sending:
            self._socket.close()

    def disown(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._socket.close()

    def _send(self, frame: bytes, data: Sequence[bytes]) -> None:
        if self._through is not None:
            self._through.send([frame, *data])
            return
        with self._sending:
            for each in (frame, *data):
                self._socket.sendall(each, _WITHOUT_SIGPIPE)

    def _send_at_once(self, frame: bytes) -> bool:
        if len(frame) > _WHOLE or not self._sending.acquire(blocking=False):
            return False
        try:
            sent = self._socket.send(frame, _WITHOUT_SIGPIPE | _WITHOUT_WAITING)
            if sent < len(frame):  # only where a system's sockets are smaller than Linux's
                self._socket.sendall(frame[sent:], _WITHOUT_SIGPIPE)
        except BlockingIOError:
            return False
        finally:
            self._sending.release()
        return True

    def _send_quietly(self, frame: bytes, data: Sequence[bytes]) -> None:
        try:
            self._send(frame, data)
        except OSError:
            return  # the other side is gone; whoever receives hears of it

    def _wait_for(self, within: float | None) -> None:
        """The socket's own limit for receiving: Python's would hold for sending as well."""
        if within != self._waits:
            whole = int(within or 0)
            limit = struct.pack("ll", whole, int(((within or 0) - whole) * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._waits = within

    def _take(self) -> Message | None:
        while len(self._arrived) >= self._wanted:
            if self._head is not None:
                return self._with_data(self._head)
            if self._wanted == _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._arrived)
                if not 2 <= length <= MAX_FRAME:
                    raise ProtocolError(f"a frame of {length} bytes; 2 to {MAX_FRAME} are allowed")
                self._wanted += length
                continue
            message = _decoded(bytes(self._arrived[_LENGTH.size : self._wanted]))
            del self._arrived[: self._wanted]
            self._wanted = _LENGTH.size
            if "data" not in message:
                return message
            self._head, self._wanted = message, _size_of(message["data"])
        return None

    def _with_data(self, message: Message) -> Message:
        parts, begin = [], 0
        for length in message["data"]:
            parts.append(bytes(self._arrived[begin : begin + length]))
            begin += length
        del self._arrived[:begin]
        self._head, self._wanted = None, _LENGTH.size
        return {**message, "data": parts}


class RemoteEvent(NamedTuple):
    """News of one request, like `_core.Event`."""

    request_id: int
    text: str = ""
    tokens: Sequence[int] = ()
    is_last: bool = False
    finish_reason: str | None = None
    stop: str | None = None
    error: BaseException | None = None
    stats: Mapping[str, float] | None = None
    logprobs: Logprobs = ()
    read: Reading | None = None


def told_of(event: Any) -> list[Any]:
    """An event as a message tells it."""
    deltas, message = event.read or (None, None)
    more: Message = {"logprobs": event.logprobs or None, "deltas": deltas, "message": message}
    if event.is_last:
        error = event.error
        more |= {
            "reason": event.finish_reason,
            "stop": event.stop,
            "error": None if error is None else told_error(error),
            "stats": event.stats,
        }
    more = {name: value for name, value in more.items() if value is not None}
    return [event.request_id, event.text, event.tokens, *([more] if more else [])]


def event_of(told: Any) -> RemoteEvent:
    if type(told) is not list or len(told) not in (3, 4):
        raise ProtocolError(f"no event: {told!r:.60}")
    request_id, text, tokens = told[:3]
    if not (type(request_id) is int and type(text) is str and type(tokens) is list):
        raise ProtocolError(f"no event: {told!r:.60}")
    if len(told) == 3:
        return RemoteEvent(request_id, text, tokens)
    more = told[3]
    if type(more) is not dict:
        raise ProtocolError(f"nothing more of an event: {more!r:.60}")
    error = error_of(more["error"]) if "error" in more else None
    read = (more["deltas"], more.get("message")) if "deltas" in more else None
    return RemoteEvent(
        request_id,
        text,
        tokens,
        is_last="reason" in more,
        finish_reason=more.get("reason"),
        stop=more.get("stop"),
        error=error,
        stats=more.get("stats"),
        logprobs=more.get("logprobs", ()),
        read=read,
    )


def told_error(error: BaseException) -> Message:
    """An error as a message tells it: the name of its class, its words and its facts."""
    if not isinstance(error, TabAgentModelError):
        return {"kind": type(error).__name__, "message": str(error)}
    told: Message = {"kind": type(error).__name__, "message": error.message}
    if error.hint is not None:
        told["hint"] = error.hint
    if facts := {name: value for name, value in error._facts.items() if value is not None}:
        told["facts"] = pack(facts, [])
    return told


def error_of(told: Any) -> Exception:
    """One of our errors, or one of the few of Python's that an engine raises."""
    if type(told) is not dict or type(told.get("kind")) is not str:
        raise ProtocolError(f"no error: {told!r:.60}")
    kind, message = told["kind"], str(told.get("message", ""))
    ours = getattr(errors, kind, None)
    if isinstance(ours, type) and issubclass(ours, TabAgentModelError):
        facts = unpack(told.get("facts") or {}, [])
        if type(facts) is not dict or {"message", "hint", "self"} & facts.keys():
            raise ProtocolError(f"no facts of an error: {facts!r:.60}")
        return ours(message, hint=told.get("hint"), **facts)
    if kind in _BUILTIN:
        known: type[Exception] = getattr(builtins, kind)
        return known(message)
    return InternalError(f"{kind}: {message}")


def pack(value: Any, data: list[bytes], keep: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON can hold it: what it has no word for is an object whose one key begins
    with `$`. Bytes go to `data`; `keep` says what stands for anything else."""
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if kind is list:
        if set(map(type, value)) <= _PLAIN:
            return value
        return [pack(each, data, keep) for each in value]
    if isinstance(value, tuple):
        return {"$tuple": [pack(each, data, keep) for each in value]}
    if isinstance(value, (bytes, bytearray, memoryview)):
        data.append(bytes(value))
        return {"$bytes": len(data) - 1}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: pack(each, data, keep) for key, each in value.items()}
        pairs = [[pack(key, data), pack(each, data, keep)] for key, each in value.items()]
        return {"$map": pairs}
    if isinstance(value, (str, int, float)):
        return value
    if keep is None:
        raise TypeError(f"a {kind.__name__} cannot travel to another process")
    return {"$object": keep(value)}


def unpack(value: Any, data: Sequence[bytes], make: Callable[[Any], Any] | None = None) -> Any:
    """What `pack` was given; `make` gets what `keep` said."""
    if type(value) is list:
        if set(map(type, value)) <= _PLAIN:
            return value
        return [unpack(each, data, make) for each in value]
    if type(value) is not dict:
        return value
    if len(value) != 1 or not (key := next(iter(value))).startswith("$"):
        return {key: unpack(each, data, make) for key, each in value.items()}
    held = value[key]
    if key == "$tuple":
        return tuple(unpack(held, data, make))
    if key == "$bytes":
        return data[held]
    if key == "$map":
        return {unpack(k, data): unpack(v, data, make) for k, v in held}
    if key == "$object" and make is not None:
        return make(held)
    raise ProtocolError(f"no value: {value!r:.60}")


_LENGTH = struct.Struct(">I")
_CHUNK, _BIG_CHUNK = 2**16, 2**20
_AT_ONCE = 4096
# What Linux takes as a whole, or not at all.
_WHOLE = 2**15
_WITHOUT_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
_WITHOUT_WAITING = getattr(socket, "MSG_DONTWAIT", 0)
_PLAIN = {str, int, float, bool, type(None)}
_BUILTIN = (
    *("AttributeError", "IndexError", "KeyError", "LookupError", "MemoryError"),
    *("NotImplementedError", "OSError", "OverflowError", "RuntimeError", "TypeError", "ValueError"),
)
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode
_scan = json.JSONDecoder().raw_decode


def _alone(chunk: bytes) -> Message | None:
    """The message of a frame that came alone and whole, as nearly all do."""
    if len(chunk) <= _LENGTH.size or _LENGTH.unpack_from(chunk)[0] != len(chunk) - _LENGTH.size:
        return None
    message = _decoded(chunk[_LENGTH.size :])
    return None if "data" in message else message


def _decoded(body: bytes) -> Message:
    try:
        text = body.decode()
        message, end = _scan(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is no JSON: {error}") from None
    if end < len(text):
        raise ProtocolError(f"a frame with more than JSON: {text[end : end + 60]!r}")
    if type(message) is not dict:
        raise ProtocolError(f"a frame that is no object: {message!r:.60}")
    return message


def _size_of(lengths: Any) -> int:
    if type(lengths) is not list or not all(type(n) is int and n >= 0 for n in lengths):
        raise ProtocolError(f"no lengths of data: {lengths!r:.60}")
    if sum(lengths) > min(MAX_DATA, sys.maxsize):
        raise ProtocolError(f"{sum(lengths)} bytes of data; at most {MAX_DATA} are allowed")
    return sum(lengths)
