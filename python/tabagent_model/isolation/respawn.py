"""Keeps a worker alive for one model, over the deaths of several.

When one dies, everybody who was under way gets one `WorkerCrashedError`, another is started by a
thread of its own, and what is asked meanwhile is held until it has loaded.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

from .._courier import begin
from ..errors import (
    ForkedProcessError,
    GenerationTimeoutError,
    InvalidRequestError,
    LoadCancelledError,
    ModelNotLoadedError,
    OutOfMemoryError,
    QueueFullError,
    QueueTimeoutError,
    TabAgentModelError,
    WorkerCrashedError,
)
from .child import Child, RemotePrompt, calling
from .frames import Message, RemoteEvent, pack
from .spawn import disown

if TYPE_CHECKING:
    from ..params import ModelConfig
    from .verdicts import Verdict

log = logging.getLogger("tabagent_model")

TICK_S = 1.0
# Before the second start within a minute; the first is at once, and the third crash is the last.
BACKOFF_S = 1.0
# Until a pin is tried again for which the new worker had no place.
RENEW_AGAIN_S = 0.1

Reply = Callable[[Exception | None], object]

_LIMITS = ("timeout_s", "max_queue_wait_s", "deadline")


class Keeper:
    """Keeps a worker for one model: hears it, answers for it when it dies, starts the next.

    up ──dies──▶ starting ──loaded──▶ up
                    └──fails──▶ down: that is told, and the next request tries again
    the third death within a minute ──▶ quarantine: no other is started, or not for a minute
    """

    def __init__(
        self,
        config: ModelConfig,
        verdict: Verdict,
        child: Child,
        described: dict[str, Message | None],
    ) -> None:
        self.config = config
        self.num_restarts = 0
        self.last_child = child
        self._verdict = verdict
        self._described = described
        self._child: Child | None = child
        self._requests: dict[int, _Request] = {}
        self._pins: dict[int, _Request] = {}
        """What the next worker computes again, to keep it as this one does."""
        self._renewing: set[int] = set()
        self._news: list[RemoteEvent] = []
        self._is_starting = self._is_closed = False
        self._refusal: TabAgentModelError | None = None
        self._not_before = 0.0
        self._changed = threading.Condition()
        self.rss_at_close_mb: float | None = None
        self._process = os.getpid()
        _keepers.add(self)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def is_up(self) -> bool:
        return self._living is not None

    def described(self, what: Literal["model", "context"]) -> Message:
        return self._described[what] or {"facts": {}, "methods": []}

    def num_held(self) -> int:
        return sum(request.is_held for request in list(self._requests.values()))

    def submit(
        self,
        request_id: int,
        prompt: Any,
        params: Mapping[str, Any],
        chat: RemotePrompt | None,
        patience: int,
    ) -> None:
        replies: SimpleQueue[Exception | None] = SimpleQueue()
        self._begin(request_id, _Request(prompt, params, replies.put, chat, patience))
        if (refused := replies.get()) is not None:
            raise self._told(refused)

    def post(self, request_id: int, prompt: Any, params: Mapping[str, Any], reply: Reply) -> bool:
        """As `submit`, for an event loop: `reply` hears later, in another thread, what was wrong.
        False: it would have to wait, and a thread has to do it."""

        def tell(error: Exception | None) -> None:
            reply(None if error is None else self._told(error))

        return self._begin(request_id, _Request(prompt, params, tell), waits=False)

    def abort(self, request_id: int) -> None:
        with self._open():
            request = self._requests.get(request_id)
            if request is None:
                return
            request.is_aborted = True
            if request.is_held:
                cancelled = RemoteEvent(request_id, is_last=True, finish_reason="cancelled")
                self._end(request_id, cancelled)
                return
            child = self._child
        message = {"action": "abort", "request": request_id}
        if child is None or child.tell(message, waits=False):
            return
        if runs_an_event_loop():
            tell = partial(child.tell, message)
            begin(threading.Thread(target=tell, name="tabagent-abort", daemon=True))
        else:
            child.tell(message)

    def unpin(self, request_id: int) -> None:
        """What was pinned is kept no longer. Where no worker lives it is gone already."""
        with self._changed:
            self._pins.pop(request_id, None)
            child = self._living
            if child is None or request_id in self._renewing:
                return
        with suppress(WorkerCrashedError):
            child.call("context", "unpin", [request_id])

    def call(
        self,
        on: str,
        method: str,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
        within: float | None = None,
        keep: Callable[[Any], object] = lambda value: None,
    ) -> Any:
        """Of the worker; if there is none, of the next, unless the answer must come soon."""
        with self._open():
            while (child := self._living) is None:
                if within is not None:
                    raise Empty
                if not self._child:
                    self._start_another()
                    self._check()
                self._changed.wait()
                self._check()
        try:
            return child.call(on, method, arguments, keywords, within, keep)
        except WorkerCrashedError as error:
            raise self._told(error) from None

    def next_events(self) -> list[RemoteEvent]:
        """Sleep until something has happened. An empty list means that it is closed."""
        while True:
            with self._changed:
                events, self._news = self._news, []
                child = self._child
                if not events and child is None:
                    if self._is_closed:
                        return []
                    self._changed.wait(TICK_S / 10 if self._requests else None)
                    self._end_overdue()
            if not events and child is not None:
                try:
                    events = child.hear(min(TICK_S, self.config.watchdog_s / 4), self._requests)
                except WorkerCrashedError as crash:
                    events = self._bury(crash)
            if self._renewing:
                events = [event for event in events if not self._is_of_renewal(event)]
            if events:
                for event in events:
                    if event.is_last:
                        self._note_end(event)
                return events

    def hear(self) -> None:
        """For a model without a context, which has no courier."""
        while self.next_events():
            pass

    def close(self) -> None:
        """Everything ends, and the memory is free when the worker is gone. Again: nothing."""
        if os.getpid() != self._process:
            return
        with self._changed:
            if not self._is_closed:
                self.rss_at_close_mb = self.last_child.rss_mb()
            self._is_closed = True
            child = self._child
            self._changed.notify_all()
        if child is not None:
            child.kill()

    def disown(self) -> None:
        """In a forked child: the worker belongs to the parent."""
        self._changed = threading.Condition()
        if (child := self._child) is not None:
            child.disown()

    def _begin(self, request_id: int, request: _Request, waits: bool = True) -> bool:
        if request.params.get("logits_hook") is not None:
            message = "`logits_hook` is a function, and cannot travel to the worker process"
            raise InvalidRequestError(
                message, hint="load the model with `isolation='none'`", name="logits_hook"
            )
        with self._open():
            child = self._living
            if child is None:
                self._hold(request_id, request)
                request.reply(None)
                return True
            self._requests[request_id] = request
        try:
            is_sent = self._send(child, request_id, request, waits)
        except Exception as error:  # after Ctrl-C it may have been sent, and is to be aborted
            self._requests.pop(request_id, None)
            raise self._told(error) from None
        if not is_sent:
            self._requests.pop(request_id, None)
        return is_sent

    @property
    def _living(self) -> Child | None:
        """A worker that is not just about to be buried."""
        return None if self._child is None or self._child.is_over else self._child

    def _open(self) -> threading.Condition:
        """The lock, if anything may be asked at all."""
        if os.getpid() != self._process:
            raise ForkedProcessError(
                "the model belongs to the parent of this forked process",
                hint="load the model in the child, or start the child with the `spawn` method",
            )
        self._check()
        return self._changed

    def _check(self) -> None:
        if self._is_closed:
            raise ModelNotLoadedError("the model was unloaded", hint="load it again")
        if self._refusal is not None and not self._may_start:
            raise copy(self._refusal)

    def _told(self, error: Exception) -> Exception:
        """Who asked while the model was unloaded hears that, not that the worker was killed."""
        if self._is_closed and isinstance(error, WorkerCrashedError):
            return ModelNotLoadedError("the model was unloaded", hint="load it again")
        return error

    @property
    def _may_start(self) -> bool:
        """After a start that failed, not at once again."""
        return self._is_starting or time.monotonic() > self._not_before

    def _send(self, child: Child, request_id: int, request: _Request, waits: bool = True) -> bool:
        data: list[bytes] = []
        question = {
            "action": "submit",
            "request": request_id,
            "prompt": request.prompt,
            "params": pack(request.left() if request.is_in else request.params, data),
        }
        if request.chat is not None:
            question |= {"chat": request.chat.told_to(child), "patience": request.patience}

        def answer(_: Any, error: Exception | None) -> None:
            self._answered(request_id, request, error)

        return child.ask(question, answer, data, waits)

    def _answered(self, request_id: int, request: _Request, error: Exception | None) -> None:
        with self._changed:
            if request.is_in:
                if error is not None:
                    self._end(request_id, _failed(request_id, error))
                return
            request.is_in = error is None
            if error is not None and self._requests.get(request_id) is request:
                del self._requests[request_id]
        request.reply(error)

    def _hold(self, request_id: int, request: _Request) -> None:
        if self.num_held() >= self.config.queue_size:
            raise QueueFullError(f"{self.num_held()} requests are waiting for a worker already")
        request.is_held = request.is_in = True
        self._requests[request_id] = request
        if self._child is None:
            self._start_another()
        self._changed.notify_all()

    def _end(self, request_id: int, event: RemoteEvent) -> None:
        """Of a request that no worker knows."""
        if self._requests.pop(request_id, None) is not None:
            self._news.append(event)
            self._changed.notify_all()

    def _note_end(self, event: RemoteEvent) -> None:
        request = self._requests.pop(event.request_id, None)
        if request is not None and request.params.get("pin") and not event.error:
            self._pins[event.request_id] = request

    def _end_overdue(self) -> None:
        for request_id, request in list(self._requests.items()):
            if request.is_held and (error := request.overdue()):
                self._end(request_id, _failed(request_id, error))

    def _bury(self, crash: WorkerCrashedError) -> list[RemoteEvent]:
        """The worker is dead. Its requests end; whoever still submits hears by the answer."""
        with self._changed:
            self._child = None
            self._changed.notify_all()
            if self._is_closed:
                return []  # the courier says goodbye
            self._renewing.clear()
            gone = {i: r for i, r in self._requests.items() if not r.is_held}
            for request_id in gone:
                del self._requests[request_id]
            self._go_on_after(crash)
        return [_failed(request_id, copy(crash)) for request_id, r in gone.items() if r.is_in]

    def _go_on_after(self, crash: WorkerCrashedError) -> None:
        """Start another worker, unless it was once too often."""
        refusal = self._verdict.note_crash(crash)
        if refusal is None:
            log.warning("%s; starting another", crash.message)
            self._start_another()
            return
        log.error("%s", refusal.message)
        self._give_up(refusal, math.inf if refusal.retry_after_s is None else refusal.retry_after_s)

    def _start_another(self) -> None:
        if self._is_starting:
            return
        self._is_starting = True
        try:
            begin(threading.Thread(target=self._restart, name="tabagent-restart", daemon=True))
        except OutOfMemoryError as error:
            self._is_starting = False
            self._give_up(error)

    def _restart(self) -> None:
        pause = BACKOFF_S * max(self._verdict.num_crashes - 1, 0)
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, pause)
        try:
            if self._is_closed:
                raise LoadCancelledError("the model was unloaded")
            child, described = start(
                self.config, lambda fraction: None, lambda: not self._is_closed
            )
        except Exception as error:
            self._note_failed_start(error)
            return
        with self._changed:
            self._is_starting, self._refusal = False, None
            self._child = self.last_child = child
            self._described = described
            self.num_restarts += 1
            held = [(i, r) for i, r in self._requests.items() if r.is_held]
            for _, request in held:
                request.is_held = False
            self._changed.notify_all()
        if self._is_closed:
            child.kill()
        for request_id, request in held:
            with suppress(TabAgentModelError):  # it died; who hears it tells everybody
                self._send(child, request_id, request)
                if request.is_aborted:
                    child.tell({"action": "abort", "request": request_id})
        with suppress(TabAgentModelError):
            self._renew_pins(child)

    def _renew_pins(self, child: Child) -> None:
        """After those who wait, who may well compute the same for themselves."""
        for request_id in list(self._pins):
            while isinstance(error := self._renew(child, request_id), QueueFullError):
                time.sleep(RENEW_AGAIN_S)
            if isinstance(error, WorkerCrashedError):
                return  # the next one does it
            if error is not None:
                self._note_lost_pin(request_id, error)

    def _renew(self, child: Child, request_id: int) -> Exception | None:
        """Submit a pin again; what was wrong with that."""
        with self._changed:
            pin = self._pins.get(request_id)
            if pin is None:  # released meanwhile
                self._renewing.discard(request_id)
                return None
            self._renewing.add(request_id)
        replies: SimpleQueue[Exception | None] = SimpleQueue()
        self._send(child, request_id, _Request(pin.prompt, pin.without_limits(), replies.put))
        return replies.get()

    def _is_of_renewal(self, event: RemoteEvent) -> bool:
        """Nobody waits for it: whoever pinned that had his answer long ago."""
        with self._changed:
            if event.request_id not in self._renewing:
                return False
            if event.is_last:
                self._renewing.discard(event.request_id)
                is_kept = event.request_id in self._pins
                child = self._living
        if event.is_last and event.error is not None:
            self._note_lost_pin(event.request_id, event.error)
        elif event.is_last and not is_kept and child is not None:  # released meanwhile
            question, data = calling("context", "unpin", [event.request_id], {})
            # Not in this thread: who hears must not wait for a worker that waits to be heard.
            ask = partial(child.ask, question, lambda value, error: None, data)
            with suppress(TabAgentModelError):
                begin(threading.Thread(target=ask, name="tabagent-unpin", daemon=True))
        return True

    def _note_lost_pin(self, request_id: int, error: BaseException) -> None:
        with self._changed:
            self._renewing.discard(request_id)
            self._pins.pop(request_id, None)
        log.warning("what was pinned is kept no longer in the new worker: %s", error)

    def _note_failed_start(self, error: Exception) -> None:
        if not isinstance(error, TabAgentModelError):
            error = ModelNotLoadedError(f"no worker could be started: {error!r}")
        with self._changed:
            self._is_starting = False
            if self._is_closed:
                self._changed.notify_all()  # the courier says goodbye
            elif isinstance(error, WorkerCrashedError):
                self._go_on_after(error)
            else:
                self._give_up(error)

    def _give_up(self, refusal: TabAgentModelError, for_s: float = TICK_S) -> None:
        """Whoever waits for a worker waits no longer, and nobody starts one for so long."""
        self._refusal, self._not_before = refusal, time.monotonic() + for_s
        for request_id, request in list(self._requests.items()):
            if request.is_held:
                self._end(request_id, _failed(request_id, copy(refusal)))
        self._changed.notify_all()


def start(
    config: ModelConfig,
    tell: Callable[[float], Any],
    is_wanted: Callable[[], bool],
) -> tuple[Child, dict[str, Message | None]]:
    """A worker that has loaded the model, and what there is to know of it."""
    child = Child(config)
    try:
        return child, child.load(tell, is_wanted)
    except BaseException:
        child.end(ModelNotLoadedError("the load failed"))
        raise


@dataclass
class _Request:
    """What is known of a request until its last event."""

    prompt: str | Sequence[int]
    params: Mapping[str, Any]
    reply: Reply
    """Hears once whether it was taken, or why not."""
    chat: RemotePrompt | None = None
    patience: int = 50
    submitted: float = field(default_factory=time.monotonic)
    is_held: bool = False
    """It waits for a worker."""
    is_in: bool = False
    """Its caller has gone on: whatever comes now is an event."""
    is_aborted: bool = False

    def overdue(self) -> TabAgentModelError | None:
        """The worker watches the time of what it has; of what is held, we do."""
        waited = time.monotonic() - self.submitted
        for name, kind in (
            ("timeout_s", GenerationTimeoutError),
            ("max_queue_wait_s", QueueTimeoutError),
        ):
            limit = self.params.get(name)
            if limit is not None and waited > limit:
                return kind(f"no worker was ready within `{name}={limit}`")
        deadline = self.params.get("deadline")
        if deadline is not None and time.time() > deadline:
            return GenerationTimeoutError(f"no worker was ready before `deadline={deadline}`")
        return None

    def without_limits(self) -> dict[str, Any]:
        """The params of one that nobody waits for."""
        return {name: value for name, value in self.params.items() if name not in _LIMITS}

    def left(self) -> dict[str, Any]:
        """The params, with what is left of the time."""
        waited = time.monotonic() - self.submitted
        params = dict(self.params)
        for name in ("timeout_s", "max_queue_wait_s"):
            if params.get(name) is not None:
                params[name] = max(params[name] - waited, 0.001)
        return params


_keepers: WeakSet[Keeper] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Those that have a context are closed by their couriers."""
    for keeper in list(_keepers):
        if not keeper.described("context")["methods"]:
            keeper.close()


def _disown_all() -> None:
    """In a forked child: what was loaded belongs to the parent."""
    disown()
    for keeper in list(_keepers):
        keeper.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _failed(request_id: int, error: Exception) -> RemoteEvent:
    return RemoteEvent(request_id, is_last=True, finish_reason="error", error=error)


def runs_an_event_loop() -> bool:
    """Whether others wait as long as this thread does."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None
