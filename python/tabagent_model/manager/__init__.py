"""Several models by name: `ModelManager` for threads, `AsyncModelManager` for event loops.

What is loaded, who waits and what leaves is decided by the rules in `_pool.py`, and done by the
keeper (`_keeper.py`), which both faces share; they differ in how they wait for its answer. A model
that is unloaded and loaded again is the same object, so whoever has it goes on where he was, like a
session.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from .._prompt import sound_text
from ..errors import (
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotLoadedError,
    QueueTimeoutError,
    TabAgentModelError,
)
from ..model import AsyncModel, Model, _config_of, inspect
from ..params import ModelConfig, ModelFields, Priority, checked_whole
from ..stream import in_executor
from ._keeper import Keeper, M, ManagedModel, ModelUsage, OnEvent, Teller
from ._needs import Estimate, checked_needs
from ._pool import PRIORITIES, Member, Needs, Pool, Ticket, Wish

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Duration = float | str | timedelta
"""Seconds, or text like "90s", "5m" and "1h30m". -1 is for ever, 0 is at once."""


class _OnePerProcess(type):
    """Without arguments there is one manager for the whole process, until it is closed."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        if args or fields:
            return super().__call__(*args, **fields)
        with _making:
            one = _ones.get(cls)
            if one is None or not one._keeper.is_open:
                one = _ones[cls] = super().__call__()
            return one


_ones: dict[type, Any] = {}
_making = threading.RLock()


class _Manager(Generic[M]):
    """Everything that needs no waiting."""

    _kind: type[M]

    def __init__(
        self,
        *,
        max_loaded: int = 3,
        max_bytes: int | Mapping[str, int] | None = None,
        keep_alive: Duration = -1,
        queue_size: int = 1024,
        snapshots: Literal["memory", "disk"] | None = None,
        estimate: Estimate | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        """Hold at most `max_loaded` models, and at most `max_bytes`: a number for all devices
        together, or one for each, like `{"cpu": 8 << 30, "CUDA0": 20 << 30}`.

        What a model takes is estimated before it is loaded, and looked up afterwards; `estimate` is
        asked instead where it is given. What is not used for `keep_alive` is unloaded. With
        `snapshots`, what was computed for sessions is kept meanwhile. `on_event` is called in a
        thread of its own.
        """
        from ._snapshots import Snapshots

        checked_whole("max_loaded", max_loaded, 1, 1024)
        limit = inf if max_bytes is None else _checked_limit(max_bytes)
        checked_whole("queue_size", queue_size, 1, 1_000_000)
        if snapshots not in (None, "memory", "disk"):
            message = f"`snapshots` must be None, 'memory' or 'disk', got {snapshots!r:.40}"
            raise InvalidRequestError(message, name="snapshots")
        self._keep_alive_s = seconds_of("keep_alive", keep_alive)
        pool = Pool(max_loaded, limit, queue_size)
        self._teller = Teller()
        if on_event is not None:
            self._teller.watch(on_event)
        self._keeper: Keeper[M] = Keeper(
            self._kind, pool, Snapshots(snapshots), estimate, self._teller
        )

    def register_model(
        self,
        name: str,
        model: str | os.PathLike[str] | ModelConfig | None = None,
        config: ModelConfig | None = None,
        *,
        set_default: bool = False,
        pin: bool = False,
        priority: Priority = "normal",
        keep_alive: Duration | None = None,
        **fields: Unpack[ModelFields],
    ) -> None:
        """Give a model file a name; None is the bundled tiny chat model.

        `fields` are those of ModelConfig. The first model is the default until another one is
        registered so, or swapped to. Among models, `priority` is who is waited for first and
        unloaded last; a pinned one is not unloaded for another, and never for being unused.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            message = f"`name` must be 1 to 200 printable characters, got {name!r:.40}"
            raise InvalidRequestError(message, name="name")
        sound_text(name)
        if priority not in PRIORITIES:
            message = f"`priority` must be one of {', '.join(PRIORITIES)}, got {priority!r:.40}"
            raise InvalidRequestError(message, name="priority")
        if config is not None:
            if not isinstance(config, ModelConfig) or isinstance(model, ModelConfig):
                message = "`config` must be a ModelConfig, and there can be one only"
                raise InvalidRequestError(message, name="config")
            model = config if model is None else config.with_model_path(model)
        keep_alive_s = self._keep_alive_s
        if keep_alive is not None:
            keep_alive_s = seconds_of("keep_alive", keep_alive)
        member = Member(name, {}, priority, keep_alive_s, bool(pin))
        self._keeper.register(member, _config_of(model, fields), bool(set_default))

    @property
    def default_model(self) -> str | None:
        """The name that is meant where none is given."""
        return self._keeper.pool.default

    @default_model.setter
    def default_model(self, name: str) -> None:
        self._keeper.change(self._name(name), is_default=True)

    @property
    def names(self) -> list[str]:
        """Those that are registered, in the order in which they were."""
        return list(self._keeper.pool.members)

    def get_model(self, name: str | None = None) -> M:
        """A model that is loaded. It may be unloaded whenever it is idle; `use` prevents that."""
        name = self._name(name)
        model = self._keeper.models.get(name)
        if model is None or not model.is_loaded:
            hint = f'`load_model("{name}")`, or use it in `with models.use("{name}")`'
            raise ModelNotLoadedError(f"`{name}` is not loaded", hint=hint)
        return model

    def list_models(self) -> list[ManagedModel]:
        """What is registered, and how it is."""
        return self._keeper.described()

    def _available(self) -> list[ManagedModel]:
        return [each for each in self.list_models() if _can_be_loaded(each)]

    def usage(self, name: str | None = None) -> ModelUsage:
        """What a model has done so far."""
        return self._keeper.usage(self._name(name))

    def watch(self, on_event: OnEvent) -> Callable[[], object]:
        """Have `on_event` called as well, until what comes back is called."""
        return self._teller.watch(on_event)

    def pin(self, name: str | None = None) -> None:
        """Let a model stay, once it is loaded, until `unload_model` or `unpin`."""
        self._keeper.change(self._name(name), is_pinned=True)

    def unpin(self, name: str | None = None) -> None:
        """Let a model leave again for others."""
        self._keeper.change(self._name(name), is_pinned=False)

    @property
    def is_closed(self) -> bool:
        return not self._keeper.is_open

    def __repr__(self) -> str:
        loaded = [each.name for each in self.list_models() if each.state == "loaded"]
        return f"<{type(self).__name__} with {', '.join(loaded) or 'nothing'} loaded>"

    def __del__(self) -> None:
        try:
            self._keeper.close()
        except Exception:  # at exit anything may be gone already
            return

    def _ticket(
        self,
        wish: Wish,
        name: str | None,
        owner: object,
        grace: Duration = -1,
        keep_alive: Duration | None = None,
    ) -> Ticket:
        ticket = Ticket(self._name(name), wish, owner, seconds_of("grace", grace))
        if keep_alive is not None:
            ticket.keep_alive_s = seconds_of("keep_alive", keep_alive)
        return ticket

    def _name(self, name: str | None) -> str:
        members = self._keeper.pool.members
        found = self.default_model if name is None else name
        if found is None:
            hint = 'begin with `register_model("small", "small.gguf")`'
            raise ModelNotFoundError("no model is registered", hint=hint)
        if not isinstance(found, str) or found not in members:
            known = ", ".join(f"`{each}`" for each in list(members)) or "none"
            hint = f"registered are {known}"
            raise ModelNotFoundError(f"Model not found: {found!s:.200}", hint=hint)
        return found


class ModelManager(_Manager[Model], metaclass=_OnePerProcess):
    """Models that are loaded when they are wanted, and unloaded for others. Any thread may use it.

    Without arguments it is the one of this process.
    """

    _kind = Model

    @contextmanager
    def use(
        self,
        name: str | None = None,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Model]:
        """A model that is loaded, and stays so as long as the `with` lasts.

        If there is no room, it waits until others are idle, for `timeout_s` at most. `keep_alive`
        holds for this model from then on.
        """
        ticket = self._ticket("use", name, threading.get_ident(), keep_alive=keep_alive)
        try:
            yield self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    @overload
    def load_model(
        self,
        name: str | None = None,
        preload: Literal[False] = False,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> Model: ...
    @overload
    def load_model(
        self,
        name: str | None = None,
        *,
        preload: Literal[True],
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> None: ...
    def load_model(
        self,
        name: str | None = None,
        preload: bool = False,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> Model | None:
        """Load a model, or find it loaded. With `preload` that begins, and nobody waits for it."""
        ticket = self._ticket("load", name, threading.get_ident(), keep_alive=keep_alive)
        if preload:
            self._keeper.measure(ticket)
            self._keeper.ask(ticket)
            return None
        try:
            return self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    def swap(self, name: str, *, grace: Duration = -1, timeout_s: float | None = None) -> Model:
        """Make another model the default, and unload the one that was it.

        Whoever uses that one is waited for, until the `grace` ends: then it is unloaded anyway. The
        new one is loaded meanwhile if both fit, otherwise afterwards; if that fails, the old one
        stays or comes back.
        """
        ticket = self._ticket("swap", name, threading.get_ident(), grace)
        try:
            return self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    def unload_model(
        self,
        name: str | None = None,
        *,
        grace: Duration = -1,
        timeout_s: float | None = None,
    ) -> None:
        """Unload a model, after waiting for whoever uses it, or until the `grace` ends."""
        ticket = self._ticket("unload", name, threading.get_ident(), grace)
        try:
            self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    def list_available_models(self) -> list[ManagedModel]:
        """Of what is registered, all that is loaded or could be: its file is there and sound.

        Each file is looked at. Whether there is room is another matter; others may leave for it.
        """
        return self._available()

    def close(self) -> None:
        """Unload everything, whoever uses it. A second call does nothing."""
        self._keeper.close()
        self._keeper.wait_until_ended()

    def _wait(self, ticket: Ticket, timeout_s: float | None) -> Model:
        timeout_s = _checked_timeout(timeout_s)
        self._keeper.measure(ticket)
        answer = self._keeper.ask(ticket)
        from concurrent.futures import TimeoutError as NotYet

        try:
            model: Model = answer.result(timeout_s)
        except NotYet:
            if answer.done():  # then it is what the load died of
                raise
            raise _late(ticket, timeout_s) from None
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncModelManager(_Manager[AsyncModel], metaclass=_OnePerProcess):
    """As `ModelManager`, for the tasks of any event loop."""

    _kind = AsyncModel

    @asynccontextmanager
    async def use(
        self,
        name: str | None = None,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AsyncModel]:
        """As `ModelManager.use`, in an `async with`."""
        ticket = self._ticket("use", name, _task(), keep_alive=keep_alive)
        try:
            yield await self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    @overload
    async def load_model(
        self,
        name: str | None = None,
        preload: Literal[False] = False,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> AsyncModel: ...
    @overload
    async def load_model(
        self,
        name: str | None = None,
        *,
        preload: Literal[True],
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> None: ...
    async def load_model(
        self,
        name: str | None = None,
        preload: bool = False,
        *,
        keep_alive: Duration | None = None,
        timeout_s: float | None = None,
    ) -> AsyncModel | None:
        """As `ModelManager.load_model`."""
        ticket = self._ticket("load", name, _task(), keep_alive=keep_alive)
        if preload:
            await in_executor(lambda: self._keeper.measure(ticket))
            self._keeper.ask(ticket)
            return None
        try:
            return await self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    async def swap(
        self, name: str, *, grace: Duration = -1, timeout_s: float | None = None
    ) -> AsyncModel:
        """As `ModelManager.swap`."""
        ticket = self._ticket("swap", name, _task(), grace)
        try:
            return await self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    async def unload_model(
        self,
        name: str | None = None,
        *,
        grace: Duration = -1,
        timeout_s: float | None = None,
    ) -> None:
        """As `ModelManager.unload_model`."""
        ticket = self._ticket("unload", name, _task(), grace)
        try:
            await self._wait(ticket, timeout_s)
        finally:
            self._keeper.leave(ticket)

    async def list_available_models(self) -> list[ManagedModel]:
        """As `ModelManager.list_available_models`."""
        return await in_executor(self._available)

    async def close(self) -> None:
        """As `ModelManager.close`."""
        self._keeper.close()
        await in_executor(self._keeper.wait_until_ended)

    async def _wait(self, ticket: Ticket, timeout_s: float | None) -> AsyncModel:
        import asyncio

        timeout_s = _checked_timeout(timeout_s)
        if self._keeper.is_to_be_measured(ticket):
            await in_executor(lambda: self._keeper.measure(ticket))
        answer = asyncio.wrap_future(self._keeper.ask(ticket))
        try:
            done, _ = await asyncio.wait([answer], timeout=timeout_s)
        finally:
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # looked at, so that asyncio does not complain about it
        if not done:
            raise _late(ticket, timeout_s)
        model: AsyncModel = answer.result()
        return model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def seconds_of(name: str, given: Duration) -> float:
    """A duration in seconds; -1 is infinite."""
    seconds: Any = given
    if isinstance(given, timedelta):
        seconds = given.total_seconds()
    elif isinstance(given, str) and _DURATION.fullmatch(given):
        parts = _PART.findall(given)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif isinstance(given, str):
        seconds = float(given) if _NUMBER.fullmatch(given) else None
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
        if seconds == -1:
            return inf
        if 0 <= seconds <= _LONGEST_S:
            return float(seconds)
    allowed = 'seconds, or text like "90s", "5m" or "1h30m"; -1 is for ever'
    raise InvalidRequestError(f"`{name}` must be {allowed}; got {given!r:.60}", name=name)


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_PART.pattern}){{1,5}}")
_NUMBER = re.compile(r"-1|[0-9]{1,12}(?:\.[0-9]{1,9})?")
_LONGEST_S = 1e9

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def _checked_limit(max_bytes: int | Mapping[str, int]) -> float | Needs:
    if isinstance(max_bytes, Mapping):
        return checked_needs("max_bytes", max_bytes)
    return checked_whole("max_bytes", max_bytes, 1, 2**62)


def _checked_timeout(timeout_s: float | None) -> float | None:
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is None or (is_number and 0 < timeout_s <= _LONGEST_S):
        return timeout_s
    message = f"`timeout_s` must be seconds above 0 or None, got {timeout_s!r:.40}"
    raise InvalidRequestError(message, name="timeout_s")


def _late(ticket: Ticket, timeout_s: float | None) -> QueueTimeoutError:
    what = "unloaded" if ticket.wish == "unload" else "had"
    return QueueTimeoutError(f"`{ticket.model}` could not be {what} within {timeout_s} s")


def _can_be_loaded(model: ManagedModel) -> bool:
    if model.state != "unloaded":
        return True
    try:
        inspect(model.path)
    except TabAgentModelError:
        return False
    return True


def _task() -> object:
    import asyncio

    return asyncio.current_task()
