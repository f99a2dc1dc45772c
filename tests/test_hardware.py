"""What the package says of this machine, and where it looks for BitNet's binaries.

The tables behind it are tested in rust/tests/cpu.rs against recorded processors.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

import machines
import tabagent_model
from tabagent_model import _core, hardware
from tabagent_model.hardware import Gpu, GpuContext, GpuInstance, GpuProcess, Machine

VARIANTS = {
    *(f"bitnet-amd-zen{n}" for n in range(1, 6)),
    *(
        f"bitnet-intel-{name}"
        for name in ("haswell", "broadwell", "skylake", "icelake", "rocketlake", "alderlake")
    ),
    "bitnet-portable",
}

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def modules_folder() -> Path:
    """The folder in the package where the CPU modules lie."""
    package = Path(tabagent_model.__file__).parent
    return next(package.rglob("*ggml-cpu-*")).parent


def test_the_variant_is_one_of_the_twelve():
    assert tabagent_model.get_cpu_variant() in VARIANTS


@pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64"), reason="speaks of ARM processors"
)
def test_arm_is_portable():
    assert tabagent_model.get_cpu_variant() == "bitnet-portable"


def test_the_processor_is_described_in_plain_values():
    cpu = _core.detect_cpu()
    kinds = {name: type(value) for name, value in cpu.items()}
    numbers = (
        "family",
        "model",
        "stepping",
        "logical_cores",
        "physical_cores",
        "usable_cores",
        "default_threads",
    )
    assert kinds.pop("affinity") in (int, type(None))
    assert kinds.pop("quota") in (float, type(None))
    assert kinds == {"vendor": str, "brand": str, "features": list} | dict.fromkeys(numbers, int)
    assert 1 <= cpu["physical_cores"] <= cpu["logical_cores"]
    assert 1 <= cpu["usable_cores"] <= cpu["logical_cores"]


@linux
@pytest.mark.parametrize("feature", ["avx", "avx2", "avx512f", "asimd"])
def test_a_feature_is_there_if_the_kernel_has_enabled_it(feature):
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    enabled = next(words for key, _, words in lines if key.strip() in ("flags", "Features"))
    assert (feature in _core.detect_cpu()["features"]) == (feature in enabled.split())


@linux
def test_cores_outside_the_affinity_mask_do_not_count():
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        cpu = _core.detect_cpu()
    finally:
        os.sched_setaffinity(0, mask)
    assert (cpu["usable_cores"], cpu["physical_cores"]) == (1, 1)


def test_a_binary_lies_below_its_platform_and_variant():
    variant = tabagent_model.get_cpu_variant()
    folder = Path("BitNet/Release/cpu")
    find = tabagent_model.get_optimal_binary
    assert Path(find(platform="linux")) == folder / "linux" / variant / "llama-server"
    assert Path(find(platform="Windows")) == folder / "windows" / variant / "llama-server.exe"
    found = find("llama.dll", base_path="elsewhere", platform="windows")
    assert Path(found) == Path("elsewhere/cpu/windows") / variant / "llama.dll"
    here = {"win32": "windows", "darwin": "macos"}.get(sys.platform, "linux")
    assert Path(find("x")) == folder / here / variant / "x"


def test_an_existing_folder_may_be_spelled_otherwise(tmp_path):
    (tmp_path / "cpu" / "Windows").mkdir(parents=True)
    found = tabagent_model.get_optimal_binary(base_path=str(tmp_path), platform="windows")
    assert Path(found).parts[-3] == "Windows"


def test_a_binary_that_must_exist_falls_back(tmp_path):
    def find() -> Path:
        found = tabagent_model.get_optimal_binary(
            "tool", base_path=str(tmp_path), platform="linux", must_exist=True
        )
        return Path(found)

    with pytest.raises(tabagent_model.TabAgentModelError) as missing:
        find()
    for build in (tabagent_model.get_cpu_variant(), "bitnet-portable", "standard"):
        assert str(tmp_path / "cpu" / "linux" / build / "tool") in str(missing.value)

    for build in ("standard", "bitnet-portable", tabagent_model.get_cpu_variant()):
        binary = tmp_path / "cpu" / "linux" / build / "tool"
        binary.parent.mkdir(parents=True, exist_ok=True)
        binary.touch()
        assert find() == binary


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "/bin/sh"])
def test_a_binary_is_a_file_name(name):
    with pytest.raises(tabagent_model.InvalidRequestError):
        tabagent_model.get_optimal_binary(name)


def test_an_unknown_platform_is_refused():
    with pytest.raises(tabagent_model.InvalidRequestError, match="`windows`, `linux` or `macos`"):
        tabagent_model.get_optimal_binary(platform="beos")


def test_the_package_has_a_module_for_this_machine_and_the_best_comes_first():
    modules = _core.cpu_modules(str(modules_folder()))
    scores = [score for _, score in modules]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0


def test_a_folder_without_modules_is_no_backend(tmp_path):
    with pytest.raises(tabagent_model.BackendError, match="no file there is called"):
        _core.cpu_modules(str(tmp_path))


@linux
def test_resident_memory_is_what_the_kernel_says():
    def kernel_says() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        value = next(line for line in lines if line.startswith("VmRSS:")).split()[1]
        return int(value) / 1024

    assert _core.process_rss_mb() == pytest.approx(kernel_says(), rel=0.1)


def test_this_machine_is_plain_data_that_survives_json():
    machine = hardware.detect()
    told = json.loads(json.dumps(machine.to_dict()))
    assert Machine.from_dict(told) == machine
    assert machine.cpu.module in [name for name, _ in _core.cpu_modules(str(modules_folder()))]
    assert 1 <= machine.cpu.threads <= machine.cpu.usable_cores
    assert 0 < machine.memory.available < machine.memory.total
    assert (machine.reason is None) == bool(machine.usable_gpus)


@pytest.mark.parametrize("name", [name for name in vars(machines) if name.isupper()])
def test_a_recorded_machine_survives_json(name: str):
    machine = getattr(machines, name)
    if isinstance(machine, Machine):
        assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"cpus": {}}, "a Machine has no field `cpus`"),
        ({"cpu": {"cores": 4}}, "a Cpu has no field `cores`"),
        ({"memory": 5}, "a Memory must be a mapping of its fields, got 5"),
        ({"gpus": [{"vram": 5}]}, "a Gpu has no field `vram`"),
        ({"gpus": [{"processes": [5]}]}, "a GpuProcess must be a mapping of its fields, got 5"),
        ([], "a Machine must be a mapping of its fields, got []"),
    ],
)
def test_what_is_no_machine_is_refused(facts: Any, message: str):
    with pytest.raises(tabagent_model.InvalidRequestError) as caught:
        Machine.from_dict(facts)
    assert caught.value.message == message


def card(index: int, name: str, pci_id: str, total: int, used: int, **facts: Any) -> dict[str, Any]:
    """As `_core.detect_gpus` tells of one."""
    unknown = {"compute_capability": None, "utilization": None, "processes": [], "instances": []}
    sizes = {"total": total, "free": total - used, "used": used}
    place = {"index": index, "name": name, "uuid": f"GPU-{name}", "pci_id": pci_id}
    return place | sizes | unknown | facts


A = card(0, "A", "0000:01:00.0", 100, 40, processes=[(1, 30), (2, None)])
B = card(1, "B", "0000:c1:00.0", 200, 0)
NVML = {"driver": "580.65", "reason": None, "gpus": [A, B]}
CUDA_0 = {"name": "CUDA0", "description": "NVIDIA B", "pci_id": "0000:C1:00.0"}


def test_gpus_are_joined_by_their_place_on_the_bus_whatever_their_numbers_are():
    # as with CUDA_VISIBLE_DEVICES=1: CUDA's first is NVML's second
    gpus = hardware.joined(NVML, [{**CUDA_0, "is_gpu": True, "total": 190, "free": 180}])
    assert [(gpu.device, gpu.name, gpu.index) for gpu in gpus] == [
        ("CUDA0", "B", 1),
        (None, "A", 0),
    ]
    assert (gpus[0].total, gpus[0].free, gpus[0].used) == (190, 180, 10)
    assert gpus[1].processes == (GpuProcess(1, 30), GpuProcess(2, None))
    assert (gpus[1].total, gpus[1].free, gpus[1].driver) == (100, 60, "580.65")


def test_a_gpu_that_nvml_does_not_know_is_there_all_the_same():
    vulkan = {"name": "Vulkan0", "description": "Radeon", "pci_id": None, "is_gpu": True}
    no_nvml = {"gpus": [], "driver": None, "reason": "no NVML: not found"}
    (gpu,) = hardware.joined(no_nvml, [{**vulkan, "total": None, "free": None}])
    assert gpu == Gpu(name="Radeon", device="Vulkan0")


# A machine with an A100 that is cut into parts, as NVML tells of it, and its second card.
PARTS = [
    {"uuid": "MIG-1", "total": 9728 << 20, "free": 9715 << 20, "used": 13 << 20},
    {"uuid": "MIG-2", "total": 19968 << 20, "free": 19930 << 20, "used": 38 << 20},
]
CUT = card(
    0,
    "NVIDIA A100-SXM4-80GB",
    "0000:07:00.0",
    81920 << 20,
    1000 << 20,
    compute_capability=(8, 0),
    instances=PARTS,
)
T4S = [
    card(number, "Tesla T4", place, 15 << 30, number * (400 << 20))
    | {"compute_capability": (7, 5), "uuid": f"GPU-{number}"}
    for number, place in enumerate(("0000:00:1e.0", "0000:00:1f.0", "0000:00:20.0"))
]


def told_by_nvml(*cards: dict[str, Any]) -> dict[str, Any]:
    return {"driver": "580.65", "reason": None, "gpus": list(cards)}


def device(name: str, description: str, pci_id: str | None, total: int) -> dict[str, Any]:
    """As `_core.list_devices` tells of one."""
    sizes = {"total": total, "free": total - (64 << 20)}
    return {"name": name, "description": description, "pci_id": pci_id, "is_gpu": True} | sizes


def test_a_part_of_a_card_has_its_own_memory_and_the_identity_of_the_card():
    total = PARTS[0]["total"]
    found = device("CUDA0", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "0000:07:00.0", total)
    (gpu,) = hardware.joined(told_by_nvml(CUT), [found])
    assert gpu == Gpu(
        name="NVIDIA A100-SXM4-80GB",
        device="CUDA0",
        index=0,
        uuid="GPU-NVIDIA A100-SXM4-80GB",
        pci_id="0000:07:00.0",
        total=total,
        free=total - (64 << 20),
        used=64 << 20,
        compute_capability=(8, 0),
        driver="580.65",
        instances=tuple(GpuInstance(**part) for part in PARTS),
    )
    machine = Machine(gpus=(gpu,))
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine


def test_two_parts_of_a_card_are_two_devices_and_the_card_is_no_third():
    places = [("CUDA0", PARTS[1]["total"]), ("CUDA1", PARTS[0]["total"])]
    found = [device(name, "A100", "0000:07:00.0", total) for name, total in places]
    gpus = hardware.joined(told_by_nvml(CUT), found)
    assert [(gpu.device, gpu.total, gpu.uuid) for gpu in gpus] == [
        ("CUDA0", PARTS[1]["total"], CUT["uuid"]),
        ("CUDA1", PARTS[0]["total"], CUT["uuid"]),
    ]


def test_devices_that_share_a_card_are_on_its_place():
    """`GGML_CUDA_DEVICES=2` on a machine with one card."""
    found = [device(f"CUDA{n}", "T4", f"0000:00:1e.0-v{n}", 7 << 30) for n in (0, 1)]
    gpus = hardware.joined(told_by_nvml(T4S[0]), found)
    assert [(gpu.device, gpu.index) for gpu in gpus] == [("CUDA0", 0), ("CUDA1", 0)]


def test_a_device_without_a_place_is_the_only_card_of_its_name_and_size():
    total = 80 << 30
    for name in ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "nvidia A100-SXM4-80GB MIG 7g.80gb"):
        found = [device("Vulkan0", name, None, total), device("Vulkan1", "Radeon", None, total)]
        a100, radeon, t4 = hardware.joined(told_by_nvml(T4S[0], CUT), found)
        assert (a100.device, a100.uuid, a100.is_unmatched) == ("Vulkan0", CUT["uuid"], False)
        assert (radeon.device, radeon.uuid, radeon.is_unmatched) == ("Vulkan1", None, False)
        assert (t4.device, t4.uuid) == (None, "GPU-0")


def test_of_two_cards_of_one_name_the_size_tells():
    small = {**T4S[1], "total": 8 << 30}
    (gpu, other) = hardware.joined(
        told_by_nvml(small, T4S[0]), [device("Vulkan0", "Tesla T4", None, 15 << 30)]
    )
    assert (gpu.device, gpu.uuid, gpu.is_unmatched) == ("Vulkan0", "GPU-0", False)
    assert (other.device, other.uuid, other.is_unmatched) == (None, "GPU-1", False)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_cards_that_are_alike_are_each_listed_once_and_as_unmatched(num_devices: int):
    found = [device(f"Vulkan{n}", "Tesla T4", None, 15 << 30) for n in range(num_devices)]
    gpus = hardware.joined(told_by_nvml(*T4S), found)
    usable = [f"Vulkan{n}" for n in range(num_devices)]
    assert [gpu.device for gpu in gpus] == usable + [None] * (3 - num_devices)
    for gpu in gpus:
        told = {"compute_capability": (7, 5), "driver": "580.65", "is_unmatched": True}
        sizes = {"total": 15 << 30, "free": (15 << 30) - (64 << 20), "used": 64 << 20}
        if gpu.device is None:
            sizes = {"total": 15 << 30}
        assert gpu == Gpu(name="Tesla T4", device=gpu.device, **told, **sizes)


def test_more_devices_than_cards_of_a_name_are_not_that_card_each():
    found = [device(f"Vulkan{n}", "Tesla T4", None, 15 << 30) for n in (0, 1)]
    gpus = hardware.joined(told_by_nvml(T4S[0]), found)
    assert [(g.device, g.uuid, g.is_unmatched) for g in gpus] == [
        ("Vulkan0", None, True),
        ("Vulkan1", None, True),
    ]


def test_a_card_that_is_placed_is_not_taken_for_one_that_is_not():
    found = [
        device("Vulkan0", "Tesla T4", "0000:00:1F.0", 15 << 30),
        device("Vulkan1", "Tesla T4", "0000:00:99.0", 15 << 30),
        device("Vulkan2", "Tesla T4", None, 15 << 30),
    ]
    gpus = hardware.joined(told_by_nvml(*T4S[:2]), found)
    assert [(g.device, g.uuid, g.is_unmatched) for g in gpus] == [
        ("Vulkan0", "GPU-1", False),
        ("Vulkan1", None, False),
        ("Vulkan2", "GPU-0", False),
    ]


def test_the_vram_of_a_card_that_is_not_there_is_unknown_and_not_0():
    assert hardware.vram_used_mb(99) is None


def test_without_a_gpu_there_is_an_empty_list_and_a_reason():
    assert hardware.joined({"gpus": [], "driver": None, "reason": "no NVML"}, []) == ()
    assert machines.NO_GPU.usable_gpus == machines.UNUSED_GPU.usable_gpus == ()
    assert machines.NO_GPU.free_on("cpu") == 11 * hardware.GIB
    assert machines.NO_GPU.free_on("CUDA0") is None


@pytest.mark.parametrize(
    ("machine", "device", "budget"),
    [
        (machines.CARD_24, "CUDA0", 0.8 * 24),
        (machines.MIG, "CUDA0", 0.8 * 10),
        (Machine.from_dict({"memory": {"total": 8 << 30}}), "cpu", 0.25 * 8),
    ],
)
def test_the_budget_is_a_share_of_what_the_device_has(machine, device, budget):
    context = GpuContext(machine)
    assert (context.device, context.max_memory) == (device, int(budget * hardware.GIB))


def test_a_budget_counts_and_refuses_with_figures():
    context = GpuContext(Machine.from_dict({"memory": {"total": 4096 * hardware.MIB}}))
    context.allocate(600 * hardware.MIB)
    with pytest.raises(
        tabagent_model.OutOfMemoryError, match=r"600 MiB \+ 500 MiB > 1.0 GiB"
    ) as no:
        context.allocate(500 * hardware.MIB)
    assert (no.value.needed, no.value.free) == (500 * hardware.MIB, 424 * hardware.MIB)
    context.deallocate(100 * hardware.MIB)
    assert context.available_memory == 524 * hardware.MIB
    with pytest.raises(tabagent_model.InvalidRequestError, match="at most 524288000"):
        context.deallocate(501 * hardware.MIB)
    for wrong in (-1, True, 1.5, "1"):
        with pytest.raises(tabagent_model.InvalidRequestError, match="`num_bytes`"):
            context.allocate(wrong)  # type: ignore[arg-type]


def test_no_budget_is_made_of_what_nobody_knows():
    unknown = Machine.from_dict({"gpus": [{"device": "CUDA0"}], "memory": {"total": 5}})
    with pytest.raises(tabagent_model.HardwareError, match="how much memory CUDA0 has"):
        GpuContext(unknown)
    with pytest.raises(tabagent_model.InvalidRequestError, match="`main_gpu` must be from 0 to 0"):
        GpuContext(machines.CARD_6, main_gpu=1)
