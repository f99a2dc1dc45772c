"""Opens a model in a thread of its own, so that whoever waits can be interrupted or cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import _core, _log, _native
from ._courier import Context
from .errors import LoadCancelledError
from .params import ModelConfig
from .stream import settle

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ._core import PyModel

T = TypeVar("T")
Loaded = tuple["Context | None", "PyModel"]
OnProgress = Callable[[float], Any]


class _Loading:
    """One load, made to run in a thread of its own while its waiter stays interruptible."""

    def __init__(self, config: ModelConfig, on_progress: OnProgress | None) -> None:
        self._config = config
        self._on_progress = on_progress
        self._is_wanted = True

    def __call__(self) -> Loaded:
        _native.start()
        config, model = self._config, _core.PyModel()
        model.load(
            config.path,
            gpu_layers=-1 if isinstance(config.gpu_layers, str) else config.gpu_layers,
            mlock=config.use_mlock,
            mmap=config.use_mmap,
            main_gpu=config.main_gpu,
            vocab_only=config.vocab_only,
            split_mode=config.split_mode,
            progress=self._progress,
        )
        try:
            context = None if config.vocab_only else self._context_of(model)
            if not self._is_wanted:
                raise LoadCancelledError(f"loading `{config.path}` was cancelled")
        except BaseException:
            model.unload()
            raise
        return context, model

    def give_up(self) -> None:
        self._is_wanted = False

    def _context_of(self, model: PyModel) -> Context:
        config = self._config
        return model.create_context(
            config.n_ctx,
            config.n_batch,
            config.n_threads,
            n_seq_max=config.max_parallel,
            queue_size=config.queue_size,
            flash_attn=config.flash_attn,
            kv_type=config.kv_type,
        )

    def _progress(self, fraction: float) -> bool:
        wanted = self._on_progress is None or self._on_progress(fraction) is not False
        return wanted and self._is_wanted


def open_model(config: ModelConfig, on_progress: OnProgress | None) -> Loaded:
    loading = _Loading(config, on_progress)
    future = _in_thread(loading)
    try:
        return future.result()
    except BaseException:
        if not future.done():  # Ctrl-C, before the load has ended
            loading.give_up()
            future.add_done_callback(_discard)
            _wait(future, 0.8)
        raise


async def open_model_async(config: ModelConfig, on_progress: OnProgress | None) -> Loaded:
    import asyncio

    loading = _Loading(config, on_progress)
    future = _in_thread(loading)
    try:
        return await settle(asyncio.wrap_future(future), loading.give_up)
    except asyncio.CancelledError:
        _discard(future)
        raise


def _discard(future: Future[Loaded]) -> None:
    """Close what was loaded for nobody."""
    if future.exception() is None:
        context, model = future.result()
        if context is not None:
            context.close()
        model.unload()


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """A thread that does not keep the program from ending, unlike those of an executor."""
    from concurrent.futures import Future

    future: Future[T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    _log.start()
    threading.Thread(target=run, name="tabagent-load", daemon=True).start()
    return future


def _wait(future: Future[Any], seconds: float) -> None:
    from concurrent.futures import wait

    wait([future], timeout=seconds)
