"""What the package says of this machine, and where it looks for BitNet's binaries.

The tables behind it are tested in rust/tests/cpu.rs against recorded processors.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

import tabagent_model
from tabagent_model import _core

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
    )
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
