"""What is known of model files in worker processes: which were tried, and which keep crashing.

A file is known by its size, the time of its last change, and its first and last mebibyte, with the
configuration it is opened with. Reading a whole file of forty gigabytes would take longer than to
load it; and what a loader stumbles over, the header, the vocabulary and the table of weights, lies
in front. Whoever changes weights in the middle of a file and turns back its clock is not caught:
this is a memory of accidents, not a guard against forgery.

A verdict holds for what the worker computes with: another CPU module, GPU backend, driver or card
is another matter. And it holds something against a file only where the file may be to blame: a
worker that the system killed, or that was refused memory and said so, may have it tomorrow.
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
from ..recovery import is_resource_exhaustion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..params import ModelConfig

CRASHES, WITHIN_S = 3, 60.0
REST_S = 60.0
"""After as many crashes that the file may not be to blame for."""
# What the system sends when memory runs out, and what somebody sends with `kill`: it says nothing
# of the file. Where we sent it ourselves, `was_hanging` says so.
KILLS = ("SIGKILL", "SIGTERM")


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
        """Refuse what is quarantined, or rests."""
        with _lock:
            until, killed = _resting.get(self._key, (0.0, ""))
        if (left := until - time.monotonic()) > 0:
            raise self._refusal_for(left, killed)
        known = self._known()
        if known and (why := known.get("quarantined")):
            raise self._refusal(str(why))

    def passed(self) -> None:
        """It survived a probe; whatever was held against it is forgotten."""
        with _lock:
            _crashes.pop(self._key, None)
            _resting.pop(self._key, None)
        self._keep({"tried": time.time()})

    def quarantine(self, crash: WorkerCrashedError) -> ModelQuarantinedError:
        self._keep({"quarantined": crash.message})
        return self._refusal(crash.message)

    def note_crash(self, crash: WorkerCrashedError) -> ModelQuarantinedError | None:
        """Too many within a short time are enough: for good, if the file may be to blame for each
        of them, otherwise for a rest, in this process alone."""
        now = time.monotonic()
        is_of_file = crash.was_hanging or not _had_no_memory(crash)
        with _lock:
            crashes = _crashes.setdefault(self._key, deque(maxlen=CRASHES))
            crashes.append((now, is_of_file))
            if len(crashes) < CRASHES or now - crashes[0][0] > WITHIN_S:
                return None
            if not all(is_of_file for _, is_of_file in crashes):
                _resting[self._key] = now + REST_S, crash.message
                return self._refusal_for(REST_S, crash.message)
        return self.quarantine(crash)

    @property
    def num_crashes(self) -> int:
        """Within the last minute."""
        now = time.monotonic()
        with _lock:
            return sum(now - then <= WITHIN_S for then, _ in _crashes.get(self._key, ()))

    def _refusal(self, why: str) -> ModelQuarantinedError:
        return ModelQuarantinedError(
            f"`{self._name}` is in quarantine with this configuration: {why}",
            hint="load it with `probe=True` to try it again, or with other settings",
        )

    def _refusal_for(self, seconds: float, why: str) -> ModelQuarantinedError:
        return ModelQuarantinedError(
            f"`{self._name}` is not started for {seconds:.0f} s, after {CRASHES} workers that"
            f" ended within a minute: {why}",
            hint="see whether memory ran out, and give it more, or the model a smaller `n_ctx`",
            retry_after_s=seconds,
        )

    def _known(self) -> dict[str, Any] | None:
        kept = self._cache.facts().get(self._key)
        return kept if isinstance(kept, dict) else _verdicts.get(self._key)

    def _keep(self, verdict: dict[str, Any]) -> None:
        with _lock:
            _verdicts[self._key] = verdict  # for where nothing can be written
            self._cache.keep(self._key, verdict)


def _had_no_memory(crash: WorkerCrashedError) -> bool:
    """By the way it ended, or by its last words."""
    return crash.signal in KILLS or is_resource_exhaustion(crash)


_lock = threading.Lock()
_crashes: dict[str, deque[tuple[float, bool]]] = {}
"""When, and whether the file may be to blame."""
_resting: dict[str, tuple[float, str]] = {}
"""Until when, and why."""
_verdicts: dict[str, dict[str, Any]] = {}


def _key(config: ModelConfig, files: Sequence[str]) -> str:
    settings = {**config.to_dict(), "model_path": None, "isolation": None, "watchdog_s": None}
    found = hashlib.sha256(json.dumps([settings, _native.what_computes()], sort_keys=True).encode())
    for file in files:
        path = Path(file)
        facts = path.stat()
        found.update(f"{facts.st_size} {facts.st_mtime_ns} ".encode())
        with path.open("rb") as content:
            found.update(content.read(2**20))
            content.seek(max(facts.st_size - 2**20, 0))
            found.update(content.read(2**20))
    return found.hexdigest()[:32]
