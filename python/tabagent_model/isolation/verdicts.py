"""What is known of model files in worker processes: which were tried, and which keep crashing.

A file is known by its size, the time of its last change, and its first and last mebibyte, with the
configuration it is opened with. Reading a whole file of forty gigabytes would take longer than to
load it; and what a loader stumbles over, the header, the vocabulary and the table of weights, lies
in front. Whoever changes weights in the middle of a file and turns back its clock is not caught:
this is a memory of accidents, not a guard against forgery.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _native
from .._cache import Cache
from ..errors import ModelQuarantinedError, WorkerCrashedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..params import ModelConfig

CRASHES, WITHIN_S = 3, 60.0


class Verdict:
    """About one file and one configuration, for all models of this process and later ones."""

    def __init__(self, config: ModelConfig, files: Sequence[str]) -> None:
        self._name = Path(config.path).name
        self._key = _key(config, files)
        self._cache = Cache("isolation.json", _native.machine())

    @property
    def is_tried(self) -> bool:
        return self._known() is not None

    def check(self) -> None:
        """Refuse what is quarantined."""
        known = self._known()
        if known and (why := known.get("quarantined")):
            raise self._refusal(str(why))

    def passed(self) -> None:
        """It survived a probe; whatever was held against it is forgotten."""
        with _lock:
            _crashes.pop(self._key, None)
        self._keep({"tried": time.time()})

    def quarantine(self, crash: WorkerCrashedError) -> ModelQuarantinedError:
        self._keep({"quarantined": crash.message})
        return self._refusal(crash.message)

    def note_crash(self, crash: WorkerCrashedError) -> ModelQuarantinedError | None:
        """Too many within a short time are enough."""
        now = time.monotonic()
        with _lock:
            times = _crashes.setdefault(self._key, deque(maxlen=CRASHES))
            times.append(now)
            is_enough = len(times) == CRASHES and now - times[0] <= WITHIN_S
        return self.quarantine(crash) if is_enough else None

    @property
    def num_crashes(self) -> int:
        """Within the last minute."""
        now = time.monotonic()
        with _lock:
            times = _crashes.get(self._key, ())
            return sum(now - then <= WITHIN_S for then in times)

    def _refusal(self, why: str) -> ModelQuarantinedError:
        return ModelQuarantinedError(
            f"`{self._name}` is in quarantine with this configuration: {why}",
            hint="load it with `probe=True` to try it again, or with other settings",
        )

    def _known(self) -> dict[str, Any] | None:
        kept = self._cache.facts().get(self._key)
        return kept if isinstance(kept, dict) else _verdicts.get(self._key)

    def _keep(self, verdict: dict[str, Any]) -> None:
        with _lock:
            _verdicts[self._key] = verdict  # for where nothing can be written
            self._cache.keep(self._key, verdict)


_lock = threading.Lock()
_crashes: dict[str, deque[float]] = {}
_verdicts: dict[str, dict[str, Any]] = {}


def _key(config: ModelConfig, files: Sequence[str]) -> str:
    settings = {**config.to_dict(), "model_path": None, "isolation": None, "watchdog_s": None}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        path = Path(file)
        facts = path.stat()
        found.update(f"{facts.st_size} {facts.st_mtime_ns} ".encode())
        with path.open("rb") as content:
            found.update(content.read(2**20))
            content.seek(max(facts.st_size - 2**20, 0))
            found.update(content.read(2**20))
    return found.hexdigest()[:32]
