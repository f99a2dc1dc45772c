"""Where a model goes: a ladder of tries, from what was asked for down to what may be instead.

```text
all that was asked for on the GPU
fewer layers there
keys and values of 8 bits           unless `kv_type` names a type
half of `n_ctx`, again and again    down to `n_ctx_min`, if that allows it
the CPU                             unless `device` or `fallback` says otherwise
```

`ladder` is a function of plain values: the file's header, the settings and the machine. The loader
takes the first rung that fits and goes on when llama.cpp cannot allocate it after all. Whatever was
not the first choice is told: in the log, and in `info()`.

GPU rungs follow llama.cpp's sources, and were never run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import hardware
from ..errors import GpuNotAvailableError, InvalidRequestError
from ..hardware import GIB, MIB, Gpu, Machine, kind_of, shown
from ._estimate import Estimate, Header, Wish, checked_machine, estimate_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..params import ModelConfig, ModelFields

CPU_MARGIN = 64 * MIB


@dataclass(frozen=True)
class Rung:
    """One way to load a model, and whether the estimate says that it fits."""

    what: str
    """What it is: `all 29 layers on CUDA0`, `the CPU`."""
    n_ctx: int
    """What is asked for, which may be more than the model was trained with."""
    estimate: Estimate
    short: tuple[str, int, int] | None = None
    """Where it does not fit: the device, the bytes that are needed there, and those free."""
    reason: str = ""
    """Why this one, when it is the one that was taken."""

    @property
    def fits(self) -> bool:
        return self.short is None

    @property
    def told(self) -> str:
        if self.short is None:
            return f"{self.what}: fits"
        device, needed, free = self.short
        return f"{self.what}: needs {shown(needed)} on {device}, but {shown(free)} is free"


def ladder(
    header: Header, config: ModelConfig, machine: Machine, *, may_measure: bool = False
) -> tuple[Rung, ...]:
    """All that may be tried, best first. A GPU that is asked for and not there is an error."""
    return tuple(_Climbing(header, config, machine, may_measure).rungs())


def estimate(
    model: str | os.PathLike[str] | ModelConfig | None = None,
    /,
    *,
    draft: str | os.PathLike[str] | None = None,
    machine: Machine | None = None,
    **fields: Unpack[ModelFields],
) -> Estimate:
    """What loading a model would take, as bytes on each device; nothing is loaded.

    It takes what `Model.load` takes, and what it tells is for the way the model would be loaded on
    this machine, or on another one that is given as `machine`; where nothing fits, for the way
    that was asked for. `draft` is the file of a smaller model that is to guess ahead for this one,
    with as many tokens and sequences: then it is what both take, and the draft finds its place
    first.
    """
    config, machine = _asked(model, fields), _machine(machine)
    alone = _best(config, machine)
    if draft is None:
        return alone
    asked: ModelFields = {
        "model_path": draft,
        "n_ctx": alone.n_ctx,
        "max_parallel": alone.max_parallel,
        "gpu_layers": "auto",
        "tensor_split": (),
    }
    small = _best(config.with_fields(**asked), machine)
    large = _best(config, machine.less(small.needs))
    shares = [
        replace(
            large.on(device),
            mapped=large.on(device).mapped + small.on(device).mapped,
            draft=small.on(device).needed,
        )
        for device in {**large.needs, **small.needs}
    ]
    return replace(large, shares=tuple(shares))


def rungs_of(
    model: str | os.PathLike[str] | ModelConfig | None = None,
    /,
    *,
    machine: Machine | None = None,
    **fields: Unpack[ModelFields],
) -> tuple[Rung, ...]:
    """The ladder for what `Model.load` would be given."""
    config = _asked(model, fields)
    return ladder(Header(config.path), config, _machine(machine))


def _asked(model: str | os.PathLike[str] | ModelConfig | None, fields: ModelFields) -> ModelConfig:
    from ..params import ModelConfig

    config = model if isinstance(model, ModelConfig) else ModelConfig(model)
    return config.with_fields(**fields)


def _machine(machine: Machine | None) -> Machine:
    return hardware.detect() if machine is None else checked_machine(machine)


def _best(config: ModelConfig, machine: Machine) -> Estimate:
    rungs = ladder(Header(config.path), config, machine)
    return next((rung for rung in rungs if rung.fits), rungs[0]).estimate


def short_of(estimate: Estimate, machine: Machine) -> tuple[str, int, int] | None:
    """The first device that it does not fit on, with what is needed and what is free."""
    for share in estimate.shares:
        free = machine.free_on(share.device)
        needed = share.needed + margin_on(share.device, machine)
        if free is not None and needed > free:
            return share.device, needed, free
    return None


def margin_on(device: str, machine: Machine) -> int:
    """What stays free for what nobody counted: a sixteenth of a GPU, at least 256 MiB and at most
    a GiB, since llama.cpp ends the process when a GPU's memory runs out while it computes."""
    if device == "cpu":
        return CPU_MARGIN
    total = next((gpu.total for gpu in machine.gpus if gpu.device == device), None)
    return min(max((total or 0) // 16, 256 * MIB), GIB)


def chosen_gpus(config: ModelConfig, machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs that the settings allow. None where they do not insist on one."""
    kind, _, number = config.device.partition(":")
    if kind == "cpu" or config.gpu_layers == 0:
        return ()
    gpus = machine.usable_gpus
    if kind not in ("auto", "gpu"):
        gpus = tuple(gpu for gpu in gpus if kind_of(gpu.device or "") == kind)
    if number:
        gpus = gpus[int(number) : int(number) + 1]
    if not gpus and kind != "auto" and config.fallback != "cpu":
        why = machine.reason or f"there are {[gpu.device for gpu in machine.usable_gpus]}"
        raise GpuNotAvailableError(
            f"`device` is {config.device!r}, and there is no such GPU here: {why}",
            hint='take `device="auto"`, or allow `fallback="cpu"`',
            device=config.device,
        )
    if not gpus:
        return ()
    _check_gpus(config, gpus)
    return (gpus[_main_gpu(config)],) if config.split_mode == "none" else gpus


def gpu_settings(config: ModelConfig, machine: Machine, estimate: Estimate) -> dict[str, Any]:
    """How llama.cpp is told: it counts all GPUs that it knows, and shares are in their order."""
    if not estimate.gpu_layers:
        return {"gpu_layers": 0}
    order = [gpu.device for gpu in machine.usable_gpus]
    used = [order.index(gpu.device) for gpu in chosen_gpus(config, machine)]
    told: dict[str, Any] = {"gpu_layers": estimate.gpu_layers, "split_mode": config.split_mode}
    if len(used) == 1:
        return {**told, "split_mode": "none", "main_gpu": used[0]}
    if config.tensor_split or len(used) < len(order):
        shares = [0.0] * len(order)
        given = [float(gpu.free or 1) for gpu in chosen_gpus(config, machine)]
        for place, share in zip(used, config.tensor_split or given, strict=False):
            shares[place] = float(share)
        told["tensor_split"] = shares
    return {**told, "main_gpu": used[_main_gpu(config)]}


def _main_gpu(config: ModelConfig) -> int:
    """Within the GPUs that are chosen; a number in `device` has said it already."""
    return 0 if ":" in config.device else config.main_gpu


def _check_gpus(config: ModelConfig, gpus: tuple[Gpu, ...]) -> None:
    count = len(gpus)
    if _main_gpu(config) >= count:
        allowed = f"below {count}, the number of GPUs that can be used"
        message = f"`main_gpu` must be {allowed}, got {config.main_gpu}"
        raise InvalidRequestError(message, name="main_gpu")
    given = len(tuple(config.tensor_split))
    if given > count:
        message = f"`tensor_split` has {given} entries, and {count} GPUs can be used"
        raise InvalidRequestError(message, name="tensor_split")


class _Climbing:
    def __init__(
        self, header: Header, config: ModelConfig, machine: Machine, may_measure: bool
    ) -> None:
        self.header, self.config, self.machine = header, config, machine
        self.may_measure = may_measure
        self.gpus = chosen_gpus(config, machine)
        self.most = header.n_layers
        asked = config.gpu_layers
        self.asked = asked if isinstance(asked, int) and asked >= 0 else self.most

    def rungs(self) -> Iterator[Rung]:
        if not self.gpus:
            yield from self._on_cpu()
            return
        yield from self._on_gpu()
        device, fallback = self.config.device, self.config.fallback
        if fallback == "cpu" or (fallback == "auto" and device == "auto"):
            yield from self._on_cpu()

    def _on_gpu(self) -> Iterator[Rung]:
        asked = min(self.asked, self.most)
        config, n_ctx = self.config, self.config.n_ctx
        yield self._rung(asked, n_ctx, config.kv_type)
        if config.fallback in ("error", "cpu"):
            return
        yield from self._with_fewer_layers(asked, n_ctx, config.kv_type)
        kv_type = config.kv_type
        if self._may_shrink_kv():
            kv_type = "q8_0"
            yield self._rung(asked, n_ctx, kv_type)
            yield from self._with_fewer_layers(asked, n_ctx, kv_type)
        for smaller in self._smaller_contexts():
            yield self._rung(asked, smaller, kv_type)
            yield from self._with_fewer_layers(asked, smaller, kv_type)

    def _on_cpu(self) -> Iterator[Rung]:
        for n_ctx in (self.config.n_ctx, *self._smaller_contexts()):
            yield self._rung(0, n_ctx, self.config.kv_type)

    def _with_fewer_layers(self, asked: int, n_ctx: int, kv_type: str) -> Iterator[Rung]:
        """With the most that fit: with fewer layers a GPU never needs more."""
        low, high = 0, asked - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._rung(middle, n_ctx, kv_type).fits:
                low = middle
            else:
                high = middle - 1
        if low > 0:
            yield self._rung(low, n_ctx, kv_type)

    def _may_shrink_kv(self) -> bool:
        """Only where the type was left open, and a head is a whole number of blocks of 32.
        Quantised values need flash attention."""
        heads = (self.header.sizes["head_dim_k"], self.header.sizes["head_dim_v"])
        is_open = self.config.kv_type == "auto" and self.config.flash_attn != "off"
        return is_open and all(dim and dim % 32 == 0 for dim in heads)

    def _smaller_contexts(self) -> Iterator[int]:
        trained = self.header.facts["n_ctx_train"] or self.config.n_ctx
        n_ctx, least = min(self.config.n_ctx, trained), self.config.n_ctx_min
        while least and n_ctx // 2 >= max(least, 8):
            n_ctx //= 2
            yield n_ctx

    def _rung(self, gpu_layers: int, n_ctx: int, kv_type: str) -> Rung:
        wish = Wish(gpu_layers, n_ctx, kv_type, self.gpus if gpu_layers else ())
        estimate = estimate_of(
            self.header, self.config, self.machine, wish, may_measure=self.may_measure
        )
        return Rung(self._what(wish), n_ctx, estimate, short_of(estimate, self.machine))

    def _what(self, wish: Wish) -> str:
        where = "the CPU"
        if wish.gpu_layers:
            names = "+".join(gpu.device or "" for gpu in wish.gpus)
            share = "all" if wish.gpu_layers == self.most else f"{wish.gpu_layers} of"
            where = f"{share} {self.most} layers on {names}"
        if wish.kv_type != self.config.kv_type:
            where += f", keys and values in {wish.kv_type}"
        if wish.n_ctx != self.config.n_ctx:
            where += f", n_ctx {wish.n_ctx}"
        return where
