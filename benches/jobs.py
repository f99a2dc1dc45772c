"""What is measured: each job asks an engine something and turns what it saw into figures.

An engine with a method of a job's name does that job itself (llama.cpp's own tools do).
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

from . import load
from .engines import (
    EVERYTHING,
    GREEDY,
    SAMPLING,
    Answer,
    Ask,
    LlamaServer,
    OursAsync,
    OurServer,
    Setting,
    in_threads,
)
from .machine import neighbours
from .models import words

Figures = dict[str, float]

# Prompts of different purposes begin differently, so that none finds another one in a cache.
_WARM_UP, _LONG, _CHAT, _ALONE = 1_000_003, 2_000_003, 3_000_017, 4_000_037


def decode(engine: Any, depth: int, tokens: int, seed: int) -> Figures:
    """One stream, after `depth` tokens of prompt."""
    _warm_up(engine)
    answer = engine.one(Ask(words(max(depth, 4), seed), tokens))
    return {
        "rate": answer.rate,
        "longest_gap_ms": max(answer.gaps_s) * 1e3,
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
    return {
        "first_ms": second.first_s * 1e3,
        "cold_ms": first.first_s * 1e3,
        "factor": first.first_s / second.first_s,
    }


def beside_prefill(engine: Any, prompt: int, chat: int, chat_is_first: bool, seed: int) -> Figures:
    """A short chat next to somebody's long prompt: either joins the other one at its work."""
    _warm_up(engine)
    alone = engine.one(Ask(words(16, seed + _ALONE), chat))
    gap_s = 1 / alone.rate
    if chat_is_first:  # it has said a few words when the prompt comes
        chat_after_s, prompt_after_s = 0.0, alone.first_s + 3 * gap_s
    else:
        chat_after_s, prompt_after_s = 0.2, 0.0
    long = Ask(words(prompt, seed + _LONG), 2, prompt_after_s)
    short = Ask(words(16, seed + _CHAT), chat, chat_after_s)
    long_answer, short_answer = engine.together([long, short])
    chat_was_first = short_answer.pieces[0] < long_answer.asked < short_answer.pieces[-1]
    prompt_was_first = long_answer.asked < short_answer.asked < long_answer.pieces[0]
    if not (chat_was_first if chat_is_first else prompt_was_first):
        raise RuntimeError("the chat and the long prompt did not meet as they should")
    gaps_s = short_answer.gaps_s
    in_time = sum(piece < long_answer.pieces[0] for piece in short_answer.pieces)
    return {
        "p99_factor": percentile_99(gaps_s) / gap_s,
        "longest_factor": max(gaps_s) / gap_s,
        "in_time_percent": in_time / len(short_answer.pieces) * 100,
        "undisturbed_gap_ms": gap_s * 1e3,
        "chat_ms": short_answer.total_s * 1e3,
        "chat_first_ms": short_answer.first_s * 1e3,
        "prompt_ms": long_answer.first_s * 1e3,
    }


def cancelling(engine: OursAsync, prompt: int, others: int, times: int, seed: int) -> Figures:
    """How long after a cancel the place is free: a chat's beside others, and a long prompt's. For
    the chat it is counted as well how many steps end meanwhile; the first is the one under way."""
    _warm_up(engine)
    dice = random.Random(seed)
    endless = 10**6

    async def cancel(ask: Ask, after_pieces: int, after_s: float) -> tuple[float, int]:
        async with engine.stream(ask) as stream:
            for _ in range(after_pieces):
                await anext(stream)
            await asyncio.sleep(after_s)
            before, began = engine.model.metrics()["steps"], time.perf_counter()
            await stream.aclose()
            return time.perf_counter() - began, engine.model.metrics()["steps"] - before

    async def run() -> Figures:
        answers = [Answer() for _ in range(others)]
        asks = [Ask(words(16, seed * 1000 + i), endless) for i in range(others)]
        beside = [
            asyncio.ensure_future(engine.ask(*both)) for both in zip(asks, answers, strict=True)
        ]
        while any(len(answer.pieces) < 8 for answer in answers):
            await asyncio.sleep(0.01)
        chats, prompts = [], []
        for number in range(times):
            ask = Ask(words(16, (seed + _CHAT) * 1000 + number), endless)
            chats.append(await cancel(ask, 2, dice.uniform(0, 0.02)))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for number in range(times):
            ask = Ask(words(prompt, (seed + _LONG) * 1000 + number), endless)
            prompts.append((await cancel(ask, 0, dice.uniform(0.02, 0.1)))[0])
        took, steps = zip(*chats, strict=True)
        gaps = [gap for answer in answers for gap in answer.gaps_s]
        return {
            "chat_steps": percentile_99(steps),
            "chat_p99_ms": percentile_99(took) * 1e3,
            "prompt_p99_ms": percentile_99(prompts) * 1e3,
            "step_ms": median(gaps) * 1e3,
            "step_p99_ms": percentile_99(gaps) * 1e3,
        }

    return engine.loop.run_until_complete(run())


def beside_neighbours(engine: Any, tokens: int, nice: int, cores: int, seed: int) -> Figures:
    """Decoding alone, then next to processes that compute without a pause."""
    run = getattr(engine, "decode", None) or partial(decode, engine)
    alone = run(depth=4, tokens=tokens, seed=seed)
    with neighbours(nice, cores) as found:
        beside = run(depth=4, tokens=tokens, seed=seed + _CHAT)
    return {
        "kept": beside["rate"] / alone["rate"],
        "rate": beside["rate"],
        "alone_rate": alone["rate"],
        "neighbour_cpus": found.cpus,
    }


def two_models(engine: Any, tokens: int, seed: int) -> Figures:
    """A second model in this process: what both reach together."""
    _warm_up(engine)
    alone = engine.one(Ask(words(4, seed), tokens))
    second = type(engine)(engine.setting)
    try:
        _warm_up(second)
        asks = [Ask(words(4, seed + _CHAT), tokens), Ask(words(4, seed + _LONG), tokens)]
        answers = in_threads(list(zip([engine, second], asks, strict=True)))
    finally:
        second.close()
    return _both(alone, *((answer.tokens, answer.pieces) for answer in answers))


def two_processes(engine: Any, tokens: int, seed: int) -> Figures:
    """A second process with the same model: what both reach together."""
    _warm_up(engine)
    alone = engine.one(Ask(words(4, seed), tokens))
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    ask = Ask(words(4, seed + _LONG), tokens)
    second = spawning.Process(target=_second, args=(there, type(engine), engine.setting, ask))
    second.start()
    there.close()
    try:
        here.recv()
        here.send("now")
        answer = engine.one(Ask(words(4, seed + _CHAT), tokens))
        return _both(alone, (answer.tokens, answer.pieces), here.recv())
    finally:
        second.join()


def sampling(engine: Any, tokens: int, pairs: int, seed: int) -> Figures:
    """What choosing a token takes, when everything that shapes the choice is on."""
    _warm_up(engine)
    rates: dict[str, list[float]] = {"greedy": [], "full": []}
    for pair in range(pairs):
        turns = [("greedy", GREEDY), ("full", EVERYTHING)]
        for name, options in turns if pair % 2 else reversed(turns):
            answer = engine.one(Ask(words(8, seed * 1000 + pair), tokens, sampling=options))
            rates[name].append(answer.rate)
    greedy, full = median(rates["greedy"]), median(rates["full"])
    return {"greedy_rate": greedy, "full_rate": full, "cost_percent": (1 - full / greedy) * 100}


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
        "lag_p99_ms": percentile_99(delays) * 1e3,
        "lag_median_ms": median(delays) * 1e3,
        "python_percent": python / seconds * 100,
        "python_us_per_token": python / sum(a.tokens for a in answers) * 1e6,
        "cpus_busy": process / seconds,
    }


def isolation(
    engine: OursAsync, streams: int, prompt: int, tokens: int, pairs: int, seed: int
) -> Figures:
    """The same model here and in a process of its own, asked in turns."""
    options = {**engine.setting.options, "isolation": "process"}
    other = OursAsync(replace(engine.setting, options=options))
    engines = {"here": engine, "there": other}
    found: dict[str, list[Figures]] = {"here": [], "there": []}
    try:
        for number in range(2 * pairs + 2):
            name = ("here", "there", "there", "here")[number % 4]
            first = (seed * 1000 + number) * 100
            asks = [Ask(words(prompt, first + i), tokens) for i in range(streams)]
            # After the other's turn, for which caches were emptied: a program uses one of them.
            engines[name].one(Ask(words(prompt, first + streams), 8))
            cpu = time.process_time()
            answers = engines[name].together(asks)
            cpu = time.process_time() - cpu
            figures = {**_crowd_figures(answers), "step_us": _decoding_s(answers) * 1e6, "cpu": cpu}
            if number >= 2:  # the first of each is to warm up
                found[name].append(figures)
    finally:
        other.close()
    turns = list(zip(found["here"], found["there"], strict=True))
    return {
        "kept": median(there["rate"] / here["rate"] for here, there in turns),
        "us_per_token": median(there["step_us"] - here["step_us"] for here, there in turns),
        "first_later_ms": median(there["first_ms"] - here["first_ms"] for here, there in turns),
        "here_rate": median(here["rate"] for here, _ in turns),
        "there_rate": median(there["rate"] for _, there in turns),
        "parent_us_per_token": median(there["cpu"] for _, there in turns) / streams / tokens * 1e6,
    }


def http(
    engine: OurServer | LlamaServer,
    clients: int,
    requests: int,
    prompt: Sequence[int],
    answer: Sequence[int],
    seed: int,
    shared: int = 0,
    per_s: float = 0.0,
    counts_http: bool = False,
) -> Figures:
    """Chats over HTTP: of clients that ask in turns, or of as many as come, `per_s`.

    What HTTP costs is what the server takes beside its worker, less what asking such a worker takes
    without HTTP.
    """
    dice = random.Random(seed)
    beginning = [{"role": "system", "content": words(shared, seed + _LONG)}] if shared else []
    chats = []
    for number in range(requests):
        said = words(_between(dice, *prompt), seed * 1000 + number)
        messages = [*beginning, {"role": "user", "content": said}]
        chats.append(load.Chat(messages, _between(dice, *answer), SAMPLING))
    _warm_up_server(engine)
    door, cpu, began = _door_seconds(engine), time.process_time(), time.perf_counter()
    if per_s:
        heard = asyncio.run(load.as_they_come(engine.port, chats, per_s, dice))
    else:
        heard = asyncio.run(load.in_turns(engine.port, chats, clients))
    door = _door_seconds(engine) - door
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    figures = _heard_figures(heard)
    figures["client_percent"] = cpu / seconds * 100
    if isinstance(engine, OurServer):
        per_token = door / sum(each.tokens for each in heard)
        figures["door_us_per_token"] = per_token * 1e6
        if counts_http:
            without = _seconds_without_http(engine.setting, chats, clients)
            figures["http_us_per_token"] = (per_token - without) * 1e6
    return figures


def health(engine: OurServer | LlamaServer, prompt: int, seed: int) -> Figures:
    """How soon `/health` answers while a long prompt is being read."""
    _warm_up_server(engine)
    chat = load.Chat([{"role": "user", "content": words(prompt, seed + _LONG)}], 2, SAMPLING)

    async def run() -> tuple[load.Heard, list[load.Exchange]]:
        async with load.exchange(engine.port, chat.request()) as found:
            asked = await load.until_over(engine.port, "/health", found, every_s=0.02)
        return found.heard(chat.tokens), asked

    heard, asked = asyncio.run(run())
    if heard.failure is not None:
        raise RuntimeError(f"the long prompt: {heard.failure}")
    during = [each for each in asked if each.asked < heard.pieces[0]]
    times = [each.total_s * 1e3 for each in during]
    return {
        "longest_ms": max(times),
        "median_ms": median(times),
        "asked": len(times),
        "failed": sum(each.status != 200 for each in during),
        "prompt_ms": heard.first_s * 1e3,
    }


JOBS: dict[str, Callable[..., Figures]] = {
    job.__name__: job
    for job in (
        decode,
        prefill,
        crowd,
        follow_up,
        beside_prefill,
        beside_neighbours,
        two_models,
        two_processes,
        sampling,
        idle,
        event_loop,
        cancelling,
        isolation,
        http,
        health,
    )
}


def percentile_99(values: Sequence[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def _warm_up(engine: Any) -> None:
    engine.one(Ask(words(24, _WARM_UP), 8))


def _warm_up_server(engine: OurServer | LlamaServer) -> None:
    chats = [load.Chat([{"role": "user", "content": words(24, _WARM_UP + i)}], 8) for i in range(4)]
    failures = [each.failure for each in asyncio.run(load.in_turns(engine.port, chats, 2))]
    if any(failures):
        raise RuntimeError(f"no answer: {failures}")


def _door_seconds(engine: Any) -> float:
    """CPU seconds of what a server does beside computing, where that is a process of its own."""
    return engine.door_seconds() if isinstance(engine, OurServer) else 0.0


def _seconds_without_http(setting: Setting, chats: Sequence[load.Chat], clients: int) -> float:
    """CPU seconds per token of a program that asks the same of a worker process of its own."""
    import uvloop  # the server runs on it, too

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    engine = OursAsync(replace(setting, options={"isolation": "process"}))
    num_tokens = 0

    async def client(left: Iterator[load.Chat]) -> None:
        nonlocal num_tokens
        for chat in left:
            fields = {"max_tokens": chat.tokens, "ignore_eos": True, **chat.fields}
            async with engine.model.stream_chat(chat.messages, **fields) as pieces:
                async for _ in pieces:
                    pass
            num_tokens += pieces.usage.completion_tokens

    async def in_turns(left: Iterator[load.Chat]) -> None:
        await asyncio.gather(*(client(left) for _ in range(clients)))

    try:
        engine.loop.run_until_complete(in_turns(iter(chats[:4])))
        num_tokens, before = 0, time.process_time()
        engine.loop.run_until_complete(in_turns(iter(chats)))
        return (time.process_time() - before) / num_tokens
    finally:
        engine.close()


def _between(dice: random.Random, low: int, high: int) -> int:
    """Twice as many are as likely as half as many."""
    return round(math.exp(dice.uniform(math.log(low), math.log(high))))


def _second(pipe: Connection, kind: type[Any], setting: Setting, ask: Ask) -> None:
    """The other process: it opens its engine, waits for the word, and answers."""
    engine = kind(setting)
    try:
        _warm_up(engine)
        pipe.send("ready")
        pipe.recv()
        answer = engine.one(ask)
        pipe.send((answer.tokens, answer.pieces))
    finally:
        engine.close()


def _both(alone: Answer, *answers: tuple[int, list[float]]) -> Figures:
    """Two that ran at the same time against one alone; the clock is the machine's."""
    seconds = max(pieces[-1] for _, pieces in answers) - min(pieces[0] for _, pieces in answers)
    rate = sum(tokens - 1 for tokens, _ in answers) / seconds
    speeds = [(tokens - 1) / (pieces[-1] - pieces[0]) for tokens, pieces in answers]
    return {
        "kept": rate / alone.rate,
        "rate": rate,
        "alone_rate": alone.rate,
        "slower_to_faster": min(speeds) / max(speeds),
    }


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
        "gap_ms": max(max(a.gaps_s) for a in answers) * 1e3,
    }


def _decoding_s(answers: list[Answer]) -> float:
    """Per token after the first ones."""
    seconds = max(a.pieces[-1] for a in answers) - min(a.pieces[0] for a in answers)
    return seconds / sum(a.tokens - 1 for a in answers)


def _heard_figures(heard: Sequence[load.Heard]) -> Figures:
    good = [each for each in heard if each.failure is None]
    if not good:
        raise RuntimeError(f"all of them failed: {heard[0].failure}")
    firsts = [each.first_s * 1e3 for each in good]
    gaps = [gap * 1e3 for each in good for gap in each.gaps_s]
    seconds = max(each.pieces[-1] for each in good) - min(each.asked for each in heard)
    return {
        "rate": sum(each.tokens for each in good) / seconds,
        "seconds": seconds,
        "first_p50_ms": median(firsts),
        "first_p99_ms": percentile_99(firsts),
        "gap_p50_ms": median(gaps),
        "gap_p99_ms": percentile_99(gaps),
        "failed": len(heard) - len(good),
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
