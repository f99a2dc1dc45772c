"""Opens a model in a thread of its own, so that whoever waits can be interrupted or cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _log
from ._courier import Context, begin
from .errors import LoadCancelledError
from .params import ModelConfig
from .stream import settle

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ._core import PyModel
    from .placement._ledger import ModelMemory

Loaded = tuple["Context | None", "PyModel"]
OnProgress = Callable[[float], Any]


def open_model(
    config: ModelConfig, on_progress: OnProgress | None, probe: bool | None = None
) -> Loaded:
    loading = _Loading(config, on_progress, probe)
    loading.begin()
    try:
        return loading.future.result()
    except BaseException:
        if not loading.future.done():  # Ctrl-C, before the load has ended
            loading.give_up()
            loading.future.add_done_callback(_discard)
            loading.join(timeout=0.8)
        raise


async def open_model_async(
    config: ModelConfig, on_progress: OnProgress | None, probe: bool | None = None
) -> Loaded:
    import asyncio

    loading = _Loading(config, on_progress, probe)
    loading.begin()
    try:
        return await settle(asyncio.wrap_future(loading.future), loading.give_up)
    except asyncio.CancelledError:
        _discard(loading.future)
        raise


def placement_of(native: object) -> dict[str, Any]:
    """Where the loader put a model, why, and what it tried before; of one that it loaded, here or
    in a worker."""
    from .placement._ledger import LEDGER, Entry

    entry = LEDGER.entry_of(native)
    if isinstance(entry, Entry):
        return entry.facts()
    told: dict[str, Any] = getattr(native, "placement", {})
    return told


def memory_of(native: object) -> ModelMemory | None:
    """What such a model holds, as the ledger has it."""
    from .placement._ledger import LEDGER

    entry = LEDGER.entry_of(getattr(native, "holder", native))
    return None if entry is None else entry.memory()


def give_up_all() -> None:
    """At exit: a thread that returned from Rust into a Python that is gone would be an abort."""
    global _is_exiting
    _is_exiting = True
    for loading in list(_underway):
        loading.give_up()
    for loading in list(_underway):
        loading.join(timeout=1.0)


class _Loading(threading.Thread):
    """One load, in a thread of its own while its waiter stays interruptible.

    It is a daemon: unlike the threads of an executor it does not keep the program from ending.
    """

    def __init__(
        self, config: ModelConfig, on_progress: OnProgress | None, probe: bool | None
    ) -> None:
        from concurrent.futures import Future

        super().__init__(name="tabagent-load", daemon=True)
        self.future: Future[Loaded] = Future()
        self._config = config
        self._on_progress = on_progress
        self._probe = probe
        self._is_wanted = True

    def begin(self) -> None:
        _log.start()
        begin(self)
        _underway.add(self)

    def run(self) -> None:
        try:
            loaded = self._load()
        except BaseException as error:
            if not _is_exiting:  # then only daemons are waiting, and nobody wants their complaints
                self.future.set_exception(error)
        else:
            self.future.set_result(loaded)
        finally:
            _underway.discard(self)

    def give_up(self) -> None:
        self._is_wanted = False

    def _load(self) -> Loaded:
        config = self._config
        if config.isolation == "process" or self._probe:
            from .isolation import remote

            if config.isolation == "process":
                return remote.open_isolated(
                    config, self._progress, lambda: self._is_wanted, self._probe
                )
            remote.probe(config, lambda: self._is_wanted)
        context, model = load_here(config, self._progress)
        if not self._is_wanted:
            model.unload()
            raise LoadCancelledError(f"loading `{config.path}` was cancelled")
        return context, model

    def _progress(self, fraction: float) -> bool:
        wanted = self._on_progress is None or self._on_progress(fraction) is not False
        return wanted and self._is_wanted


def load_here(config: ModelConfig, progress: Callable[[float], bool]) -> Loaded:
    """Into this process."""
    from .placement import _climb  # here: only a load needs what it imports

    return _climb.load(config, progress)


_underway: set[_Loading] = set()
_is_exiting = False


def _discard(future: Future[Loaded]) -> None:
    """Close what was loaded for nobody."""
    if future.exception() is None:
        context, model = future.result()
        if context is not None:
            context.close()
        model.unload()
