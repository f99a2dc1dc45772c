"""Answers on their way to a client that may be slow, or gone.

    Events ──▶ reader ──▶ Outbox ──▶ (writer) ──▶ the connection
                             ▲
            supervisor: pings, time limits, and the client that leaves

A connection of our own server takes what is due without the writer, unless its client is slow.

Whoever leaves ends what was asked for: its place in the engine is free within a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from .config import ServerConfig
from .guard import ClientGone, Refusal

T = TypeVar("T")


class Events(Protocol):
    """What is to be sent, event by event; closing it ends what makes them."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    async def aclose(self) -> None: ...


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive, config: ServerConfig) -> T:
    """The result of some work, which ends when the client leaves or it takes too long."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait(
            (task, gone), timeout=config.request_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else _too_long(config)
    except asyncio.CancelledError:  # whoever runs us is about to stop
        raise _shutting_down() from None
    finally:
        await _end(task, gone)


class EventStream:
    """A response of server-sent events: the first at once, then what has come, in few writes."""

    def __init__(
        self,
        events: Events,
        config: ServerConfig,
        error_event: Callable[[dict[str, Any]], bytes],
    ) -> None:
        self._events = events
        self._config = config
        self._error_event = error_event
        self._outbox = Outbox(config.stream_batch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._outbox.write = scope.get(WRITE, self._outbox.write)
        reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_client_left(receive))
        try:
            await self._watch(writer, gone, scope)
            await reader
        except asyncio.CancelledError:
            await self._say_goodbye(reader, writer, _shutting_down())
        except Refusal as refusal:
            await self._say_goodbye(reader, writer, refusal)
        finally:
            await _end(reader, writer, gone)
            await self._events.aclose()

    async def _read(self) -> None:
        try:
            async for event in self._events:
                self._outbox.put(event)
        except Exception:
            self._outbox.close()
            raise
        self._outbox.close()  # not if we are cancelled: then there is a goodbye to be said

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async for data, is_last in self._outbox:
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self._outbox.acknowledge()

    async def _watch(
        self, writer: asyncio.Task[None], gone: asyncio.Task[None], scope: Scope
    ) -> None:
        """Until everything is sent, or there is nobody to send it to."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.request_timeout_s
        tick = min(self._config.ping_s, self._config.send_timeout_s) / 4
        while not writer.done():
            await asyncio.wait((writer, gone), timeout=tick, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not writer.done():
                raise ClientGone
            now = loop.time()
            unread_s, held = self._outbox.unread_s(now), self._outbox.held_bytes
            if unread_s > self._config.send_timeout_s or held > _MOST_HELD:
                scope.get(ABORT, lambda: None)()  # it may still be there, but it does not read
                raise ClientGone
            if now > deadline:
                raise _too_long(self._config)
            if self._outbox.silent_s(now) > self._config.ping_s:
                self._outbox.put(b": ping\n\n")
        writer.result()

    async def _say_goodbye(
        self, reader: asyncio.Task[None], writer: asyncio.Task[None], why: Refusal
    ) -> None:
        await _end(reader)
        self._outbox.put(self._error_event(why.content))
        self._outbox.close()
        await asyncio.wait((writer,), timeout=1.0)


class Outbox:
    """Data that waits to be sent. Iterating gives all that is there, once it is due, and whether it
    is the last: the first at once, then when 10 ms have gone by, or `batch` pieces have come."""

    def __init__(self, batch: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._batch = batch
        self.write: Callable[[bytes], bool] = lambda data: False
        """Sends what is due, if that needs no waiting."""
        self._pieces: list[bytes] = []
        self._is_closed = False
        self._is_over = False
        self._is_sending = False
        self._touched = self._loop.time()
        self._due = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, piece: bytes) -> None:
        if self._is_closed:
            return
        self._pieces.append(piece)
        if len(self._pieces) >= self._batch or (now := self._loop.time()) >= self._due:
            self._send()
        elif self._timer is None:
            self._timer = self._loop.call_later(self._due - now, self._ring)

    def close(self) -> None:
        self._is_closed = True
        self._wake()

    def acknowledge(self) -> None:
        """What was taken last is sent."""
        self._is_sending = False
        self._touched = self._loop.time()
        self._due = self._touched + 0.010

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self._pieces))

    def unread_s(self, now: float) -> float:
        """How long the connection has not taken what is being sent."""
        return now - self._touched if self._is_sending else 0.0

    def silent_s(self, now: float) -> float:
        """How long there has been nothing to send."""
        return 0.0 if self._is_sending or self._pieces else now - self._touched

    def __aiter__(self) -> Outbox:
        return self

    async def __anext__(self) -> tuple[bytes, bool]:
        if self._is_over:
            raise StopAsyncIteration
        while not self._is_ready():
            self._waiter = self._loop.create_future()
            await self._waiter
        data = b"".join(self._pieces)
        self._take_out()
        self._is_over, self._is_sending = self._is_closed, True
        self._touched = self._loop.time()
        return data, self._is_over

    def _is_ready(self) -> bool:
        if self._is_closed or len(self._pieces) >= self._batch:
            return True
        return bool(self._pieces) and self._loop.time() >= self._due

    def _ring(self) -> None:
        self._timer, self._due = None, 0.0  # a timer may ring a little early by the loop's clock
        self._send()

    def _send(self) -> None:
        if not self._is_sending and self.write(b"".join(self._pieces)):
            self._take_out()
            self.acknowledge()
        else:
            self._wake()

    def _take_out(self) -> None:
        self._pieces.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


ABORT = "tabagent.abort"
"""In a scope: closes the connection without waiting for what the client has not read."""

WRITE = "tabagent.write"
"""In a scope: takes a piece of the body at once and says so, or says that it cannot."""

_MOST_HELD = 8_000_000


def _shutting_down() -> Refusal:
    return Refusal(503, "shutting_down", "the server is shutting down", retry_after="5")


def _too_long(config: ServerConfig) -> Refusal:
    message = f"the answer was not complete after {config.request_timeout_s:g} s"
    return Refusal(408, "generation_timeout", message)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
