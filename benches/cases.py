"""The cases: who does which job with which model, and which figures of it are shown."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

HALF = "qwen2.5-0.5b-q4_0"
OURS = "tabagent_model"
OURS_ASYNC = "tabagent_model async"

_ONE = (OURS, "llama-bench", "llama-server", "llama-cpp-python", "xllamacpp")
_TALKING = (OURS, "llama-server", "llama-cpp-python", "xllamacpp")
_MANY = (OURS_ASYNC, "llama-batched-bench", "llama-server", "xllamacpp")


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    unit: str
    more_is_better: bool = False
    has_factor: bool = True
    """Whether how many times more or less it is says anything."""


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    model: str
    job: str
    parameters: dict[str, Any]
    engines: tuple[str, ...]
    metrics: tuple[Metric, ...]
    n_ctx: int = 512
    streams: int = 1
    neighbour: bool = False
    """Whether somebody computes beside it at nice 19."""
    short: dict[str, Any] | None = field(default=None)
    """Parameters for the short run, with the tiny model; None: it is not in there."""

    def by_cpu_time(self) -> Case:
        """The same job, judged by the CPU time it takes."""
        engines = [name for name in self.engines if name not in _OUTSIDE]
        title = f"{self.title}, per CPU second"
        return replace(self, title=title, engines=tuple(engines), metrics=(_CPU_RATE,))

    def shortened(self) -> Case:
        parameters = {**self.parameters, **(self.short or {})}
        streams = parameters.get("streams", self.streams)
        title = self.title.replace(self.model, "tiny")
        changes: dict[str, Any] = dict(model="tiny", parameters=parameters, streams=streams)
        return replace(self, title=title, **changes)


_RATE = Metric("rate", "tokens/s", "tok/s", more_is_better=True)
_FIRST = Metric("first_ms", "first token", "ms")
_CPU_RATE = Metric("cpu_rate", "tokens per CPU second", "tok/s", more_is_better=True)
_OUTSIDE = ("llama-bench", "llama-batched-bench")


def _decode(name: str, model: str, depth: int = 4, tokens: int = 128, **more: Any) -> Case:
    after = f" after {depth:,} tokens" if depth > 4 else ""
    beside = " beside a busy process at nice 19" if more.get("neighbour") else ""
    return Case(
        name,
        f"decode, one stream{after}{beside}, {model}",
        model,
        "decode",
        dict(depth=depth, tokens=tokens),
        _ONE,
        (_RATE,),
        n_ctx=depth + tokens + 128,
        **more,
    )


def _crowd(streams: int) -> Case:
    return Case(
        f"crowd-{streams}",
        f"{streams} streams of 400 + 128 tokens, {HALF}",
        HALF,
        "crowd",
        dict(streams=streams, prompt=400, tokens=128),
        _MANY,
        (Metric("seconds", "until all are done", "s"),),
        n_ctx=640,
        streams=streams,
    )


CASES = (
    _decode("decode", HALF),
    _decode("decode-tiny", "tiny", tokens=256, short=dict(tokens=256)),
    _decode("decode-400", HALF, depth=400),
    _decode("decode-3500", HALF, depth=3500),
    _decode("decode-q8_0", "qwen2.5-0.5b-q8_0"),
    _decode("decode-1.5b", "qwen2.5-1.5b-q4_k", tokens=64),
    _decode("decode-1b", "llama-3.2-1b-q4_0", tokens=64),
    Case(
        "prefill",
        f"prompt of 512 tokens, {HALF}",
        HALF,
        "prefill",
        dict(prompt=512),
        _ONE,
        (_RATE,),
        n_ctx=768,
        short={},
    ),
    Case(
        "first-token",
        f"first token of a 400-token prompt, {HALF}",
        HALF,
        "prefill",
        dict(prompt=400),
        _ONE,
        (_FIRST,),
        n_ctx=768,
    ),
    Case(
        "follow-up",
        f"first token after a shared beginning of 1,000 tokens, {HALF}",
        HALF,
        "follow_up",
        dict(shared=1000, own=20),
        _TALKING,
        (_FIRST, Metric("cold_ms", "first token without it", "ms")),
        n_ctx=1280,
        streams=4,
    ),
    _crowd(8),
    _crowd(32),
    Case(
        "beside-prefill",
        f"a 30-token chat that begins during a 4,000-token prefill, {HALF}",
        HALF,
        "beside_prefill",
        dict(prompt=4000, chat=30),
        (OURS_ASYNC, "llama-server", "xllamacpp"),
        (
            Metric("chat_first_ms", "its first token", "ms"),
            Metric("gap_ms", "its longest pause", "ms"),
            Metric("chat_ms", "its end", "ms"),
            Metric("prompt_ms", "first token of the long prompt", "ms"),
        ),
        n_ctx=4352,
        streams=2,
    ),
    Case(
        "event-loop",
        "64 streams of 16 + 64 tokens in one event loop, tiny",
        "tiny",
        "event_loop",
        dict(streams=64, prompt=16, tokens=64),
        (OURS_ASYNC,),
        (
            _RATE,
            Metric("lag_p99_ms", "the loop's lag, 99th percentile", "ms"),
            Metric("python_percent", "Python's share of the CPU time", "%"),
            Metric("python_us_per_token", "Python's CPU time per token", "µs"),
        ),
        n_ctx=128,
        streams=64,
        short={},
    ),
    Case(
        "crowd-tiny",
        "64 streams of 16 + 64 tokens, tiny",
        "tiny",
        "crowd",
        dict(streams=64, prompt=16, tokens=64),
        _MANY,
        (_RATE,),
        n_ctx=128,
        streams=64,
    ),
    _decode("neighbour", HALF, tokens=16, neighbour=True),
    Case(
        "idle",
        "CPU of a loaded model that nobody asks, tiny",
        "tiny",
        "idle",
        dict(seconds=5),
        _TALKING,
        (Metric("percent", "of one CPU", "%", has_factor=False),),
        short=dict(seconds=1),
    ),
)
