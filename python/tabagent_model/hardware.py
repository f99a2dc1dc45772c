"""What this machine has: its processor, its memory, its GPUs; and a budget of one of them.

```python
from tabagent_model import hardware

machine = hardware.detect()
print(machine.cpu.threads, machine.memory.available, [gpu.name for gpu in machine.gpus])
```

A `Machine` is plain data. It can be written down (`to_dict`), made up (`from_dict`), and given to
everything that decides by it. What nobody tells is None, never 0: a 0 that means "unknown" lets
every memory check pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from . import _native
from .errors import HardwareError, InvalidRequestError, OutOfMemoryError

if TYPE_CHECKING:
    from .backends import Backend

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Cpu:
    name: str = ""
    logical_cores: int = 1
    physical_cores: int = 1
    """Cores among the processors this process may run on."""
    usable_cores: int = 1
    """Processors this process may keep busy: within its affinity mask and its cgroup's quota."""
    affinity: int | None = None
    """Processors in the affinity mask."""
    quota: float | None = None
    """How many processors' time the cgroup allows; 1.5 for instance."""
    threads: int = 1
    """What `n_threads=0` comes to."""
    features: tuple[str, ...] = ()
    """Instruction sets that processor and system offer, under Linux's names."""
    module: str | None = None
    """The ggml module that computes: the build for this generation of processors."""
    layouts: dict[str, float] = field(default_factory=dict, hash=False)
    """Types of weights that the module lays out anew, and what each byte of them becomes."""
    keeps_k_quants: bool = False
    """K-quants stay in the file's layout all the same, unless it was measured that they had better
    not."""


@dataclass(frozen=True)
class Memory:
    """Main memory, in bytes."""

    total: int | None = None
    available: int | None = None
    """What can be had without swapping, within the cgroup's limit."""
    limit: int | None = None
    """Of the tightest cgroup around this process."""


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    used: int | None = None
    """None where the driver does not tell, as in many containers."""


@dataclass(frozen=True)
class GpuInstance:
    """A part of a GPU (MIG)."""

    uuid: str | None = None
    total: int | None = None
    free: int | None = None
    used: int | None = None


@dataclass(frozen=True)
class Gpu:
    name: str | None = None
    device: str | None = None
    """llama.cpp's name for it, like `CUDA0`; None: this build cannot compute on it."""
    index: int | None = None
    """NVML's number, which is not CUDA's."""
    uuid: str | None = None
    pci_id: str | None = None
    total: int | None = None
    """Bytes as llama.cpp can have them, so of a part where the GPU is cut into parts; what NVML
    says where llama.cpp does not know the GPU."""
    free: int | None = None
    used: int | None = None
    compute_capability: tuple[int, int] | None = None
    driver: str | None = None
    utilization: int | None = None
    """Percent of the last second or so in which something ran."""
    processes: tuple[GpuProcess, ...] = ()
    instances: tuple[GpuInstance, ...] = ()
    is_unmatched: bool = False
    """Several cards are alike, and nobody tells which of NVML's is which of llama.cpp's: what
    differs between them is None here."""


@dataclass(frozen=True)
class Machine:
    cpu: Cpu = Cpu()
    memory: Memory = Memory()
    gpus: tuple[Gpu, ...] = ()
    """Those that llama.cpp can use come first, in its own order, which `main_gpu` counts in."""
    reason: str | None = None
    """Why no GPU can be used; None if one can."""

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.device is not None)

    def free_on(self, device: str) -> int | None:
        """Bytes that are free on `cpu` or on one of llama.cpp's devices; None: nobody knows."""
        if device == "cpu":
            return self.memory.available
        return next((gpu.free for gpu in self.gpus if gpu.device == device), None)

    def less(self, taken: Mapping[str, int]) -> Machine:
        """The same with so many bytes taken of what is free on each device."""

        def left(free: int | None, device: str | None) -> int | None:
            return None if free is None else max(0, free - taken.get(device or "", 0))

        memory = replace(self.memory, available=left(self.memory.available, "cpu"))
        gpus = tuple(replace(gpu, free=left(gpu.free, gpu.device)) for gpu in self.gpus)
        return replace(self, memory=memory, gpus=gpus)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Machine:
        """A machine as `to_dict` wrote it down, or made up; what is left out has its default."""
        known = _checked(cls, facts)
        if "cpu" in known:
            cpu = _checked(Cpu, known["cpu"])
            known["cpu"] = Cpu(**{**cpu, "features": tuple(cpu.get("features", ()))})
        if "memory" in known:
            known["memory"] = Memory(**_checked(Memory, known["memory"]))
        known["gpus"] = tuple(_gpu_of(gpu) for gpu in known.get("gpus", ()))
        return cls(**known)


def detect() -> Machine:
    """This machine, as it is now."""
    core, module = _native.core, _native.start()
    found = core.detect_cpu()
    layouts, keeps_k_quants = _layouts()
    cpu = Cpu(
        name=found["brand"],
        logical_cores=found["logical_cores"],
        physical_cores=found["physical_cores"],
        usable_cores=found["usable_cores"],
        affinity=found["affinity"],
        quota=found["quota"],
        threads=found["default_threads"],
        features=tuple(found["features"]),
        module=module,
        layouts=dict(layouts),
        keeps_k_quants=keeps_k_quants,
    )
    memory = core.memory_info()
    nvml, devices = core.detect_gpus(), [each for each in core.list_devices() if each["is_gpu"]]
    gpus = joined(nvml, devices)
    return Machine(
        cpu=cpu,
        memory=Memory(memory["total"], memory["available"], memory["limit"]),
        gpus=gpus,
        reason=why_no_gpu(gpus, nvml["reason"], _native.gpu_backends()),
    )


def why_slow() -> str | None:
    """What holds back whoever computes in this process: less than one processor to compute with."""
    quota = _native.core.detect_cpu()["quota"]
    if quota is None or quota >= 1:
        return None
    return f"a cgroup allows this process {quota:g} of one processor"


def vram_used_mb(index: int = 0) -> float | None:
    """What is used of a card, by NVML's number, in MiB; None, never 0, where nobody tells."""
    found = {card["index"]: card["used"] for card in _native.core.detect_gpus()["gpus"]}
    used = found.get(index)
    return None if used is None else used / MIB


def joined(nvml: Mapping[str, Any], devices: list[dict[str, Any]]) -> tuple[Gpu, ...]:
    """NVML's GPUs and llama.cpp's, as one list in which no card stands twice.

    They are the same where they are on the same place of the bus, whatever their numbers say under
    `CUDA_VISIBLE_DEVICES`. Several devices may be on one place: parts of a card (MIG). Where
    llama.cpp tells no place, as with Vulkan drivers without `VK_EXT_pci_bus_info`, name and size
    have to do: it never tells a UUID, and the order says nothing, since NVML counts along the bus
    and CUDA begins with the fastest card. So of cards that are alike, each entry has what is true
    of all of them, and `is_unmatched` says so.
    """
    cards, driver = nvml["gpus"], nvml["driver"]
    by_place = {card["pci_id"]: card for card in cards if card["pci_id"]}
    placed = [by_place.get(_place_of(device)) for device in devices]
    left = [card for card in cards if card not in placed]
    stray = [device for device, card in zip(devices, placed, strict=True) if card is None]
    gpus = []
    for device, card in zip(devices, placed, strict=True):
        alike = [each for each in left if card is None and _may_be(each, device)]
        rivals = [other for other in stray if any(_may_be(each, other) for each in alike)]
        is_unmatched = len(alike) > 1 or len(rivals) > 1
        found = _in_common(alike) if is_unmatched else next(iter(alike), card)
        gpus.append(_joined(found, device, driver, is_unmatched))
    for card in left:
        rivals = [device for device in stray if _may_be(card, device)]
        alike = [each for each in left if any(_may_be(each, device) for device in rivals)]
        if not rivals:
            gpus.append(_joined(card, None, driver))
        elif alike.index(card) >= len(rivals):  # the others are those devices, in whatever order
            gpus.append(_joined(_in_common(alike), None, driver, is_unmatched=True))
    return tuple(gpus)


def why_no_gpu(gpus: tuple[Gpu, ...], nvml: str | None, backends: Sequence[Backend]) -> str | None:
    """All that is known of it: of the backends, the cards, the driver. None if one can be used."""
    if any(gpu.device for gpu in gpus):
        return None
    names = ", ".join(gpu.name or "a GPU" for gpu in gpus)
    if refused := [each for each in backends if each.refused]:
        told = "; ".join(
            f"the {each.kind} backend is not loaded: {each.refused}" for each in refused
        )
        return f"{names} cannot be used, as {told}" if names else told
    if names:
        return (
            f"{names} cannot be used: there is no GPU backend in this installation;"
            " `tabagent-model build-backend` compiles one"
        )
    return nvml


# By how llama.cpp's names of devices begin.
_KINDS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "metal": "metal",
    "mtl": "metal",
    "rocm": "rocm",
    "hip": "rocm",
    "vulkan": "vulkan",
}
# How much of a device's memory a budget covers.
_SHARES: dict[str, float] = {"cpu": 0.25, "metal": 0.5}
_SHARE_OF_VRAM = 0.8


class GpuContext:
    """A budget of one device's memory, and an account of what is taken from it.

    The budget is 80 % of a GPU's memory, half of the main memory with Metal, which shares it, and a
    quarter of it on a CPU. It only counts: what models really take stands in
    `tabagent_model.memory()`.
    """

    def __init__(self, machine: Machine | None = None, main_gpu: int = 0) -> None:
        machine = detect() if machine is None else machine
        gpus = machine.usable_gpus
        if gpus and not 0 <= main_gpu < len(gpus):
            allowed = f"from 0 to {len(gpus) - 1}"
            raise InvalidRequestError(
                f"`main_gpu` must be {allowed}, got {main_gpu}", name="main_gpu"
            )
        self.device = (gpus[main_gpu].device or "cpu") if gpus else "cpu"
        self.kind = kind_of(self.device)
        total = machine.memory.total
        if self.kind not in _SHARES:
            total = gpus[main_gpu].total
        if total is None:
            raise HardwareError(f"nobody tells how much memory {self.device} has")
        self.max_memory = int(total * _SHARES.get(self.kind, _SHARE_OF_VRAM))
        self.allocated_memory = 0
        ready = "CPU-only inference" if self.kind == "cpu" else f"{self.device} context ready"
        _native._log().info("%s, with a budget of %s", ready, shown(self.max_memory))

    @property
    def available_memory(self) -> int:
        return self.max_memory - self.allocated_memory

    def allocate(self, num_bytes: int) -> None:
        """Take so much from the budget, or refuse with the figures."""
        _check_bytes(num_bytes)
        if num_bytes > self.available_memory:
            message = (
                f"the budget of {self.device} is exceeded: {shown(self.allocated_memory)} +"
                f" {shown(num_bytes)} > {shown(self.max_memory)}"
            )
            raise OutOfMemoryError(
                message, needed=num_bytes, free=self.available_memory, device=self.device
            )
        self.allocated_memory += num_bytes

    def deallocate(self, num_bytes: int) -> None:
        """Give back what was allocated; more than that is refused."""
        _check_bytes(num_bytes)
        if num_bytes > self.allocated_memory:
            message = (
                f"`num_bytes` must be at most {self.allocated_memory}, which is allocated,"
                f" got {num_bytes}"
            )
            raise InvalidRequestError(message, name="num_bytes")
        self.allocated_memory -= num_bytes


def kind_of(device: str) -> str:
    """`CUDA0` → `cuda`; `gpu` for a kind that has no name here."""
    return _KINDS.get(device.lower().rstrip("0123456789"), "gpu")


def shown(num_bytes: int | None) -> str:
    """As a person reads it: `5.2 GiB`."""
    if num_bytes is None:
        return "unknown"
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"


@functools.cache
def _layouts() -> tuple[dict[str, float], bool]:
    return _native.core.weight_layouts()


def _place_of(device: Mapping[str, Any]) -> str | None:
    """On the bus, as NVML's cards have it. With `GGML_CUDA_DEVICES` several devices share a card,
    and llama.cpp writes `-v` and a number behind the place of each."""
    place: str | None = device["pci_id"]
    return place and place.lower().partition("-v")[0]


def _may_be(card: Mapping[str, Any], device: Mapping[str, Any]) -> bool:
    """By name and size, for what has no place to go by."""
    if (card["pci_id"] and device["pci_id"]) or not (card["name"] and device["description"]):
        return False
    if _bare(card["name"]) != _bare(device["description"]):
        return False
    whole: int | None = card["total"]
    seen: int | None = device["total"]
    if whole is None or seen is None:
        return True
    return seen <= whole if card["instances"] else abs(whole - seen) <= whole // 10


def _bare(name: str) -> str:
    """Older drivers leave the maker out, and CUDA names the part of a card."""
    return name.lower().removeprefix("nvidia ").partition(" mig ")[0].strip()


def _in_common(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is true of each of them, whichever it is."""
    names = ("name", "total", "compute_capability")
    return {name: cards[0][name] for name in names if len({card[name] for card in cards}) == 1}


def _joined(
    card: Mapping[str, Any] | None,
    device: Mapping[str, Any] | None,
    driver: str | None,
    is_unmatched: bool = False,
) -> Gpu:
    card, device = card or {}, device or {}
    total = device.get("total") or card.get("total")
    free = device.get("free") if device.get("total") else card.get("free")
    return Gpu(
        name=card.get("name") or device.get("description"),
        device=device.get("name"),
        index=card.get("index"),
        uuid=card.get("uuid"),
        pci_id=card.get("pci_id") or device.get("pci_id"),
        total=total,
        free=free,
        used=total - free if device and total and free is not None else card.get("used"),
        compute_capability=card.get("compute_capability"),
        driver=driver if card else None,
        utilization=card.get("utilization"),
        processes=tuple(GpuProcess(*each) for each in card.get("processes", ())),
        instances=tuple(GpuInstance(**each) for each in card.get("instances", ())),
        is_unmatched=is_unmatched,
    )


def _gpu_of(given: Any) -> Gpu:
    facts = _checked(Gpu, given)
    processes = (GpuProcess(**_checked(GpuProcess, each)) for each in facts.get("processes", ()))
    instances = (GpuInstance(**_checked(GpuInstance, each)) for each in facts.get("instances", ()))
    facts["processes"], facts["instances"] = tuple(processes), tuple(instances)
    if (capability := facts.get("compute_capability")) is not None:
        facts["compute_capability"] = tuple(capability)
    return Gpu(**facts)


def _checked(kind: type, given: Any) -> dict[str, Any]:
    """The facts of one part; a name that it has not is refused, and so is what is no mapping."""
    if isinstance(given, kind):
        return {each.name: getattr(given, each.name) for each in fields(kind)}
    if not isinstance(given, Mapping):
        message = f"a {kind.__name__} must be a mapping of its fields, got {given!r:.60}"
        raise InvalidRequestError(message, name=kind.__name__)
    names = [each.name for each in fields(kind)]
    for name in given:
        if name not in names:
            message = f"a {kind.__name__} has no field `{name}`"
            hint = "there are " + ", ".join(names)
            raise InvalidRequestError(message, hint=hint, name=str(name))
    return dict(given)


def _check_bytes(num_bytes: object) -> None:
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 0:
        message = f"`num_bytes` must be a whole number from 0, got {num_bytes!r:.60}"
        raise InvalidRequestError(message, name="num_bytes")
