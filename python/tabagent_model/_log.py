"""Carries llama.cpp's own log lines to `logging.getLogger("tabagent_model.llama")`.

llama.cpp logs from its own threads, which must not wait for Python; so Rust keeps the lines and
one thread here fetches them.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from . import _core
from ._courier import begin

_lock = threading.Lock()
_thread: threading.Thread | None = None


def start() -> None:
    """Once per process, before the first model is loaded."""
    global _thread
    import logging

    with _lock:
        if _thread is None:
            # Without a handler of ours, Python would print warnings of an unconfigured program.
            logging.getLogger("tabagent_model").addHandler(logging.NullHandler())
            thread = threading.Thread(target=_forward, name="tabagent-log", daemon=True)
            begin(thread)
            _thread = thread


def stop() -> None:
    """At exit."""
    if _thread is not None:
        _core.stop_log()
        _thread.join(timeout=0.5)


def disown() -> None:
    """In a forked child: the thread did not come along."""
    global _lock, _thread
    _lock, _thread = threading.Lock(), None


def _forward() -> None:
    import logging

    logger = logging.getLogger("tabagent_model.llama")
    levels = {
        "debug": logging.DEBUG,
        "info": logging.INFO,
        "warning": logging.WARNING,
        "error": logging.ERROR,
    }
    while lines := _core.take_log():
        for level, line in lines:
            with suppress(Exception):  # a user's handler may raise; the next line is not its fault
                logger.log(levels[level], "%s", line)
