"""Runs a soak, prints its report, and ends with 1 if anything was wrong."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tabagent_model import AsyncModel, Completion, Model, ModelConfig, PyModel
from tabagent_model._core import Event

from . import http
from .ledger import Ledger, belongings, markdown
from .plan import N_CTX, REFERENCE, REFERENCE_FIELDS, Plan
from .users import Tasks, Threads

M = TypeVar("M", Model, AsyncModel)

QUEUE_SIZE = 64
M_ARENA_MAX = -8  # of malloc.h
PATIENCE_S = 10
PATIENCE_WITH_ALL_S = 300


def main() -> int:
    args = arguments()
    report = http.soak(args.minutes, args.users, args.seed) if args.http else soak_engine(args)
    print(markdown(report), end="")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(report))
    return 1 if report["num_faults"] else 0


def soak_engine(args: argparse.Namespace) -> dict[str, Any]:
    take_one_arena()
    plan = Plan(args.seed, args.requests, args.cancels, args.mistakes, args.loads)
    expected = reference()
    before = least_belongings()
    ledger = Ledger(args.requests, args.warm_up, on_sample=watch)
    watch()
    soak(plan, ledger, args.users, args.threads, expected)
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    if not eventually(lambda: least_belongings() == before):
        ledger.fault(f"left behind: {belongings()}, and before it was {before}")
    ledger.close()
    asked = {"seed": args.seed, "users": args.users, "threads": args.threads}
    return {**asked, **ledger.report()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=1000, help="requests before them (1000)")
    parser.add_argument("--users", type=int, default=8)
    threads = "that compute, for each engine (2, so that they meet)"
    parser.add_argument("--threads", type=int, default=2, help=threads)
    parser.add_argument("--cancels", type=float, default=0.1, help="their share (0.1)")
    parser.add_argument("--mistakes", type=float, default=0.1, help="their share (0.1)")
    parser.add_argument("--loads", type=int, default=100, help="rounds of load and unload (100)")
    parser.add_argument("--http", action="store_true", help="over HTTP, for so many --minutes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    parser.add_argument("--markdown", type=Path, help="write the table into this file")
    return parser.parse_args()


def least_belongings() -> dict[str, int]:
    """Of some moments: a thread that has been joined is still there for a little while."""
    moments = []
    for _ in range(20):
        time.sleep(0.02)
        moments.append(belongings())
    return {name: min(moment[name] for moment in moments) for name in moments[0]}


def watch() -> None:
    """Where nothing ends any more for minutes, say what everybody is doing, and end with 1."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(PATIENCE_WITH_ALL_S, exit=True)


def take_one_arena() -> None:
    """Let all threads allocate from one place.

    Otherwise each has an arena of malloc's, which take thousands of requests to come to their size;
    with one, what grows is what we lose.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def soak(
    plan: Plan, ledger: Ledger, num_users: int, num_threads: int, expected: Completion
) -> None:
    """Half of the users are threads, half are tasks; each half has an engine of its own."""
    numbers = iter(range(-ledger.warm_up, plan.requests))  # atomic, so all may share it
    border = Border(num_threads)
    with border.open(Model) as model:
        threads = Threads(model, plan, ledger, numbers, expected)
        users = [threading.Thread(target=threads.run) for _ in range(num_users - num_users // 2)]
        for user in users:
            user.start()
        tasks = soak_tasks(plan, ledger, num_users // 2, num_threads, numbers, expected)
        asyncio.run(tasks)
        for user in users:
            user.join()
        border.check(ledger)


async def soak_tasks(
    plan: Plan,
    ledger: Ledger,
    num_users: int,
    num_threads: int,
    numbers: Iterator[int],
    expected: Completion,
) -> None:
    border = Border(num_threads)
    async with border.open(AsyncModel) as model:
        tasks = Tasks(model, plan, ledger, numbers, expected)
        await asyncio.gather(*(tasks.run() for _ in range(num_users)))
        border.check(ledger)


def reference() -> Completion:
    """What a model says that has seen nothing else."""
    with Model.load(n_ctx=N_CTX, max_parallel=1, n_threads=1) as model:
        return model.generate(REFERENCE, **REFERENCE_FIELDS)


class Border:
    """A context that is watched where Python meets Rust: who goes in comes out once."""

    def __init__(self, num_threads: int) -> None:
        self._native = PyModel()
        self._native.load(ModelConfig().path)
        self._context = self._native.create_context(
            N_CTX, n_seq_max=4, queue_size=QUEUE_SIZE, n_threads=num_threads
        )
        self._inside: set[int] = set()
        self._strangers: list[int] = []

    def open(self, face: type[M]) -> M:
        return face(self, self._native)

    def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
        self._inside.add(request_id)
        try:
            self._context.submit(request_id, prompt, params, *chat)
        except BaseException:
            self._inside.remove(request_id)
            raise

    def next_events(self) -> Sequence[Event]:
        events = self._context.next_events()
        for event in events:
            if event.request_id not in self._inside:
                self._strangers.append(event.request_id)
            elif event.is_last:
                self._inside.remove(event.request_id)
        return events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def check(self, ledger: Ledger) -> None:
        def is_idle() -> bool:
            metrics = self._context.metrics()
            return not self._inside and metrics["running"] == metrics["waiting"] == 0

        if not eventually(is_idle):
            metrics = self._context.metrics()
            ledger.fault(f"never ended: {sorted(self._inside)[:20]}, the engine says {metrics}")
        if self._strangers:
            ledger.fault(f"events for requests that had ended: {self._strangers[:20]}")


def eventually(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.01)
    return False


if __name__ == "__main__":
    sys.exit(main())
