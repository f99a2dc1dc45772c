"""What the figures belong to: this machine, the memory in use on it, and where a model lies."""

from __future__ import annotations

import time
from dataclasses import dataclass

from .. import _core, hardware
from ..hardware import MIB, Machine, shown
from ..model import Model

MB = 1_000_000
SETTLE_S = 0.5
"""A driver takes its time to give memory back."""


@dataclass(frozen=True)
class Reading:
    """Bytes in use; None, never 0, where nobody tells."""

    rss: int | None
    """What of this process lies in main memory, mapped model files included."""
    vram: int | None
    """Of all GPUs that llama.cpp can compute on, whoever uses it."""

    def __str__(self) -> str:
        return f"RSS {_megabytes(self.rss)}, VRAM {_megabytes(self.vram)}"


def read(machine: Machine | None = None) -> Reading:
    """Now."""
    machine = hardware.detect() if machine is None else machine
    rss_mb = _core.process_rss_mb()
    used = [gpu.used for gpu in machine.usable_gpus]
    known = [each for each in used if each is not None]
    return Reading(
        rss=None if rss_mb is None else round(rss_mb * MIB),
        vram=sum(known) if known and len(known) == len(used) else None,
    )


def read_after_unload(was_on_gpu: bool) -> Reading:
    if was_on_gpu:
        time.sleep(SETTLE_S)
    return read()


def growth(before: int | None, after: int | None) -> float | None:
    """Megabytes; None where one of the two is not known."""
    return None if before is None or after is None else (after - before) / MB


def facts_of(machine: Machine) -> dict[str, str]:
    """What stands above a table."""
    cpu, gpus = machine.cpu, machine.usable_gpus
    return {
        "version": f"tabagent_model {_core.__version__}, llama.cpp {_core.LLAMA_CPP_VERSION}",
        "machine": f"{cpu.name}, {cpu.threads} threads, module {cpu.module},"
        f" {shown(machine.memory.available)} of {shown(machine.memory.total)} available",
        "GPU": ", ".join(f"{gpu.name} ({gpu.device}, {shown(gpu.total)})" for gpu in gpus)
        or f"none: {machine.reason}",
    }


def placed(model: Model) -> str:
    """Where its layers are, which may be less than was asked for."""
    info = model.info()
    where = f"{info['placement']['device']}, {info['n_threads']} threads"
    if info["gpu_layers"]:
        where += f", {info['gpu_layers']} of {info['n_layers'] + 1} layers on a GPU"
    return f"{where}; {info['reason']}" if info["failed_rungs"] else where


def _megabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / MB:,.0f} MB"
