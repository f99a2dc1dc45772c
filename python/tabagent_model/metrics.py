"""The engine's counters as Prometheus text.

Dashboards exist for llama.cpp's names and for vLLM's, so both are given; what neither has a name
for is called `tabagent:…`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any, Literal

Kind = Literal["counter", "gauge"]

_SIMPLE: tuple[tuple[str, Kind, str, str], ...] = (
    ("llamacpp:prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens."),
    ("llamacpp:prompt_seconds_total", "counter", "prompt_seconds", "Seconds spent on prompts."),
    ("llamacpp:tokens_predicted_total", "counter", "generated_tokens", "Generated tokens."),
    (
        "llamacpp:tokens_predicted_seconds_total",
        "counter",
        "decode_seconds",
        "Seconds spent on generating.",
    ),
    ("llamacpp:n_decode_total", "counter", "steps", "Steps of the engine."),
    ("llamacpp:requests_processing", "gauge", "running", "Requests that run."),
    ("llamacpp:requests_deferred", "gauge", "waiting", "Requests that wait for a place."),
    ("vllm:num_requests_running", "gauge", "running", "Requests that run."),
    ("vllm:num_requests_waiting", "gauge", "waiting", "Requests that wait for a place."),
    ("vllm:kv_cache_usage_perc", "gauge", "kv_cache_usage", "Share of the places' tokens in use."),
    ("vllm:prefix_cache_queries_total", "counter", "prompt_tokens", "Prompt tokens looked up."),
    ("vllm:prefix_cache_hits_total", "counter", "cached_tokens", "Prompt tokens found computed."),
    ("vllm:prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens."),
    ("vllm:generation_tokens_total", "counter", "generated_tokens", "Generated tokens."),
    ("vllm:num_preemptions_total", "counter", "preemptions", "Requests that had to wait again."),
    ("tabagent:requests_total", "counter", "requests", "Requests that came in."),
    ("tabagent:shared_steps_total", "counter", "shared_steps", "Steps beside another model's."),
    ("tabagent:dropped_tokens_total", "counter", "dropped_tokens", "Tokens lost to overflow."),
    ("tabagent:prompt_cache_bytes", "gauge", "prompt_cache_bytes", "Main memory for beginnings."),
)

_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "first_token_s", "From the call to the first token."),
    ("vllm:inter_token_latency_seconds", "gap_s", "From one token to the next."),
    ("vllm:e2e_request_latency_seconds", "request_s", "From the call to the end."),
    ("vllm:request_queue_time_seconds", "queue_s", "From the call to a place."),
)

_ENDS = ("stop", "length", "cancelled", "error")


def prometheus(metrics: Mapping[str, Any], model: str) -> str:
    """Text in Prometheus' exposition format of what `Model.metrics()` gives."""
    return prometheus_of_many({model: metrics})


def prometheus_of_many(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of several models, by name."""
    return "".join(f"{line}\n" for line in _lines(engines))


def _lines(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    labelled = [(f'model_name="{_escaped(name)}"', told) for name, told in engines.items()]
    for name, kind, key, meaning in _SIMPLE:
        if found := [(label, told[key]) for label, told in labelled if key in told]:
            yield from _head(name, kind, meaning)
            yield from (f"{name}{{{label}}} {value}" for label, value in found)
    if found := [(label, told) for label, told in labelled if told.get("busy_slots")]:
        name = "llamacpp:n_busy_slots_per_decode"
        yield from _head(name, "gauge", "Requests per step.")
        for label, told in found:
            yield f"{name}{{{label}}} {told['busy_slots'] / told['steps']}"
    name = "vllm:request_success_total"
    yield from _head(name, "counter", "Requests that ended.")
    for label, told in labelled:
        for reason in _ENDS:
            yield f'{name}{{{label},finished_reason="{reason}"}} {told.get(f"ended_{reason}", 0)}'
    for name, key, meaning in _HISTOGRAMS:
        if found := [(label, told[key]) for label, told in labelled if key in told]:
            yield from _head(name, "histogram", meaning)
            for label, times in found:
                yield from _histogram(name, label, times)


def _head(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"


def _histogram(name: str, label: str, times: Mapping[str, Any]) -> Iterator[str]:
    for bound, count in times["buckets"].items():
        le = "+Inf" if bound == inf else bound
        yield f'{name}_bucket{{{label},le="{le}"}} {count}'
    yield f"{name}_sum{{{label}}} {times['sum']}"
    yield f"{name}_count{{{label}}} {times['count']}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
