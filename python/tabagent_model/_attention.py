"""Which attention a model computes with on a CPU: measured once, and remembered.

llama.cpp's own choice, flash attention over a cache of f16, is seldom the fastest on a CPU; which
one is depends on the processor, the module, the heads, the depth and the threads. The first load
of a model with other heads measures (`rust/src/context/attention.rs`) and waits for it: half a
second or so, once for each machine, while a context could not change its mind afterwards.
`TABAGENT_CALIBRATE=0` turns that off. Then what was measured before decides, or a built-in rule.
"""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple

from . import _native
from ._cache import Cache, may_calibrate

Choice = tuple[str, str]
"""`flash_attn` and `kv_type`."""
Times = dict[Choice, tuple[float, float]]
"""Microseconds of one layer for a token of a prompt, and for one of the answer."""

# Another choice than llama.cpp's must be faster by so much, so that noise does not make it; and one
# that takes twice the memory by more.
CLEARLY = 1.05
CLEARLY_WITH_F32 = 1.10

_measuring = threading.Lock()
_known: dict[Work, Times | None] = {}


class Work(NamedTuple):
    """What the times depend on, besides the machine."""

    head_dim: int
    n_head: int
    n_head_kv: int
    n_ctx: int
    n_threads: int


def choose(
    work: tuple[int, ...],
    choices: list[Choice],
    built_in: Choice,
    *,
    may_measure: bool = True,
    module: str | None = None,
) -> Choice:
    """The fastest of these choices, the first of which is llama.cpp's own.

    `module` is the one that computes, if that is known already.
    """
    if len(choices) == 1:
        return choices[0]
    work = Work(*work)
    times = times_of(work) if may_measure or work in _known else measured(module).get(work)
    return fastest(times, choices, work.n_ctx) if times else built_in


def times_of(work: Work) -> Times | None:
    """What each choice takes. None: it was not measured, and now it is off or the machine is busy.

    A process asks once, so that all its contexts choose alike.
    """
    with _measuring:
        if work not in _known:
            is_allowed = may_calibrate()  # a wrong setting is told where nothing depends on it, too
            _known[work] = measured().get(work) or (_measure(work) if is_allowed else None)
        return _known[work]


def measured(module: str | None = None) -> dict[Work, Times]:
    """All that is remembered of this machine, with the CPU module in use."""
    found = {}
    for name, times in _cache(module).facts().items():
        try:
            work = Work(*map(int, name.split()))
            found[work] = {
                _choice(choice): (float(prompt), float(answer))
                for choice, (prompt, answer) in times.items()
            }
        except (AttributeError, TypeError, ValueError):
            continue  # damaged, or of another version; it is measured again
    return found


def fastest(times: Times, choices: list[Choice], n_ctx: int) -> Choice:
    own = choices[0]

    def handicapped(choice: Choice) -> float:
        clearly = CLEARLY_WITH_F32 if choice[1] == "f32" else CLEARLY
        return cost(times[choice], n_ctx) * (1.0 if choice == own else clearly)

    return min((choice for choice in choices if choice in times), key=handicapped, default=own)


def cost(times: tuple[float, float], n_ctx: int) -> float:
    """A prompt of half the context, and an answer of a quarter."""
    prompt, answer = times
    return n_ctx / 2 * prompt + n_ctx / 4 * answer


def _measure(work: Work) -> Times | None:
    log = logging.getLogger("tabagent_model")
    log.info("measuring attention for heads of %d x %d/%d at n_ctx=%d, %d threads", *work)
    times = _native.core.measure_attention(*work)
    if times is None:
        log.info("the machine is busy; in this process the built-in rule chooses attention")
    else:
        _cache().keep(" ".join(map(str, work)), {"+".join(c): t for c, t in times.items()})
    return times


def _cache(module: str | None = None) -> Cache:
    return Cache("attention.json", f"{_native.machine()}|{module or _native.start()}")


def _choice(name: str) -> Choice:
    flash_attn, kv_type = name.split("+")
    return flash_attn, kv_type
