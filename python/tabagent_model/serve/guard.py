"""Stands before every route: who may ask, and from where.

    request ──▶ an id ──▶ Host ──▶ Origin ──▶ key ──▶ the routes

A web page elsewhere can make a browser on this machine send requests here. It cannot choose their
`Host` (so a name that it made point here is refused), nor their `Origin`, nor a JSON content type
without asking first, and what is answered to that question names only origins that were allowed.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator
from hashlib import sha256
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._shapes import new_id
from .config import ServerConfig
from .openai import error_body, json_bytes

log = logging.getLogger("tabagent_model.serve")


class Refusal(Exception):  # noqa: N818 - not every one is somebody's error
    """A request that is answered with nothing but a status and a reason."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = error_body(message, status, code)

    @classmethod
    def of(cls, status: int, content: dict[str, Any]) -> Refusal:
        """In somebody else's shape."""
        refusal = cls(status, "", "")
        refusal.content = content
        if status == 503:
            refusal.headers["retry-after"] = "1"
        return refusal


class ClientGone(Exception):  # noqa: N818 - nobody is left to be told of an error
    """The client closed its connection before it had its answer."""


class Guard:
    """An ASGI application around another."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, open_paths: Collection[str], traffic: Traffic
    ) -> None:
        self._app = app
        self._config = config
        self._open_paths = open_paths
        self._traffic = traffic
        self._keys = [sha256(key.encode()).digest() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(scope, headers, send)
        try:
            exchange.allow(self._checked_origin(headers))
            if is_preflight(scope["method"], headers):
                raise _permission(headers)
            self._check_key(scope, headers)
            await self._app(scope, receive, exchange.send)
        except ClientGone:
            exchange.status = CLIENT_GONE
        except Refusal as refusal:
            await exchange.refuse(refusal)
        except Exception:
            log.exception("%s: the request failed", exchange.id)
            message = "the request failed, and the server's log says why"
            await exchange.refuse(Refusal(500, "internal_error", message))
        finally:
            exchange.log()
            self._traffic.count(exchange.status, exchange.seconds)

    def _checked_origin(self, headers: Headers) -> str | None:
        """The origin of another page that may ask; None: the request comes from no other page."""
        hosts = headers.getlist("host") or ["localhost"]  # HTTP/1.0 need not say it
        if len(hosts) > 1 or not (name := host_name(hosts[0])):
            raise Refusal(400, "invalid_host", "there must be one `Host` header, with a host")
        if not self._is_good_host(name):
            message = f"this server is not known as `{name:.100}`; `--allow-host` makes it so"
            raise Refusal(403, "host_not_allowed", message)
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2].lower() == hosts[0].lower():
            return None
        if origin in self._config.allowed_origins or "*" in self._config.allowed_origins:
            return origin
        message = f"pages of `{origin:.100}` may not ask here; `--allow-origin` lets them"
        raise Refusal(403, "origin_not_allowed", message)

    def _is_good_host(self, name: str) -> bool:
        allowed = self._config.allowed_hosts
        return name == "localhost" or name in allowed or "*" in allowed or _is_address(name)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._keys or path in self._open_paths:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        given = sha256(key.encode()).digest()
        if not any([hmac.compare_digest(given, known) for known in self._keys]):
            message = "a key is needed: `Authorization: Bearer …`, and this is none of them"
            raise Refusal(401, "invalid_api_key", message, www_authenticate="Bearer")


CLIENT_GONE = 499
"""As nginx calls it; it is in the log only."""


class _Exchange:
    """One request and its answer, as they are sent and logged."""

    def __init__(self, scope: Scope, headers: Headers, send: Send) -> None:
        given = headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"req-{new_id()}"
        self.status = 0
        self._scope = scope
        self._send = send
        self._origin: str | None = None
        self._begun = time.perf_counter()

    def allow(self, origin: str | None) -> None:
        self._origin = origin

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            headers["x-content-type-options"] = "nosniff"
            if self._origin is not None:
                headers["access-control-allow-origin"] = self._origin
                headers["access-control-expose-headers"] = "x-request-id, retry-after"
                headers.add_vary_header("origin")
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        if self.status:  # the answer has begun; the connection is cut by whoever runs us
            return
        body = b"" if refusal.status == 204 else json_bytes(refusal.content)
        headers = {"content-type": "application/json", **refusal.headers}
        if refusal.status == 204:
            del headers["content-type"]
        else:
            headers["content-length"] = str(len(body))
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        method, path = self._scope["method"], printable(self._scope["path"])
        log.info("%s %s %s %d %.0f ms", self.id, method, path, self.status, self.seconds * 1000)


class Traffic:
    """What came in, for `/metrics`."""

    def __init__(self) -> None:
        self._begun = time.time()
        self._statuses: Counter[int] = Counter()
        self._buckets = [0] * (len(_BOUNDS_S) + 1)
        self._seconds = 0.0

    def count(self, status: int, seconds: float) -> None:
        self._statuses[status] += 1
        self._buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        self._seconds += seconds

    def prometheus(self) -> Iterator[str]:
        name = "tabagent:http_requests_total"
        yield from (f"# HELP {name} Requests by status.", f"# TYPE {name} counter")
        for status, number in sorted(self._statuses.items()):
            yield f'{name}{{status="{status}"}} {number}'
        name = "tabagent:http_request_seconds"
        yield from (f"# HELP {name} From the request to the end.", f"# TYPE {name} histogram")
        count = 0
        for bound, number in zip((*_BOUNDS_S, "+Inf"), self._buckets, strict=True):
            count += number
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self._seconds}"
        yield f"{name}_count {count}"
        name = "tabagent:uptime_seconds"
        yield from (f"# HELP {name} Since the start.", f"# TYPE {name} gauge")
        yield f"{name} {time.time() - self._begun}"


_BOUNDS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


async def body_of(scope: Scope, receive: Receive, config: ServerConfig) -> bytes:
    """The JSON text that came with a request; what is too much or too slow is refused."""
    headers = Headers(scope=scope)
    _check_content_type(headers)
    most = config.max_body_mb * 1_000_000
    length = headers.get("content-length", "0")
    too_large = Refusal(
        413, "body_too_large", f"a body may have {most} bytes at most", connection="close"
    )
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "invalid_http", "the `Content-Length` must be a number")
    if len(length) > 15 or int(length) > most:
        if headers.get("expect") is None:  # else the client has not begun to send it
            await _discard(receive)
        raise too_large
    import anyio

    body = bytearray()
    with anyio.move_on_after(config.body_timeout_s):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > most:
                del body
                await _discard(receive)
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)
    why = f"the body was not there after {config.body_timeout_s:g} s"
    raise Refusal(408, "request_timeout", why, connection="close")


def _check_content_type(headers: Headers) -> None:
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "application/json":
        raise Refusal(415, "unsupported_media_type", "the `Content-Type` must be application/json")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters)
    if charset is not None and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise Refusal(415, "unsupported_media_type", "the charset must be utf-8")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "unsupported_media_type", "the body must not be compressed")


async def _discard(receive: Receive) -> None:
    """Most clients read an answer only after they have sent everything; so wait a little."""
    import anyio

    with anyio.move_on_after(2.0):
        while (message := await receive()).get("more_body", False):
            pass
        if message["type"] == "http.disconnect":
            raise ClientGone


def is_preflight(method: str, headers: Headers) -> bool:
    return method == "OPTIONS" and "origin" in headers and _ASKS_FOR_METHOD in headers


def _permission(headers: Headers) -> Refusal:
    """What a browser hears that asks beforehand whether a page may ask."""
    wished = headers.get("access-control-request-headers", "")
    answer = Refusal(204, "", "")
    answer.headers = {
        "access-control-allow-methods": "GET, POST, OPTIONS",
        "access-control-allow-headers": wished if _HEADER_NAMES.fullmatch(wished) else "",
        "access-control-max-age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        answer.headers["access-control-allow-private-network"] = "true"
    return answer


_ASKS_FOR_METHOD = "access-control-request-method"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_\-, ]{0,1000}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._\-]{1,253})(:[0-9]{1,5})?")


def host_name(given: str) -> str | None:
    """The name in a `Host` header, without the port; None if there is none in it."""
    found = _HOST.fullmatch(given)
    return found[1].lower().rstrip(".") if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def printable(text: Any) -> str:
    """For a log line: nothing in it moves a cursor or begins a new line."""
    return repr(f"{text:.500}")[1:-1]
