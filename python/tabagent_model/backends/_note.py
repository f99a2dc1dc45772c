"""What a backend was built from, as it is written down beside it: `libggml-cuda.json`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import _core
from .._cache import Cache


@dataclass(frozen=True)
class Note:
    engine: str
    """llama.cpp's sources, as `_core.ENGINE` names those of this package."""
    sha256: str
    size: int
    architectures: tuple[str, ...] = ()
    """What there is machine code for, in CMake's words: `80-real`, `90`, `gfx1100`."""
    toolkit: str = ""
    """What compiled it: `CUDA 13.0`."""
    machine: str = ""
    """The processor, where it was compiled for no other."""

    @classmethod
    def beside(cls, library: Path) -> Note:
        """A ValueError says what is wrong with it."""
        try:
            with path_of(library).open("rb") as file:
                given = json.loads(file.read(_LONGEST))
        except FileNotFoundError:
            raise ValueError(
                f"no note lies beside `{library}` that says what it was built from"
            ) from None
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(f"the note beside `{library}` cannot be read: {error}") from None
        facts: dict[str, Any] = given if isinstance(given, dict) else {}
        if not all(isinstance(facts.get(name), kind) for name, kind in _KINDS.items()):
            raise ValueError(f"the note beside `{library}` does not say what it should")
        facts = {name: facts[name] for name in _KINDS}
        return cls(**{**facts, "architectures": tuple(map(str, facts["architectures"]))})

    @classmethod
    def of(cls, library: Path, **facts: Any) -> Note:
        """For a library that was just built from this package's sources."""
        return cls(_core.ENGINE, _hash(library), library.stat().st_size, **facts)

    def write(self, library: Path) -> None:
        path_of(library).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def check(self, library: Path, cache: Cache | None = None) -> None:
        """A ValueError if it was built from something else, or is not the file that was noted."""
        if self.engine != _core.ENGINE:
            raise ValueError(
                f"it was built from {self.engine:.80}, and this package from {_core.ENGINE};"
                " build or install it anew"
            )
        stat = library.stat()
        if stat.st_size != self.size or _known_hash(library, stat, cache) != self.sha256:
            raise ValueError(f"`{library}` is not the file that the note beside it describes")


def library_name(kind: str) -> str:
    kind = "hip" if kind == "rocm" else kind
    return f"ggml-{kind}.dll" if sys.platform == "win32" else f"libggml-{kind}.so"


def path_of(library: Path) -> Path:
    return library.with_suffix(".json")


_LONGEST = 1 << 16
_KINDS = {
    "engine": str,
    "sha256": str,
    "size": int,
    "architectures": list,
    "toolkit": str,
    "machine": str,
}


def _known_hash(library: Path, stat: os.stat_result, cache: Cache | None) -> str:
    """Of a file that did not change since. A backend has up to hundreds of megabytes."""
    name = f"sha256 of {stat.st_size} bytes of {stat.st_mtime_ns}"
    known = cache.facts().get(name) if cache else None
    if isinstance(known, str):
        return known
    found = _hash(library)
    if cache:
        cache.keep(name, found)
    return found


def _hash(library: Path) -> str:
    found = hashlib.sha256()
    with library.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
