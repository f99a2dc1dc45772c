"""The OpenAI client's way to a model in the same process: httpx transports without a socket.

    OpenAI       ──▶ Transport       ──▶ an event loop in a thread of its own ──▶ handle
    AsyncOpenAI  ──▶ AsyncTransport  ──▶ the caller's event loop              ──▶ handle

The bytes are those that would go over a wire, streamed as they come. A sync client works in any
thread, also in one whose event loop is running (a notebook's). Closing a response ends its request.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from .._package import package
from .openai import Events, Reply, handle
from .service import Service

if TYPE_CHECKING:
    import httpx
    import openai

    from ..model import AsyncModel, Model

_EXTRA = "'tabagent-model[openai]'"
if not TYPE_CHECKING:
    httpx = package("httpx", _EXTRA)

T = TypeVar("T")


def client_of(model: Model, name: str | None, options: dict[str, Any]) -> openai.OpenAI:
    """An OpenAI client whose server is this model."""
    make = package("openai", _EXTRA).OpenAI
    http = httpx.Client(transport=Transport(_service(model, name)), timeout=None, trust_env=False)
    client: openai.OpenAI = make(http_client=http, **{**_DEFAULTS, **options})
    return client


def async_client_of(
    model: AsyncModel, name: str | None, options: dict[str, Any]
) -> openai.AsyncOpenAI:
    make = package("openai", _EXTRA).AsyncOpenAI
    transport = AsyncTransport(_service(model, name))
    http = httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)
    client: openai.AsyncOpenAI = make(http_client=http, **{**_DEFAULTS, **options})
    return client


class Transport(httpx.BaseTransport):
    """Carries the requests of threads."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._loop = _Loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        reply = self._loop.run(_ask(self._service, request), request)
        if not isinstance(reply.content, Events):
            return _response(reply)
        stream = _Stream(reply.content, self._loop, request)
        self._loop.streams.add(stream)
        return httpx.Response(reply.status, headers=dict(reply.headers), stream=stream)

    def close(self) -> None:
        self._loop.stop()


class AsyncTransport(httpx.AsyncBaseTransport):
    """Carries the requests of tasks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        reply = await _within(_ask(self._service, request), request)
        if isinstance(reply.content, Events):
            stream = _AsyncStream(reply.content, request)
            return httpx.Response(reply.status, headers=dict(reply.headers), stream=stream)
        return _response(reply)


class _Stream(httpx.SyncByteStream):
    def __init__(self, events: Events, loop: _Loop, request: httpx.Request) -> None:
        self._events, self._loop, self._request = events, loop, request
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        while not self._is_closed:
            event = self._loop.run(_next(self._events), self._request)
            if event is None:
                return
            yield event

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.run(self._events.aclose())


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, events: Events, request: httpx.Request) -> None:
        self._events, self._request = events, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (event := await _within(_next(self._events), self._request)) is not None:
            yield event

    async def aclose(self) -> None:
        await self._events.aclose()


class _Loop:
    """An event loop in a thread of its own, from its first use until nobody needs it."""

    def __init__(self) -> None:
        self.streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        """Those that may still be open."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop: Callable[[], object] | None = None

    def run(self, coroutine: Coroutine[Any, Any, T], request: httpx.Request | None = None) -> T:
        """Wait for it in this thread; Ctrl-C, and the client's time-out, cancel it."""
        future = asyncio.run_coroutine_threadsafe(_within(coroutine, request), self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Done at exit as well, when the engine is still there to end what runs."""
        if self._stop is not None:
            self._stop()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # or in a forked child
                self._loop = asyncio.new_event_loop()
                run = self._loop.run_forever
                self._thread = threading.Thread(target=run, name="tabagent-openai", daemon=True)
                self._thread.start()
                parts = (os.getpid(), self._loop, self._thread, self.streams)
                self._stop = weakref.finalize(self, _end, *parts)
            return self._loop


def _end(
    process: int,
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    streams: weakref.WeakSet[_Stream],
) -> None:
    if os.getpid() != process:
        return  # in a forked child the loop's file descriptors still are the parent's
    for stream in list(streams):
        stream.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=1.0)
    if not thread.is_alive():
        loop.close()


async def _ask(service: Service, request: httpx.Request) -> Reply:
    path = request.url.raw_path.decode("ascii").partition("?")[0]
    headers = {name.lower(): value for name, value in request.headers.items()}
    return await handle(service, request.method, path, request.content, headers)


async def _next(events: Events) -> bytes | None:
    return await anext(events, None)


async def _within(coroutine: Coroutine[Any, Any, T], request: httpx.Request | None) -> T:
    """The client's time-out for reading, which is for each event of a stream."""
    limits = {} if request is None else request.extensions.get("timeout", {})
    try:
        return await asyncio.wait_for(coroutine, limits.get("read"))
    except asyncio.TimeoutError as error:
        raise httpx.ReadTimeout("the model took longer", request=request) from error


def _response(reply: Reply) -> httpx.Response:
    assert isinstance(reply.content, bytes)
    return httpx.Response(reply.status, headers=dict(reply.headers), content=reply.content)


def _service(model: Model | AsyncModel, name: str | None) -> Service:
    return Service(model if name is None else {name: model})


# No word leaves the process, so there is no key to check; and what failed here, fails again.
_DEFAULTS: dict[str, Any] = {
    "base_url": "http://in-process/v1",
    "api_key": "none",
    "max_retries": 0,
}
