"""Loads a model into this process: walks the ladder until a rung holds."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core, _native
from ..errors import (
    ContextTooSmallError,
    ModelCorruptedError,
    OutOfMemoryError,
    TabAgentModelError,
)
from ..placement import Rung, gpu_settings, ladder
from . import _ledger
from ._estimate import Header

if TYPE_CHECKING:
    from .._core import PyModel
    from .._courier import Context
    from ..hardware import Machine
    from ..params import ModelConfig

_log = logging.getLogger("tabagent_model")
_MAY_BE_MEMORY = (OutOfMemoryError, ContextTooSmallError, ModelCorruptedError)
# What the system, the C++ library and ggml say when memory is refused, in llama.cpp's last words.
_IS_SHORTAGE = re.compile(
    rf"{re.escape(os.strerror(errno.ENOMEM))}|bad_alloc|unable to allocate CPU\w* buffer"
)


def load(config: ModelConfig, progress: Callable[[float], bool]) -> tuple[Context | None, PyModel]:
    """A model and its context; what came of the wish is in the ledger then, and in `info()`."""
    _native.start()
    if config.vocab_only:
        return None, _model(config, progress, {"gpu_layers": 0})
    climb = _Climb(config)
    while True:
        with _ledger.LEDGER.reserved(climb.next_rung) as rung:
            try:
                return _opened(config, progress, climb, rung)
            except _MAY_BE_MEMORY as error:
                climb.note(rung, error)


def _opened(
    config: ModelConfig, progress: Callable[[float], bool], climb: _Climb, rung: Rung
) -> tuple[Context, PyModel]:
    gpu = gpu_settings(config, climb.machine, rung.estimate)
    settled = {"repack": rung.estimate.is_repacked, "file": climb.header.file}
    model = _model(config, progress, {**gpu, **settled})
    try:
        context = _context_of(model, config, rung)
    except BaseException:
        model.unload()
        raise
    _ledger.entered(context, model, rung, climb.told(rung), climb.model)
    return context, model


def _model(
    config: ModelConfig, progress: Callable[[float], bool], further: dict[str, Any]
) -> PyModel:
    model = _core.PyModel()
    try:
        model.load(
            config.path,
            mlock=config.use_mlock,
            mmap=config.use_mmap,
            vocab_only=config.vocab_only,
            progress=progress,
            **further,
        )
    except ModelCorruptedError as error:
        raise _as_shortage(error, Path(config.path).stem) from None
    return model


def _context_of(model: PyModel, config: ModelConfig, rung: Rung) -> Context:
    """With everything settled as it was estimated, so that it takes what was reserved."""
    estimate = rung.estimate
    return model.create_context(
        rung.n_ctx,
        config.n_batch,
        config.n_threads,
        n_seq_max=estimate.max_parallel,
        queue_size=config.queue_size,
        prompt_cache_mb=config.prompt_cache_mb,
        flash_attn=estimate.flash_attn,  # type: ignore[arg-type]
        kv_type=estimate.kv_type,  # type: ignore[arg-type]
        warmup=config.warmup,
    )


def _as_shortage(error: TabAgentModelError, model: str) -> TabAgentModelError:
    """A file is not damaged because the system refused memory for it."""
    said = error.message.partition("llama.cpp says: ")[2]
    if not _IS_SHORTAGE.search(said):
        return error
    hint = "close what is not needed, or raise the limit that `ulimit -a` shows"
    return OutOfMemoryError(f"the system refuses memory for `{model}`: {said}", hint=hint)


class _Climb:
    """One load: the rungs that were tried, or were not worth trying, and the next one."""

    machine: Machine

    def __init__(self, config: ModelConfig) -> None:
        self.model = Path(config.path).stem
        self._config = config
        self.header = Header(config.path)
        self._rungs: tuple[Rung, ...] = ()
        self._tried: dict[str, Exception] = {}

    def next_rung(self, machine: Machine) -> Rung:
        self.machine = machine
        self._rungs = ladder(self.header, self._config, machine, may_measure=True)
        left = [each for each in self._rungs if each.fits and each.what not in self._tried]
        if left:
            return replace(left[0], reason=self._reason(left[0]))
        if self._tried:  # what llama.cpp said is nearer to the truth than any estimate
            raise next(reversed(self._tried.values()))
        raise _ledger.LEDGER.refusal(self.model, self._rungs)

    def note(self, rung: Rung, error: TabAgentModelError) -> None:
        """Remember what did not fit after all; anything else is no reason to try another way."""
        is_memory = not isinstance(error, ModelCorruptedError) or (
            rung.estimate.gpu_layers > 0 and "alloc" in error.message
        )
        if not is_memory:
            raise error
        self._tried[rung.what] = error

    def told(self, rung: Rung) -> list[str]:
        """Every rung above this one, with what was wrong with it."""
        above = self._rungs[: [each.what for each in self._rungs].index(rung.what)]
        lines = []
        for each in above:
            error = self._tried.get(each.what)
            lines.append(each.told if error is None else f"{each.what}: {error}")
        return lines

    def _reason(self, rung: Rung) -> str:
        config = self._config
        if above := self.told(rung):
            reason = f"{rung.what}, since what was asked for does not fit ({above[0]})"
            _log.warning("`%s` is loaded otherwise than asked: %s", self.model, reason)
            return reason
        if rung.estimate.gpu_layers:
            return f"{rung.what}, as asked"
        if config.device == "cpu" or config.gpu_layers == 0:
            return "the CPU, as asked"
        why = self.machine.reason or "no GPU that was asked for is there"
        if config.gpu_layers != "auto" or config.device != "auto":
            _log.warning("`%s` is loaded on the CPU: %s", self.model, why)
        return f"the CPU: {why}"
