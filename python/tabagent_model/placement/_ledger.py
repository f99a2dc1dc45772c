"""One ledger for all models of this process: who holds how much memory, and what a load may have.

It keeps no account of who has left: it looks who is there. A load reserves its estimate before it
begins, so that two loads at a time do not count on the same memory; when the model is there, what
llama.cpp really allocated counts instead.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import _core, hardware
from ..errors import OutOfMemoryError
from ..hardware import Gpu, Machine, Memory, shown
from ._estimate import Estimate, Share

if TYPE_CHECKING:
    from .._core import PyModel
    from .._courier import Context
    from ..placement import Rung


@dataclass(frozen=True)
class ModelMemory:
    """What one loaded model holds, device by device."""

    model: str
    path: str
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class DeviceMemory:
    """Where the memory of one device is, in bytes; None: nobody knows."""

    device: str
    total: int | None
    free: int | None
    models: int
    """What the models of this process hold, without the mapped pages of their files."""
    reserved: int
    """For loads that are under way."""
    others: int | None
    """What other processes and the system hold."""


@dataclass(frozen=True)
class MemoryReport:
    models: tuple[ModelMemory, ...]
    devices: tuple[DeviceMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{device.device}: {shown(device.free)} of {shown(device.total)} free,"
            f" models {shown(device.models)}, reserved {shown(device.reserved)},"
            f" others {shown(device.others)}"
            for device in self.devices
        ]
        for model in self.models:
            for share in model.shares:
                lines.append(
                    f"  {model.model} on {share.device}: weights {shown(share.weights)}"
                    f" + {shown(share.mapped)} mapped, keys and values {shown(share.kv)},"
                    f" compute {shown(share.compute)}, prompt cache {shown(share.cache)},"
                    f" other {shown(share.other)}"
                )
        return "\n".join(lines)


@dataclass(frozen=True)
class Entry:
    """A loaded model: how it was placed, and what was tried before."""

    model: str
    path: str
    estimate: Estimate
    reason: str
    failed: tuple[str, ...]
    context: weakref.ref[Any] | None

    def shares(self) -> tuple[Share, ...]:
        """As llama.cpp allocated them; as estimated, where it has no context to ask."""
        context = self.context() if self.context else None
        if context is None:
            return self.estimate.shares
        found = {share.device: Share(share.device) for share in self.estimate.shares}
        for use in context.memory():
            device = "cpu" if use["in_ram"] else use["device"]
            share = found.get(device, Share(device))
            weights = "mapped" if use["is_mapped"] else "weights"
            found[device] = replace(
                share,
                **{weights: getattr(share, weights) + use["weights"]},
                kv=share.kv + use["context"],
                compute=share.compute + use["compute"],
            )
        other = self.estimate.on("cpu").other  # llama.cpp does not tell
        cache = context.metrics()["prompt_cache_bytes"]
        found["cpu"] = replace(found["cpu"], other=other, cache=cache)
        return tuple(found.values())

    def facts(self) -> dict[str, Any]:
        """For `info()`."""
        estimate = self.estimate
        return {
            "placement": {
                "device": "+".join(estimate.devices),
                "gpu_layers": estimate.gpu_layers,
                "kv_type": estimate.kv_type,
                "n_ctx": estimate.n_ctx,
            },
            "reason": self.reason,
            "failed_rungs": list(self.failed),
        }


class Ledger:
    def __init__(self, detect: Callable[[], Machine] = hardware.detect) -> None:
        self._detect = detect
        self._lock = threading.RLock()
        self._entries: weakref.WeakKeyDictionary[Any, Entry] = weakref.WeakKeyDictionary()
        self._reserved: dict[int, Estimate] = {}

    def disown(self) -> None:
        """In a forked child: the models are the parent's, and so is who held the lock."""
        self._lock = threading.RLock()
        self._entries = weakref.WeakKeyDictionary()
        self._reserved = {}

    def enter(self, native: PyModel, entry: Entry) -> None:
        with self._lock:
            self._entries[native] = entry

    def entry_of(self, native: object) -> Entry | None:
        try:
            return self._entries.get(native)
        except TypeError:  # of a stand-in that cannot be referred to weakly
            return None

    def machine(self) -> Machine:
        """This machine, without what loads under way have reserved."""
        with self._lock:
            machine, reserved = self._detect(), dict(self._reserved)
        for estimate in reserved.values():
            machine = _without(machine, estimate)
        return machine

    @contextmanager
    def reserved(self, choose: Callable[[Machine], Rung]) -> Iterator[Rung]:
        """Choose by what is free, and hold that until the load has ended, one way or the other."""
        with self._lock:
            rung = choose(self.machine())
            self._reserved[id(rung)] = rung.estimate
        try:
            yield rung
        finally:
            with self._lock:
                self._reserved.pop(id(rung), None)

    def memory(self) -> MemoryReport:
        """Who holds what, now."""
        with self._lock:
            machine, reserved = self._detect(), list(self._reserved.values())
            loaded = [entry for native, entry in self._entries.items() if native.is_loaded]
        models = tuple(ModelMemory(each.model, each.path, each.shares()) for each in loaded)
        names = ["cpu", *(gpu.device for gpu in machine.usable_gpus if gpu.device)]
        devices = tuple(_device(name, machine, models, reserved) for name in names)
        return MemoryReport(models, devices)

    def unloading(self, device: str) -> dict[str, int]:
        """What unloading each model would free there, most first."""
        freed = {
            model.model: share.own
            for model in self.memory().models
            for share in model.shares
            if share.device == device and share.own
        }
        return dict(sorted(freed.items(), key=lambda item: -item[1]))

    def refusal(self, model: str, rungs: Sequence[Rung]) -> OutOfMemoryError:
        """None of them fits: the first says what is missing, since it is what was asked for."""
        first = rungs[0]
        device, needed, free = first.short or ("cpu", first.estimate.needed, 0)
        message = (
            f"`{model}` with {first.estimate.max_parallel} x {first.estimate.n_ctx} tokens of"
            f" context needs {shown(needed)} on {device}, but {shown(free)} is free"
        )
        freed = self.unloading(device)
        if freed:
            told = (f"unloading `{name}` would free {shown(size)}" for name, size in freed.items())
            message += "; " + ", ".join(list(told)[:3])
        hint = "lower `n_ctx` or `max_parallel`, or take a smaller model or quantization"
        return OutOfMemoryError(
            message,
            hint=hint,
            needed=needed,
            free=free,
            device=device,
            rungs=tuple(rung.told for rung in rungs),
            unloading=freed,
        )


LEDGER = Ledger()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LEDGER.disown)


def memory() -> MemoryReport:
    """Which model of this process holds how much memory on which device, and what is left.

    Bytes, of weights, keys and values, computing, and prompt caches; what others hold; and what is
    free. `print(memory())` shows it as a table.
    """
    return LEDGER.memory()


def entered(
    context: Context | None, native: PyModel, rung: Rung, failed: Sequence[str], model: str
) -> None:
    """Write a model down that was just loaded."""
    refers = None if context is None else weakref.ref(context)
    entry = Entry(model, native.path, rung.estimate, rung.reason, tuple(failed), refers)
    LEDGER.enter(native, entry)


def _without(machine: Machine, estimate: Estimate) -> Machine:
    def less(free: int | None, device: str) -> int | None:
        return None if free is None else max(0, free - estimate.on(device).needed)

    memory = replace(machine.memory, available=less(machine.memory.available, "cpu"))

    def gpu_less(gpu: Gpu) -> Gpu:
        return replace(gpu, free=less(gpu.free, gpu.device)) if gpu.device else gpu

    return replace(machine, memory=memory, gpus=tuple(map(gpu_less, machine.gpus)))


def _device(
    device: str, machine: Machine, models: Sequence[ModelMemory], reserved: Sequence[Estimate]
) -> DeviceMemory:
    held = sum(s.own for model in models for s in model.shares if s.device == device)
    promised = sum(estimate.on(device).needed for estimate in reserved)
    free = machine.free_on(device)
    if device == "cpu":
        total = _total_of(machine.memory)
        ours = _core.memory_info()["private"]
        others = None
        if total is not None and free is not None and ours is not None:
            others = max(0, total - free - ours)
    else:
        gpu = next(gpu for gpu in machine.gpus if gpu.device == device)
        total, others = gpu.total, _of_others(gpu, held)
    return DeviceMemory(device, total, free, held, promised, others)


def _total_of(memory: Memory) -> int | None:
    return min((each for each in (memory.total, memory.limit) if each is not None), default=None)


def _of_others(gpu: Gpu, ours: int) -> int | None:
    """By process where the driver tells, else all that is used but for what our models hold."""
    pid = os.getpid()
    if gpu.processes and all(each.used is not None for each in gpu.processes):
        return sum(each.used or 0 for each in gpu.processes if each.pid != pid)
    return None if gpu.used is None else max(0, gpu.used - ours)
