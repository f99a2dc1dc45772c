"""Carries the events of a context to whoever waits for them.

    Rust: one list of events per step ──▶ Courier (one thread) ──┬──▶ Inbox      of a thread
                                                                 └──▶ LoopInbox  of an event loop

A request is registered before it is submitted, so no event can be early; its inbox is forgotten
with the event that is the last. However it ends, every inbox gets a last event.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakSet

from .errors import (
    ForkedProcessError,
    InternalError,
    InvalidRequestError,
    ModelNotLoadedError,
    OutOfMemoryError,
    TabAgentModelError,
)

if TYPE_CHECKING:
    import asyncio
    from asyncio import AbstractEventLoop
    from concurrent.futures import Future, ThreadPoolExecutor

    from ._core import Wire
    from .results import Completion, Logprobs
    from .schema import Schema

    OnEnd = Callable[["Completion | None"], "Completion | None"]


class Event(Protocol):
    """What `_core.Event` and `testing.ScriptedEvent` have in common."""

    @property
    def request_id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def is_last(self) -> bool: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop(self) -> str | None: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def stats(self) -> Mapping[str, float] | None: ...
    @property
    def logprobs(self) -> Logprobs: ...
    @property
    def read(self) -> Reading | None: ...


class Context(Protocol):
    """What `_core.PyContext` and `testing.ScriptedContext` have in common, as far as we use it."""

    @property
    def is_closed(self) -> bool: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def flash_attn(self) -> str: ...
    @property
    def kv_type(self) -> str: ...
    def submit(
        self,
        request_id: int,
        prompt: Any,
        params: Mapping[str, Any],
        chat: Any = None,
        patience: int = 50,
    ) -> None: ...
    def abort(self, request_id: int) -> None: ...
    def next_events(self) -> Sequence[Event]: ...
    def tell_through(self, wire: Wire) -> None: ...
    def check_thread(self) -> None: ...
    def close(self) -> None: ...
    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str: ...
    def metrics(self) -> dict[str, Any]: ...
    def slots(self) -> list[dict[str, int | None]]: ...
    def unpin(self, request_id: int) -> None: ...
    def export_state(self, tokens: Sequence[int]) -> bytes | None: ...
    def import_state(self, data: bytes, tokens: Sequence[int]) -> int: ...


class FarContext(Context, Protocol):
    """One in another process."""

    def post(
        self,
        request_id: int,
        prompt: Any,
        params: Mapping[str, Any],
        reply: Callable[[Exception | None], object],
    ) -> bool: ...


class ChatParser(Protocol):
    """What `_core.ChatParser` and `testing.ScriptedParser` have in common."""

    def feed(self, text: str) -> Sequence[Any]: ...
    def finish(self, is_complete: bool = True) -> tuple[Sequence[Any], Mapping[str, Any]]: ...


class ChatPrompt(Protocol):
    """What `_core.ChatPrompt` and the prompt of a script have in common."""

    @property
    def text(self) -> str: ...
    @property
    def stops(self) -> Sequence[str]: ...
    @property
    def preserved_tokens(self) -> Sequence[int]: ...
    @property
    def constraint(self) -> dict[str, Any] | None: ...
    @property
    def thinking(self) -> tuple[str, str] | None: ...
    @property
    def is_thinking(self) -> bool: ...
    @property
    def is_plain(self) -> bool: ...
    def parser(self, patience: int = 50) -> ChatParser: ...
    def tokens(self, after: str | None = None, limit: int | None = None) -> list[int] | None: ...


Reading = tuple[Sequence[Any], Mapping[str, Any] | None]
"""What is new of a chat's answer, and with the last event all of it."""

request_ids = count(1)

# Tokenizing a longer text, or writing it to another process, would hold up an event loop.
LONG_TEXT = 8192

# An answer is read for a fiftieth of the time at most; one that nobody watches, at its end.
_PATIENCE, _NOT_BEFORE_THE_END = 50, 2**32 - 1


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered. A prompt that takes work is made on the way in."""

    id: int
    prompt: str | list[int] | Callable[[], list[int]]
    params: Mapping[str, Any]
    on_end: OnEnd | None = None
    """Hears of the end once: gets the answer and may change it, or None if there is none."""
    chat: Callable[[], ChatPrompt] | None = None
    """What a chat was written out as, when its prompt was made."""
    schema: Schema | None = None
    """What a chat's answer has to be."""
    is_far: bool = False
    """It is asked of another process."""

    @property
    def size(self) -> float:
        """How much there is to tokenize; without end where nobody should wait for the way in."""
        return math.inf if self.is_far or callable(self.prompt) else len(self.prompt)

    @property
    def is_light(self) -> bool:
        """Whether an event loop can write it to another process itself."""
        if not self.is_far or callable(self.prompt) or len(self.prompt) > LONG_TEXT:
            return False
        values = self.params.values()
        return not any(
            isinstance(value, Mapping)
            or (isinstance(value, (str, list, tuple)) and len(value) > LONG_TEXT)
            for value in values
        )


class Courier(threading.Thread):
    """The thread that sleeps in `next_events`, and the door through which requests go in.

    For all that has come it wakes each event loop once, however many streams that loop has.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(name="tabagent-courier", daemon=True)
        self._context = context
        if any(other.is_alive() and other._context is context for other in list(_couriers)):
            raise InvalidRequestError("this context belongs to another model", name="context")
        self._inboxes: dict[int, Inbox | LoopInbox] = {}
        self._lock = threading.Lock()
        self._end: TabAgentModelError | None = None
        self._threads: ThreadPoolExecutor | None = None
        self.was_used = False
        self.on_turn: Callable[[], object] = lambda: None
        """Called in any thread when the first request comes, and when the last one is gone."""
        begin(self)
        _couriers.add(self)

    def send(self, request: Request, inbox: Inbox | LoopInbox, is_watched: bool = True) -> None:
        """Submit a request. What is wrong with it is raised here, and then no event will come."""
        try:
            prompt = request.prompt() if callable(request.prompt) else request.prompt
            self._expect(request.id, inbox)
            chat = None if request.chat is None else request.chat()
            if chat is None or chat.is_plain:
                self._context.submit(request.id, prompt, request.params)
            else:
                patience = _PATIENCE if is_watched else _NOT_BEFORE_THE_END
                self._context.submit(request.id, prompt, request.params, chat, patience)
        except Exception:
            self._forget(request.id)
            raise
        except BaseException:  # Ctrl-C: nobody knows whether it had been submitted by then
            self.abandon(request.id)
            raise

    def post(
        self, request: Request, inbox: LoopInbox, note: Callable[[bool], None]
    ) -> asyncio.Future[None] | None:
        """Submit a request to another process from an event loop, which waits for nothing: the
        future hears what `send` would say, after `note` has heard whether the request was taken.
        None: it takes a thread."""
        if not request.is_light:
            return None
        reply = inbox.loop.create_future()

        def settle(error: Exception | None) -> None:
            note(error is None)
            if error is None:
                reply.set_result(None)
            else:
                reply.set_exception(error)

        def hear(error: Exception | None) -> None:
            if error is not None:
                self._forget(request.id)
            with suppress(RuntimeError):  # the loop was closed, and nobody waits
                inbox.loop.call_soon_threadsafe(settle, error)

        self._expect(request.id, inbox)
        try:
            far = cast("FarContext", self._context)
            is_sent = far.post(request.id, request.prompt, request.params, hear)
        except Exception:
            self._forget(request.id)
            raise
        except BaseException:  # as in `send`
            self.abandon(request.id)
            raise
        if not is_sent:
            self._forget(request.id)
        return reply if is_sent else None

    def in_thread(self, function: Callable[[], None]) -> Future[None]:
        """For what an event loop must not wait for, nor the thread that hears: to submit and to
        abort may take as long as a worker hangs. The loops' own threads are for others."""
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            self.check()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(8, "tabagent-submit")
            try:
                return self._threads.submit(function)
            except RuntimeError:
                raise _no_thread("tabagent-submit") from None

    def abort(self, request_id: int) -> None:
        """Ask for the end of a request; its last event still comes."""
        if self._end is None:
            with suppress(TabAgentModelError):  # closed in the meantime: it ends anyway
                self._context.abort(request_id)

    def abandon(self, request_id: int) -> None:
        """End a request whose reader is gone."""
        self._forget(request_id)
        self.abort(request_id)

    def close(self) -> None:
        """End every request and close the context. A second call does nothing."""
        if self.is_foreign:
            return
        self._context.close()
        if threading.current_thread() is not self:
            self.join(timeout=1.0)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._inboxes

    def carries(self, request_id: int) -> bool:
        """Whether the last event of a request is still to come."""
        return request_id in self._inboxes

    def check(self) -> None:
        """Raise what keeps requests from being carried, if anything does."""
        if _is_exiting and threading.current_thread().daemon:
            raise SystemExit
        if self._end is not None:
            raise copy(self._end)  # one that is raised again and again would grow its traceback

    def check_owner(self) -> None:
        """Raise if this process is a fork of the one that loaded the model."""
        if self.is_foreign:
            self.check()

    def check_thread(self) -> None:
        """Raise in a logits hook, for which the model waits: no event can come meanwhile."""
        self._context.check_thread()

    @property
    def is_foreign(self) -> bool:
        return isinstance(self._end, ForkedProcessError)

    def disown(self) -> None:
        """In a forked child: neither the thread nor the context came along."""
        self._lock = threading.Lock()
        self._inboxes, self._threads = {}, None
        self._end = ForkedProcessError(
            "the model belongs to the parent of this forked process",
            hint="load the model in the child, or start the child with the `spawn` method",
        )

    def run(self) -> None:
        end: TabAgentModelError
        try:
            while events := self._context.next_events():
                self._carry(events)
            end = ModelNotLoadedError("the model was unloaded", hint="load it again")
        except TabAgentModelError as error:
            end = error
        except Exception as error:
            end = InternalError(f"no more events can be carried: {error!r}")
        with self._lock:
            self._end = end
            orphans, threads = list(self._inboxes), self._threads
        if threads is not None:
            threads.shutdown(wait=False)
        self._carry([_Goodbye(request_id, copy(end)) for request_id in orphans])

    def _expect(self, request_id: int, inbox: Inbox | LoopInbox) -> None:
        with self._lock:  # against a goodbye that would miss this inbox
            self.check()
            was_idle, self.was_used = self.is_idle, True
            self._inboxes[request_id] = inbox
        if was_idle:
            self.on_turn()

    def _carry(self, events: Sequence[Event]) -> None:
        by_loop: dict[AbstractEventLoop, list[tuple[LoopInbox, Event]]] = {}
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if isinstance(inbox, Inbox):
                if _is_exiting and inbox.is_of_daemon:
                    event = _Goodbye(event.request_id, SystemExit())
                inbox.put(event)
            elif inbox is not None:
                by_loop.setdefault(inbox.loop, []).append((inbox, event))
            if event.is_last:  # forgotten only now: what is not carried any more has arrived
                self._forget(event.request_id)
        if _is_exiting:
            return
        for loop, letters in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:  # the loop was closed, and with it went every reader
                for _, event in letters:
                    self._forget(event.request_id)
                    with suppress(TabAgentModelError, RuntimeError):  # it ends in any case
                        self.in_thread(partial(self.abort, event.request_id))

    def _forget(self, request_id: int) -> None:
        if self._inboxes.pop(request_id, None) is not None and self.is_idle:
            self.on_turn()


class Inbox:
    """Where the events of a reader lie that is a thread."""

    def __init__(self) -> None:
        self.is_of_daemon = threading.current_thread().daemon
        self._letters: SimpleQueue[Event] = SimpleQueue()

    def put(self, event: Event) -> None:
        self._letters.put(event)

    def get(self, within: float | None = None) -> Event | None:
        """Wait for the next event, or as many seconds. Ctrl-C interrupts the wait."""
        try:
            return self._letters.get(timeout=_PATIENCE_S if within is None else within)
        except Empty:
            return None


class LoopInbox:
    """Where the events of readers lie that are tasks of an event loop."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._letters: deque[Event] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    def put(self, event: Event) -> None:
        """Only in the thread of the loop."""
        self._letters.append(event)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def get(self) -> Event:
        while not self._letters:
            waiter = self.loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)
        return self._letters.popleft()


def begin(thread: threading.Thread) -> None:
    """Start a thread, if the system gives one."""
    try:
        thread.start()
    except RuntimeError:
        raise _no_thread(thread.name) from None


def _no_thread(name: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"the system refuses a thread (`{name}`)",
        hint="close what is not needed, or raise the limit that `ulimit -a` shows",
    )


def close_all() -> None:
    """At exit: no thread of ours may be in Rust when Python takes itself apart.

    Threads and loops that still wait for an answer are daemons then, and nobody wants to hear
    their complaints: such a thread ends as by `sys.exit`, and such a loop just hears no more.
    """
    global _is_exiting
    _is_exiting = True
    for courier in list(_couriers):
        with suppress(Exception):
            courier.close()


def disown_all() -> None:
    """In a forked child: what was loaded belongs to the parent."""
    for courier in list(_couriers):
        courier.disown()


@dataclass(frozen=True)
class _Goodbye:
    """The last event of a request that the context can no longer answer."""

    request_id: int
    error: BaseException
    text: str = ""
    tokens: Sequence[int] = ()
    is_last: bool = True
    finish_reason: str = "error"
    stop: str | None = None
    stats: Mapping[str, float] | None = None
    logprobs: Logprobs = ()
    read: Reading | None = None


_couriers: WeakSet[Courier] = WeakSet()
_is_exiting = False

# On Windows a lock does not hear Ctrl-C while one waits for it, so there `get` comes back at times.
_PATIENCE_S = 0.1 if sys.platform == "win32" else None


def _deliver(letters: list[tuple[LoopInbox, Event]]) -> None:
    for inbox, event in letters:
        inbox.put(event)
