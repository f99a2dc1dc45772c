"""What is measured: each job asks an engine something and turns what it saw into figures.

An engine with a method of a job's name does that job itself (llama.cpp's own tools do).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from .engines import Answer, Ask, OursAsync
from .models import words

Figures = dict[str, float]

# Prompts of different purposes begin differently, so that none finds another one in a cache.
_WARM_UP, _LONG, _CHAT = 1_000_003, 2_000_003, 3_000_017


def decode(engine: Any, depth: int, tokens: int, seed: int) -> Figures:
    """One stream, after `depth` tokens of prompt."""
    _warm_up(engine)
    answer = engine.one(Ask(words(max(depth, 4), seed), tokens))
    return {
        "rate": answer.rate,
        "longest_gap_ms": answer.longest_gap_s * 1e3,
        "cpu_rate": answer.cpu_rate,
    }


def prefill(engine: Any, prompt: int, seed: int) -> Figures:
    """From the call to the first piece of text, with the tokenizing and the first sample."""
    _warm_up(engine)
    answer = engine.one(Ask(words(prompt, seed), 2))
    cpu_s = answer.pieces_cpu[0] - answer.asked_cpu
    return {
        "rate": prompt / answer.first_s,
        "first_ms": answer.first_s * 1e3,
        "cpu_rate": prompt / cpu_s,
    }


def crowd(engine: Any, streams: int, prompt: int, tokens: int, seed: int) -> Figures:
    """Streams that begin at the same time, each with a prompt of its own."""
    _warm_up(engine)
    asks = [Ask(words(prompt, seed * 1000 + i), tokens) for i in range(streams)]
    answers = engine.together(asks)
    return _crowd_figures(answers)


def follow_up(engine: Any, shared: int, own: int, seed: int) -> Figures:
    """The first token of two requests that share their beginning."""
    _warm_up(engine)
    beginning = words(shared, seed)
    first = engine.one(Ask(beginning + words(own, seed + _CHAT), 8))
    second = engine.one(Ask(beginning + words(own, seed + _LONG), 8))
    return {"first_ms": second.first_s * 1e3, "cold_ms": first.first_s * 1e3}


def beside_prefill(engine: Any, prompt: int, chat: int, seed: int) -> Figures:
    """A short chat that begins while somebody's long prompt is being read."""
    _warm_up(engine)
    long = Ask(words(prompt, seed + _LONG), 2)
    short = Ask(words(16, seed + _CHAT), chat, after_s=0.2)
    long_answer, short_answer = engine.together([long, short])
    return {
        "chat_ms": short_answer.total_s * 1e3,
        "chat_first_ms": short_answer.first_s * 1e3,
        "gap_ms": short_answer.longest_gap_s * 1e3,
        "prompt_ms": long_answer.first_s * 1e3,
    }


def idle(engine: Any, seconds: float, seed: int) -> Figures:
    """The CPU that a loaded model takes when nobody asks anything."""
    engine.one(Ask(words(8, seed), 16))
    time.sleep(0.5)
    before = engine.cpu_seconds()
    time.sleep(seconds)
    return {"percent": (engine.cpu_seconds() - before) / seconds * 100}


def event_loop(engine: OursAsync, streams: int, prompt: int, tokens: int, seed: int) -> Figures:
    """A crowd in one event loop: how late the loop is, and how much of the CPU Python takes."""
    _warm_up(engine)
    asks = [Ask(words(prompt, seed * 1000 + i), tokens) for i in range(streams)]
    delays: list[float] = []

    async def run() -> list[Answer]:
        watch = asyncio.ensure_future(_watch(delays))
        try:
            return list(await asyncio.gather(*map(engine.ask, asks)))
        finally:
            watch.cancel()

    python, process, began = _python_seconds(), time.process_time(), time.perf_counter()
    answers = engine.loop.run_until_complete(run())
    seconds = time.perf_counter() - began
    python, process = _python_seconds() - python, time.process_time() - process
    return {
        **_crowd_figures(answers),
        "lag_p99_ms": quantiles(delays, n=100)[98] * 1e3,
        "lag_median_ms": median(delays) * 1e3,
        "python_percent": python / process * 100,
        "python_us_per_token": python / sum(a.tokens for a in answers) * 1e6,
        "cpus_busy": process / seconds,
    }


JOBS: dict[str, Callable[..., Figures]] = {
    job.__name__: job
    for job in (decode, prefill, crowd, follow_up, beside_prefill, idle, event_loop)
}


def _warm_up(engine: Any) -> None:
    engine.one(Ask(words(24, _WARM_UP), 8))


def _crowd_figures(answers: list[Answer]) -> Figures:
    seconds = max(a.pieces[-1] for a in answers) - min(a.asked for a in answers)
    cpu_s = max(a.pieces_cpu[-1] for a in answers) - min(a.asked_cpu for a in answers)
    firsts = [a.first_s * 1e3 for a in answers]
    return {
        "seconds": seconds,
        "rate": sum(a.tokens for a in answers) / seconds,
        "cpu_rate": sum(a.tokens for a in answers) / cpu_s,
        "first_ms": median(firsts),
        "last_first_ms": max(firsts),
        "gap_ms": max(a.longest_gap_s for a in answers) * 1e3,
    }


async def _watch(delays: list[float], every: float = 0.005) -> None:
    """How much later than asked for the loop comes back, again and again."""
    while True:
        due = time.perf_counter() + every
        await asyncio.sleep(every)
        delays.append(time.perf_counter() - due)


def _python_seconds() -> float:
    """CPU seconds of the threads that run Python: the event loop's and the courier's."""
    threads = [t for t in threading.enumerate() if t.ident and "log" not in t.name]
    clocks = [time.pthread_getcpuclockid(t.ident) for t in threads if t.ident]
    return sum(map(time.clock_gettime, clocks))
