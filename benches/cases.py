"""The cases: who does which job with which model, which figures are shown, what they must reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

HALF = "qwen2.5-0.5b-q4_0"
OURS = "tabagent_model"
OURS_ASYNC = "tabagent_model async"
OURS_SERVED = "tabagent_model serve"
ALL_OURS = (OURS, OURS_ASYNC, OURS_SERVED)
"""One of them is in a case."""
LIKE_US = ", our attention"
"""Ends the name of a tool of llama.cpp that runs with the attention settings that we chose."""
BENCH_LIKE_US = "llama-bench" + LIKE_US
BATCHED_LIKE_US = "llama-batched-bench" + LIKE_US

_ONE = (OURS, "llama-bench", "llama-server", "llama-cpp-python", "xllamacpp")
_TALKING = (OURS, "llama-server", "llama-cpp-python", "xllamacpp")
_MANY = (OURS_ASYNC, "llama-batched-bench", BATCHED_LIKE_US, "llama-server", "xllamacpp")


@dataclass(frozen=True)
class Target:
    """What our figure must reach: a number, or so many times the figure of a contender."""

    bound: float
    against: str | None = None


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    unit: str
    more_is_better: bool = False
    has_factor: bool = True
    """Whether how many times more or less it is says anything."""
    targets: tuple[Target, ...] = ()

    def demand(self, target: Target) -> str:
        sign = "≥" if self.more_is_better else "≤"
        unit = f"x {target.against}" if target.against else self.unit
        return f"{sign} {target.bound:g} {unit}"


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    group: str
    model: str
    job: str
    parameters: dict[str, Any]
    engines: tuple[str, ...]
    metrics: tuple[Metric, ...]
    n_ctx: int = 512
    streams: int = 1
    takes_s: float = 5.0
    """One run of one contender on two cores, about; for the estimate."""
    short: dict[str, Any] | None = field(default=None)
    """Parameters for the short run, with the tiny model; None: it is not in there."""

    def by_cpu_time(self) -> Case:
        """The same job, judged by the CPU time it takes."""
        engines = [name for name in self.engines if name.removesuffix(LIKE_US) not in _OUTSIDE]
        title = f"{self.title}, per CPU second"
        return replace(self, title=title, engines=tuple(engines), metrics=(_CPU_RATE,))

    def shortened(self) -> Case:
        """With the tiny model, for which no target was set unless it is the case's own."""
        parameters = {**self.parameters, **(self.short or {})}
        streams = parameters.get("streams", self.streams)
        metrics = self.metrics
        if self.model != "tiny":
            metrics = tuple(replace(metric, targets=()) for metric in metrics)
        return replace(
            self,
            title=self.title.replace(self.model, "tiny"),
            model="tiny",
            parameters=parameters,
            streams=streams,
            metrics=metrics,
            takes_s=min(self.takes_s, 3.0),
        )


_RATE = Metric("rate", "tokens/s", "tok/s", more_is_better=True)
_FIRST = Metric("first_ms", "first token", "ms")
_CPU_RATE = Metric("cpu_rate", "tokens per CPU second", "tok/s", more_is_better=True)
_KEPT = Metric("kept", "of the undisturbed speed", "x", more_is_better=True)
_AGGREGATE = Metric("kept", "both together, of one alone", "x", more_is_better=True)
_OUTSIDE = ("llama-bench", "llama-batched-bench")


def _with(metric: Metric, *targets: Target) -> Metric:
    return replace(metric, targets=targets)


def _decode(
    name: str,
    model: str,
    *targets: Target,
    depth: int = 4,
    tokens: int = 128,
    takes_s: float = 4,
    short: dict[str, Any] | None = None,
) -> Case:
    after = f" after {depth:,} tokens" if depth > 4 else ""
    return Case(
        name,
        f"decode, one stream{after}, {model}",
        "one-stream",
        model,
        "decode",
        dict(depth=depth, tokens=tokens),
        _ONE,
        (_with(_RATE, *targets),),
        n_ctx=depth + tokens + 128,
        takes_s=takes_s,
        short=short,
    )


def _crowd(streams: int, takes_s: float) -> Case:
    return Case(
        f"crowd-{streams}",
        f"{streams} streams of 400 + 128 tokens, {HALF}",
        "crowd",
        HALF,
        "crowd",
        dict(streams=streams, prompt=400, tokens=128),
        _MANY,
        (
            replace(
                _RATE,
                title="new tokens/s",
                targets=(
                    Target(1.5, "llama-server"),
                    Target(0.97, BATCHED_LIKE_US),
                    Target(3, "xllamacpp"),
                ),
            ),
        ),
        n_ctx=640,
        streams=streams,
        takes_s=takes_s,
    )


def _beside_prefill(name: str, title: str, chat_is_first: bool) -> Case:
    return Case(
        name,
        f"{title}, {HALF}",
        "latency",
        HALF,
        "beside_prefill",
        dict(prompt=4000, chat=30, chat_is_first=chat_is_first),
        (OURS_ASYNC, "llama-server", "xllamacpp"),
        (
            Metric("p99_factor", "p99 gap, of the undisturbed", "x", targets=(Target(3),)),
            Metric("longest_factor", "longest gap, of the undisturbed", "x"),
            # Whoever lets the chat wait until the prompt is read has no gaps to show.
            Metric(
                "in_time_percent",
                "of the chat, said before the long prompt was read",
                "%",
                has_factor=False,
            ),
            Metric("chat_first_ms", "the chat's first token", "ms"),
            Metric("chat_ms", "the chat's end", "ms"),
            Metric("prompt_ms", "first token of the long prompt", "ms"),
        ),
        n_ctx=4352,
        streams=2,
        takes_s=18,
    )


def _neighbour(name: str, who: str, nice: int, cores: int, *targets: Target) -> Case:
    return Case(
        name,
        f"decode beside {who}, {HALF}",
        "neighbours",
        HALF,
        "beside_neighbours",
        dict(tokens=64, nice=nice, cores=cores),
        _ONE,
        (
            _with(_KEPT, *targets),
            replace(_RATE, title="tokens/s beside it"),
            Metric("neighbour_cpus", "what it got", "CPUs", has_factor=False),
        ),
        takes_s=12,
    )


def _two(name: str, title: str, engines: tuple[str, ...], bound: float) -> Case:
    return Case(
        name,
        f"{title}, {HALF}",
        "neighbours",
        HALF,
        name.replace("-", "_"),
        dict(tokens=128),
        engines,
        (_with(_AGGREGATE, Target(bound)), replace(_RATE, title="tokens/s of both")),
        takes_s=10,
    )


def _kv_layout(streams: int, shared: bool, takes_s: float) -> Case:
    whose = "one shared prompt" if shared else "a prompt of 200 each"
    return Case(
        f"kv-layout-{'shared-' if shared else ''}{streams}",
        f"KV cache, {streams} stream{'s' * (streams > 1)}, {whose}, 32 new tokens each, {HALF}",
        "kv-layout",
        HALF,
        "kv_layout",
        dict(streams=streams, prompt=1000 if shared else 200, tokens=32, shared=shared),
        (BATCHED_LIKE_US,),
        (
            Metric("streams_s", "a stream per sequence", "s", has_factor=False),
            Metric("unified_s", "unified", "s", has_factor=False),
            Metric("factor", "unified takes so many times as long", "x", has_factor=False),
        ),
        n_ctx=1280 if shared else 256,
        streams=streams,
        takes_s=takes_s,
    )


def _sampling(name: str, model: str, tokens: int, *targets: Target) -> Case:
    return Case(
        name,
        f"all sampling options against greedy, {model}",
        "sampling",
        model,
        "sampling",
        dict(tokens=tokens, pairs=6),
        (OURS,),
        (
            Metric("cost_percent", "of a step", "%", has_factor=False, targets=targets),
            Metric("full_rate", "all options", "tok/s", more_is_better=True),
            Metric("greedy_rate", "greedy", "tok/s", more_is_better=True),
        ),
        takes_s=12,
    )


def _isolation(name: str, model: str, streams: int, tokens: int, takes_s: float) -> Case:
    crowd = f", {streams} streams" if streams > 1 else ""
    is_tiny = model == "tiny"
    return Case(
        name,
        f"a process of its own against none{crowd}, {model}",
        "isolation",
        model,
        "isolation",
        dict(streams=streams, prompt=16, tokens=tokens, pairs=8),
        (OURS_ASYNC,),
        (
            Metric(
                "kept",
                "of the speed without it",
                "x",
                more_is_better=True,
                targets=() if is_tiny else (Target(0.97),),
            ),
            Metric(
                "us_per_token", "longer per token", "µs", has_factor=False, targets=(Target(30),)
            ),
            Metric("first_later_ms", "later first token", "ms", targets=(Target(1),)),
            Metric("parent_us_per_token", "CPU of the parent per token", "µs"),
            replace(_RATE, key="there_rate", title="tokens/s with it"),
        ),
        n_ctx=tokens + 64,
        streams=streams,
        takes_s=takes_s,
        short=dict(pairs=3) if is_tiny else None,
    )


def _http(
    name: str,
    who: str,
    takes_s: float,
    *more: Metric,
    model: str = HALF,
    metrics: tuple[Metric, ...] | None = None,
    n_ctx: int = 0,
    streams: int = 0,
    short: dict[str, Any] | None = None,
    **parameters: Any,
) -> Case:
    usual = dict(clients=1, requests=8, prompt=[32, 256], answer=[16, 96])
    return Case(
        name,
        f"HTTP, {who}, {model}",
        "http",
        model,
        "http",
        {**usual, **parameters},
        (OURS_SERVED, "llama-server"),
        ((_SERVED_RATE, *_LATENCIES) if metrics is None else metrics) + more + _SERVED_WELL,
        n_ctx=n_ctx,
        streams=streams,
        takes_s=takes_s,
        short=short,
    )


_AS_GOOD = (Target(1.0, "llama-server"),)
_SERVED_RATE = replace(_RATE, title="new tokens/s", targets=(Target(1.4, "llama-server"),))
_LATENCIES = (
    Metric("first_p50_ms", "first token, median", "ms"),
    Metric("first_p99_ms", "first token, 99th percentile", "ms", targets=_AS_GOOD),
    Metric("gap_p50_ms", "between tokens, median", "ms"),
    Metric("gap_p99_ms", "between tokens, 99th percentile", "ms", targets=_AS_GOOD),
)
_SERVED_WELL = (
    Metric("failed", "requests that failed", "requests", has_factor=False, targets=(Target(0),)),
    Metric("client_percent", "the client's share of a core", "%", has_factor=False),
)
# The engine of this model leaves little to be seen but what is around it, and asks for no lead.
_SERVED_TINY = tuple(replace(metric, targets=()) for metric in (_SERVED_RATE, *_LATENCIES))
_DOOR = Metric(
    "door_us_per_token", "CPU of the server beside its worker, per token", "µs", has_factor=False
)
_HTTP = Metric("http_us_per_token", "of it for HTTP", "µs", has_factor=False, targets=(Target(60),))


CASES = (
    _decode("decode", HALF, Target(1.0, "llama-bench")),
    _decode(
        "decode-tiny",
        "tiny",
        Target(0.9, "llama-bench"),
        Target(2, "llama-cpp-python"),
        tokens=256,
        takes_s=2,
        short={},
    ),
    _decode("decode-400", HALF, Target(1.4, "llama-server"), depth=400, takes_s=6),
    _decode("decode-3500", HALF, Target(2, "llama-server"), depth=3500, tokens=64, takes_s=18),
    _decode("decode-q8_0", "qwen2.5-0.5b-q8_0", takes_s=5),
    _decode("decode-1.5b", "qwen2.5-1.5b-q4_k", tokens=64, takes_s=8),
    _decode("decode-1b", "llama-3.2-1b-q4_0", tokens=64, takes_s=8),
    Case(
        "prefill",
        f"prompt of 512 tokens, {HALF}",
        "one-stream",
        HALF,
        "prefill",
        dict(prompt=512),
        _ONE,
        (_with(_RATE, Target(1.0, "llama-bench")),),
        n_ctx=768,
        takes_s=4,
        short={},
    ),
    Case(
        "first-token",
        f"first token of a 400-token prompt, {HALF}",
        "latency",
        HALF,
        "prefill",
        dict(prompt=400),
        (*_ONE, BENCH_LIKE_US),
        # llama-bench tells how long the prompt itself takes, computed as we compute it.
        (_with(_FIRST, Target(1.05, BENCH_LIKE_US)),),
        n_ctx=768,
        takes_s=4,
    ),
    Case(
        "follow-up",
        f"first token after a shared beginning of 1,000 tokens, {HALF}",
        "latency",
        HALF,
        "follow_up",
        dict(shared=1000, own=20),
        _TALKING,
        (
            Metric(
                "factor",
                "so many times as fast as without it",
                "x",
                more_is_better=True,
                targets=(Target(10),),
            ),
            _FIRST,
            Metric("cold_ms", "first token without it", "ms"),
        ),
        n_ctx=1280,
        streams=4,
        takes_s=7,
    ),
    _beside_prefill(
        "chat-during-prefill", "a 30-token chat that begins during a 4,000-token prefill", False
    ),
    _beside_prefill(
        "prefill-during-chat", "a 4,000-token prefill that begins during a 30-token chat", True
    ),
    _crowd(8, takes_s=22),
    _crowd(32, takes_s=75),
    Case(
        "cancel",
        f"a cancelled request among four, {HALF}",
        "crowd",
        HALF,
        "cancelling",
        dict(prompt=2000, others=3, times=200),  # a p99 of fewer would be their greatest
        (OURS_ASYNC,),
        (
            Metric("chat_steps", "p99 until a chat's place is free", "steps", targets=(Target(1),)),
            Metric("chat_p99_ms", "the same", "ms"),
            Metric("step_ms", "a step", "ms"),
            Metric("step_p99_ms", "p99 of the steps", "ms"),
            Metric("prompt_p99_ms", "p99 until a long prompt's is", "ms"),
        ),
        n_ctx=2560,
        streams=4,
        takes_s=40,
        short=dict(prompt=500, times=20),
    ),
    Case(
        "event-loop",
        "64 streams of 16 + 64 tokens in one event loop, tiny",
        "crowd",
        "tiny",
        "event_loop",
        dict(streams=64, prompt=16, tokens=64),
        (OURS_ASYNC,),
        (
            Metric("lag_p99_ms", "the loop's lag, 99th percentile", "ms", targets=(Target(5),)),
            Metric("python_percent", "Python's share of a core", "%", targets=(Target(15),)),
            Metric("python_us_per_token", "Python's CPU time per token", "µs"),
            _RATE,
        ),
        n_ctx=128,
        streams=64,
        takes_s=3,
        short={},
    ),
    Case(
        "crowd-tiny",
        "64 streams of 16 + 64 tokens, tiny",
        "crowd",
        "tiny",
        "crowd",
        dict(streams=64, prompt=16, tokens=64),
        _MANY,
        (_RATE,),
        n_ctx=128,
        streams=64,
        takes_s=4,
    ),
    _neighbour("neighbour-nice-19", "one busy core at nice 19", 19, 1, Target(0.5)),
    _neighbour("neighbour", "one busy core at nice 0", 0, 1),
    _neighbour("neighbour-all-nice-19", "all cores busy at nice 19", 19, 0),
    _neighbour("neighbour-all", "all cores busy at nice 0", 0, 0),
    _two(
        "two-models",
        "two models decoding at once in one process",
        (OURS, "llama-cpp-python", "xllamacpp"),
        0.9,
    ),
    _two("two-processes", "two processes decoding at once", _TALKING, 0.8),
    Case(
        "idle",
        "CPU of a loaded model that nobody asks, tiny",
        "neighbours",
        "tiny",
        "idle",
        dict(seconds=5),
        _TALKING,
        (Metric("percent", "of one CPU", "%", has_factor=False, targets=(Target(0.5),)),),
        takes_s=7,
        short=dict(seconds=1),
    ),
    _kv_layout(1, shared=False, takes_s=5),
    _kv_layout(8, shared=False, takes_s=15),
    _kv_layout(32, shared=False, takes_s=50),
    _kv_layout(8, shared=True, takes_s=15),
    _kv_layout(32, shared=True, takes_s=30),
    _sampling("sampling-0.5b", HALF, 48, Target(3)),
    _sampling("sampling-tiny", "tiny", 200),
    _isolation("isolation-0.5b", HALF, 1, 48, takes_s=22),
    _isolation("isolation-tiny", "tiny", 1, 256, takes_s=8),
    _isolation("isolation-crowd-tiny", "tiny", 64, 64, takes_s=20),
    _http("http-1", "one client", 11),
    _http("http-8", "8 clients", 24, clients=8, requests=24),
    _http("http-32", "32 clients", 37, clients=32, requests=40),
    _http("http-64", "64 clients", 58, clients=64, requests=64),
    _http(
        "http-poisson",
        "as they come, one in a second",
        37,
        metrics=_LATENCIES,
        clients=0,
        requests=32,
        per_s=1.0,
    ),
    _http(
        "http-prefix",
        "8 clients with the same beginning of 600 tokens",
        18,
        clients=8,
        requests=24,
        prompt=[16, 64],
        answer=[16, 32],
        shared=600,
    ),
    Case(
        "http-health",
        f"HTTP, /health while a prompt of 3,500 tokens is read, {HALF}",
        "http",
        HALF,
        "health",
        dict(prompt=3500),
        (OURS_SERVED, "llama-server"),
        (
            Metric("longest_ms", "the longest wait for it", "ms", targets=(Target(100),)),
            Metric("median_ms", "the median", "ms"),
            Metric("prompt_ms", "first token of the prompt", "ms"),
            _SERVED_WELL[0],
        ),
        n_ctx=0,
        streams=0,
        takes_s=22,
    ),
    _http(
        "http-tiny-1",
        "one client",
        6,
        _DOOR,
        model="tiny",
        metrics=_SERVED_TINY,
        requests=16,
        prompt=[8, 32],
        answer=[48, 80],
    ),
    _http(
        "http-tiny-64",
        "64 streams at once",
        10,
        _DOOR,
        _HTTP,
        model="tiny",
        metrics=_SERVED_TINY,
        n_ctx=256,
        streams=64,
        clients=64,
        requests=256,
        prompt=[8, 32],
        answer=[48, 80],
        counts_http=True,
        short=dict(requests=128),
    ),
)

GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
