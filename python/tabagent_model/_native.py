"""The native core, and the choice of the CPU module that it computes with.

The package carries one build of llama.cpp's CPU code for each generation of processors. The best
one that this processor and its operating system announce is tried once in a child process, since
some announce what they cannot run; the verdict is remembered, and the next one down is taken when
a module dies. `TABAGENT_CPU_VARIANT` names a module and skips all that.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logging import Logger

    from .backends import Backend

# libggml installs a terminate handler at load that would start a debugger from a dying process.
_was_set = os.environ.get("GGML_NO_BACKTRACE")
os.environ["GGML_NO_BACKTRACE"] = "1"
try:
    from . import _core
finally:
    if _was_set is None:
        del os.environ["GGML_NO_BACKTRACE"]
    else:
        os.environ["GGML_NO_BACKTRACE"] = _was_set

from ._cache import Cache  # noqa: E402
from .errors import BackendError, InvalidRequestError  # noqa: E402

core = _core
LIBRARIES = Path(__file__).parent / "lib"

_starting = threading.Lock()
_module: str | None = None
_gpu_backends: tuple[Backend, ...] = ()


def start() -> str:
    """Load the CPU module and a GPU backend, and start llama.cpp, once; the name of the module."""
    global _module, _gpu_backends
    with _starting:
        if _module is None:
            from . import backends  # its reasons for not loading one are of no use to an import

            name = choose()
            folder = str(backends.built_cpu_module(name, machine()) or LIBRARIES)
            try:
                core.start(folder, name)
            except InvalidRequestError:  # it was opened before, to be asked how well it suits
                message = f"the CPU module {name} in `{folder}` can no longer be opened"
                hint = "close what is not needed, or raise the limit that `ulimit -a` shows"
                raise BackendError(message, hint=hint) from None
            _log().info("llama.cpp %s with the CPU module %s", core.LLAMA_CPP_VERSION, name)
            _gpu_backends = backends.load()
            _module = name
        return _module


def is_started() -> bool:
    """Whether llama.cpp runs in this process."""
    return _module is not None


def gpu_backends() -> tuple[Backend, ...]:
    """Those that lie here: the one that is loaded, and why the others are not."""
    start()
    return _gpu_backends


def choose() -> str:
    """The best CPU module that survives its trial, or the one that the environment names."""
    usable = [name for name, _ in core.cpu_modules(str(LIBRARIES))]
    wanted = os.environ.get("TABAGENT_CPU_VARIANT")
    if wanted:
        if wanted not in usable:
            names = ", ".join(usable)
            raise InvalidRequestError(
                f"`TABAGENT_CPU_VARIANT` must be one of {names}, got {wanted}", name="cpu_variant"
            )
        return wanted
    verdicts = _Verdicts()
    for name in usable:
        if verdicts.survives(name):
            return name
        _log().warning("the CPU module %s died in its trial; trying the next one", name)
    raise BackendError(
        f"no usable llama.cpp backend in `{LIBRARIES}`: all of {', '.join(usable)} died in a trial"
    )


def dead_modules() -> list[str]:
    """Those that did not survive a trial here."""
    return [name for name, survives in _Verdicts().known().items() if not survives]


def machine() -> str:
    """What a fact about this processor holds for: the processor, and what we make it run."""
    cpu = core.detect_cpu()
    kind = ".".join(str(cpu[part]) for part in ("family", "model", "stepping"))
    built = f"{core.__version__}|{core.LLAMA_CPP_VERSION}|{core.kernels() or 'no kernels'}"
    return f"{cpu['brand']} {kind}|{built}"


def what_computes() -> str:
    """The CPU module and the GPU backend, as far as settings, files and the driver tell of them:
    llama.cpp need not run here, and what a worker computes with is chosen there."""
    from . import backends

    module = os.environ.get("TABAGENT_CPU_VARIANT") or "auto"
    unfit = "".join(f", not {name}" for name in sorted(dead_modules()))
    return "|".join((f"module {module}{unfit}", *backends.traces()))


def check_folder() -> None:
    """An ImportError at once where the package's libraries are missing, not at the first load."""
    if not any(LIBRARIES.glob("*ggml-cpu*")):
        found = ", ".join(sorted(p.name for p in LIBRARIES.glob("*"))) or "nothing"
        raise BackendError(f"no usable llama.cpp backend in `{LIBRARIES}`: found {found}")


def _log() -> Logger:
    import logging  # here, and others below: only a first load needs them, and all pay for imports

    log = logging.getLogger("tabagent_model")
    if not log.handlers:
        log.addHandler(logging.NullHandler())  # else Python would print warnings on stderr
    return log


class _Verdicts:
    """What earlier trials of this installation on this processor said."""

    def __init__(self) -> None:
        self._cache = Cache("cpu-modules.json", f"{machine()}|{LIBRARIES}")

    def known(self) -> dict[str, bool]:
        return self._cache.facts()

    def survives(self, name: str) -> bool:
        known = self.known()
        if name in known:
            return bool(known[name])
        survives, is_certain = _try_module(name)
        if is_certain:
            self._cache.keep(name, survives)
        return survives


def _try_module(name: str) -> tuple[bool, bool]:
    """Let a child process compute with a module: whether it survives, and is that certain."""
    from . import _trial

    trial = _trial.call("probe_cpu_module", str(LIBRARIES), name)
    if trial.told:
        taken = "; taking it untried" if trial.survived else ""
        _log().warning("the CPU module %s: %s%s", name, trial.told, taken)
    return trial.survived, trial.is_certain


check_folder()
