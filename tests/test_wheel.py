"""What the installed shared libraries promise to the process that loads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

import tabagent_model

FOLDER = Path(tabagent_model.__file__).parent
EXTENSION = FOLDER / "_core.abi3.so"
LIBRARIES = sorted((FOLDER / "lib").glob("*.so"))
# What every Linux with the wheel's manylinux tag has.
SYSTEM = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "ld-linux-x86-64.so.2",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's format")


def dynamic(path: Path) -> dict[str, list[str]]:
    facts: dict[str, list[str]] = {"needed": [], "soname": [], "runpath": [], "rpath": []}
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".dynamic")
        for tag in section.iter_tags():
            name = tag.entry.d_tag.removeprefix("DT_").lower()
            if name in facts:
                facts[name].append(getattr(tag, name))
    return facts


def test_the_wheel_carries_every_cpu_module():
    names = {path.stem.removeprefix("libggml-cpu-") for path in LIBRARIES if "cpu" in path.stem}
    assert names == {
        "x64",
        "sse42",
        "sandybridge",
        "ivybridge",
        "piledriver",
        "haswell",
        "skylakex",
        "cannonlake",
        "cascadelake",
        "icelake",
        "cooperlake",
        "zen4",
        "alderlake",
        "sapphirerapids",
    }


def test_the_extension_looks_for_its_libraries_beside_it_only():
    facts = dynamic(EXTENSION)
    assert facts["runpath"] == ["$ORIGIN/lib"]
    assert facts["rpath"] == []


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_each_library_looks_in_its_own_folder_only(path):
    facts = dynamic(path)
    assert (facts["runpath"], facts["rpath"]) == (["$ORIGIN"], [])


@pytest.mark.parametrize("path", [EXTENSION, *LIBRARIES], ids=lambda path: path.stem)
def test_nothing_is_needed_but_the_system_and_our_own(path):
    ours = {library.name for library in LIBRARIES if library.name.startswith("tabagent-")}
    assert set(dynamic(path)["needed"]) <= SYSTEM | ours


@pytest.mark.parametrize("path", [EXTENSION, *LIBRARIES], ids=lambda path: path.stem)
def test_nothing_is_shared_with_whoever_has_the_same_names(path):
    """A symbol that is bound as unique is one for the whole process, however it was loaded."""
    with path.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        unique = [s.name for s in symbols if s["st_info"]["bind"] == "STB_LOOS"]
    assert unique == []


def test_our_names_are_nobody_elses():
    named = {path.name: dynamic(path)["soname"] for path in LIBRARIES if "cpu" not in path.stem}
    assert named == {
        f"tabagent-lib{name}.so": [f"tabagent-lib{name}.so"]
        for name in ("ggml", "ggml-base", "llama", "llama-common")
    }
