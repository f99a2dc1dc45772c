"""What to do after an error, as data; whoever asked decides whether to do it.

```python
try:
    answer = model.generate(prompt)
except TabAgentModelError as error:
    match strategy_for(error):
        case Retry(delays_ms=delays_ms):
            ...
```

What a GPU died of is known by its words alone: an abort in a worker leaves its last line, and what
llama.cpp throws leaves its text. The words are those of its backends, and were read, not seen: none
of this was ever run on a GPU that failed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from .errors import (
    GenerationCancelled,
    GpuNotAvailableError,
    InternalError,
    ModelCorruptedError,
    ModelNotLoadedError,
    ModelQuarantinedError,
    OutOfMemoryError,
    ProtocolError,
    QueueFullError,
    SamplingError,
    TokenizationError,
    WorkerCrashedError,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._prompt import Prompt
    from .model import AsyncModel, Model
    from .params import GenerationConfig, GenerationFields
    from .results import Completion


@dataclass(frozen=True)
class Retry:
    """Ask again, up to `max_attempts` times, and wait longer each time."""

    max_attempts: int
    backoff_ms: int

    @property
    def delays_ms(self) -> tuple[int, ...]:
        """Before each further try: `backoff_ms`, twice that, four times that, …"""
        return tuple(self.backoff_ms << attempt for attempt in range(self.max_attempts))


@dataclass(frozen=True)
class FallbackToCpu:
    """Load the model on the CPU, unless it is there: `generate_with_fallback` does."""


@dataclass(frozen=True)
class ReinitializeGpu:
    """Begin anew with the GPU. That takes another process: the next worker of a model with
    `isolation="process"`, which is there already; otherwise your program has to start again."""


@dataclass(frozen=True)
class ReloadModel:
    """Load the model again; once, since a file that is damaged stays so until it is replaced."""


@dataclass(frozen=True)
class SkipAndContinue:
    """This request cannot be answered, and says nothing about the next one."""


@dataclass(frozen=True)
class Fatal:
    """Nothing that could be done by itself helps. The hint of the error says what to change."""


RecoveryStrategy = Retry | FallbackToCpu | ReinitializeGpu | ReloadModel | SkipAndContinue | Fatal


def strategy_for(error: BaseException) -> RecoveryStrategy:
    """What is worth to be tried after an error, of this package or another."""
    if is_gpu_error(error):
        is_lost = isinstance(error, _TELL_BY_WORDS) and not is_resource_exhaustion(error)
        has_tries_left = not isinstance(error, ModelQuarantinedError)
        return ReinitializeGpu() if is_lost and has_tries_left else FallbackToCpu()
    if isinstance(error, InternalError) and is_resource_exhaustion(error):
        return FallbackToCpu()  # of a device that llama.cpp did not name
    found = (strategy for kinds, strategy in _STRATEGIES if isinstance(error, kinds))
    return next(found, Fatal())


def is_resource_exhaustion(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(_words(error)))


def is_gpu_error(error: BaseException) -> bool:
    """Whether it was a GPU that failed: it is full, lost, or not there."""
    if isinstance(error, OutOfMemoryError):
        return getattr(error, "device", "cpu") != "cpu"
    return isinstance(error, GpuNotAvailableError) or bool(_GPU.search(_words(error)))


@overload
def generate_with_fallback(
    model: Model,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    **fields: Unpack[GenerationFields],
) -> Completion: ...
@overload
def generate_with_fallback(
    model: AsyncModel,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    **fields: Unpack[GenerationFields],
) -> Awaitable[Completion]: ...
def generate_with_fallback(
    model: Model | AsyncModel,
    prompt: Prompt,
    config: GenerationConfig | None = None,
    **fields: Unpack[GenerationFields],
) -> Completion | Awaitable[Completion]:
    """Answer a prompt, on the CPU if the GPU fails: `model.generate_with_fallback`, to be awaited
    if the model is an AsyncModel."""
    return model.generate_with_fallback(prompt, config, **fields)


# The first that fits holds. Whatever is not here is fatal, above all what the caller has to change:
# a prompt that is too long, a parameter out of its range, a file that is none.
_Kinds = type[BaseException] | tuple[type[BaseException], ...]
_STRATEGIES: tuple[tuple[_Kinds, RecoveryStrategy], ...] = (
    (TimeoutError, Retry(max_attempts=2, backoff_ms=500)),
    ((ProtocolError, ConnectionError, QueueFullError), Retry(max_attempts=3, backoff_ms=100)),
    # Once: a request that ends three workers within a minute puts its model into quarantine.
    (WorkerCrashedError, Retry(max_attempts=1, backoff_ms=100)),
    ((ModelCorruptedError, ModelNotLoadedError), ReloadModel()),
    ((TokenizationError, SamplingError, GenerationCancelled), SkipAndContinue()),
)

_TELL_BY_WORDS = (WorkerCrashedError, ModelQuarantinedError, InternalError)
_GPU = re.compile(
    r"\b(CUDA|ROCm|HIP|MUSA|cuBLAS|SYCL|Metal) error"
    r"|ggml-(cuda|hip|musa|vulkan|metal|sycl|opencl|cann)\S*:\d+:"  # where an abort was
    r"|cudaMalloc|\bvk::|kIOGPU|DeviceLost|OutOfDeviceMemory",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(
    r"out of memory|OutOf(Device|Host)?Memory|failed to allocate"
    r"|memory allocation of \d+ bytes failed|bad_alloc|mem_buffer != NULL",  # Rust, C++, ggml
    re.IGNORECASE,
)


def _words(error: BaseException) -> str:
    if not isinstance(error, _TELL_BY_WORDS):
        return ""
    return f"{error.message} {getattr(error, 'last_line', '')}"
