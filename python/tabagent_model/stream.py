"""Answers on their way: read them piece by piece, collect them, or leave early.

A stream that is left (the end of its `with`, `close`, a cancelled task, Ctrl-C) aborts its
request and waits for the last event, so that its place is free afterwards. One that is only
dropped aborts without waiting.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ._courier import LONG_TEXT, Courier, Event, Inbox, LoopInbox, Request
from .errors import GenerationCancelled, InternalError, InvalidRequestError, TabAgentModelError
from .results import (
    ChatCompletion,
    ChatDelta,
    Completion,
    FinishReason,
    Source,
    TokenLogprob,
    Usage,
    logprobs_of,
    metrics_of,
)

if TYPE_CHECKING:
    from asyncio import Future

    from typing_extensions import Self

    from .schema import Growing

T = TypeVar("T")
Item = TypeVar("Item", str, ChatDelta)
Result = TypeVar("Result", Completion, ChatCompletion)


class _Stream(Generic[Item, Result]):
    """What all streams know; they differ in how they wait, and in what they give."""

    def __init__(self, courier: Courier, request: Request, source: Source, owner: object) -> None:
        self._courier = courier
        self._request = request
        self._answer = ChatAnswer(request, source) if request.chat else Answer(request, source)
        self._items: deque[Item] = deque()
        """What has arrived and was not read yet."""
        self._owner = owner  # a model lives as long as its streams
        self._is_sent = False

    @property
    def request_id(self) -> int:
        return self._request.id

    @property
    def text(self) -> str:
        """What has been read so far."""
        return "".join(self._answer.pieces)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids that have been read so far."""
        return tuple(self._answer.tokens)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Of the tokens that have been read so far, if they were asked for."""
        return self._answer.logprobs

    @property
    def result(self) -> Result:
        """The whole answer, after its end; what ended it is raised if it was an error."""
        found: Any = self._answer.result
        return cast("Result", found)

    @property
    def usage(self) -> Usage:
        return self.result.usage

    def cancel(self) -> None:
        """Ask for the end and do not wait for it; callable from any thread."""
        self._answer.is_cancelled = True
        if self._is_sent and not self._answer.is_over:
            self._courier.abort(self._request.id)

    def unwatch(self) -> Self:
        """Nobody reads it while it comes; to be said before it is submitted."""
        self._answer.is_watched = False
        return self

    def _growing(self) -> Growing:
        if self._request.schema is None:
            message = "there is no object to grow: the chat was asked for without a `schema`"
            raise InvalidRequestError(message, name="schema")
        return self._request.schema.growing()

    def _take(self, event: Event) -> None:
        self._items.extend(self._answer.take(event))

    def _abandon(self) -> None:
        if self._is_sent and not self._answer.is_over:
            self._courier.abandon(self._request.id)
            self._answer.give_up()

    def __del__(self) -> None:
        try:
            self._abandon()
        except Exception:  # at exit anything may be gone already
            return


class _SyncStream(_Stream[Item, Result]):
    """For threads."""

    def __init__(self, courier: Courier, request: Request, source: Source, owner: object) -> None:
        super().__init__(courier, request, source, owner)
        self._inbox = Inbox()

    def submit(self) -> Self:
        """Done by `Model.stream`."""
        try:
            self._is_sent = True  # already now: Ctrl-C may strike on the way back
            self._courier.send(self._request, self._inbox, self._answer.is_watched)
        except Exception:
            self._is_sent = False
            self._answer.give_up()
            raise
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while True:
            with suppress(IndexError):  # another thread may be quicker
                return self._items.popleft()
            if self._answer.is_over:
                self._answer.check()
                raise StopIteration
            self._courier.check_thread()
            try:
                self._courier.check_owner()
                event = self._receive()
                if event is not None:
                    self._take(event)
            except BaseException:  # Ctrl-C, mostly
                self.close()
                raise

    def collect(self, on_token: Callable[[Item], Any] | None = None) -> Result:
        """Read to the end. `on_token` gets each piece; if it returns False, that is the end."""
        self._answer.is_watched = on_token is not None
        with self:
            if not self._is_sent:
                self.submit()
            for piece in self:
                if on_token is not None and on_token(piece) is False:
                    break
        return self.result

    def close(self) -> None:
        """End the request if it has not ended, and wait until its place is free."""
        if self._answer.is_over:
            return
        self._courier.check_thread()
        self.cancel()
        while self._is_sent and not (self._answer.is_over or self._courier.is_foreign):
            is_carried = self._courier.carries(self._request.id)
            event = self._receive(within=0.1)
            if event is not None:
                self._answer.take(event)
            elif not is_carried:
                return  # Ctrl-C struck between taking the last event and keeping it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _receive(self, within: float | None = None) -> Event | None:
        event = self._inbox.get(within)
        if event is not None and event.is_last:
            self._inbox.put(event)  # for another thread that waits here, too
        return event


class _AsyncStream(_Stream[Item, Result]):
    """For event loops.

    Cancelling the task that waits for a piece ends the request; its place is free when
    CancelledError comes out.
    """

    def __init__(self, courier: Courier, request: Request, source: Source, owner: object) -> None:
        super().__init__(courier, request, source, owner)
        self._inbox: LoopInbox | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        import asyncio

        inbox = self._inbox or await self._start()
        while True:
            if self._items:
                return self._items.popleft()
            if self._is_over:
                self._answer.check()
                raise StopAsyncIteration
            try:
                self._take(await self._receive(inbox))
            except asyncio.CancelledError:
                await self.aclose()
                raise
            except BaseException:  # the coroutine is thrown away: no more waiting
                self._abandon()
                raise

    async def collect(self, on_token: Callable[[Item], Any] | None = None) -> Result:
        """Read to the end. `on_token`, which may be `async`, can end it by returning False."""
        self._answer.is_watched = on_token is not None
        async with self:
            async for piece in self:
                wish: Any = None if on_token is None else on_token(piece)
                if hasattr(wish, "__await__"):
                    wish = await wish
                if wish is False:
                    break
        return self.result

    async def aclose(self) -> None:
        """End the request if it has not ended, and wait until its place is free."""
        import asyncio

        self.cancel()
        cancelled: BaseException | None = None
        while self._inbox is not None and not (self._is_over or self._courier.is_foreign):
            try:
                self._answer.take(await self._receive(self._inbox))
            except asyncio.CancelledError as error:  # the end is near; then it may have its way
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def _is_over(self) -> bool:
        never_began = self._answer.is_cancelled and not self._is_sent
        return self._answer.is_over or never_began

    async def _start(self) -> LoopInbox:
        import asyncio

        if self._inbox is not None:
            return self._inbox
        loop = asyncio.get_running_loop()
        inbox = self._inbox = LoopInbox(loop)
        if self._answer.is_cancelled:
            return inbox
        try:
            if (reply := self._post(inbox)) is not None:
                await settle(reply)
            elif self._request.size > LONG_TEXT:
                job = self._courier.in_thread(self._send)
                await settle(asyncio.wrap_future(job), job.cancel)
            else:
                self._send()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except BaseException:
            self._inbox = None
            raise
        if self._answer.is_cancelled:  # while a thread was submitting it
            await self.aclose()
        return inbox

    def _send(self) -> None:
        assert self._inbox is not None
        if self._answer.is_cancelled:  # while it waited for a thread
            self._answer.give_up()
            return
        try:
            self._courier.send(self._request, self._inbox, self._answer.is_watched)
        except BaseException:
            self._answer.give_up()
            raise
        self._is_sent = True

    def _post(self, inbox: LoopInbox) -> Future[None] | None:
        try:
            return self._courier.post(self._request, inbox, self._note_sent)
        except BaseException:
            self._answer.give_up()
            raise

    def _note_sent(self, is_sent: bool) -> None:
        self._is_sent = is_sent
        if not is_sent:
            self._answer.give_up()

    async def _receive(self, inbox: LoopInbox) -> Event:
        self._courier.check_owner()
        event = await inbox.get()
        if event.is_last:
            inbox.put(event)  # for another task that waits here, too
        return event


class TextStream(_SyncStream[str, Completion]):
    """An answer, piece by piece. `Model.stream` submits the request at once."""


class ChatStream(_SyncStream[ChatDelta, ChatCompletion]):
    """An answer in a conversation, piece by piece: content, reasoning, and pieces of tool calls.

    All pieces together are what `result` holds. `Model.stream_chat` submits the request at once.
    """

    def partial(self) -> Iterator[Any]:
        """The object that `schema` asked for, while it is being written. Fields that are not there
        yet have their default, or are None. The last one is the whole object, if it became one."""
        growing, last = self._growing(), None
        with self:
            for delta in self:
                shown = growing.feed(delta.content)
                if shown is not None and shown != last:
                    yield (last := shown)
        if (whole := self.result.parsed) is not None and whole != last:
            yield whole


class AsyncTextStream(_AsyncStream[str, Completion]):
    """As TextStream. The request is submitted when the first piece is awaited."""


class AsyncChatStream(_AsyncStream[ChatDelta, ChatCompletion]):
    """As ChatStream. The request is submitted when the first piece is awaited."""

    async def partial(self) -> AsyncIterator[Any]:
        """As `ChatStream.partial`."""
        growing, last = self._growing(), None
        async with self:
            async for delta in self:
                shown = growing.feed(delta.content)
                if shown is not None and shown != last:
                    yield (last := shown)
        if (whole := self.result.parsed) is not None and whole != last:
            yield whole


class Answer:
    """What has come of one request so far."""

    def __init__(self, request: Request, source: Source) -> None:
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.is_over = False
        self.is_cancelled = False
        """By us: then its end is no error."""
        self.is_watched = True
        """Somebody reads it while it comes."""
        self._request = request
        self._source = source
        self._completion: Completion | None = None
        self._error: BaseException | None = None

    def take(self, event: Event) -> Sequence[Any]:
        """Add an event, and give what is to be read of it."""
        if self.is_over:
            return ()
        if event.text:
            self.pieces.append(event.text)
        self.tokens.extend(event.tokens)
        if found := event.logprobs:
            self._logprobs += logprobs_of(found)
        if event.is_last:
            self._finish(event)
        return (event.text,) if event.text else ()

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        is_asked_for = self._request.params.get("logprobs") is not None
        return tuple(self._logprobs) if is_asked_for else None

    def check(self) -> None:
        """Raise what the request died of, if it did."""
        if self._error is not None:
            raise self._error

    @property
    def result(self) -> Completion:
        self.check()
        if self._completion is None:
            hint = "read the stream to its end, or leave its `with` block"
            raise TabAgentModelError("the answer is not complete yet", hint=hint)
        return self._completion

    def give_up(self) -> None:
        """Nobody will read it: it was not submitted, or is left to itself."""
        if self._request.on_end is not None:
            self._request.on_end(None)

    def _finish(self, event: Event) -> None:
        if event.finish_reason == "error":
            self._error = event.error or InternalError("the request failed without a reason")
        elif event.finish_reason == "cancelled" and not self.is_cancelled:
            self._error = GenerationCancelled("the request was cancelled by somebody else")
        else:
            self._completion = self._complete(event)
        if self._request.on_end is not None:
            self._completion = self._request.on_end(self._completion)
        self.is_over = True

    def _complete(self, event: Event) -> Completion:
        stats = event.stats or {}
        metrics = metrics_of(self._request.id, stats, self._source)
        return Completion(
            text="".join(self.pieces),
            tokens=tuple(self.tokens),
            finish_reason=cast("FinishReason", event.finish_reason),
            usage=Usage(
                prompt_tokens=metrics.prompt_tokens,
                completion_tokens=metrics.generated_tokens,
                total_tokens=metrics.prompt_tokens + metrics.generated_tokens,
                cached_tokens=metrics.cached_tokens,
                dropped_tokens=int(stats.get("dropped_tokens", 0)),
                n_ctx=int(stats.get("n_ctx", 0)),
            ),
            metrics=metrics,
            model=self._source.model,
            seed=int(stats.get("seed", -1)),
            stop=event.stop,
            logprobs=self.logprobs,
        )


class ChatAnswer(Answer):
    """One that is read as its chat template means it."""

    _message: Mapping[str, Any] | None = None
    """All that was read, with the last event."""

    def __init__(self, request: Request, source: Source) -> None:
        super().__init__(request, source)
        self._reached = [(0, 0)]
        """How many characters, and tokens, there were after each event."""

    def take(self, event: Event) -> Sequence[ChatDelta]:
        if self.is_over:  # as the base says; the last event is there for everybody who reads
            return ()
        found, self._message = event.read or (None, None)
        super().take(event)
        self._reached.append((self._reached[-1][0] + len(event.text), len(self.tokens)))
        if found is not None:
            return [*map(ChatDelta.read, found)]
        return (ChatDelta(event.text),) if event.text else ()

    def _finish(self, event: Event) -> None:
        super()._finish(event)
        if isinstance(answer := self._completion, ChatCompletion) and answer.parse_error:
            import logging

            log = logging.getLogger("tabagent_model")
            # Why, is in the answer: it may quote what was said, which is nobody's in a log.
            log.warning("request %d: its answer could not be read", self._request.id)

    def _complete(self, event: Event) -> ChatCompletion:
        raw, message = super()._complete(event), self._message
        if message is None:
            message = {"content": raw.text, "reasoning": "", "tool_calls": [], "error": None}
        if message["reasoning"]:
            thoughts = self._num_tokens_of(message["reasoning"], raw.text)
            raw = replace(raw, usage=replace(raw.usage, reasoning_tokens=thoughts))
        calls = raw.finish_reason == "stop" and message["tool_calls"]
        return ChatCompletion.read(raw, message, "tool_calls" if calls else raw.finish_reason)

    def _num_tokens_of(self, part: str, text: str) -> int:
        """Of a part of the text; by its length where it was put together from several."""
        if (begin := text.find(part)) < 0:
            return round(len(self.tokens) * min(len(part) / max(len(text), 1), 1))
        return self._num_tokens_until(begin + len(part)) - self._num_tokens_until(begin)

    def _num_tokens_until(self, position: int) -> int:
        at = bisect_left(self._reached, (position, 0))
        return self._reached[at][1] if at < len(self._reached) else len(self.tokens)


async def settle(future: Future[T], on_cancel: Callable[[], object] = lambda: None) -> T:
    """Wait for the end of what cannot be stopped; a cancellation is delivered after it."""
    import asyncio

    cancelled: BaseException | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        future.exception()  # looked at, so that asyncio does not complain about it
        raise cancelled
    return future.result()


async def in_executor(function: Callable[[], T]) -> T:
    """In a thread; it is waited for also by who is cancelled meanwhile."""
    import asyncio

    return await settle(asyncio.get_running_loop().run_in_executor(None, function))
