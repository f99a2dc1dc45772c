"""What to run on which machine: the tables of recommended models and settings, in one place.

```python
from tabagent_model import recommend

print(recommend(vram=8))           # qwen2.5-7b, n_ctx 4096, all layers
print(recommend(ram=16))           # without a GPU
print(recommend().config("model.gguf"))   # settings for this machine
```

Sizes are gigabytes as cards and modules are sold: what a machine reports is rounded to that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import hardware
from .errors import InvalidRequestError
from .hardware import GIB, Machine, kind_of

if TYPE_CHECKING:
    from .params import ModelConfig

Tier = Literal["low", "medium", "high", "very_high"]
Speed = Literal["fast", "medium", "slow"]

# From so many gigabytes of VRAM: the model, and its context. All layers go to the GPU.
MODELS = (
    (16, "qwen2.5-14b", 8192),
    (12, "qwen2.5-7b", 8192),
    (8, "qwen2.5-7b", 4096),
    (4, "llama3.2-1b", 4096),
    (0, "llama3.2-1b", 2048),
)
SHARE_OF_RAM = 0.7
"""What of the main memory counts as a CPU's share in that table."""
CPU_CONTEXT = 2048
METAL_CONTEXT_PER_GB = 512
METAL_CONTEXT = 8192

# From so many gigabytes of VRAM: requests at a time, rows of a batch, the context.
GPU_SETTINGS = (
    (24, (4, 1024, 16384)),
    (16, (3, 512, 8192)),
    (8, (2, 256, 4096)),
    (0, (1, 128, 2048)),
)
CPU_SETTINGS = (1, 128, 2048)

# Up to so many gigabytes of RAM: models at a time, and how long one stays without being asked.
POOLS = ((16, (1, "5m")), (32, (2, "15m")), (64, (3, "30m")))
LARGE_POOL = (4, "1h")

# From so many gigabytes on.
RAM_TIERS: tuple[tuple[float, Tier], ...] = (
    (32, "very_high"),
    (16, "high"),
    (8, "medium"),
    (0, "low"),
)
VRAM_TIERS: tuple[tuple[float, Tier], ...] = (
    (16, "very_high"),
    (8, "high"),
    (4, "medium"),
    (0, "low"),
)

SPLIT_RESERVE = GIB
"""What a split leaves of a GPU for everything but weights."""
ROOM_FOR_ALL = 1.2
"""A model goes to a GPU as a whole when the GPU has a fifth more than its size."""


@dataclass(frozen=True)
class Recommendation:
    model: str
    """A name of the registry."""
    n_ctx: int
    gpu_layers: int
    """-1 is all of them."""
    reason: str

    def config(self, model_path: str | os.PathLike[str] | None = None) -> ModelConfig:
        """These settings for a file."""
        from .params import ModelConfig

        return ModelConfig(model_path, n_ctx=self.n_ctx, gpu_layers=self.gpu_layers)

    def __str__(self) -> str:
        layers = "all layers on the GPU" if self.gpu_layers else "on the CPU"
        return f"{self.model}, n_ctx {self.n_ctx}, {layers} ({self.reason})"


@dataclass(frozen=True)
class Optimized:
    """Settings for a machine, whatever the model."""

    max_parallel: int
    n_batch: int
    n_ctx: int
    gpu_layers: int
    n_threads: int
    """0 leaves it to the engine."""
    max_loaded: int
    keep_alive: str

    def config(self, model_path: str | os.PathLike[str] | None = None) -> ModelConfig:
        from .params import ModelConfig

        return ModelConfig(model_path, **self._fields())

    def report(self, config: ModelConfig) -> str:
        """What would change, a line for each setting."""
        now = {name: getattr(config, name) for name in self._fields()}
        changes = [
            f"{name}: {now[name]} → {value}"
            for name, value in self._fields().items()
            if now[name] != value
        ]
        return "\n".join(changes) or "No changes recommended"

    def _fields(self) -> dict[str, Any]:
        names = ("max_parallel", "n_batch", "n_ctx", "gpu_layers", "n_threads")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Split:
    """How many layers of a model fit on a GPU."""

    gpu_layers: int
    cpu_layers: int
    speed: Speed


def recommend(
    vram: float | None = None,
    ram: float | None = None,
    *,
    unified: bool = False,
    machine: Machine | None = None,
) -> Recommendation:
    """Which model suits so many gigabytes; of this machine, where none are given.

    `vram` is a GPU's own memory. Without one, 70 % of `ram` stand for it, and the model stays on
    the CPU. `unified` says that GPU and CPU share their memory, as Apple's do.
    """
    if vram is None and ram is None:
        vram, ram, unified = _memory_of(machine)
    gpu, main = _size("vram", vram), _size("ram", ram)
    if unified:
        n_ctx = min(METAL_CONTEXT, int(main or gpu) * METAL_CONTEXT_PER_GB)
        model, _ = _from(MODELS, main or gpu)
        return Recommendation(model, max(n_ctx, 512), -1, f"{main or gpu:g} GB of shared memory")
    if gpu > 0:
        model, n_ctx = _from(MODELS, gpu)
        return Recommendation(model, n_ctx, -1, f"{gpu:g} GB of VRAM")
    model, _ = _from(MODELS, main * SHARE_OF_RAM)
    return Recommendation(model, CPU_CONTEXT, 0, f"no GPU, {main:g} GB of RAM")


def optimize(
    vram: float | None = None, ram: float | None = None, *, machine: Machine | None = None
) -> Optimized:
    """Settings for so many gigabytes; for this machine, where none are given."""
    if vram is None and ram is None:
        vram, ram, _ = _memory_of(machine)
    gpu, main = _size("vram", vram), _size("ram", ram)
    parallel, batch, n_ctx = _from(GPU_SETTINGS, gpu)[0] if gpu else CPU_SETTINGS
    loaded, keep_alive = next((pool for most, pool in POOLS if main <= most), LARGE_POOL)
    return Optimized(parallel, batch, n_ctx, -1 if gpu else 0, 0, loaded, keep_alive)


def recommend_split(model_bytes: int, vram_bytes: int | None, total_layers: int = 32) -> Split:
    """How many of its layers go to a GPU with so much memory, by size alone, before there is a file
    to look into. `tabagent_model.estimate` knows better when there is one."""
    _size("model_bytes", model_bytes)
    room = max(0, int(_size("vram_bytes", vram_bytes)) - SPLIT_RESERVE)
    if isinstance(total_layers, bool) or not isinstance(total_layers, int) or total_layers < 1:
        raise _refusal("total_layers", "a whole number from 1", total_layers)
    layers = (
        total_layers if not model_bytes else min(total_layers, room * total_layers // model_bytes)
    )
    share = layers / total_layers
    speed: Speed = "fast" if share >= 0.9 else "medium" if share >= 0.5 else "slow"
    return Split(layers, total_layers - layers, speed)


def loading_strategy(model_bytes: int, vram_bytes: int | None) -> Literal["gpu", "split", "cpu"]:
    """`gpu` where the model fits with a fifth to spare, `split` where a part of it does."""
    size, room = _size("model_bytes", model_bytes), _size("vram_bytes", vram_bytes)
    if room and size * ROOM_FOR_ALL <= room:
        return "gpu"
    return "split" if room > SPLIT_RESERVE else "cpu"


def ram_tier(ram: float) -> Tier:
    tier: Tier = _from(RAM_TIERS, _size("ram", ram))[0]
    return tier


def vram_tier(vram: float) -> Tier:
    tier: Tier = _from(VRAM_TIERS, _size("vram", vram))[0]
    return tier


def _from(table: Any, size: float) -> Any:
    """The row for what begins at so many gigabytes."""
    return next(row[1:] for row in table if size >= row[0])


def _memory_of(machine: Machine | None) -> tuple[float, float, bool]:
    """Its largest GPU and its RAM, in whole gigabytes."""
    machine = hardware.detect() if machine is None else machine
    total = min(size for size in (machine.memory.total or 0, machine.memory.limit or 1 << 62))
    gpus = machine.usable_gpus
    largest = max((gpu.total or 0 for gpu in gpus), default=0)
    unified = any(kind_of(gpu.device or "") == "metal" for gpu in gpus)
    return round(largest / GIB), round(total / GIB), unified


def _size(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1e15:
        raise _refusal(name, "a number from 0", value)
    return value


def _refusal(name: str, allowed: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` must be {allowed}, got {value!r:.60}", name=name)
