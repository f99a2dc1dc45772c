"""Can a process load a model, use it, unload it, and go on with another? Three phases and a gate.

```text
3B     load → warm-up → short generation → classification → unload
7B     the same
swap   a manager with room for one: 3B is asked, swapped for 7B, that is asked, all is closed
```

Memory is compared with a warm baseline, taken when the tiny bundled model has come and gone: what a
driver and llama.cpp set up once stays until the process ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .. import hardware
from ..errors import ContextTooSmallError, OutOfMemoryError
from ..hardware import Machine
from ..manager import ModelManager
from ..model import Model
from ..params import GenerationConfig, ModelConfig
from ._files import Chosen
from ._machine import Reading, facts_of, growth, placed, read, read_after_unload
from ._report import BenchmarkResult, Report, Target, Verdict

LOAD_S = Target("<", 10)
CLASSIFICATION_MS = Target("<", 500)
GENERATION_MS = Target("<", 2000)
RECLAIMED_MB = Target("±", 100)
NONE = Target("=", 0)

CONSEQUENCES: Mapping[Verdict, str] = {
    "passed": "The gate is open: proceed.",
    "failed": "The gate is closed: evaluate alternatives (llama.cpp's C API directly, or PyO3).",
    "undecided": "The gate stays closed until everything was measured, on a machine with a GPU.",
}

# The prompts hold ChatML's control tokens, so nothing is put before them.
SAMPLING = GenerationConfig(
    temperature=0.7, top_p=0.9, top_k=0, repeat_penalty=1.0, seed=42, special=True, add_bos=False
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# What was read before need not be computed again, so each begins differently.
WARM_UP = CHAT.format("Say hello.")
GENERATION = CHAT.format("Why is the sea salty? Answer in one sentence.")
CLASSIFICATION = (
    "<|im_start|>system\nClassify the sentiment of the text in one word: positive, negative or"
    " neutral.<|im_end|>\n" + CHAT.format("I love this product, it works very well!")
)
ONE_WORD, ONE_SENTENCE = 10, 32
_NO_MEMORY = (OutOfMemoryError, ContextTooSmallError)


def spike3(
    small: Chosen,
    large: Chosen,
    *,
    n_gpu_layers: int = 99,
    n_ctx: int = 2048,
    use_mmap: bool = True,
    tell: Callable[[str], object] = lambda what: None,
) -> Report:
    """Run the three phases; `tell` hears what is being done."""
    config = ModelConfig(n_ctx=n_ctx, max_parallel=1, gpu_layers=n_gpu_layers, use_mmap=use_mmap)
    configs = {"3B": config.with_model_path(small.path), "7B": config.with_model_path(large.path)}
    run = _Run(tell)
    run.warm_up(config)
    results = (
        *run.phase("3B", configs["3B"], classification=CLASSIFICATION_MS),
        *run.phase("7B", configs["7B"], generation=GENERATION_MS),
        *run.swap(configs),
    )
    settings = f"n_gpu_layers {n_gpu_layers}, n_ctx {n_ctx}" + ("" if use_mmap else ", no mmap")
    facts = {**facts_of(run.machine), "settings": settings, "3B": str(small), "7B": str(large)}
    return Report("spike3", facts | run.placements, results, run.readings, CONSEQUENCES)


class _Run:
    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self.machine = hardware.detect()
        self.readings = {"cold": read()}
        self.placements: dict[str, str] = {}
        self._is_on_gpu = False
        """Whether the model that was loaded last had layers there."""

    def warm_up(self, config: ModelConfig) -> None:
        self._tell("warming up with the bundled model")
        with Model.load(config.with_model_path(None)) as model:
            self._ask(model, WARM_UP, 1)
        self.readings["warm"] = read_after_unload(self._is_on_gpu)

    def phase(
        self,
        name: str,
        config: ModelConfig,
        *,
        classification: Target | None = None,
        generation: Target | None = None,
    ) -> Iterator[BenchmarkResult]:
        self._tell(f"{name}: loading {config.path}")
        self._is_on_gpu = False
        began = time.perf_counter()
        try:
            model = Model.load(config)
        except _NO_MEMORY as error:
            why = "the model could not be loaded"
            yield BenchmarkResult(f"{name} load", None, "s", LOAD_S, error.message, is_broken=True)
            yield BenchmarkResult(f"{name} classification", None, "ms", classification, why)
            yield BenchmarkResult(f"{name} short generation", None, "ms", generation, why)
        else:
            yield BenchmarkResult(f"{name} load", time.perf_counter() - began, "s", LOAD_S)
            with model:
                self._tell(f"{name}: asking")
                self.placements[f"{name} is on"] = placed(model)
                warm_up = self._ask(model, WARM_UP, ONE_WORD)
                sentence = self._ask(model, GENERATION, ONE_SENTENCE)
                word = self._ask(model, CLASSIFICATION, ONE_WORD)
                self.readings[f"{name} loaded"] = read()
            yield warm_up.as_result(f"{name} warm-up")
            yield word.as_result(f"{name} classification", classification)
            yield sentence.as_result(f"{name} short generation", generation)
        yield from self._reclaimed(name)

    def swap(self, configs: dict[str, ModelConfig]) -> Iterator[BenchmarkResult]:
        """There is room for one, so the second is loaded when the first is gone."""
        self._tell("swap: loading 3B, then 7B in its place")
        self._is_on_gpu = False
        took_s, error = None, ""
        with ModelManager(max_loaded=1) as models:
            for name, config in configs.items():
                models.register_model(name, config)
            try:
                self._ask(models.load_model("3B"), CLASSIFICATION, ONE_WORD)
                self.readings["swap: 3B loaded"] = read()
                began = time.perf_counter()
                model = models.swap("7B")
                took_s = time.perf_counter() - began
                self._ask(model, CLASSIFICATION, ONE_WORD)
                self.readings["swap: 7B loaded"] = read()
            except _NO_MEMORY as failed:
                error = failed.message
        yield BenchmarkResult("swap out of memory", float(bool(error)), "times", NONE, error)
        yield BenchmarkResult("swap 3B → 7B", took_s, "s", note="unloading and loading")
        yield from self._reclaimed("swap")

    def _ask(self, model: Model, prompt: str, max_tokens: int) -> _Answer:
        self._is_on_gpu = model.info()["gpu_layers"] > 0
        began = time.perf_counter()
        usage = model.generate(prompt, SAMPLING, max_tokens=max_tokens).usage
        took_ms = (time.perf_counter() - began) * 1000
        return _Answer(took_ms, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def _reclaimed(self, name: str) -> Iterator[BenchmarkResult]:
        after = self.readings[f"{name} unloaded"] = read_after_unload(self._is_on_gpu)
        why_not = why_no_vram(self.machine, self._is_on_gpu)
        return reclaimed(name, self.readings["warm"], after, why_not)


@dataclass(frozen=True)
class _Answer:
    ms: float
    num_prompt: int
    num_cached: int
    num_written: int

    def as_result(self, name: str, target: Target | None = None) -> BenchmarkResult:
        known = f" ({self.num_cached} known before)" if self.num_cached else ""
        note = f"{self.num_prompt} tokens read{known}, {self.num_written} written"
        return BenchmarkResult(name, self.ms, "ms", target, note)


def why_no_vram(machine: Machine, is_on_gpu: bool) -> str:
    """Memory that was never taken cannot come back: then there is nothing to measure."""
    if is_on_gpu:
        return ""
    return "no layer was on a GPU" if machine.usable_gpus else "no GPU can be used here"


def reclaimed(
    name: str, before: Reading, after: Reading, why_not: str
) -> Iterator[BenchmarkResult]:
    """What is held more than before; `why_not` is why the GPUs' memory says nothing."""
    rss = growth(before.rss, after.rss)
    vram = None if why_not else growth(before.vram, after.vram)
    for kind, value, reason in (("RSS", rss, ""), ("VRAM", vram, why_not)):
        note = "over the warm baseline" if value is not None else reason or "nobody tells"
        yield BenchmarkResult(f"{name} {kind} after unload", value, "MB", RECLAIMED_MB, note)
