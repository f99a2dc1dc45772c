"""A server in a thread of the tests, and sockets that say what no client would."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx

from tabagent_model import Model
from tabagent_model.serve.config import ServerConfig
from tabagent_model.serve.http import Door
from tabagent_model.serve.listen import bind, server_of
from tabagent_model.serve.models import Source
from tabagent_model.serve.service import Service
from tabagent_model.testing import ScriptedContext


class Served:
    """Models behind a port; none: a server whose models are still being loaded."""

    def __init__(self, models: Source | None, **rules: Any) -> None:
        self.door = Door(ServerConfig(**rules))
        self.door.service = None if models is None else Service(models)
        self._listener = bind("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = server_of(self.door)
        run = self._server.run
        self._thread = threading.Thread(target=run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> Served:
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """As a signal does."""
        self._server.should_exit = True

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def say(self, data: bytes) -> bytes:
        """What comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(65_536):
            received += data
    except ConnectionResetError:
        pass
    return received


def post(path: str, body: bytes | str, *headers: str, close: bool = True) -> bytes:
    """A request as bytes."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    lines += [*headers, *(["Connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


def events_of(text: str) -> list[Any]:
    """The data of each server-sent event; the mark of the end stays text."""
    data = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def wait_until(is_so: Callable[[], object], within_s: float = 30) -> None:
    """A test that hangs says so."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def scripted(*pieces: Any, **settings: Any) -> tuple[ScriptedContext, Model]:
    context = ScriptedContext(pieces or ("Be", "cause", "!"), **settings)
    return context, Model(context)
