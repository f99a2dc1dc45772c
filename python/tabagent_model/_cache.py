"""What was found out about this machine, in small JSON files in the user's cache folder.

A folder that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import InvalidRequestError


class Cache:
    """One such file: for each machine and installation, facts by their names."""

    def __init__(self, name: str, machine: str) -> None:
        home = os.environ.get("TABAGENT_HOME")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tabagent_model"
        self._file = (Path(home) if home else cache) / name
        self._machine = machine

    def facts(self) -> dict[str, Any]:
        facts = self._read().get(self._machine)
        return facts if isinstance(facts, dict) else {}

    def keep(self, name: str, fact: Any) -> None:
        import json

        facts = {**self._read(), self._machine: {**self.facts(), name: fact}}
        temporary = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            import logging

            log = logging.getLogger("tabagent_model")
            log.info("what was found out about this machine cannot be remembered: %s", error)

    def _read(self) -> dict[str, Any]:
        import json

        try:
            facts = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}


def may_calibrate() -> bool:
    """Whether what nobody found out yet may be measured now."""
    wanted = os.environ.get("TABAGENT_CALIBRATE") or "1"
    if wanted not in ("0", "1"):
        message = f"`TABAGENT_CALIBRATE` must be 0 or 1, got {wanted}"
        raise InvalidRequestError(message, name="TABAGENT_CALIBRATE")
    return wanted == "1"
