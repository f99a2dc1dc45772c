"""What computes beside the CPU: which GPU backends lie here, which one is loaded, and why no other.

A backend is one library of llama.cpp's. `tabagent-model build-backend` puts it into the user's data
folder; a wheel like `tabagent-model-cuda` brings it as the package `tabagent_model_cuda`. It shares
structs with our own libraries, so one from other sources would crash, and ggml's check comes when
it has run already. So a note lies beside it that says what it was built from (`_note.py`). Nothing
of it runs before that was compared, the driver is there, and a child process has computed with it.

One backend is loaded, the first that can be: two would both offer the same cards.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import _core, _trial
from .._cache import Cache
from ..errors import InvalidRequestError, TabAgentModelError
from ._note import Note, library_name

KINDS = ("cuda", "rocm", "metal", "vulkan")
"""Best first, where several can be loaded."""
CUDA_ARCHITECTURE = re.compile(r"(?P<number>\d{2,3})(?P<only>[af]?)(?P<form>-real|-virtual)?")


@dataclass(frozen=True)
class Backend:
    kind: str
    library: Path
    devices: tuple[str, ...] = ()
    """What it brought, if it is the one that is loaded."""
    refused: str | None = None
    """Why it is not loaded."""


def load() -> tuple[Backend, ...]:
    """Load the first that can be, and say of each that lies here what became of it."""
    wanted = _wanted()
    told: list[Backend] = []
    for backend in found():
        in_use = [each.kind for each in told if each.refused is None]
        if backend.kind not in wanted:
            refused: str | None = f"`TABAGENT_GPU_BACKEND` is {os.environ['TABAGENT_GPU_BACKEND']}"
        elif in_use:
            refused = f"the {in_use[0]} backend is in use"
        else:
            refused = refusal(backend)
        told.append(replace(backend, refused=refused) if refused else _loaded(backend))
        _log(told[-1])
    return tuple(told)


def found() -> list[Backend]:
    """All that lie here, best first; of a kind, the user's own before an installed one."""
    places = ((kind, folder / library_name(kind)) for kind in KINDS for folder in _folders(kind))
    return [Backend(kind, library) for kind, library in places if _is_there(library)]


def refusal(backend: Backend, *, anew: bool = False) -> str | None:
    """Why it must not be loaded; None if nothing speaks against it. `anew` tries what was tried."""
    try:
        note = Note.beside(backend.library)
        cache = Cache("gpu-backends.json", str(backend.library))
        note.check(backend.library, cache)
    except (OSError, ValueError) as error:
        return str(error)
    cards = _core.detect_gpus()
    return (
        missing_driver(backend.kind)
        or (backend.kind == "cuda" and no_code(note.architectures, cards["gpus"], all))
        or _dies(backend, note, cards, cache, anew)
        or None
    )


def data_folder() -> Path:
    """Where backends lie that were built here, each kind in a folder of its own."""
    home = os.environ.get("TABAGENT_HOME")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return (Path(home) if home else data / "tabagent_model") / "backends"


def built_cpu_module(name: str, machine: str) -> Path | None:
    """The folder with this CPU module, if it was built here, from our sources, for this machine."""
    try:
        library = data_folder() / "cpu" / library_name(f"cpu-{name}")
        note = Note.beside(library)
        note.check(library)
    except (OSError, RuntimeError, ValueError):  # a RuntimeError: this user has no home
        return None
    return library.parent if note.machine == machine else None


def traces() -> list[str]:
    """What lies here, without opening it: each library by its size and the time of its change; and
    for a GPU backend the choice, the driver and the cards that it will meet."""
    told: list[str] = []
    with suppress(OSError, RuntimeError):  # a RuntimeError: this user has no home
        modules = sorted((data_folder() / "cpu").glob(library_name("cpu-*")))
        told += [_trace("cpu", module) for module in modules]
    libraries = [_trace(backend.kind, backend.library) for backend in found()]
    if not libraries:
        return told
    facts = _core.detect_gpus()
    choice = {name: os.environ.get(name) for name in ("TABAGENT_GPU_BACKEND", *_VISIBLE)}
    seen = [f"{name}={value}" for name, value in choice.items() if value is not None]
    cards = [f"{card['name']} {card['uuid']}" for card in facts["gpus"]]
    return [*told, *libraries, *seen, f"driver {facts['driver']}", *cards]


def missing_driver(kind: str) -> str | None:
    """What a backend of this kind needs of the system, and is not there."""
    if sys.platform != "linux":
        return None
    if kind == "metal":
        return "Metal is Apple's"
    if kind == "rocm":
        there = Path("/dev/kfd").exists()
        return None if there else "there is no AMD driver here: no /dev/kfd"
    library, name = _DRIVERS[kind]
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return f"there is no {name} here: {error}"
    return None


def no_code(
    architectures: Sequence[str],
    cards: Sequence[Mapping[str, Any]],
    how_many: Callable[[Iterable[bool]], bool] = any,
) -> str | None:
    """Names the cards that a CUDA backend was not compiled for, if they are `any` or `all`."""
    known = [card for card in cards if card.get("compute_capability")]
    cannot = [card for card in known if not runs_on(architectures, card["compute_capability"])]
    if not architectures or not known or not how_many(card in cannot for card in known):
        return None
    numbers = ["{}.{}".format(*card["compute_capability"]) for card in cannot]
    pairs = zip(cannot, numbers, strict=True)
    names = ", ".join(f"{card['name']} (SM {number})" for card, number in pairs)
    wanted = ",".join(sorted({number.replace(".", "") for number in numbers}))
    return (
        f"it was compiled for {', '.join(architectures)}, which is not for {names};"
        f" build it with `--arch {wanted}`"
    )


def runs_on(architectures: Sequence[str], capability: Sequence[int]) -> bool:
    """Machine code runs on its own generation from its own number on; PTX is translated for
    whatever is newer. What ends in `a` is for one number only."""
    wanted = (capability[0], capability[1])
    for architecture in architectures:
        if not (parts := CUDA_ARCHITECTURE.fullmatch(architecture)):
            continue
        own = divmod(int(parts["number"]), 10)
        runs_as_it_is = parts["form"] != "-virtual" and own[0] == wanted[0] and own <= wanted
        is_translated = parts["form"] != "-real" and own <= wanted
        if own == wanted or (parts["only"] != "a" and (runs_as_it_is or is_translated)):
            return True
    return False


# On Linux; elsewhere the trial finds it out.
_DRIVERS = {
    "cuda": ("libcuda.so.1", "NVIDIA driver"),
    "vulkan": ("libvulkan.so.1", "Vulkan loader"),
}
# A driver may have to translate all kernels first.
_TRIAL_SECONDS = 180
_FAILURE_HOLDS_S = 600
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")


def _wanted() -> tuple[str, ...]:
    choice = os.environ.get("TABAGENT_GPU_BACKEND") or "auto"
    if choice not in ("auto", "none", *KINDS):
        allowed = ", ".join(("auto", "none", *KINDS))
        message = f"`TABAGENT_GPU_BACKEND` must be one of {allowed}, got {choice:.60}"
        raise InvalidRequestError(message, name="TABAGENT_GPU_BACKEND")
    return KINDS if choice == "auto" else tuple(kind for kind in KINDS if kind == choice)


def _is_there(library: Path) -> bool:
    """A folder that this user may not look into has nothing for him."""
    try:
        return library.is_file()
    except OSError:
        return False


def _folders(kind: str) -> Iterator[Path]:
    with suppress(RuntimeError):
        yield data_folder() / kind
    spec = find_spec(f"tabagent_model_{kind}")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield Path(folder)


def _trace(kind: str, library: Path) -> str:
    try:
        stat = library.stat()
    except OSError:
        return f"{kind} {library}, which cannot be looked at"
    return f"{kind} {library.name} of {stat.st_size} bytes, changed at {stat.st_mtime_ns}"


def _dies(
    backend: Backend, note: Note, cards: Mapping[str, Any], cache: Cache, anew: bool
) -> str | None:
    """Let a child process compute with it, once for each build, driver and set of cards. That it
    failed holds for ten minutes: a card may recover, and the workers of now need not try it all."""
    uuids = [card["uuid"] for card in cards["gpus"]]
    visible = [os.environ.get(name) for name in _VISIBLE]
    name = f"{note.sha256} computes with {cards['driver']} on {uuids}, of which {visible}"
    match None if anew else cache.facts().get(name):
        case "computes":
            return None
        case [float(then), str(told)] if 0 <= time.time() - then < _FAILURE_HOLDS_S:
            return told
    trial = _trial.call("probe_gpu_backend", str(backend.library), seconds=_TRIAL_SECONDS)
    if trial.survived:
        if trial.is_certain:
            cache.keep(name, "computes")
        return None
    # A card may be missed by the backend and hidden from it, so that alone is no reason.
    missed = no_code(note.architectures, cards["gpus"]) if backend.kind == "cuda" else None
    told = "; ".join(filter(None, (trial.told, missed)))
    cache.keep(name, [time.time(), told])
    return told


def _loaded(backend: Backend) -> Backend:
    try:
        return replace(backend, devices=tuple(_core.load_gpu_backend(str(backend.library))))
    except TabAgentModelError as error:
        return replace(backend, refused=error.message)


def _log(backend: Backend) -> None:
    import logging

    log = logging.getLogger("tabagent_model")
    if backend.refused is None:
        log.info("the %s backend %s: %s", backend.kind, backend.library, ", ".join(backend.devices))
    else:
        log.warning("the %s backend is not loaded: %s", backend.kind, backend.refused)
