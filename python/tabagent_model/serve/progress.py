"""How far the prompts of a request are read, between the pieces of its answers.

The engine has no event for that, but its slots tell it after each step; so they are looked at while
the first piece of an answer is waited for, and no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TabAgentModelError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .service import Answers

_LOOK_S = 0.05


@dataclass(frozen=True)
class PromptProgress:
    """So many tokens of a prompt, as llama-server counts them: those from the cache are in both."""

    total: int
    cache: int
    processed: int
    time_ms: int
    """Since it was first seen being read."""


class WithProgress:
    """Answers, and before the first piece of each what there is to tell of its prompt."""

    def __init__(self, answers: Answers[Any, Any]) -> None:
        self._answers = answers
        self._unread = dict(enumerate(answers.request_ids))
        """The ids of those of which no piece has come."""
        self._told: dict[int, PromptProgress] = {}
        self._begun: dict[int, float] = {}
        self._ready: deque[tuple[int, Any]] = deque()
        self._next: asyncio.Future[tuple[int, Any]] | None = None

    @property
    def results(self) -> list[Any]:
        return self._answers.results

    def logprobs(self, index: int) -> Any:
        return self._answers.logprobs(index)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Any]:
        while not self._ready:
            if not self._unread:
                return await anext(self._answers)
            await self._wait()
        return self._ready.popleft()

    async def aclose(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._answers.aclose()

    async def _wait(self) -> None:
        """For the next piece, or until it is time to look."""
        piece = self._next = self._next or asyncio.ensure_future(anext(self._answers))
        await asyncio.wait([piece], timeout=_LOOK_S)
        await self._look()
        if piece.done():
            self._next = None
            index, item = piece.result()
            self._unread.pop(index, None)
            self._ready.append((index, item))

    async def _look(self) -> None:
        slots: list[dict[str, int | None]] = []
        with suppress(TabAgentModelError):  # it was unloaded meanwhile, and the answer says so
            slots = await self._answers.slots()
        seen = {slot["request_id"]: slot for slot in slots}
        for index, request_id in self._unread.items():
            if request_id in seen:
                self._tell(index, seen[request_id])

    def _tell(self, index: int, slot: dict[str, int | None]) -> None:
        total = slot["prompt_tokens"] or 0
        processed = min(slot["held_tokens"] or 0, total)
        before = self._told.get(index)
        if before is not None and before.processed == processed:
            return
        begun = self._begun.setdefault(index, time.monotonic())
        time_ms = round((time.monotonic() - begun) * 1000)
        progress = PromptProgress(total, slot["cached_tokens"] or 0, processed, time_ms)
        self._told[index] = progress
        self._ready.append((index, progress))
