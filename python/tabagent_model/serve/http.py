"""The HTTP door: the service's routes as an ASGI application.

bytes ──▶ Guard ──▶ route ──▶ {openai, anthropic, responses, llama_server, control} ──▶ Service
                                              │
bytes ◀── one JSON object, or an EventStream ◀┘
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from .. import metrics
from ..errors import ModelNotLoadedError
from ..hardware import why_slow
from . import anthropic, control, llama_server, openai, responses
from .config import ServerConfig
from .guard import ClientGone, Guard, Refusal, Traffic, body_of
from .openai import json_bytes, read_json
from .openapi import description
from .service import Service
from .sse import EventStream, unless_gone

Act = Callable[[Service, Any], Coroutine[Any, Any, Any]]


class Door:
    """An application, and the service behind it once that is there."""

    def __init__(self, config: ServerConfig) -> None:
        self.service: Service | None = None
        self.progress = 0.0
        """How much of the models is loaded, while there is no service yet."""
        self.config = config
        self._traffic = Traffic()
        guard = Middleware(
            Guard,
            config=config,
            open_paths={"/health", "/ready", *(_PAGE if config.has_page else ())},
            traffic=self._traffic,
        )
        self.app = Starlette(
            routes=list(self._routes()),
            middleware=[guard],
            exception_handlers={HTTPException: _refuse_route},
        )
        self.app.router.redirect_slashes = False

    @property
    def open_service(self) -> Service:
        if self.service is None:
            percent = int(self.progress * 100)
            message = f"the model is being loaded, {percent} % is done"
            raise Refusal(503, "model_loading", message, retry_after="1")
        return self.service

    def _routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        retrieve = _Route(self, "GET", openai.retrieve_model)
        routes.append(Route("/v1/models/{model:path}", retrieve, methods=["GET"]))
        for shapes in (openai, anthropic, responses, llama_server, control):
            for path, (method, act) in shapes.ROUTES.items():
                answer = _Route(self, method, act, shapes)
                routes.append(Route(path, answer, methods=[method]))
        if self.config.has_page:
            routes += [Route(path, _page) for path in _PAGE]
        return routes

    async def _health(self, request: Request) -> Response:
        """Whether the models are there; a long prompt does not keep this waiting."""
        if self.service is None:
            return _json({"status": "loading", "progress": round(self.progress, 3)}, 503)
        if not self.service.models.is_well:
            return _json({"status": "error"}, 503)
        slow = why_slow()
        return _json({"status": "ok"} if slow is None else {"status": "ok", "slow": slow})

    async def _ready(self, request: Request) -> Response:
        """Whether a request would find a place, or one in the queue."""
        if (health := await self._health(request)).status_code != 200:
            return health
        for name, engine in (await self._engines()).items():
            model = self.open_service.loaded(name)
            if model is not None and engine["waiting"] >= model.config.queue_size:
                return _json({"status": "busy", "model": name}, 503)
        return _json({"status": "ok"})

    async def _openapi(self, request: Request) -> Response:
        described = [
            (method, route.path)
            for route in self.app.routes
            if isinstance(route, Route) and route.path not in _PAGE
            for method in sorted((route.methods or set()) - {"HEAD"})
        ]
        return _json(description(described))

    async def _metrics(self, request: Request) -> Response:
        text = metrics.prometheus_of_many(await self._engines())
        text += "".join(f"{line}\n" for line in self._traffic.prometheus())
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _engines(self) -> dict[str, dict[str, Any]]:
        """The counters of those models that are loaded."""
        service, counted = self.open_service, {}
        for name in service.names:
            with suppress(ModelNotLoadedError):  # or it is unloaded just now
                counted[name] = await service.metrics(name)
        return counted


@dataclass(frozen=True)
class _Route:
    """What is asked by JSON and answered by JSON, or by events."""

    door: Door
    method: str
    act: Act
    shapes: Any = openai
    """The module whose errors it speaks: `refusal_of` and `error_event`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = self.door.config
        try:
            asked = await self._asked(scope, receive)
            answer = await unless_gone(self.act(self.door.open_service, asked), receive, config)
        except (ClientGone, Refusal):
            raise
        except Exception as error:
            status, content = self.shapes.refusal_of(error)
            raise Refusal.of(status, content) from None
        if isinstance(answer, (dict, list)):
            await _json(answer)(scope, receive, send)
        else:
            tell = self.shapes.error_event
            await EventStream(answer, config, tell)(scope, receive, send)

    async def _asked(self, scope: Scope, receive: Receive) -> Any:
        request = Request(scope)
        if self.method == "GET":
            return request.path_params.get("model") or dict(request.query_params)
        body = await body_of(scope, receive, self.door.config)
        return read_json(body, request.headers)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json_bytes(content), status, media_type="application/json")


async def _refuse_route(request: Request, error: Exception) -> Response:
    """No such path, or not by that method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        message = f"{path!r:.200} takes {allow}, got {method!r:.20}"
        raise Refusal(405, "method_not_allowed", message, allow=allow)
    raise Refusal(404, "not_found", f"there is nothing at {path!r:.200}")


async def _page(request: Request) -> Response:
    name, media_type = _PAGE[request.scope["path"].removeprefix(request.scope["root_path"])]
    content = (Path(__file__).parent / "page" / name).read_bytes()
    return Response(content, media_type=media_type, headers=_PAGE_HEADERS)


_PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}
