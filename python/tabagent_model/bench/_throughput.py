"""How fast a model is: by itself, on a GPU against the CPU, and for several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from .. import hardware
from ..hardware import kind_of
from ..model import Model
from ..params import GenerationConfig, ModelConfig, checked_whole
from ..results import InferenceMetrics
from ._files import Chosen
from ._machine import facts_of, placed, read, read_after_unload
from ._report import BenchmarkResult, Report, Target
from ._spike3 import reclaimed, why_no_vram

Tell = Callable[[str], object]

NUM_PROMPT, NUM_STANDARD, NUM_COMPARED, NUM_CROWD = 128, 256, 64, 64
LEAST_N_CTX = 512
EVERYTHING = GenerationConfig(ignore_eos=True, seed=42)

# The seed's own table, by kind of device. Only its rates are asked for: 256 tokens in the times
# that it names would be many times as fast.
RATES = {"cpu": Target("≥", 10), "cuda": Target("≥", 100), "metal": Target("≥", 50)}
EXPECTED = {
    "cpu": ("1 to 3 s", "500 to 2,000 ms", "10 to 50 tok/s"),
    "cuda": ("2 to 5 s", "80 to 200 ms", "100 to 200 tok/s"),
    "metal": ("2 to 5 s", "100 to 300 ms", "50 to 100 tok/s"),
}
SPEED_UP = Target("≥", 5)


def standard(
    model: Chosen,
    *,
    n_gpu_layers: int = 99,
    n_ctx: int = 2048,
    rounds: int = 3,
    tell: Callable[[str], object] = lambda what: None,
) -> Report:
    """Load, write 256 tokens a few times, unload; beside what the seed expected."""
    checked_whole("rounds", rounds, 1, 1000)
    machine, config = hardware.detect(), _config(model, n_gpu_layers, n_ctx)
    with Model.load(config.with_model_path(None)) as tiny:
        _write(tiny, 0, 1)
    readings = {"warm": read_after_unload(True)}
    tell(f"loading {model.path}")
    began = time.perf_counter()
    with Model.load(config) as loaded:
        load_s = time.perf_counter() - began
        kind, is_on_gpu, where = _kind(loaded), loaded.info()["gpu_layers"] > 0, placed(loaded)
        answers = []
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            answers.append(_write(loaded, number, NUM_STANDARD))
        readings["loaded"] = read()
    readings["unloaded"] = read_after_unload(is_on_gpu)
    why_not = why_no_vram(machine, is_on_gpu)
    results = (
        *_beside_the_seed(kind, load_s, answers),
        *reclaimed("model", readings["warm"], readings["unloaded"], why_not),
    )
    facts = {**facts_of(machine), "model": str(model), "it is on": where}
    return Report("standard", facts, results, readings)


def gpu_vs_cpu(
    model: Chosen,
    *,
    n_gpu_layers: int = 99,
    n_ctx: int = 2048,
    tell: Callable[[str], object] = lambda what: None,
) -> Report:
    """The same prompt and the same number of tokens on both."""
    machine, config = hardware.detect(), _config(model, n_gpu_layers, n_ctx)
    facts = {**facts_of(machine), "model": str(model)}
    tell("on the CPU")
    with Model.load(config.cpu_only()) as loaded:
        cpu = _speeds(loaded)
    gpu, why_not = None, why_no_vram(machine, is_on_gpu=bool(machine.usable_gpus))
    if not why_not:
        tell("on the GPU")
        with Model.load(config) as loaded:
            facts["it is on"] = placed(loaded)
            if loaded.info()["gpu_layers"]:
                gpu = _speeds(loaded)
            else:
                why_not = "no layer was on a GPU"
    results = []
    for at, what in enumerate(("reading", "writing")):
        there = None if gpu is None else gpu[at]
        faster = None if there is None else there / cpu[at]
        results += [
            BenchmarkResult(f"{what} on the CPU", cpu[at], "tok/s"),
            BenchmarkResult(f"{what} on the GPU", there, "tok/s", note=why_not),
            BenchmarkResult(f"{what}: speed-up", faster, "x", SPEED_UP, why_not),
        ]
    return Report("gpu-vs-cpu", facts, tuple(results))


def concurrency(
    model: Chosen,
    num_requests: int,
    *,
    n_gpu_layers: int = 99,
    n_ctx: int = 2048,
    tell: Callable[[str], object] = lambda what: None,
) -> Report:
    """One request alone, then so many together: is each answer whole, and how much slower?"""
    checked_whole("num_requests", num_requests, 1, 256)
    config = _config(model, n_gpu_layers, n_ctx).with_parallel(num_requests)
    facts = {**facts_of(hardware.detect()), "model": str(model)}
    with Model.load(config) as loaded:
        facts["it is on"] = placed(loaded)
        tell("one alone")
        alone = _write(loaded, 0, NUM_CROWD)
        tell(f"{num_requests} together")
        prompts = [_prompt(loaded, number + 1) for number in range(num_requests)]
        began = time.perf_counter()
        answers = loaded.generate(prompts, EVERYTHING, max_tokens=NUM_CROWD)
        took_ms = (time.perf_counter() - began) * 1000
    whole = [answer for answer in answers if len(answer.tokens) == NUM_CROWD]
    speeds = [answer.metrics.tokens_per_second for answer in answers]
    firsts = [answer.metrics.time_to_first_token_ms for answer in answers]
    in_turn = num_requests * alone.inference_time_ms
    results = (
        BenchmarkResult("whole answers", len(whole), "of them", Target("=", num_requests)),
        BenchmarkResult("one alone", alone.tokens_per_second, "tok/s"),
        BenchmarkResult("each of them", median(speeds), "tok/s", note=_spread(speeds)),
        BenchmarkResult("first token alone", alone.time_to_first_token_ms, "ms"),
        BenchmarkResult("first token together", median(firsts), "ms", note=_spread(firsts)),
        BenchmarkResult("as fast as one by one", in_turn / took_ms, "x", note="all of it"),
    )
    return Report("concurrency", facts, results)


def _config(model: Chosen, n_gpu_layers: int, n_ctx: int) -> ModelConfig:
    checked_whole("n_ctx", n_ctx, LEAST_N_CTX, 2**24)
    return ModelConfig(model.path, n_ctx=n_ctx, max_parallel=1, gpu_layers=n_gpu_layers)


def _kind(model: Model) -> str:
    """Of the device that most depends on."""
    info = model.info()
    return kind_of(info["placement"]["device"].split("+")[0]) if info["gpu_layers"] else "cpu"


def _prompt(model: Model, number: int) -> list[int]:
    """Another number, another beginning, so that nothing of it was read before."""
    text = f"{number} is the number of this story. " + "Once there was a house by the sea. " * 32
    return model.tokenize(text)[:NUM_PROMPT]


def _write(model: Model, number: int, num_tokens: int) -> InferenceMetrics:
    return model.generate(_prompt(model, number), EVERYTHING, max_tokens=num_tokens).metrics


def _speeds(model: Model) -> tuple[float, float]:
    """Tokens read and written in a second, warm."""
    _write(model, 0, 2)
    metrics = _write(model, 1, NUM_COMPARED)
    return metrics.prompt_tokens / metrics.prompt_eval_ms * 1000, metrics.tokens_per_second


def _beside_the_seed(
    kind: str, load_s: float, answers: Sequence[InferenceMetrics]
) -> list[BenchmarkResult]:
    expected = EXPECTED.get(kind, ("nothing",) * 3)
    load, times, rates = (f"seed: {told}" for told in expected)
    firsts = [each.time_to_first_token_ms for each in answers]
    wholes = [each.inference_time_ms for each in answers]
    speeds = [each.tokens_per_second for each in answers]
    note = f"after {answers[0].prompt_tokens} tokens, {_spread(firsts)}"
    return [
        BenchmarkResult("load", load_s, "s", note=load),
        BenchmarkResult("first token", median(firsts), "ms", note=note),
        BenchmarkResult(
            f"{NUM_STANDARD} tokens", median(wholes), "ms", note=f"{_spread(wholes)}; {times}"
        ),
        BenchmarkResult(
            "writing", median(speeds), "tok/s", RATES.get(kind), f"{_spread(speeds)}; {rates}"
        ),
    ]


def _spread(figures: Sequence[float]) -> str:
    return f"{min(figures):,.1f} to {max(figures):,.1f}"
