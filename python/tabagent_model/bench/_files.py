"""Which files are the models to measure, and why those.

A model is what its header says, whatever its file is called: any one with as many parameters does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    InvalidRequestError,
    ModelNotFoundError,
    TabAgentModelError,
    UnreadableModelError,
)
from ..hardware import shown
from ..model import inspect
from ..results import ModelDescription

_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Size:
    name: str
    least: float
    """Billions of parameters, as in the next."""
    most: float
    usual: str
    """The file that this is usually measured with."""

    @property
    def option(self) -> str:
        return f"--model-{self.name.lower()}"

    @property
    def range(self) -> str:
        return f"{self.least:g} to {self.most:g} billion parameters"

    def has(self, model: ModelDescription) -> bool:
        return self.least <= model.n_params / 1e9 <= self.most and not model.is_embedding


SMALL = Size("3B", 2.5, 4.0, "qwen2.5-3b-instruct-q4_k_m.gguf")
LARGE = Size("7B", 6.5, 8.5, "qwen2.5-7b-instruct-q4_k_m-00001-of-00002.gguf")


@dataclass(frozen=True)
class Chosen:
    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def named(path: str | os.PathLike[str], option: str) -> Chosen:
    """A file that somebody chose; what is wrong with it is told before anything is loaded."""
    found = inspect(path)
    return Chosen(found.path, f"{_described(found)}; named by `{option}`")


def choose(size: Size, folder: str | os.PathLike[str]) -> Chosen:
    """The model of that size in a folder, one of 4 bits before others."""
    sound, broken = _models_in(Path(folder))
    fitting = [found for found in sound if size.has(found)]
    if not fitting:
        raise _nothing_fits(size, folder, sound, broken)
    taken = min(fitting, key=lambda found: ("Q4" not in found.quantization, found.path))
    others = len(fitting) - 1
    which = f"taken before {others} more, 4 bits first" if others else "the only one"
    return Chosen(taken.path, f"{_described(taken)}; {which} in `{folder}` with {size.range}")


def _models_in(folder: Path) -> tuple[list[ModelDescription], list[str]]:
    """Those that can be loaded, and what is wrong with the others."""
    if not folder.exists():
        hint = "name another one with `--model-dir`, or the files themselves"
        raise ModelNotFoundError(f"there is no folder `{folder}`", hint=hint)
    if not folder.is_dir():
        message = f"`--model-dir` must be a folder, and `{folder}` is a file"
        raise InvalidRequestError(message, name="model_dir")
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        message = f"the folder `{folder}` cannot be read: {error.strerror}"
        raise UnreadableModelError(message) from None
    sound, broken = [], []
    for file in files:
        if file.suffix != ".gguf" or _LATER_PART.search(file.name):
            continue
        try:
            sound.append(inspect(file))
        except TabAgentModelError as error:
            broken.append(error.message)
    return sound, broken


def _nothing_fits(
    size: Size, folder: str | os.PathLike[str], sound: list[ModelDescription], broken: list[str]
) -> ModelNotFoundError:
    there = [f"`{Path(each.path).name}` has {_counted(each.n_params)}" for each in sound] + broken
    found = "; ".join(there) or "there is no `.gguf` file"
    message = f"no model in `{folder}` has {size.range}: {found}"
    hint = f"put `{size.usual}` there, or name a file with `{size.option}`"
    return ModelNotFoundError(message, hint=hint)


def _described(found: ModelDescription) -> str:
    size = shown(found.size_bytes)
    return f"{_counted(found.n_params)} parameters, {found.quantization}, {size}"


def _counted(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e8 else f"{number:,}"
