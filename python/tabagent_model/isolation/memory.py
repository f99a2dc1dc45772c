"""A worker's memory, in the ledger of the process that started it.

```text
    worker                                             parent
    {"reserve": {"cpu": 93}, "beside": {}}        ──▶  Ledger.promise
                                                  ◀──  {"action": "reserved", "beside": {"cpu": 70}}
    chooses again, with 70 less to choose from
    {"reserve": {"cpu": 40}, "beside": {"cpu": 70}} ─▶
                                                  ◀──  {"action": "reserved", "beside": null}
    loads, and tells what that took
```

The worker chooses, since llama.cpp runs there and not here. The ledger is the parent's, since there
may be other models.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _core, hardware
from ..errors import ProtocolError, TabAgentModelError
from ..hardware import Machine
from ..placement._estimate import Share
from ..placement._ledger import LEDGER, ModelMemory, WorkerMemory

if TYPE_CHECKING:
    from .child import Child
    from .frames import Message

# How long a look at a worker may take before what was seen last has to do.
GLIMPSE_S = 1.0


class Books:
    """In the worker: what its parent asks about memory."""

    def __init__(self, native: object = None) -> None:
        self._native = native

    def told(self) -> Message:
        """What the model holds, and all of this process."""
        entry, facts = LEDGER.entry_of(self._native), _core.memory_info()
        shares = () if entry is None else entry.memory().shares
        return {
            "shares": [asdict(share) for share in shares],
            "resident": facts["resident"],
            "private": facts["private"],
        }

    def machine(self) -> Message:
        return hardware.detect().to_dict()


class Tenant:
    """In the parent: a model that lives in a worker, as an entry of the ledger."""

    def __init__(self, child: Child, path: str, told: Any) -> None:
        self._child = weakref.ref(child)  # whether it lives is nothing the ledger decides
        self._path, self._pid, self._known = path, child.pid, _checked(told)

    def memory(self) -> ModelMemory:
        """What the worker tells; what it told last, where it does not answer."""
        with suppress(Empty, TabAgentModelError):
            self._known = _checked(self._ask("told"))
        shares, resident, private = self._known
        worker = WorkerMemory(self._pid, resident, private)
        return ModelMemory(Path(self._path).stem, self._path, shares, worker)

    def machine(self) -> Machine | None:
        with suppress(Empty, TabAgentModelError):
            return Machine.from_dict(self._ask("machine"))
        return None

    def _ask(self, method: str) -> Any:
        if (child := self._child()) is None:
            raise Empty
        return child.call("memory", method, within=GLIMPSE_S)


def sizes(told: Any) -> dict[str, int]:
    """Bytes by device, as they came over a socket."""
    if type(told) is not dict or not all(type(size) is int and size >= 0 for size in told.values()):
        raise ProtocolError(f"no bytes by device: {told!r:.60}")
    return told


class _Known(NamedTuple):
    shares: tuple[Share, ...]
    resident: int | None
    private: int | None


def _checked(told: Any) -> _Known:
    try:
        shares = [Share(str(each.pop("device")), **sizes(each)) for each in told["shares"]]
        resident, private = told["resident"], told["private"]
        sizes({"resident": resident or 0, "private": private or 0})
    except (LookupError, TypeError, AttributeError) as error:
        raise ProtocolError(f"no account of memory: {error!r:.60}") from None
    return _Known(tuple(shares), resident, private)
