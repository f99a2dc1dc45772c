"""Users: threads that ask a Model, and tasks that ask an AsyncModel. Each takes the next request.

What a request ends with is a word for the ledger; whatever is not as it should be is a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

from tabagent_model import AsyncModel, Completion, Model
from tabagent_model.errors import GenerationTimeoutError, QueueFullError

from .ledger import Ledger
from .plan import Ask, Plan


class SoakError(Exception):
    """Something is not as it should be."""


class QuitError(Exception):
    """Raised by a callback, and expected where the callback was given."""


class Users:
    """What both kinds share: where the next request comes from, and what a sound answer is."""

    def __init__(
        self, model: Any, plan: Plan, ledger: Ledger, numbers: Iterator[int], expected: Completion
    ) -> None:
        self.model = model
        self.plan = plan
        self.ledger = ledger
        self.numbers = numbers
        self.expected = expected
        """The answer to the reference prompt."""

    def check(self, ask: Ask, answer: Completion) -> str:
        fields = ask.fields
        stops = fields.get("stop", ())
        if ask.kind in ("reference", "load") and answer != self.expected:
            raise SoakError(f"not the reference answer: {answer.text!r}")
        if answer.finish_reason not in ("stop", "length"):
            raise SoakError(f"ended with `{answer.finish_reason}`")
        if len(answer.tokens) > fields["max_tokens"]:
            raise SoakError(f"{len(answer.tokens)} tokens, and {fields['max_tokens']} were allowed")
        if any(stop in answer.text for stop in stops):
            raise SoakError(f"a stop string in {answer.text!r}")
        if fields.get("ignore_eos") and not stops and len(answer.tokens) < fields["max_tokens"]:
            raise SoakError(f"only {len(answer.tokens)} tokens of {fields['max_tokens']}")
        return "answered"

    def check_left(self, answer: Completion) -> str:
        if answer.finish_reason not in ("cancelled", "stop", "length"):
            raise SoakError(f"was left, and ended with `{answer.finish_reason}`")
        return "cancelled" if answer.finish_reason == "cancelled" else "answered"

    def check_refused(self, ask: Ask, error: Exception | None) -> str:
        if type(error) is not ask.refusal:
            raise SoakError(f"{ask.prompt!r:.40} {ask.fields!r:.40} gave {error!r:.200}")
        return f"refused: {type(error).__name__}"

    def quit_after(self, pieces: int, *, by_raising: bool = False) -> Any:
        seen = 0

        def on_token(piece: str) -> bool:
            nonlocal seen
            seen += 1
            if seen > pieces and by_raising:
                raise QuitError
            return seen <= pieces

        return on_token

    def settle(self, number: int, ask: Ask, began: float, outcome: str | Exception) -> None:
        is_late = isinstance(outcome, GenerationTimeoutError) and "timeout_s" in ask.fields
        if is_late:
            outcome = "timed out"
        elif isinstance(outcome, Exception):
            self.ledger.fault(f"request {number} ({ask.kind}): {outcome!r:.300}")
            outcome = "failed"
        self.ledger.note(number, ask.kind, outcome, time.perf_counter() - began)


class Threads(Users):
    model: Model
    ways = ("unread", "close", "leave", "drop", "callback", "raising", "elsewhere", "late")

    def run(self) -> None:
        for number in self.numbers:
            ask, began = self.plan[number], time.perf_counter()
            outcome: str | Exception | None = None
            while outcome is None:
                try:
                    outcome = getattr(self, ask.kind)(ask)
                except QueueFullError:
                    self.ledger.count("queue full")
                    time.sleep(0.005)
                except Exception as error:
                    outcome = error
            self.settle(number, ask, began, outcome)

    def generate(self, ask: Ask) -> str:
        return self.check(ask, self.model.generate(ask.prompt, **ask.fields))

    reference = generate

    def stream(self, ask: Ask) -> str:
        with self.model.stream(ask.prompt, **ask.fields) as stream:
            text = "".join(stream)
        if text != stream.result.text:
            raise SoakError(f"the pieces are {text!r}, the answer is {stream.result.text!r}")
        return self.check(ask, stream.result)

    def crowd(self, ask: Ask) -> str:
        for answer in self.model.generate(ask.prompt, **ask.fields):
            self.check(ask, answer)
        return "answered"

    def mistake(self, ask: Ask) -> str:
        use = self.model.generate if ask.pieces else self.model.stream
        try:
            use(ask.prompt, **ask.fields)
        except Exception as error:
            return self.check_refused(ask, error)
        return self.check_refused(ask, None)

    def burst(self, ask: Ask) -> str:
        """More than the queue takes."""
        streams = []
        try:
            while True:
                streams.append(self.model.stream(ask.prompt, **ask.fields))
        except QueueFullError:
            self.ledger.count("queue full")
        for stream in streams:
            stream.cancel()
        for stream in streams:
            self.check_left(stream.collect())
        return "cancelled"

    def load(self, ask: Ask) -> str:
        with Model.load(n_ctx=256, max_parallel=1, n_threads=1) as model:
            return self.check(ask, model.generate(ask.prompt, **ask.fields))

    def cancel(self, ask: Ask) -> str:
        return getattr(self, self.ways[int(ask.way * len(self.ways))])(ask)

    def unread(self, ask: Ask) -> str:
        stream = self.model.stream(ask.prompt, **ask.fields)
        stream.cancel()
        return self.check_left(stream.collect())

    def close(self, ask: Ask) -> str:
        stream = self.model.stream(ask.prompt, **ask.fields)
        for _ in zip(range(ask.pieces), stream, strict=False):
            pass
        stream.close()
        return self.check_left(stream.result)

    def leave(self, ask: Ask) -> str:
        with self.model.stream(ask.prompt, **ask.fields) as stream:
            for number, _ in enumerate(stream):
                if number >= ask.pieces:
                    break
        return self.check_left(stream.result)

    def drop(self, ask: Ask) -> str:
        stream = self.model.stream(ask.prompt, **ask.fields)
        for _ in zip(range(ask.pieces), stream, strict=False):
            pass
        return "dropped"

    def callback(self, ask: Ask) -> str:
        on_token = self.quit_after(ask.pieces)
        return self.check_left(self.model.generate(ask.prompt, on_token=on_token, **ask.fields))

    def raising(self, ask: Ask) -> str:
        on_token = self.quit_after(ask.pieces, by_raising=True)
        try:
            return self.check(ask, self.model.generate(ask.prompt, on_token=on_token, **ask.fields))
        except QuitError:
            return "cancelled"

    def elsewhere(self, ask: Ask) -> str:
        stream = self.model.stream(ask.prompt, **ask.fields)
        timer = threading.Timer(ask.delay, stream.cancel)
        timer.start()
        answer = stream.collect()
        timer.join()
        return self.check_left(answer)

    def late(self, ask: Ask) -> str:
        outcome = self.stream(ask)
        stream = self.model.stream("a", max_tokens=1)
        stream.collect()
        stream.cancel()
        stream.close()
        return outcome


class Tasks(Users):
    model: AsyncModel
    ways = ("unread", "close", "leave", "drop", "callback", "task", "tasks", "timeout", "late")

    async def run(self) -> None:
        for number in self.numbers:
            ask, began = self.plan[number], time.perf_counter()
            outcome: str | Exception | None = None
            while outcome is None:
                try:
                    outcome = await getattr(self, ask.kind)(ask)
                except QueueFullError:
                    self.ledger.count("queue full")
                    await asyncio.sleep(0.005)
                except Exception as error:
                    outcome = error
            self.settle(number, ask, began, outcome)

    async def generate(self, ask: Ask) -> str:
        return self.check(ask, await self.model.generate(ask.prompt, **ask.fields))

    reference = generate

    async def stream(self, ask: Ask) -> str:
        async with self.model.stream(ask.prompt, **ask.fields) as stream:
            text = "".join([piece async for piece in stream])
        if text != stream.result.text:
            raise SoakError(f"the pieces are {text!r}, the answer is {stream.result.text!r}")
        return self.check(ask, stream.result)

    async def crowd(self, ask: Ask) -> str:
        for answer in await self.model.generate(ask.prompt, **ask.fields):
            self.check(ask, answer)
        return "answered"

    async def mistake(self, ask: Ask) -> str:
        try:
            if ask.pieces:
                await self.model.generate(ask.prompt, **ask.fields)
            else:
                await self.model.stream(ask.prompt, **ask.fields).collect()
        except Exception as error:
            return self.check_refused(ask, error)
        return self.check_refused(ask, None)

    async def burst(self, ask: Ask) -> str:
        """More than the queue takes."""
        streams = []
        try:
            while True:
                stream = self.model.stream(ask.prompt, **ask.fields)
                await stream.__aenter__()
                streams.append(stream)
        except QueueFullError:
            self.ledger.count("queue full")
        for stream in streams:
            stream.cancel()
        for stream in streams:
            await stream.aclose()
            self.check_left(stream.result)
        return "cancelled"

    async def load(self, ask: Ask) -> str:
        async with await AsyncModel.load(n_ctx=256, max_parallel=1, n_threads=1) as model:
            return self.check(ask, await model.generate(ask.prompt, **ask.fields))

    async def cancel(self, ask: Ask) -> str:
        return await getattr(self, self.ways[int(ask.way * len(self.ways))])(ask)

    async def unread(self, ask: Ask) -> str:
        async with self.model.stream(ask.prompt, **ask.fields) as stream:
            stream.cancel()
        return self.check_left(stream.result)

    async def close(self, ask: Ask) -> str:
        stream = await self.read(ask)
        await stream.aclose()
        return self.check_left(stream.result)

    async def leave(self, ask: Ask) -> str:
        async with self.model.stream(ask.prompt, **ask.fields) as stream:
            number = 0
            async for _ in stream:
                if number >= ask.pieces:
                    break
                number += 1
        return self.check_left(stream.result)

    async def drop(self, ask: Ask) -> str:
        await self.read(ask)
        return "dropped"

    async def read(self, ask: Ask) -> Any:
        stream = self.model.stream(ask.prompt, **ask.fields)
        await stream.__aenter__()
        with contextlib.suppress(StopAsyncIteration):
            for _ in range(ask.pieces):
                await stream.__anext__()
        return stream

    async def callback(self, ask: Ask) -> str:
        on_token = self.quit_after(ask.pieces)
        answer = await self.model.generate(ask.prompt, on_token=on_token, **ask.fields)
        return self.check_left(answer)

    async def task(self, ask: Ask) -> str:
        return await self.cancelled(self.generate(ask), ask.delay)

    async def tasks(self, ask: Ask) -> str:
        crowd = self.crowd(replace(ask, prompt=[ask.prompt] * 3))
        return await self.cancelled(crowd, ask.delay)

    async def cancelled(self, use: Coroutine[Any, Any, str], delay: float) -> str:
        task = asyncio.ensure_future(use)
        await asyncio.sleep(delay)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def timeout(self, ask: Ask) -> str:
        try:
            return await asyncio.wait_for(self.generate(ask), ask.delay)
        except GenerationTimeoutError:
            raise
        except asyncio.TimeoutError:
            return "cancelled"

    async def late(self, ask: Ask) -> str:
        outcome = await self.stream(ask)
        stream = self.model.stream("a", max_tokens=1)
        await stream.collect()
        stream.cancel()
        await stream.aclose()
        return outcome
