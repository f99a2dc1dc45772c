"""Which layout of weights a model computes with on a CPU: measured once, and remembered.

llama.cpp lays weights out anew when it loads them, where there is a layout for the CPU's widest
instructions (for AMX, its own, ours). Kernels for the file's layout compete with that, and which of
them is faster depends on the processor, the module, the type of the weights and the threads. The
first load of a model with weights of another type measures (`rust/src/context/layouts.rs`) and
waits for it: a quarter of a second, once for each machine. `TABAGENT_CALIBRATE=0` turns that off.
Then what was measured before decides, or a built-in rule.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from . import _native
from ._cache import Cache, may_calibrate

Pace = tuple[float, float]
"""Microseconds of a mebibyte of weights for a token of a prompt, and for one of the answer."""

# The built-in rule is left only for what is faster by so much, so that noise does not do it.
CLEARLY = 1.05

_measuring = threading.Lock()
_known: dict[Work, Times | None] = {}


class Work(NamedTuple):
    """What the times depend on, besides the machine."""

    type: str
    n_threads: int


class Times(NamedTuple):
    in_file: Pace
    anew: Pace


def choose(
    sizes: Mapping[str, int],
    n_threads: int,
    built_in: bool,
    *,
    may_measure: bool = True,
    module: str | None = None,
) -> bool:
    """Whether to lay weights out anew that have so many bytes of each type.

    `module` is the one that computes, if that is known already.
    """
    works = [Work(kind, n_threads) for kind in sizes]
    if may_measure or all(work in _known for work in works):
        found = times_of(works)
    else:
        remembered = measured(module)
        found = {work: remembered.get(work) for work in works}
    times = {work.type: seen for work, seen in found.items() if seen is not None}
    return pays(sizes, times, built_in)


def pays(sizes: Mapping[str, int], times: Mapping[str, Times], built_in: bool) -> bool:
    """Whether to lay out anew: as the built-in rule says, unless the other is clearly faster."""
    if not sizes or not times.keys() >= sizes.keys():
        return built_in
    in_file = sum(size * cost(times[kind].in_file) for kind, size in sizes.items())
    anew = sum(size * cost(times[kind].anew) for kind, size in sizes.items())
    return not in_file * CLEARLY < anew if built_in else anew * CLEARLY < in_file


def cost(pace: Pace) -> float:
    """A prompt and an answer half as long, as for attention."""
    prompt, answer = pace
    return 2 * prompt + answer


def times_of(works: Iterable[Work]) -> dict[Work, Times | None]:
    """What both layouts take. None: it was not measured, and now it is off or the machine is busy.

    A process asks once, so that all its models, and what is estimated of them, agree.
    """
    with _measuring:
        if new := [work for work in works if work not in _known]:
            is_allowed = may_calibrate()  # a wrong setting is told also where nothing depends on it
            found = measured()
            missing = [work for work in new if work not in found]
            if missing and is_allowed:
                found |= _measure(missing)
            _known.update({work: found.get(work) for work in new})
        return {work: _known[work] for work in works}


def measured(module: str | None = None) -> dict[Work, Times]:
    """All that is remembered of this machine, with the CPU module in use."""
    found = {}
    for name, times in _cache(module).facts().items():
        try:
            kind, n_threads = name.split()
            in_file, anew = ((float(prompt), float(answer)) for prompt, answer in times)
            if all(0 < time < math.inf for time in (*in_file, *anew)):
                found[Work(kind, int(n_threads))] = Times(in_file, anew)
        except (TypeError, ValueError):
            continue  # damaged, or of another version; it is measured again
    return found


def _measure(works: list[Work]) -> dict[Work, Times]:
    log = logging.getLogger("tabagent_model")
    types, n_threads = [work.type for work in works], works[0].n_threads
    log.info("measuring layouts of weights in %s, %d threads", ", ".join(types), n_threads)
    times = _native.core.measure_layouts(types, n_threads)
    if times is None:
        log.info("the machine is busy; in this process the built-in rule lays out weights")
        return {}
    found = {Work(kind, n_threads): Times(*seen) for kind, seen in times.items()}
    for work, seen in found.items():
        _cache().keep(" ".join(map(str, work)), seen)
    return found


def _cache(module: str | None = None) -> Cache:
    return Cache("layouts.json", f"{_native.machine()}|{module or _native.start()}")
