"""How a worker process begins, and the notes that it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

from .._courier import begin
from ..errors import BackendError


def command() -> list[str]:
    """What starts a worker, but for its three arguments."""
    if not sys.executable or getattr(sys, "frozen", False):
        message = "there is no Python interpreter to start a worker process with"
        raise BackendError(message, hint="load it with `isolation='none'`")
    if not hasattr(os, "register_at_fork"):
        message = "worker processes are not supported on this system"
        raise BackendError(message, hint="load it with `isolation='none'`")
    # Isolated from the environment and the working directory; imports come from where ours do.
    paths = json.dumps([path for path in sys.path if isinstance(path, str)])
    return [sys.executable, "-I", "-c", _PROGRAM, paths]


def new_notes() -> int:
    """A file without a name, which outlives the worker that writes it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tabagent-worker")
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp()
        Path(path).unlink()
    os.lseek(descriptor, _LAST_LINE_BYTES, os.SEEK_SET)
    return descriptor


def last_line(notes: int) -> str | None:
    """What an abort wrote to stderr tells most; otherwise it is what llama.cpp logged last."""
    begin = max(_LAST_LINE_BYTES, os.fstat(notes).st_size - _STDERR_BYTES)
    for where, size in ((begin, _STDERR_BYTES), (0, _LAST_LINE_BYTES)):
        text = os.pread(notes, size, where).replace(b"\0", b"").decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if lines := [line.strip() for line in lines if not line.startswith(_OF_BACKTRACES)]:
            return lines[-1]
    return None


def spawned(command: list[str], socket: int, stderr: int) -> subprocess.Popen[bytes]:
    """Linux kills a worker that asked for it when the *thread* that started it ends, and the one
    that loads a model soon does. So one thread that lives as long as the process starts them all.
    """
    global _spawner
    with _spawning:
        if _spawner is None:
            orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
            thread = threading.Thread(target=_start_all, args=(orders,), name="tabagent-spawn")
            thread.daemon = True
            begin(thread)
            _spawner = orders
        orders = _spawner
    started: SimpleQueue[subprocess.Popen[bytes] | BaseException] = SimpleQueue()

    def start() -> None:
        try:
            started.put(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=[socket],
                    start_new_session=True,  # Ctrl-C on the terminal is for us
                    # What an abort says is to be the last line.
                    env={**os.environ, "GGML_NO_BACKTRACE": "1", "RUST_BACKTRACE": "0"},
                )
            )
        except BaseException as error:
            started.put(error)

    orders.put(start)
    process = started.get()
    if isinstance(process, BaseException):
        raise process
    return process


def disown() -> None:
    """In a forked child: the thread that starts workers did not come along."""
    global _spawning, _spawner
    _spawning, _spawner = threading.Lock(), None


def _start_all(orders: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        orders.get()()


_spawning = threading.Lock()
_spawner: SimpleQueue[Callable[[], None]] | None = None

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from tabagent_model.isolation.worker import main; main(sys.argv[2:])"
)
# The first bytes of a worker's notes are the last line of its log, written by `rust/src/log.rs`;
# behind them is what it wrote to its stderr.
_LAST_LINE_BYTES = 1024
_STDERR_BYTES = 4096
# What Rust says behind the words that matter.
_OF_BACKTRACES = ("note: run with", "skipping backtrace")
