"""The child of `isolation="process"`: an engine that is asked over a socket (docs/protocol.md).

`child.py` starts it, and it ends when its parent does. Three threads: one hears, one tells the
events that the engine does not tell itself, one says that it is alive. Calls that may take time
have a few more, so that an abort never waits behind them.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from .. import _core
from .._courier import LONG_TEXT, begin
from .._loading import load_here, placement_of
from ..errors import InvalidRequestError, ProtocolError, TabAgentModelError
from ..params import ModelConfig
from ..placement._ledger import LEDGER
from .frames import PROTOCOL, Message, Wire, pack, told_error, told_of, unpack
from .memory import Books

if TYPE_CHECKING:
    from .._loading import Loaded

Load = Callable[[ModelConfig, Callable[[float], bool]], "Loaded"]


def main(arguments: Sequence[str], load: Load = load_here) -> None:
    """`arguments`: the number of the socket, of the parent's process, and seconds between beats."""
    descriptor, parent, every = arguments
    _end_with(int(parent))
    _be_the_first_to_go()
    _core.keep_last_line(sys.stderr.fileno())
    through = _core.Wire(int(descriptor))
    Worker(
        Wire(socket.socket(fileno=int(descriptor)), through), through, load, float(every)
    ).serve()


class Worker:
    """One engine and what it was asked."""

    def __init__(self, wire: Wire, through: _core.Wire, load: Load, beat_s: float) -> None:
        self._wire = wire
        self._through = through
        self._load = load
        self._beat_s = beat_s
        self._objects: dict[int | str, Any] = {"memory": Books()}
        """What calls are made on: `model`, `context`, `memory`, and by number what they gave."""
        self._numbers = count(1)
        self._reservations: SimpleQueue[dict[str, int] | None] = SimpleQueue()
        self._calls = ThreadPoolExecutor(8, "tabagent-call")
        self._num_calls = 0
        self._counting = threading.Lock()

    def serve(self) -> None:
        """Until the parent hangs up, and then at once: nothing here needs to be put in order."""
        try:
            hello = {"protocol": PROTOCOL, "version": _core.__version__, "pid": os.getpid()}
            self._wire.send({"hello": hello})
            self._start(self._tell_logs)
            self._start(self._beat)
            while True:
                self._hear(self._wire.receive() or {})
        except EOFError:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _hear(self, message: Message) -> None:
        for number in message.get("released", ()):
            self._objects.pop(number, None)
        action = message.get("action")
        if action == "abort":
            self._objects["context"].abort(message["request"])
        elif action == "submit":
            # In the order they came, but for those that take long to tokenize or write out.
            is_long = len(message["prompt"]) > LONG_TEXT or type(message.get("chat")) is list
            self._answer(message, self._submit, in_turn=not is_long)
        elif action == "call":
            self._answer(message, self._call)
        elif action == "load":
            self._answer(message, self._open)
        elif action == "reserved":
            self._reservations.put(message["beside"])
        else:
            raise ProtocolError(f"Unknown action: {action!r:.40}")

    def _answer(
        self, message: Message, work: Callable[[Message], Any], in_turn: bool = False
    ) -> None:
        with self._counting:
            self._num_calls += 1
        if in_turn:
            self._do(message, work)
        else:
            self._calls.submit(self._do, message, work)

    def _do(self, message: Message, work: Callable[[Message], Any]) -> None:
        data: list[bytes] = []
        try:
            reply = {"id": message["id"], "value": pack(work(message), data, self._keep)}
            self._wire.send(reply, data)
        except OSError:
            return  # the parent is gone; the thread that hears knows
        except Exception as error:
            self._wire.send({"id": message["id"], "error": told_error(error)})
        finally:
            with self._counting:
                self._num_calls -= 1

    def _open(self, message: Message) -> Message:
        def tell(fraction: float) -> bool:
            self._wire.send({"id": message["id"], "progress": fraction})
            return True

        config = ModelConfig.from_dict(unpack(message["config"], message.get("data", ())))
        LEDGER.elsewhere = self._reserve
        context, model = self._load(config.with_isolation("none"), tell)
        books = Books(model)
        self._objects |= {"model": model, "context": context, "memory": books}
        if context is not None:
            context.tell_through(self._through)
            self._start(self._tell_events)
        described = _described(model)
        described["facts"]["placement"] = pack(placement_of(model), [])
        told = context and _described(context)
        return {"model": described, "context": told, "memory": books.told()}

    def _reserve(
        self, needs: Mapping[str, int], beside: Mapping[str, int]
    ) -> dict[str, int] | None:
        """Of the parent, which has the ledger; the thread that hears takes its answer."""
        self._wire.send({"reserve": needs, "beside": beside})
        return self._reservations.get()

    def _submit(self, message: Message) -> None:
        params = unpack(message["params"], message.get("data", ()))
        asked = message["request"], message["prompt"], params
        chat = message.get("chat")
        if chat is None:
            self._objects["context"].submit(*asked)
            return
        if type(chat) is list:
            chat = self._objects["model"].render_chat(*chat)
        else:
            chat = self._objects[chat]
        self._objects["context"].submit(*asked, chat, message["patience"])

    def _call(self, message: Message) -> Any:
        data, method = message.get("data", ()), message["method"]
        target = self._objects[message["on"]]
        if method.startswith("_") or method in _NOT_FROM_OUTSIDE:
            raise InvalidRequestError(f"`{method}` cannot be called from outside", name="method")
        arguments, keywords = (unpack(message[name], data) for name in ("arguments", "keywords"))
        return getattr(target, method)(*arguments, **keywords)

    def _keep(self, thing: Any) -> Message:
        number = next(self._numbers)
        self._objects[number] = thing
        described = _described(thing)
        if isinstance(thing, _core.ChatPrompt):
            described["facts"]["ids"] = self._ids(thing)
        return {"number": number, "kind": type(thing).__name__, **described}

    def _ids(self, prompt: _core.ChatPrompt) -> list[int] | None:
        """What is asked next of nearly every prompt: a question less on the way to the engine."""
        context = self._objects["context"]
        try:
            return None if context is None else prompt.tokens(limit=context.n_ctx)
        except TabAgentModelError:
            return None  # who asks hears why

    def _tell_events(self) -> None:
        context = self._objects["context"]
        while events := context.next_events():
            self._wire.send({"events": [*map(told_of, events)]})

    def _tell_logs(self) -> None:
        _forward_own_words()
        while lines := _core.take_log():
            self._wire.send({"log": lines})

    def _beat(self) -> None:
        """Whether we live, and what the engine's own thread has to say to that."""
        while True:
            time.sleep(self._beat_s)
            context = self._objects.get("context")
            pulse, is_busy = (None, False) if context is None else context.pulse()
            if is_busy or self._num_calls:
                self._wire.send({"beat": [pulse, is_busy, _core.process_rss_mb()]})

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except OSError:
                os._exit(0)  # the parent is gone
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        begin(threading.Thread(target=run, name=f"tabagent{work.__name__}", daemon=True))


# What belongs to the worker itself, or takes a function.
_NOT_FROM_OUTSIDE = (
    *("load", "unload", "create_context", "close", "generate"),
    *("submit", "abort", "next_events", "tell_through"),
)


def _described(thing: Any) -> Message:
    """The plain facts of an object, and what it can be asked."""
    facts, methods = {}, []
    for name in dir(thing):
        if name.startswith("_"):
            continue
        value = getattr(thing, name)
        if callable(value):
            methods.append(name)
            continue
        try:
            facts[name] = pack(value, [])
        except TypeError:
            continue
    return {"facts": facts, "methods": [name for name in methods if name not in _NOT_FROM_OUTSIDE]}


def _end_with(parent: int) -> None:
    """When the parent dies, the kernel kills this process, also a stopped one."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it had died before


def _be_the_first_to_go() -> None:
    """When memory runs out, better the worker than the program that it works for."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - no file of ours
            file.write("500")
    except OSError:
        return


def _forward_own_words() -> None:
    """What the package logs here goes the way of llama.cpp's lines."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _core.put_log(record.levelname.lower(), record.getMessage())

    logger = logging.getLogger("tabagent_model")
    logger.addHandler(Forward())
    logger.setLevel(logging.INFO)
    logger.propagate = False
