"""Chats over HTTP, streamed the same way from every server.

While they stream nothing is understood: what arrives is kept with its time, and read when all is
over. So the client takes little of the CPU that the server computes with, and how much it took is
among the figures. It is as nice as the server, for one that waits for a core would measure its own
waiting. A public load tool parses as it goes, which costs more than what is measured here.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

PATIENCE_S = 300


@dataclass(frozen=True)
class Chat:
    """What one request asks, and how many tokens it must give."""

    messages: Sequence[dict[str, str]]
    tokens: int
    fields: dict[str, Any] = field(default_factory=dict)

    def request(self) -> bytes:
        """A connection for each: who keeps one open between two requests keeps a thread of
        llama-server busy."""
        asked = {
            "messages": self.messages,
            "max_tokens": self.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **self.fields,
        }
        body = json.dumps(asked).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


@dataclass
class Heard:
    """What came of a chat: when each piece of its text was there, or why there is none."""

    asked: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    failure: str | None = None

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.asked

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


async def in_turns(port: int, chats: Sequence[Chat], clients: int) -> list[Heard]:
    """Clients that each ask again as soon as they have their answer."""
    left, exchanges = iter(chats), []

    async def client() -> None:
        for chat in left:
            async with exchange(port, chat.request()) as found:
                await found.over
            exchanges.append((found, chat))

    await asyncio.gather(*(client() for _ in range(clients)))
    return [found.heard(chat.tokens) for found, chat in exchanges]


async def as_they_come(
    port: int, chats: Sequence[Chat], per_s: float, dice: random.Random
) -> list[Heard]:
    """Clients that know nothing of each other: a Poisson process of so many per second."""
    times = accumulate(dice.expovariate(per_s) for _ in chats)

    async def client(chat: Chat, after_s: float) -> Heard:
        await asyncio.sleep(after_s)
        async with exchange(port, chat.request()) as found:
            await found.over
        return found.heard(chat.tokens)

    return list(await asyncio.gather(*map(client, chats, times)))


async def until_over(port: int, path: str, found: Exchange, every_s: float) -> list[Exchange]:
    """Ask for a path again and again, until another exchange is over."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    asked = []
    while not found.over.done():
        async with exchange(port, request) as each:
            await each.over
        asked.append(each)
        await asyncio.sleep(every_s)
    return asked


class Exchange(asyncio.Protocol):
    """A request on a connection of its own, and what comes back until the server closes it."""

    def __init__(self) -> None:
        self.asked = 0.0
        self.arrived: list[tuple[float, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def heard(self, tokens: int) -> Heard:
        """As an answer of so many tokens; whatever else it is, is a failure."""
        heard = Heard(self.asked)
        try:
            self._read(heard)
        except (ValueError, LookupError, TypeError) as error:
            heard.failure = f"nonsense: {error!r:.80}"
        if heard.failure is None and (heard.tokens != tokens or not heard.pieces):
            heard.failure = f"{heard.tokens} tokens instead of {tokens}"
        return heard

    @property
    def status(self) -> int:
        return int(b"".join(data for _, data in self.arrived)[9:12] or 0)

    @property
    def total_s(self) -> float:
        return self.arrived[-1][0] - self.asked if self.arrived else float(PATIENCE_S)

    def _read(self, heard: Heard) -> None:
        if self.status != 200:
            body = self.arrived[-1][1][-80:] if self.arrived else b""
            heard.failure = f"status {self.status}: {body!r}"
            return
        heard.failure = "it ended before its end"
        for at, data in self._events():
            if data == b"[DONE]":
                heard.failure = None
                return
            chunk = json.loads(data)
            if "error" in chunk:
                heard.failure = f"{chunk['error']!r:.80}"
                return
            for choice in chunk["choices"]:
                if choice["delta"].get("content") or choice["delta"].get("reasoning_content"):
                    heard.pieces.append(at)
            if usage := chunk.get("usage"):
                heard.tokens = usage["completion_tokens"]

    def _events(self) -> Iterator[tuple[float, bytes]]:
        """The data of each server-sent event, and when its last byte was there."""
        ends = list(accumulate(len(data) for _, data in self.arrived))
        unfinished = b""
        for end, data in _chunks(b"".join(data for _, data in self.arrived)):
            *events, unfinished = (unfinished + data).split(b"\n\n")
            at = self.arrived[bisect_left(ends, end)][0]
            for event in events:
                if event.startswith(b"data: "):
                    yield at, event[6:]


@asynccontextmanager
async def exchange(port: int, request: bytes) -> AsyncIterator[Exchange]:
    """One that has begun; it does not outlive its block, nor everybody's patience."""
    loop, asked = asyncio.get_running_loop(), time.perf_counter()
    transport, found = await loop.create_connection(Exchange, "127.0.0.1", port)
    found.asked = asked
    given_up = loop.call_later(PATIENCE_S, transport.abort)
    try:
        transport.write(request)
        yield found
    finally:
        given_up.cancel()
        transport.abort()


def _chunks(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """The chunks of an answer's body, and where in it each of them ends."""
    at = answer.index(b"\r\n\r\n") + 4
    while (line := answer.find(b"\r\n", at)) > 0:
        begin, size = line + 2, int(answer[at:line], 16)
        if size == 0 or begin + size > len(answer):
            return
        yield begin + size, answer[begin : begin + size]
        at = begin + size + 2
