"""The thread behind a manager: it hears what happened, and has done what follows from it.

    caller ──ticket──▶ keeper: one thread, which owns the pool ──order──▶ a thread loads or unloads
       ▲                  │     ▲                                                │
       └───── model ──────┘     └────────────── what came of it ─────────────────┘

Nobody else changes the pool, so there are no locks, and no Ctrl-C can strike halfway. Nor does the
keeper ever wait for a model, so it is always there to answer.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .._courier import begin
from .._loading import Loaded, open_model
from ..errors import ForkedProcessError, InternalError, InvalidRequestError
from ..model import AsyncModel, Model
from ..params import ModelConfig, Priority
from ._needs import Estimate, after_load, before_load
from ._pool import Member, Order, Pool, State, Ticket, taken

if TYPE_CHECKING:
    import logging
    from concurrent.futures import Future

    from .._base import Base
    from ._snapshots import Snapshots

M = TypeVar("M", Model, AsyncModel)
Happening = Callable[[Pool, float], list[Order]]
Step = Literal["load", "drain", "unload"]


@dataclass(frozen=True)
class ModelEvent:
    """A step in the life of a model: it begins with progress 0.0 and ends with 1.0.

    A drain has no end if nobody wants the model gone any more.
    """

    model: str
    step: Step
    progress: float
    seconds: float
    """Since the step began."""
    error: BaseException | None = None
    """What a load died of; then there is no 1.0."""


@dataclass(frozen=True)
class ManagedModel:
    """A registered model, as it is at this moment."""

    name: str
    path: str
    state: State
    is_default: bool
    is_pinned: bool
    priority: Priority
    keep_alive_s: float
    needs_bytes: int
    """On all devices together; 0: not known yet."""
    num_users: int
    """How many are in a `use`."""
    num_waiting: int
    needs: dict[str, int] = field(default_factory=dict, hash=False)
    """By device; under "" where the `estimate` of the manager does not tell on which."""


@dataclass(frozen=True)
class ModelUsage:
    """What a model has done since it was registered, all its loads together."""

    requests: int = 0
    generated_tokens: int = 0
    time_ms: float = 0.0
    """From the call to the end, summed over all requests."""
    num_loads: int = 0
    last_used: float | None = None
    """As `time.time()`; None: never."""


OnEvent = Callable[[ModelEvent], object]


class Keeper(threading.Thread, Generic[M]):
    """The thread that owns the pool. It ends when the pool was closed and is empty."""

    def __init__(
        self,
        kind: type[M],
        pool: Pool,
        snapshots: Snapshots,
        estimate: Estimate | None,
        teller: Teller,
    ) -> None:
        super().__init__(name="tabagent-manager", daemon=True)
        self.pool = pool
        self.models: dict[str, M] = {}
        self._configs: dict[str, ModelConfig] = {}
        self._usages: dict[str, ModelUsage] = {}
        self._kind: type[M] = kind
        self._snapshots, self._teller = snapshots, teller
        self._estimate = estimate
        # It may be written to by whoever collects garbage in the middle of reading it.
        self._mail: SimpleQueue[Happening] = SimpleQueue()
        self._answers: dict[Ticket, Future[Any]] = {}
        self._given_up: set[str] = set()
        self._began: dict[str, float] = {}
        """When the models that are draining began to."""
        self._process = os.getpid()
        self._has_ended = False
        begin(self)

    @property
    def is_open(self) -> bool:
        return not self.pool.is_closed and not self._is_foreign

    @property
    def _is_foreign(self) -> bool:
        """In a forked child neither this thread nor the models came along."""
        return self._process != os.getpid()

    def register(self, member: Member, config: ModelConfig, is_default: bool) -> None:
        def happen(pool: Pool, now: float) -> list[Order]:
            known = pool.members.get(member.name)
            if known is not None and known.state != "unloaded":
                hint = f'`unload_model("{member.name}")` before'
                message = f"`{member.name}` is {known.state}, so it cannot be registered anew"
                raise InvalidRequestError(message, hint=hint, name="name")
            pool.register(member, is_default)
            self._configs[member.name] = config
            return pool.tick(now)

        self._have(happen)

    def change(self, name: str, is_default: bool = False, is_pinned: bool | None = None) -> None:
        def happen(pool: Pool, now: float) -> list[Order]:
            member = pool.members[name]
            pool.default = name if is_default else pool.default
            member.is_pinned = member.is_pinned if is_pinned is None else is_pinned
            return pool.tick(now)

        self._have(happen)

    def is_to_be_measured(self, ticket: Ticket) -> bool:
        return ticket.wish != "unload" and self.pool.members[ticket.model].state == "unloaded"

    def measure(self, ticket: Ticket) -> None:
        """Look at the file, before anything leaves for it: this raises what is wrong with it."""
        if self.is_to_be_measured(ticket):
            ticket.needs = before_load(self._configs[ticket.model], self._estimate)

    def ask(self, ticket: Ticket) -> Future[Any]:
        """The model, when it is loaded; whatever, when it is gone if that was wished."""
        from concurrent.futures import Future

        self._check()
        answer: Future[Any] = Future()

        def happen(pool: Pool, now: float) -> list[Order]:
            self._answers[ticket] = answer
            orders: list[Order] = []
            if self._was_closed_by_its_user(ticket.model):
                orders = pool.unloaded(ticket.model, now)
            return orders + pool.ask(ticket, now)

        self._tell(happen)
        return answer

    def leave(self, ticket: Ticket) -> None:
        def happen(pool: Pool, now: float) -> list[Order]:
            self._answers.pop(ticket, None)
            return pool.leave(ticket, now)

        self._tell(happen)

    def close(self) -> None:
        self._tell(Pool.close)

    def wait_until_ended(self) -> None:
        if self._is_foreign or _is_exiting:
            return
        self.join()
        if self._teller.is_alive() and threading.current_thread() is not self._teller:
            self._teller.join(timeout=1.0)

    def described(self) -> list[ManagedModel]:
        pool = self.pool
        return [
            ManagedModel(
                name=member.name,
                path=self._configs[member.name].path,
                state=member.state,
                is_default=member.name == pool.default,
                is_pinned=member.is_pinned,
                priority=member.priority,
                keep_alive_s=member.keep_alive_s,
                needs_bytes=taken(member.needs, None),
                needs=dict(member.needs),
                num_users=len(member.users),
                num_waiting=pool.num_waiting(member.name),
            )
            for member in list(pool.members.values())
        ]

    def usage(self, name: str) -> ModelUsage:
        usage, model = self._usages.get(name, ModelUsage()), self.models.get(name)
        if model is not None:
            usage = _with_usage_of(model, usage)
        used_at = self.pool.members[name].used_at
        if used_at:
            usage = replace(usage, last_used=time.time() - (time.monotonic() - used_at))
        return usage

    def run(self) -> None:
        while not (self.pool.is_closed and self.pool.is_empty):
            patience_s = min(max(self.pool.next_time - time.monotonic(), 0.0), _A_DAY_S)
            try:
                happen = self._mail.get(timeout=patience_s)
            except Empty:
                happen = Pool.tick
            self._hear(happen)
        self._has_ended = True
        self._clear_mail()
        self._teller.stop()

    def _check(self) -> None:
        if self._is_foreign:
            message = "the manager belongs to the parent of this forked process"
            raise ForkedProcessError(message, hint="make another one in the child")

    def _tell(self, happen: Happening) -> None:
        if not self._is_foreign:
            self._mail.put(happen)
            if self._has_ended:  # then the pool refuses whatever comes
                self._clear_mail()

    def _have(self, happen: Happening) -> None:
        """Tell, and wait until it was done; what it raises is raised here."""
        from concurrent.futures import Future

        self._check()
        done: Future[None] = Future()

        def and_say_so(pool: Pool, now: float) -> list[Order]:
            try:
                orders = happen(pool, now)
            except Exception as error:
                done.set_exception(error)
                return []
            done.set_result(None)
            return orders

        self._tell(and_say_so)
        done.result()

    def _hear(self, happen: Happening) -> None:
        try:
            for order in happen(self.pool, time.monotonic()):
                self._carry_out(order)
        except Exception as error:  # a fault of ours: better an error for all than silence
            _log().exception("the manager is confused")
            for ticket in list(self._answers):
                message = f"the manager is confused: {error!r}"
                self._carry_out(Order("refuse", ticket.model, ticket, InternalError(message)))

    def _clear_mail(self) -> None:
        while True:
            try:
                self._hear(self._mail.get_nowait())
            except Empty:
                return

    def _carry_out(self, order: Order) -> None:
        if _is_exiting:
            return
        name, answer = order.model, self._answers.pop(order.ticket, None) if order.ticket else None
        if order.verb == "load":
            self._given_up.discard(name)
            self._begin(self._load, name)
        elif order.verb == "give_up":
            self._given_up.add(name)
        elif order.verb == "drain":
            self._began[name] = time.monotonic()
            self._say(name, "drain", 0.0, self._began[name])
        elif order.verb == "stay":
            self._began.pop(name, None)
        elif order.verb == "unload":
            if name in self._began:
                self._say(name, "drain", 1.0, self._began.pop(name))
            self._begin(self._unload, name)
        elif answer is not None and answer.set_running_or_notify_cancel():
            if order.error is not None:
                answer.set_exception(order.error)
            else:
                answer.set_result(self.models.get(name))

    def _begin(self, work: Callable[[str], None], name: str) -> None:
        thread = threading.Thread(
            target=work, args=(name,), name=f"tabagent{work.__name__}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            work(name)

    def _load(self, name: str) -> None:
        began, said = time.monotonic(), 0.0

        def heard(fraction: float) -> bool:
            nonlocal said
            if said + 0.01 <= fraction < 1.0:
                said = fraction
                self._say(name, "load", said, began)
            return name not in self._given_up

        self._say(name, "load", 0.0, began)
        try:
            model = self._adopted(name, open_model(self._configs[name], heard))
        except Exception as error:
            failure = error
            self._say(name, "load", said, began, failure)
            self._tell(lambda pool, now: pool.failed(name, failure, now))
            return
        self._say(name, "load", 1.0, began)
        self._tell(lambda pool, now: pool.loaded(name, now))
        self._turned(name)  # requests may have come before this was known
        self._weigh(name, model)

    def _adopted(self, name: str, opened: Loaded) -> M:
        """The same object again, if there is one, with what was loaded in it."""
        model, config = self.models.get(name), self._configs[name]
        if model is None:
            model = self._kind(*opened, config)
        else:
            model._config = config
            model._adopt(*opened)
        if model._courier is not None:
            model._courier.on_turn = lambda: self._turned(name)
        self._snapshots.restore(model)
        usage = self._usages.get(name, ModelUsage())
        self._usages[name] = replace(usage, num_loads=usage.num_loads + 1)
        self.models[name] = model
        return model

    def _weigh(self, name: str, model: M) -> None:
        """What it took after all. Nobody waits for this any more."""
        try:
            needs = after_load(model, self._estimate)
        except Exception as error:  # then what was estimated before holds
            _log().warning("what `%s` takes is not known: %s", model.config.path, error)
        else:
            self._tell(lambda pool, now: pool.weighed(name, needs, now))

    def _unload(self, name: str) -> None:
        began, model = time.monotonic(), self.models[name]
        self._say(name, "unload", 0.0, began)
        usage = self._usages[name]
        try:
            usage = _with_usage_of(model, usage)
            self._snapshots.save(model)
            model._close()
        except Exception:
            _log().exception("unloading `%s` went wrong", name)
        self._usages[name] = usage
        self._say(name, "unload", 1.0, began)
        self._tell(lambda pool, now: pool.unloaded(name, now))

    def _turned(self, name: str) -> None:
        """Something began to run in a model, or nothing runs any more."""

        def happen(pool: Pool, now: float) -> list[Order]:
            courier = self.models[name]._courier
            if courier is None:
                return pool.running(name, False, now)
            return pool.running(name, not courier.is_idle, now, courier.was_used)

        self._tell(happen)

    def _was_closed_by_its_user(self, name: str) -> bool:
        model = self.models.get(name)
        is_said_to_be_loaded = self.pool.members[name].state == "loaded"
        return is_said_to_be_loaded and model is not None and not model.is_loaded

    def _say(
        self,
        name: str,
        step: Step,
        progress: float,
        began: float,
        error: Exception | None = None,
    ) -> None:
        seconds = time.monotonic() - began
        self._teller.tell(ModelEvent(name, step, progress, seconds, error))


class Teller(threading.Thread):
    """Calls those who watch, who may take their time and ask the manager for things. It begins
    when the first of them comes."""

    def __init__(self) -> None:
        super().__init__(name="tabagent-events", daemon=True)
        self._watchers: dict[object, OnEvent] = {}
        self._mail: SimpleQueue[ModelEvent | None] = SimpleQueue()
        self._beginning = threading.Lock()

    def watch(self, on_event: OnEvent) -> Callable[[], object]:
        if not callable(on_event):
            message = f"`on_event` must be a function, got a {type(on_event).__name__}"
            raise InvalidRequestError(message, name="on_event")
        watcher = object()
        with self._beginning:
            self._watchers[watcher] = on_event
            if self.ident is None:
                begin(self)
        return lambda: self._watchers.pop(watcher, None)

    def tell(self, event: ModelEvent) -> None:
        if self._watchers:
            self._mail.put(event)

    def stop(self) -> None:
        self._mail.put(None)

    def run(self) -> None:
        while (event := self._mail.get()) is not None:
            for on_event in list(self._watchers.values()):
                try:
                    on_event(event)
                except Exception:
                    _log().exception("`on_event` failed")


def _with_usage_of(model: Base, usage: ModelUsage) -> ModelUsage:
    if not model.is_loaded or model._context is None:
        return usage
    counted = model.metrics()
    return replace(
        usage,
        requests=usage.requests + counted.get("requests", 0),
        generated_tokens=usage.generated_tokens + counted.get("generated_tokens", 0),
        time_ms=usage.time_ms + counted.get("request_s", {}).get("sum", 0.0) * 1000,
    )


def _log() -> logging.Logger:
    import logging

    return logging.getLogger("tabagent_model")


# Longer than so much no queue needs to be waited for at a time.
_A_DAY_S = 86_400.0
_is_exiting = False


@atexit.register
def _at_exit() -> None:
    """Models are closed by themselves then, and no thread may begin anything."""
    global _is_exiting
    _is_exiting = True
