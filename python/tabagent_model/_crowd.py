"""Requests that are answered together: a list in, a list out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ._courier import LONG_TEXT, Courier, Event, Inbox, LoopInbox, Request
from .errors import QueueFullError
from .results import Completion, Source
from .stream import Answer, ChatAnswer, settle


class Crowd:
    """Requests that are answered together. If one fails, the others are ended.

    More of them than may wait in the queue are submitted as places become free.
    """

    def __init__(self, courier: Courier, requests: Iterable[Request], source: Source) -> None:
        self._courier = courier
        self._unsent = deque(requests)
        self._answers = {
            request.id: (ChatAnswer if request.chat else Answer)(request, source)
            for request in self._unsent
        }
        self._running: set[int] = set()

    def collect(self) -> list[Completion]:
        inbox = Inbox()
        try:
            self._send(inbox)
            while self._running:
                event = inbox.get()
                if event and self._take(event):
                    self._send(inbox)
        except BaseException:
            self._abort()
            while any(map(self._courier.carries, self._running)):
                inbox.get(within=0.1)
            raise
        return self._results()

    async def collect_async(self) -> list[Completion]:
        import asyncio

        loop = asyncio.get_running_loop()
        inbox = LoopInbox(loop)
        length = sum(request.size for request in self._unsent)
        is_much = length > LONG_TEXT or len(self._unsent) > 64
        try:
            while self._unsent or self._running:
                if is_much and self._unsent:
                    job = self._courier.in_thread(lambda: self._send(inbox))
                    await settle(asyncio.wrap_future(job), job.cancel)
                else:
                    self._send(inbox)
                while not self._take(await inbox.get()):
                    pass
        except GeneratorExit:  # the coroutine is thrown away: no more waiting
            self._abort()
            raise
        except BaseException:
            self._abort()
            await self._until_all_are_over(inbox)
            raise
        return self._results()

    def _send(self, inbox: Inbox | LoopInbox) -> None:
        while self._unsent:
            request = self._unsent.popleft()
            self._running.add(request.id)  # already now: Ctrl-C may strike on the way back
            try:
                self._courier.send(request, inbox)
            except Exception as error:
                self._running.discard(request.id)
                if not self._running or not isinstance(error, QueueFullError):
                    raise
                self._unsent.appendleft(request)
                return  # one of ours has to end first

    def _take(self, event: Event) -> bool:
        """Whether one has ended."""
        answer = self._answers[event.request_id]
        answer.take(event)
        if answer.is_over:
            self._running.discard(event.request_id)
            answer.check()
        return answer.is_over

    async def _until_all_are_over(self, inbox: LoopInbox) -> None:
        import asyncio

        cancelled: BaseException | None = None
        while self._running:
            try:
                event = await inbox.get()
            except asyncio.CancelledError as error:  # the end is near; then it may have its way
                cancelled = error
            else:
                if event.is_last:
                    self._running.discard(event.request_id)
        if cancelled is not None:
            raise cancelled

    def _abort(self) -> None:
        for request_id in self._running:
            self._courier.abort(request_id)

    def _results(self) -> list[Completion]:
        return [answer.result for answer in self._answers.values()]
