"""What uvicorn's HTTP connections have no limits for: how many, how long, and how large a head.

Applied to the bytes themselves, before there is a request that somebody could look at.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .config import ServerConfig
from .openai import error_body, json_bytes
from .sse import ABORT, WRITE


def connection_of(limits: ServerConfig) -> type[HttpToolsProtocol]:
    """uvicorn's connection within these limits."""
    most_bytes = limits.max_header_kb * 1000

    class Connection(HttpToolsProtocol):
        _head_bytes = 0
        """Of the head that is being received; -1: it is complete."""
        _num_headers = 0
        _told_bytes = 0
        """Of the head of the present request: a whole one may come in one read."""
        _is_refused = False
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._refuse(503, "too_many_connections", "too many connections are open")
            else:
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_deadline()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._is_refused:
                return
            if self._head_bytes >= 0:
                self._head_bytes += len(data)
                if self._deadline is None:
                    self._await_head()
            super().data_received(data)
            if self._head_bytes > most_bytes:
                self._refuse(431, "headers_too_large", f"a head may have {most_bytes} bytes")

        def on_message_begin(self) -> None:
            self._num_headers = self._told_bytes = 0
            super().on_message_begin()
            cast("dict[str, Any]", self.scope)[ABORT] = self.transport.abort

        def on_url(self, url: bytes) -> None:
            self._note(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._num_headers += 1
            self._note(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_bytes = -1
            self._forget_deadline()
            super().on_headers_complete()
            cast("dict[str, Any]", self.scope)[WRITE] = partial(self._write, self.cycle)

        def on_message_complete(self) -> None:
            self._head_bytes = 0  # what comes now is the next head
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            if self._is_too_large() or self._head_bytes > most_bytes:
                self._refuse(431, "headers_too_large", f"at most {_MOST_HEADERS} headers")
            else:
                self._refuse(400, "invalid_http", "this is not HTTP/1.1 as it should be")

        def _write(self, cycle: RequestResponseCycle, data: bytes) -> bool:
            """What `send` does with a piece of a body in the end, if it needs no waiting."""
            has_begun = cycle.response_started and cycle.chunked_encoding
            is_over = cycle.response_complete or cycle.disconnected or self.transport.is_closing()
            if not has_begun or is_over or self.flow.write_paused:
                return False
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return True

        def _note(self, num_bytes: int) -> None:
            self._told_bytes += num_bytes
            if self._is_too_large():
                raise OverflowError  # the parser gives up, and so `send_400_response` is called

        def _is_too_large(self) -> bool:
            return self._told_bytes > most_bytes or self._num_headers > _MOST_HEADERS

        def _await_head(self) -> None:
            self._deadline = self.loop.call_later(limits.header_timeout_s, self._give_up)

        def _forget_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self._head_bytes > 0:
                self._refuse(408, "request_timeout", "the head of the request did not come")
            else:
                self.transport.close()  # nothing was asked, so nothing is answered

        def _refuse(self, status: int, code: str, message: str) -> None:
            """Answer without a request, and leave time to read it before the connection goes."""
            if self._is_refused or self.transport.is_closing():
                return
            self._is_refused = True
            self._forget_deadline()
            self.transport.write(_answer(status, json_bytes(error_body(message, status, code))))
            self.loop.call_later(1.0, self.transport.close)

    return Connection


_MOST_HEADERS = 100


def _answer(status: int, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_REASONS: dict[int, Any] = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
