"""The machine that is measured on: what it is, and who else is using it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")

# CPUs that others may use without being noticed: more changes figures by more than they spread.
QUIET = 0.15


def facts() -> dict[str, Any]:
    """What a figure depends on and a reader cannot see."""
    cpu = _lines("/proc/cpuinfo")
    memory = _lines("/proc/meminfo").get("MemTotal", "0").split()[0]
    is_virtual = "hypervisor" in cpu.get("flags", "")
    return {
        "processor": cpu.get("model name", platform.processor()),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual machine": is_virtual,
        "memory_gib": round(int(memory) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}, {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def num_cores() -> int:
    """Physical cores that this process may use; at most 8, as everybody here would choose."""
    usable = os.sched_getaffinity(0)
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return min(len(siblings), 8)


def who_is_busy(seconds: float = 1.0) -> list[tuple[float, str]]:
    """CPUs used by each process that is not ours, the greediest first."""
    before, began = _cpu_by_process(), time.perf_counter()
    time.sleep(seconds)
    took = time.perf_counter() - began
    used = []
    for process, (cpu, name) in _cpu_by_process().items():
        share = (cpu - before.get(process, (cpu, name))[0]) / took
        if share > 0.02 and process != os.getpid():
            used.append((share, name))
    return sorted(used, reverse=True)


@dataclass
class Disturbance:
    cpus: float = 0.0
    """How many CPUs somebody else used meanwhile, the host of a virtual machine included."""

    @property
    def is_too_much(self) -> bool:
        return self.cpus > QUIET


@contextmanager
def disturbance() -> Iterator[Disturbance]:
    """What was used of the machine beyond us and the children that we waited for."""
    found = Disturbance()
    busy, ours, began = _busy_seconds(), _our_seconds(), time.perf_counter()
    yield found
    others = (_busy_seconds() - busy) - (_our_seconds() - ours)
    found.cpus = max(0.0, others / (time.perf_counter() - began))


@dataclass
class Neighbours:
    process_ids: list[int]
    cpus: float = 0.0
    """What they got, all together."""


@contextmanager
def neighbours(nice: int, cores: int) -> Iterator[Neighbours]:
    """Processes that compute without a pause, each held to a core of its own; 0 means all cores.

    Held there, a polite one cannot make way by moving. Whoever is measured may go where it likes.
    """
    held = sorted(os.sched_getaffinity(0))[: cores or None]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _NEIGHBOUR, str(core), str(nice)], stdout=subprocess.PIPE
        )
        for core in held
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        found = Neighbours([process.pid for process in processes])
        before, began = _cpu_by_process(), time.perf_counter()
        yield found
        after, seconds = _cpu_by_process(), time.perf_counter() - began
        found.cpus = sum(after[i][0] - before[i][0] for i in found.process_ids) / seconds
    finally:
        for process in processes:
            process.kill()
            process.communicate()


_NEIGHBOUR = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.nice(int(sys.argv[2]))
print(flush=True)
while True:
    pass
"""


def _busy_seconds() -> float:
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _idle, _waiting, irq, soft_irq, stolen = fields
    return (user + nice + system + irq + soft_irq + stolen) / _TICKS


def _our_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_by_process() -> dict[int, tuple[float, str]]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            fields = (path / "stat").read_text().rsplit(") ", 1)[1].split()
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            cpu = (int(fields[11]) + int(fields[12])) / _TICKS
            found[int(path.name)] = (cpu, command.strip()[:60] or path.name)
    return found


def _lines(path: str) -> dict[str, str]:
    """The first value of each `name: value` in a file."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found
