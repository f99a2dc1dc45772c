"""One ledger for all models of this process: who holds how much memory, and what a load may have.

It keeps no account of who has left: it looks who is there. A load reserves its estimate before it
begins, so that two loads at a time do not count on the same memory; when the model is there, what
llama.cpp really allocated counts instead.

A worker has a ledger of its own, with its one model. It is asked what that holds, and before it
loads it asks for what the model will need (`promise`): this ledger decides.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .. import _core, _native, hardware
from ..errors import OutOfMemoryError
from ..hardware import Gpu, Machine, Memory, shown
from ._estimate import Estimate, Share

if TYPE_CHECKING:
    from .._core import PyModel
    from .._courier import Context
    from ..placement import Rung


@dataclass(frozen=True)
class WorkerMemory:
    """The process of its own that a model lives in, in bytes; None: nobody knows."""

    pid: int
    resident: int | None
    """What it has in main memory, mapped pages of files included."""
    private: int | None
    """The part of it that is its own."""


@dataclass(frozen=True)
class ModelMemory:
    """What one loaded model holds, device by device."""

    model: str
    path: str
    shares: tuple[Share, ...]
    worker: WorkerMemory | None = None
    """With `isolation="process"`."""

    @property
    def needs(self) -> dict[str, int]:
        """What had to be free on each device."""
        return {share.device: share.needed for share in self.shares}


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
            if (worker := model.worker) is not None:
                pages = f"{shown(worker.private)} of its own, {shown(worker.resident)} resident"
                lines.append(f"  {model.model} in process {worker.pid}: {pages}")
            for share in model.shares:
                lines.append(
                    f"  {model.model} on {share.device}: weights {shown(share.weights)}"
                    f" + {shown(share.mapped)} mapped, keys and values {shown(share.kv)},"
                    f" compute {shown(share.compute)}, prompt cache {shown(share.cache)},"
                    f" other {shown(share.other)}"
                )
        return "\n".join(lines)


class Holder(Protocol):
    """Who holds memory as long as it is loaded: a model here, or a worker."""

    @property
    def is_loaded(self) -> bool: ...


class Lodger(Protocol):
    """What the ledger knows of one."""

    def memory(self) -> ModelMemory: ...
    def machine(self) -> Machine | None:
        """As it is seen from there, if llama.cpp runs there and not here."""


@dataclass(frozen=True)
class Entry:
    """A model in this process: how it was placed, and what was tried before."""

    model: str
    path: str
    estimate: Estimate
    reason: str
    failed: tuple[str, ...]
    context: weakref.ref[Any] | None

    def memory(self) -> ModelMemory:
        return ModelMemory(self.model, self.path, self.shares())

    def machine(self) -> None:
        return None

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
        self._entries: weakref.WeakKeyDictionary[Any, Lodger] = weakref.WeakKeyDictionary()
        self._reserved: dict[object, Mapping[str, int]] = {}
        self.elsewhere: Elsewhere = lambda needs, beside: None

    def disown(self) -> None:
        """In a forked child: the models are the parent's, and so is who held the lock."""
        self._lock = threading.RLock()
        self._entries = weakref.WeakKeyDictionary()
        self._reserved = {}

    def enter(self, holder: Holder, entry: Lodger) -> None:
        with self._lock:
            self._entries[holder] = entry

    def entry_of(self, holder: object) -> Lodger | None:
        try:
            return self._entries.get(holder)
        except TypeError:  # of a stand-in that cannot be referred to weakly
            return None

    @property
    def can_detect(self) -> bool:
        """Without starting llama.cpp in this process."""
        return _native.is_started() or bool(self._lodgers())

    def detected(self) -> Machine:
        """This machine. Where llama.cpp runs in workers only, one of them looks: started here it
        would take a GPU's memory, and could take this process along."""
        if not _native.is_started():
            for entry in self._lodgers():
                if (machine := entry.machine()) is not None:
                    return machine
        return self._detect()

    def machine(self) -> Machine:
        """This machine, without what loads under way have reserved."""
        return self.without_reserved(self.detected())

    def without_reserved(self, machine: Machine) -> Machine:
        with self._lock:
            return machine.less(_sum(self._reserved.values()))

    @contextmanager
    def reserved(self, choose: Callable[[Machine], Rung]) -> Iterator[Rung]:
        """Choose by what is free, and hold that until the load has ended, one way or the other."""
        with self._lock:
            rung = choose(self.machine())
            while others := self.elsewhere(rung.estimate.needs, self._reserved.get(_OTHERS, {})):
                self._reserved[_OTHERS] = others
                rung = choose(self.machine())
            self._reserved[id(rung)] = rung.estimate.needs
        try:
            yield rung
        finally:
            self.release(id(rung))

    def promise(
        self, load: object, needs: Mapping[str, int], beside: Mapping[str, int]
    ) -> dict[str, int] | None:
        """Reserve for a load in a worker, until `release`. It chose its needs `beside` what it
        knew of others; if those have reserved more by now, they are told, and nothing is reserved.
        """
        with self._lock:
            others = _sum(held for key, held in self._reserved.items() if key != load)
            if any(size > beside.get(device, 0) for device, size in others.items()):
                return others
            self._reserved[load] = needs
            return None

    def release(self, load: object) -> None:
        with self._lock:
            self._reserved.pop(load, None)

    def memory(self) -> MemoryReport:
        """Who holds what, now."""
        models, machine = self._models(), self.detected()
        with self._lock:
            reserved = _sum(self._reserved.values())
        names = ["cpu", *(gpu.device for gpu in machine.usable_gpus if gpu.device)]
        devices = tuple(_device(name, machine, models, reserved) for name in names)
        return MemoryReport(models, devices)

    def unloading(self, device: str) -> dict[str, int]:
        """What unloading each model would free there, most first."""
        freed = {
            model.model: share.own
            for model in self._models()
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
        hint = "lower `n_ctx` or `max_parallel`, or take a smaller model or quantization"
        told = tuple(rung.told for rung in rungs)
        facts = {"needed": needed, "free": free, "device": device, "rungs": told}
        return self.with_unloading(OutOfMemoryError(message, hint=hint, **facts))

    def with_unloading(self, refusal: OutOfMemoryError) -> OutOfMemoryError:
        """A refusal, which may be a worker's, with what other models hold where it was short."""
        freed = self.unloading(refusal.device)
        told = [f"unloading `{name}` would free {shown(size)}" for name, size in freed.items()]
        message = "; ".join([refusal.message, ", ".join(told[:3])] if told else [refusal.message])
        facts = {**refusal._facts, "unloading": freed}
        return OutOfMemoryError(message, hint=refusal.hint, **facts)

    def _models(self) -> tuple[ModelMemory, ...]:
        return tuple(entry.memory() for entry in self._lodgers())

    def _lodgers(self) -> list[Lodger]:
        with self._lock:
            return [entry for holder, entry in self._entries.items() if holder.is_loaded]


Elsewhere = Callable[[Mapping[str, int], Mapping[str, int]], Mapping[str, int] | None]
"""In a worker, its parent's `promise`."""
_OTHERS = "reserved by others, as the parent told"


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


def _sum(reservations: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """By device."""
    found: dict[str, int] = {}
    for needs in reservations:
        for device, size in needs.items():
            found[device] = found.get(device, 0) + size
    return found


def _device(
    device: str, machine: Machine, models: Sequence[ModelMemory], reserved: Mapping[str, int]
) -> DeviceMemory:
    held = sum(s.own for model in models for s in model.shares if s.device == device)
    free, workers = machine.free_on(device), [m.worker for m in models if m.worker is not None]
    if device == "cpu":
        total = _total_of(machine.memory)
        ours = [_core.memory_info()["private"], *(worker.private for worker in workers)]
        others = None
        if total is not None and free is not None and None not in ours:
            others = max(0, total - free - sum(each or 0 for each in ours))
    else:
        gpu = next(gpu for gpu in machine.gpus if gpu.device == device)
        pids = {os.getpid(), *(worker.pid for worker in workers)}
        total, others = gpu.total, _of_others(gpu, held, pids)
    return DeviceMemory(device, total, free, held, reserved.get(device, 0), others)


def _total_of(memory: Memory) -> int | None:
    return min((each for each in (memory.total, memory.limit) if each is not None), default=None)


def _of_others(gpu: Gpu, ours: int, pids: Collection[int]) -> int | None:
    """By process where the driver tells, else all that is used but for what our models hold."""
    if gpu.processes and all(each.used is not None for each in gpu.processes):
        return sum(each.used or 0 for each in gpu.processes if each.pid not in pids)
    return None if gpu.used is None else max(0, gpu.used - ours)
