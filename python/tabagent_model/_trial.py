"""A function of the core, called once in a child process that may die of it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from . import _core

# The extension is loaded by its path, so that the trial runs nothing but what is tried.
_PROGRAM = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_core", sys.argv[1])
spec = importlib.util.spec_from_file_location("_core", sys.argv[1], loader=loader)
core = importlib.util.module_from_spec(spec)
loader.exec_module(core)
try:
    getattr(core, sys.argv[2])(*sys.argv[3:])
except Exception as error:
    sys.exit(str(getattr(error, "message", error)))
"""


@dataclass(frozen=True)
class Trial:
    survived: bool
    is_certain: bool
    """The same would happen again; not so when it was killed, or could not be tried."""
    told: str = ""
    """How it ended."""


def call(function: str, *arguments: str, seconds: int = 30) -> Trial:
    import signal
    import subprocess

    if not sys.executable:
        return Trial(True, False, "there is no Python to try it with")
    command = [sys.executable, "-I", "-c", _PROGRAM, str(_core.__file__), function, *arguments]
    try:
        tried = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            check=False,
            start_new_session=True,  # Ctrl-C on the terminal is no verdict
        )
    except OSError as error:
        return Trial(True, False, f"it cannot be tried ({error})")
    except subprocess.TimeoutExpired:
        return Trial(False, False, f"its trial took over {seconds} s")
    if tried.returncode == 0:
        return Trial(True, True)
    lines = tried.stderr.decode(errors="replace").strip().splitlines()
    # A backend that aborts has said why before it says where.
    last = next((line for line in lines if " error: " in line), "".join(lines[-1:]))
    if tried.returncode > 0:
        return Trial(False, True, last)
    try:
        name = signal.Signals(-tried.returncode).name
    except ValueError:
        name = f"signal {-tried.returncode}"
    was_killed = name in ("SIGTERM", "SIGKILL")
    return Trial(False, not was_killed, f"{name} ended its trial, after the words {last!r:.300}")
