"""The soak over HTTP: users of `tabagent-model serve` who leave, dawdle and make mistakes.

    python -m tests.soak --http --minutes 30

In the first half of the time the worker is killed now and then; whoever is under way then may hear
of that, and nobody else may hear of anything. In the second half nobody is killed, so what the
worker holds can be seen to stay as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from .ledger import Ledger, belongings, children, growth_fault, private_mib
from .plan import MAX_TOKENS, PREAMBLE, REFERENCE, REFERENCE_EVERY, REFERENCE_FIELDS, STORY

WARM_UP = 300
PATIENCE_S = 60.0
KILL_EVERY_S = 31.0  # the third death within a minute would be the last
AFTER_A_KILL_S = 3.0
SAMPLES = 300
QUEUE_SIZE = 8
OUR_THREADS, LOOP_THREADS = 8, 32
"""At most so many submit, and do whatever else an event loop leaves to threads."""


def soak(minutes: float, num_users: int, seed: int) -> dict[str, Any]:
    """The report of a server, its users, and the one who kills its worker."""
    with serving() as server:
        ledger = Ledger(0, WARM_UP, measure=lambda: private_mib(server.pid))
        users = Users(server, seed, ledger)
        asyncio.run(users.soak(minutes * 60, num_users))
        server.stop(ledger)
    ledger.close()
    worker = f"The worker was killed {len(users.kills)} times; after the last time it held"
    return {
        "seed": seed,
        "users": num_users,
        **ledger.report(),
        "kills": len(users.kills),
        "worker_memory": users.worker_memory,
        "more": [f"{worker} {_range(users.worker_memory)}."],
    }


@dataclass(frozen=True)
class Server:
    """`tabagent-model serve` with the bundled model, in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def workers(self) -> list[int]:
        return children(self.pid)

    def stop(self, ledger: Ledger) -> None:
        """As a service manager does."""
        workers = self.workers
        self.process.terminate()
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            ledger.fault(f"it had not ended {PATIENCE_S:.0f} s after SIGTERM")
            return
        if status:
            ledger.fault(f"it ended with {status}")
        if left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
            ledger.fault(f"its workers {left} live on")


@contextmanager
def serving() -> Iterator[Server]:
    """One that has loaded its model, and is gone afterwards."""
    with tempfile.TemporaryDirectory() as home:
        words = Path(home) / "stderr"
        command = [sys.executable, "-m", "tabagent_model", "serve", "--port", "0", "--quiet"]
        command += ["--n-ctx", "512", "--parallel", "4", "--threads", "2"]
        command += ["--queue-size", str(QUEUE_SIZE)]
        environment = {**os.environ, "TABAGENT_HOME": home, "MALLOC_ARENA_MAX": "1"}
        with words.open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr, env=environment)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", words.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(f"there is no server: {words.read_text()}")
                time.sleep(0.05)
            yield Server(process, int(found[1]))
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Call:
    """One thing that a user does."""

    kind: str
    request: bytes
    status: int = 200
    ends: tuple[bytes, ...] = ()
    """One of these stands near the end of the answer."""
    way: str = ""
    """How it is left; nothing: it is read to the end."""
    reads: int = 0
    """What is read before that."""


class Plan:
    """What call number n of a seed is."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __getitem__(self, number: int) -> Call:
        if number % REFERENCE_EVERY == 0:
            return Call("reference", post("/v1/completions", {"prompt": REFERENCE, **_GREEDY}))
        chance = random.Random(self._seed * 1_000_003 + number)
        share = chance.random()
        if share < 0.1:
            request, status = chance.choice(MISTAKES)
            return Call("mistake", request, status)
        if share < 0.2:
            return Call("look", chance.choice(LOOKS))
        path, ends, body = _asked(chance)
        if share < 0.35:
            way = chance.choice(("close", "abort", "at once", "half a request"))
            body |= {"stream": chance.random() < 0.8, **_long(path)}
            return Call("leave", post(path, body), way=way, reads=chance.choice((0, 1, 2, 5)))
        if share < 0.4:
            body |= {"stream": True, **_long(path)}
            return Call("dawdle", post(path, body), ends=ends, way="dawdle")
        if share < 0.8:
            return Call("stream", post(path, body | {"stream": True}), ends=ends)
        return Call("whole", post(path, body))


class Users:
    def __init__(self, server: Server, seed: int, ledger: Ledger) -> None:
        self.server = server
        self.plan = Plan(seed)
        self.ledger = ledger
        self.kills: list[float] = []
        self.worker_memory: list[tuple[int, float]] = []
        """Since the last kill."""
        self._expected = ""
        self._begun = 0

    async def soak(self, seconds: float, num_users: int) -> None:
        self._expected = await self._reference()
        await self._crowd(range(-WARM_UP, 0), num_users)
        await self._need_all_threads()
        await self._settle()
        before = await self._least_belongings()
        end = time.monotonic() + seconds
        others = [
            asyncio.ensure_future(self._kill(seconds)),
            asyncio.ensure_future(self._watch(seconds)),
        ]
        await self._crowd(takewhile(lambda _: time.monotonic() < end, count()), num_users)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self.ledger.requests = self._begun
        await self._settle()
        after = await self._least_belongings()
        if any(after[name] > before[name] for name in before):
            self.ledger.fault(f"left behind: {after}, and before it was {before}")
        if fault := growth_fault(self.worker_memory):
            self.ledger.fault(f"the worker's {fault}")

    async def _need_all_threads(self) -> None:
        """The server makes threads as it needs them, up to a number. With a worker that stands
        still for a moment it needs all that it will ever have."""

        async def ask(request: bytes) -> bytes:
            async with connected(self.server.port) as (reader, writer):
                writer.write(request)
                return await reader.read()

        one_token = post("/v1/completions", {"prompt": "a", "max_tokens": 1})
        asked = [one_token] * OUR_THREADS + [post("/tokenize", {"content": "a"})] * LOOP_THREADS
        workers = self.server.workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        answers = [asyncio.ensure_future(ask(request)) for request in asked]
        await asyncio.sleep(0.5)
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        for answer in await asyncio.gather(*answers):
            if not answer.startswith(b"HTTP/1.1 200"):
                self.ledger.fault(f"nothing after a worker stood still: {answer[-300:]!r}")

    async def _crowd(self, numbers: Iterable[int], num_users: int) -> None:
        left = iter(numbers)

        async def user() -> None:
            for number in left:
                self._begun += number >= 0
                await self._use(number)

        await asyncio.gather(*(user() for _ in range(num_users)))

    async def _use(self, number: int) -> None:
        call, began = self.plan[number], time.monotonic()
        outcome = None
        while outcome is None:
            try:
                outcome = await asyncio.wait_for(self._do(call), PATIENCE_S)
            except QueueFullError:
                self.ledger.count("queue full")
                await asyncio.sleep(0.01)
            except Exception as error:
                outcome = "crashed"
                was_killed = any(began - AFTER_A_KILL_S < kill for kill in self.kills)
                if not (was_killed and any(word in str(error) for word in _CRASHED)):
                    self.ledger.fault(f"request {number} ({call.kind}): {error!r:.400}")
                    outcome = "failed"
        self.ledger.note(number, call.kind, outcome, time.monotonic() - began)

    async def _do(self, call: Call) -> str:
        async with connected(self.server.port) as (reader, writer):
            if call.way == "half a request":
                writer.write(call.request[: len(call.request) // 2])
                await writer.drain()
                return "left"
            writer.write(call.request)
            if call.way == "at once":
                return "left"
            if call.way in ("close", "abort"):
                for _ in range(call.reads):
                    await reader.read(1000)
                if call.way == "close":
                    writer.close()
                return "left"
            begin = await reader.read(100)
            if call.way == "dawdle":
                await asyncio.sleep(0.2)
            answer = begin + await reader.read()
        return self._check(call, answer)

    def _check(self, call: Call, answer: bytes) -> str:
        status = int(answer[9:12] or 0)
        if status == 503 and any(words in answer for words in _BUSY):
            raise QueueFullError
        if status != call.status:
            raise SoakError(f"{status} instead of {call.status}: {answer[-300:]!r}")
        if call.ends and not any(end in answer[-2000:] for end in call.ends):
            raise SoakError(f"no end: {answer[-300:]!r}")
        if call.kind == "whole":
            json.loads(_body(answer))
        if call.kind == "reference" and (said := _text(answer)) != self._expected:
            raise SoakError(f"not the reference answer: {said!r}")
        return f"refused: {status}" if call.kind == "mistake" else "answered"

    async def _reference(self) -> str:
        """Once the model is loaded."""
        while True:
            async with connected(self.server.port) as (reader, writer):
                writer.write(self.plan[0].request)
                answer = await reader.read()
            if not answer.startswith(b"HTTP/1.1 503"):
                return _text(answer)
            await asyncio.sleep(0.05)

    async def _settle(self) -> None:
        """Nobody may be left in the engine when nobody asks any more."""
        deadline = time.monotonic() + 10
        while busy := re.findall(
            rb"^llamacpp:requests_\w+{.*} [^0]\S*$", await self._metrics(), re.M
        ):
            if time.monotonic() > deadline:
                self.ledger.fault(f"never ended: {busy}")
                return
            await asyncio.sleep(0.05)

    async def _metrics(self) -> bytes:
        async with connected(self.server.port) as (reader, writer):
            writer.write(get("/metrics"))
            return await reader.read()

    async def _least_belongings(self) -> dict[str, int]:
        """Of some moments: what has been closed is still there for a little while."""
        moments = []
        for _ in range(40):
            await asyncio.sleep(0.05)
            found = belongings(self.server.pid)
            for worker in self.server.workers:
                found["the worker's file descriptors"] = belongings(worker)["file descriptors"]
            moments.append(found)
        return {name: min(moment.get(name, 0) for moment in moments) for name in moments[0]}

    async def _kill(self, seconds: float) -> None:
        """Now and then, in the first half of the time."""
        end = time.monotonic() + seconds / 2
        await asyncio.sleep(min(KILL_EVERY_S, seconds / 8))
        for number in count():
            if time.monotonic() > end:
                return
            how = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)[number % 3]
            for worker in self.server.workers:
                with suppress(ProcessLookupError):
                    os.kill(worker, how)
            self.kills.append(time.monotonic())
            self.worker_memory.clear()
            await asyncio.sleep(KILL_EVERY_S)

    async def _watch(self, seconds: float) -> None:
        for number in count():
            await asyncio.sleep(seconds / SAMPLES)
            self.ledger.sample(self._begun)
            is_warm = number > SAMPLES * 0.6
            for worker in self.server.workers if is_warm else ():
                with suppress(OSError, IndexError):  # it may just be gone
                    self.worker_memory.append((self._begun, private_mib(worker)))


class SoakError(Exception):
    """Something is not as it should be."""


class QueueFullError(Exception):
    """The one thing for which a user has to try again."""


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def post(path: str, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if not any(header.startswith("Content-Type") for header in headers):
        headers += ("Content-Type: application/json",)
    return _head("POST", path, f"Content-Length: {len(data)}", *headers) + data


def get(path: str, *headers: str) -> bytes:
    return _head("GET", path, *headers)


def _head(method: str, path: str, *headers: str) -> bytes:
    if not any(header.startswith("Host") for header in headers):
        headers += ("Host: localhost",)
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", *headers, "Connection: close", "", ""]
    ).encode()


def _asked(chance: random.Random) -> tuple[str, tuple[bytes, ...], dict[str, Any]]:
    """Where something is asked, what ends a streamed answer there, and what is asked."""
    length = min(int(4 + chance.lognormvariate(3.4, 1)), 500)
    start = chance.randrange(len(STORY) - length)
    text = STORY[start : start + length]
    if chance.random() < 0.2:
        text = PREAMBLE + text[:200]
    fields: dict[str, Any] = {"temperature": chance.choice((0, 0.7, 1.5))}
    most = min(1 + int(chance.lognormvariate(2.5, 0.8)), MAX_TOKENS)
    messages = [{"role": "user", "content": text}]
    path = chance.choice(list(_ENDS))
    if path == "/v1/responses":
        return path, _ENDS[path], {"input": text, "max_output_tokens": most, **fields}
    fields["max_tokens"] = most
    if path == "/v1/messages":
        fields["temperature"] = min(fields["temperature"], 1)
        return path, _ENDS[path], {"messages": messages, "model": "default", **fields}
    fields["n"] = chance.choices((1, 3), (9, 1))[0]
    if chance.random() < 0.1:
        fields["stop"] = chance.choice(([" the"], ["."], ["e", "never said"]))
    if path == "/v1/completions":
        return path, _ENDS[path], {"prompt": text, **fields}
    return path, _ENDS[path], {"messages": messages, **fields}


def _long(path: str) -> dict[str, Any]:
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {name: MAX_TOKENS, "ignore_eos": True}


_RUNNING = re.compile(rb"^llamacpp:requests_\w+{.*} [^0].*$", re.MULTILINE)
_BUSY = (b" requests are waiting ", b'{"status":"busy"')
_CRASHED = ("worker process", "worker_crashed")
_DONE = (b"data: [DONE]",)
_ENDS = {
    "/v1/chat/completions": _DONE,
    "/v1/completions": _DONE,
    "/v1/messages": (b"event: message_stop",),
    "/v1/responses": (b"event: response.completed", b"event: response.incomplete"),
}
_GREEDY = {**REFERENCE_FIELDS, "stream": False}
_HELLO: Any = {"messages": [{"role": "user", "content": "Hello"}]}

LOOKS = (
    *map(get, ("/health", "/ready", "/metrics", "/v1/models", "/props", "/slots", "/openapi.json")),
    get("/"),
    post("/tokenize", {"content": STORY[:200]}),
    post("/detokenize", {"tokens": [65, 66, 67]}),
    post("/apply-template", _HELLO),
    post("/v1/messages/count_tokens", {"model": "default", **_HELLO}),
)
MISTAKES: tuple[tuple[bytes, int], ...] = (
    (get("/nothing/here"), 404),
    (get("/v1/completions"), 405),
    (get("/health", "Host: evil.example"), 403),
    (get("/v1/models", "Origin: https://evil.example"), 403),
    (get("/health", *(f"X-{n}: 1" for n in range(200))), 431),
    (get("/" + "a" * 40_000), 431),
    (b"GET /health HTTP/9.9\r\n\r\n", 400),
    (b"\0\1\2\3\r\n\r\n", 400),
    (post("/v1/completions", b"{"), 400),
    (post("/v1/completions", b"\xff\xfe"), 400),
    (post("/v1/completions", b"[" * 5000), 400),
    (post("/v1/completions", {"prompt": "a"}, "Content-Type: text/plain"), 415),
    (post("/v1/completions", {"prompt": 7}), 400),
    (post("/v1/completions", {"prompt": "a", "max_tokens": -5}), 400),
    (post("/v1/completions", {"prompt": "a", "temperature": "hot"}), 400),
    (post("/v1/completions", {"prompt": "a", "model": "gpt-9"}), 404),
    (post("/v1/completions", {"prompt": "word " * 5000}), 400),
    (post("/v1/completions", {"prompt": [1, 10**6]}), 400),
    (post("/v1/completions", {"prompt": "a", "grammar": "root ::= nothing"}), 400),
    (post("/v1/chat/completions", {"messages": []}), 400),
    (post("/v1/chat/completions", {**_HELLO, "tools": [{"type": "nothing"}]}), 400),
    (post("/v1/chat/completions", {**_HELLO, "n": 1000}), 400),
    (post("/v1/messages", _HELLO), 400),
    (post("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}), 400),
    (post("/tokenize", {"content": None}), 400),
)


def _text(answer: bytes) -> str:
    return str(json.loads(_body(answer))["choices"][0]["text"])


def _body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def _range(samples: list[tuple[int, float]]) -> str:
    sizes = [mib for _, mib in samples] or [0.0]
    return f"{min(sizes):.1f} to {max(sizes):.1f} MiB"
