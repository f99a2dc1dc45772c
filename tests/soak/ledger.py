"""The accounts of a soak: how requests ended, what memory did, and what was wrong."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tabagent_model

MIB_PER_1000_REQUESTS = 1.0
# What malloc keeps or gives back at a moment's notice; a slope over a short run is made of it.
NOISE_MIB = 3.0
SAMPLES = 400


class Ledger:
    """Requests with a number below zero warm up: their faults count, and nothing else of them."""

    def __init__(
        self,
        requests: int,
        warm_up: int,
        on_sample: Callable[[], object] = lambda: None,
        measure: Callable[[], float] | None = None,
    ) -> None:
        self.requests = requests
        """0: known only at the end, and whoever knows the time takes the samples."""
        self.warm_up = warm_up
        self.on_sample = on_sample
        self._measure = measure or private_mib
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[tuple[int, float]] = []
        self._seconds: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self._lock = threading.Lock()
        self._began = time.perf_counter()

    def note(self, number: int, kind: str, outcome: str, seconds: float) -> None:
        with self._lock:
            self.counts["ended"] += 1
            if number >= 0:
                self.outcomes[kind][outcome] += 1
                self._seconds[kind].append(seconds)
        if number >= 0 and self.requests and number % max(self.requests // SAMPLES, 1) == 0:
            self.sample(number)

    def sample(self, number: int) -> None:
        self.memory.append((number, self._measure()))
        self.on_sample()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self._lock:
            self.counts["faults"] += 1
            if len(self.faults) < 50:
                self.faults.append(what)

    def close(self) -> None:
        ended, begun = self.counts["ended"], self.warm_up + self.requests
        if ended != begun:
            self.fault(f"{ended} of {begun} requests came to an end")
        if fault := growth_fault(self.memory):
            self.fault(fault)

    def report(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        slope, growth = slope_of(self.memory)
        megabytes = [mib for _, mib in self.memory]
        return {
            "requests": self.requests,
            "warm_up": self.warm_up,
            "seconds": round(seconds, 1),
            "requests_per_second": round(self.counts["ended"] / seconds, 1),
            "machine": machine(),
            "version": tabagent_model.__version__,
            "kinds": {
                kind: {
                    "requests": outcomes.total(),
                    "ended": dict(outcomes.most_common()),
                    **self._percentiles(kind),
                }
                for kind, outcomes in sorted(self.outcomes.items())
            },
            "queue_full": self.counts["queue full"],
            "memory": {
                "mib_per_1000_requests": round(slope, 3),
                "growth_mib": round(growth, 2),
                "least_mib": round(min(megabytes, default=0), 1),
                "greatest_mib": round(max(megabytes, default=0), 1),
                "samples": [(number, round(mib, 2)) for number, mib in self.memory],
            },
            "num_faults": self.counts["faults"],
            "faults": self.faults,
        }

    def _percentiles(self, kind: str) -> dict[str, float]:
        ordered = sorted(self._seconds[kind])
        last = len(ordered) - 1
        return {f"p{p}_ms": round(ordered[last * p // 100] * 1000, 2) for p in (50, 99)}


def markdown(report: dict[str, Any]) -> str:
    memory = report["memory"]
    computed_by = f", {report['threads']} threads an engine" if "threads" in report else ""
    lines = [
        f"{report['requests']:,} requests and {report['warm_up']:,} before them to warm up, in"
        f" {report['seconds']:,} s ({report['requests_per_second']} per second), by"
        f" {report['users']} users{computed_by}, seed {report['seed']}; {report['machine']},"
        f" tabagent_model {report['version']}.",
        "",
        "| kind | requests | ended | p50 ms | p99 ms |",
        "|---|---:|---|---:|---:|",
    ]
    for kind, found in report["kinds"].items():
        ended = ", ".join(f"{count:,} {what}" for what, count in found["ended"].items())
        row = (kind, f"{found['requests']:,}", ended, found["p50_ms"], found["p99_ms"])
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        f"The queue was full {report['queue_full']:,} times. Private memory was"
        f" {memory['least_mib']} to {memory['greatest_mib']} MiB and grew by"
        f" {memory['mib_per_1000_requests']} MiB per 1,000 requests.",
        *report.get("more", ()),
        f"Faults: {report['num_faults'] or 'none'}.",
        *(f"- {fault}" for fault in report["faults"]),
    ]
    return "\n".join(lines) + "\n"


def growth_fault(samples: Sequence[tuple[int, float]]) -> str | None:
    """That memory grows, if it does; a sample is the number of a request and MiB."""
    slope, growth = slope_of(samples)
    if slope > MIB_PER_1000_REQUESTS and growth > NOISE_MIB:
        return f"memory grows by {slope:.2f} MiB per 1,000 requests, {growth:.1f} in all"
    return None


def slope_of(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """MiB per 1,000 requests by Theil and Sen, and what that makes in all."""
    points = sorted(samples)
    slopes = [
        (after - before) / (later - earlier)
        for at, (earlier, before) in enumerate(points)
        for later, after in points[at + 1 :]
        if later > earlier
    ]
    if not slopes:
        return 0.0, 0.0
    slope = statistics.median(slopes)
    return slope * 1000, slope * (points[-1][0] - points[0][0])


def private_mib(process: int | str = "self") -> float:
    """Not what is resident: pages of the model file come and go as the system likes."""
    status = Path(f"/proc/{process}/status").read_text()
    kinds = ("RssAnon:", "VmSwap:")
    return sum(int(status.partition(kind)[2].split(None, 1)[0]) for kind in kinds) / 1024


def belongings(process: int | str = "self") -> dict[str, int]:
    """What a process has beside memory."""
    return {
        "file descriptors": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": len(list(Path(f"/proc/{process}/task").iterdir())),
        "children": len(children(process)),
    }


def children(process: int | str = "self") -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):  # it has just ended
            found += map(int, (thread / "children").read_text().split())
    return found


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = cpuinfo.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    return f"{os.cpu_count()} CPUs ({name}), Python {platform.python_version()}"
