"""Models are listed, loaded, unloaded and swapped by name, and watched meanwhile: the routes of
llama-server's router, and one for swaps. No web framework.

Only names that the operator gave are known here; nothing that comes over a wire names a file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ._request import Fields
from .openai import error_event, json_bytes, list_models, refusal_of, status_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..manager import Duration
    from ..manager._keeper import ModelEvent
    from .service import Service

AT_ONCE_S = 0.2
"""What is refused within this time is told even to those who do not wait."""


async def load(service: Service, given: object) -> dict[str, Any]:
    body = Fields(given)
    name = _name(body, service)
    wait, keep_alive = body.flag("wait"), body.duration("keep_alive")
    return await _have(service, name, wait, service.models.load(name, keep_alive))


async def unload(service: Service, given: object) -> dict[str, Any]:
    """Those who use it are waited for, until the `grace` ends."""
    body = Fields(given)
    name = _name(body, service)
    wait, grace = body.flag("wait"), _grace(body)
    return await _have(service, name, wait, service.models.unload(name, grace))


async def swap(service: Service, given: object) -> dict[str, Any]:
    """Another model becomes the default; the one of before is unloaded when it is idle."""
    body = Fields(given)
    name = _name(body, service)
    wait, grace = body.flag("wait"), _grace(body)
    return await _have(service, name, wait, service.models.swap(name, grace))


async def watch(service: Service, _: object = None) -> Watch:
    return Watch(service)


ROUTES: dict[str, tuple[str, Callable[[Service, Any], Awaitable[Any]]]] = {
    "/models": ("GET", list_models),
    "/models/load": ("POST", load),
    "/models/unload": ("POST", unload),
    "/models/swap": ("POST", swap),
    "/models/sse": ("GET", watch),
}


class Watch:
    """The states of all models, then each change, as server-sent events, until somebody ends it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._news: asyncio.Queue[bytes | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(event: ModelEvent) -> None:
            if (told := _told(event)) is not None:
                with suppress(RuntimeError):  # the loop is closed, and with it went the reader
                    loop.call_soon_threadsafe(self._news.put_nowait, told)

        self._stop = service.models.watch(hear)
        service.watches.add(self)
        for each in service.models.described():
            self._news.put_nowait(_event(each.name, status_of(service, each)))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        event = await self._news.get()
        if event is None:
            raise StopAsyncIteration
        return event

    def end(self) -> None:
        self._news.put_nowait(None)

    async def aclose(self) -> None:
        self._stop()
        self._service.watches.discard(self)


def _told(event: ModelEvent) -> bytes | None:
    """In llama-server's words."""
    if isinstance(event.error, Exception):
        failed = {"value": "unloaded", "failed": True, **refusal_of(event.error)[1]}
        return _event(event.model, failed)
    if event.step == "load" and event.progress < 1.0:
        stage = "text_model"
        progress = {"stages": [stage], "current": stage, "value": event.progress}
        return _event(event.model, {"value": "loading", "progress": progress})
    state = _STATES.get((event.step, event.progress))
    return None if state is None else _event(event.model, {"value": state})


_STATES = {
    ("load", 1.0): "loaded",
    ("drain", 0.0): "draining",
    ("unload", 0.0): "unloading",
    ("unload", 1.0): "unloaded",
}


def _event(model: str, status: dict[str, Any]) -> bytes:
    told = {name: it for name, it in status.items() if name != "value"}
    data = {"status": status["value"], **told}
    content = {"model": model, "event": "model_status", "data": data}
    return b"data: " + json_bytes(content) + b"\n\n"


def _name(body: Fields, service: Service) -> str:
    if (name := body.text("model")) is None:
        body.bad("model", "the name of a model", None)
    return service.resolve(name)


def _grace(body: Fields) -> Duration:
    grace = body.duration("grace")
    return -1 if grace is None else grace


async def _have(
    service: Service, name: str, wait: bool, work: Coroutine[Any, Any, None]
) -> dict[str, Any]:
    """Have it done, and wait for the end if that is wished; who leaves then takes it back."""
    task = asyncio.ensure_future(work)
    if wait:
        await task
    else:
        service.remember(task)
        done, _ = await asyncio.wait([task], timeout=AT_ONCE_S)
        if done:
            task.result()
        else:
            task.add_done_callback(lambda task: _note_end(service, name, task))
    return {"success": True}


def _note_end(service: Service, name: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        service.models.failed(name, error)


__all__ = ["ROUTES", "error_event", "refusal_of"]
