"""A worker process as its parent sees it: it is started, asked and heard, and it ends.

One thread hears; which one changes: first the one that loads, then the courier's. It also keeps
the watch. A worker in which something is under way says every second how far its engine's thread
has got; one that is silent, or whose engine stands still, for `watchdog_s` is killed. Seconds are
counted in what was heard, not read from a clock: a laptop that slept is no hung worker.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from itertools import count
from mmap import PAGESIZE
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from .. import _core
from ..errors import (
    BackendError,
    LoadCancelledError,
    OutOfMemoryError,
    ProtocolError,
    WorkerCrashedError,
)
from ..placement._ledger import LEDGER
from .frames import PROTOCOL, Answer, Message, RemoteEvent, Wire, error_of, event_of, pack, unpack
from .memory import Tenant, sizes
from .spawn import command, last_line, new_notes, spawned

if TYPE_CHECKING:
    from io import FileIO

    from ..params import ModelConfig


# Until its first word: Python has to start, perhaps on a busy machine.
START_S = 30.0
_DESCRIBED = {"model", "context", "memory"}


class Child:
    """One worker process, from its start to its end."""

    def __init__(self, config: ModelConfig) -> None:
        self._name = Path(config.path).name
        self._config = config
        self._beat_s = min(1.0, config.watchdog_s / 4)
        self._silent_s = self._stuck_s = 0.0
        self._has_begun = self._is_loading = False
        self._pulse: Any = None
        self._last_rss_mb: float | None = None
        self._statm: FileIO | None = None
        """Where the kernel tells how much memory it has; it is looked at for each answer."""
        self._answers: dict[int, Answer] = {}
        self._progress: Callable[[float], Any] = lambda fraction: None
        self._interrupted: BaseException | None = None
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._end: Exception | None = None
        self._under_way: Collection[int] = ()
        self.released: deque[int] = deque()
        """Objects there that nobody holds here any more; told with the next message."""
        program = command()
        with ExitStack() as opened:
            try:
                self._notes = new_notes()
                opened.callback(os.close, self._notes)
                ours, theirs = map(opened.enter_context, socket.socketpair())
                for end in (ours, theirs):
                    end.setblocking(True)  # whatever the program's default is
                # The engine waits when it is full: as much as the system allows, for a parent
                # that holds the GIL for a while.
                theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 2**20)
                arguments = [str(theirs.fileno()), str(os.getpid()), str(self._beat_s)]
                self._process = spawned([*program, *arguments], theirs.fileno(), self._notes)
            except OSError as error:
                message = f"no worker process could be started: {error}"
                raise BackendError(message, hint="load it with `isolation='none'`") from None
            opened.pop_all()
        theirs.close()
        self._wire = Wire(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return self._end is not None

    @property
    def is_loaded(self) -> bool:
        """Whether it holds memory: the ledger asks."""
        return self._end is None and self._process.poll() is None

    def rss_mb(self) -> float | None:
        if self._end is not None:
            return None
        try:
            if self._statm is None:
                self._statm = Path(f"/proc/{self.pid}/statm").open("rb", 0)  # noqa: SIM115
            told = os.pread(self._statm.fileno(), 100, 0)
            return int(told.split()[1]) * PAGESIZE / 2**20
        except (OSError, LookupError, ValueError):  # not Linux, or it has just ended
            return self._last_rss_mb

    def load(
        self, tell: Callable[[float], Any], is_wanted: Callable[[], bool]
    ) -> dict[str, Message | None]:
        """Let it open the model; what there is to know of the model and its context."""

        def progress(fraction: float) -> None:
            if tell(fraction) is False:
                raise LoadCancelledError(f"loading `{self._config.path}` was cancelled")

        self._progress, self._is_loading = progress, True
        config = pack(self._config.to_dict(), [])
        try:
            described = self.settle({"action": "load", "config": config}, is_wanted)
            if type(described) is not dict or not described.keys() >= _DESCRIBED:
                raise ProtocolError(f"no description of a model: {described!r:.60}")
            if described["context"] is not None:
                LEDGER.enter(self, Tenant(self, self._config.path, described["memory"]))
        except OutOfMemoryError as error:
            raise LEDGER.with_unloading(error) if hasattr(error, "rungs") else error from None
        finally:
            self._is_loading = False
            LEDGER.release(id(self))
        return described

    def settle(
        self,
        question: Mapping[str, Any],
        is_wanted: Callable[[], bool] = lambda: True,
        under_way: Sequence[int] = (),
    ) -> Any:
        """Ask, and be the one who hears until it is answered and what is under way has ended."""
        answers: list[tuple[Any, Exception | None]] = []
        self.ask(question, lambda value, error: answers.append((value, error)))
        running = set(under_way)
        while not answers or (running and answers[0][1] is None):
            if not is_wanted():
                raise LoadCancelledError(f"loading `{self._config.path}` was cancelled")
            events = self.hear(0.1, under_way)
            running -= {event.request_id for event in events if event.is_last}
            if self._interrupted is not None:
                raise self._interrupted
        value, error = answers[0]
        if error is not None:
            raise error
        return value

    def ask(
        self,
        question: Mapping[str, Any],
        answer: Answer,
        data: Sequence[bytes] = (),
        waits: bool = True,
    ) -> bool:
        """Send a question. `answer` hears once, in the thread that hears. False: it would have to
        wait to be sent, and must not."""
        number = next(self._numbers)
        with self._lock:
            if self._end is not None:
                raise copy(self._end)
            self._answers[number] = answer
        is_sent = False
        try:
            is_sent = self.tell({"id": number, **question}, data, waits)
        finally:
            if not is_sent:
                with self._lock:  # where it is gone, the end of the worker is its answer
                    is_sent = self._answers.pop(number, None) is None
        return is_sent

    def call(
        self,
        on: int | str,
        method: str,
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
        within: float | None = None,
        keep: Callable[[Any], object] = lambda value: None,
    ) -> Any:
        """Ask and wait, while another thread hears. `queue.Empty` if that takes too long; `keep`
        gets the answer also when it is late."""
        question, data = calling(on, method, arguments, keywords or {})
        replies: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def hear(value: Any, error: Exception | None) -> None:
            if error is None:
                keep(value)
            replies.put((value, error))

        self.ask(question, hear, data)
        value, error = replies.get(timeout=within)
        if error is not None:
            raise error
        return value

    def tell(
        self, message: Mapping[str, Any], data: Sequence[bytes] = (), waits: bool = True
    ) -> bool:
        """Send what needs no answer. If it is gone, whoever hears will know."""
        if released := self._take_released():
            message = {**message, "released": released}
        is_sent = False
        try:
            is_sent = self._wire.send(message, data, waits)
        except OSError:
            is_sent = True
        finally:
            if not is_sent:
                self.released.extend(released)
        return is_sent

    def hear(self, within: float, under_way: Collection[int]) -> list[RemoteEvent]:
        """Take one message and do what it says; events are given back.

        With requests under way or questions open, silence means that it hangs. When it has died,
        that is raised here, and everybody who waits for an answer gets it as well.
        """
        self._under_way = under_way
        try:
            message = self._wire.receive(within)
            if message is None:
                self._note_silence(within if under_way or self._answers else 0.0)
                return []
            self._silent_s, self._has_begun = 0.0, True
            return self._take(message)
        except WorkerCrashedError:
            raise
        except Exception as error:
            why = "" if isinstance(error, EOFError) else f" after it sent nonsense ({error!r:.200})"
            raise self.end(self._crash(why)) from None

    def kill(self) -> None:
        """End it; nothing in it needs to be put in order."""
        self._process.kill()
        self._wire.hang_up()

    def end(self, error: Exception) -> Exception:
        """It is over: clean up, and tell everybody who waits for an answer."""
        with self._lock:
            if self._end is not None:
                return self._end
            self._end = error
            answers, self._answers = self._answers, {}
        self.kill()
        self.wait()
        self._wire.close()
        os.close(self._notes)
        if self._statm is not None:
            self._statm.close()
        for answer in answers.values():
            answer(None, copy(error))
        return error

    def wait(self, timeout: float = 10.0) -> int | None:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:  # the kernel is busy taking its memory back
            return None

    def disown(self) -> None:
        """In a forked child: it belongs to the parent."""
        self._wire.disown()
        self._process.returncode = 0  # else it would be waited for

    def _take_released(self) -> list[int]:
        taken = []
        with suppress(IndexError):  # another thread may be quicker
            while self.released:
                taken.append(self.released.popleft())
        return taken

    def _take(self, message: Message) -> list[RemoteEvent]:
        if (told := message.get("events")) is not None:
            return [event_of(each) for each in told]
        if "progress" in message:
            self._tell_progress(float(message["progress"]))
        elif "id" in message:
            self._take_answer(message)
        elif "beat" in message:
            self._note_beat(*message["beat"])
        elif "log" in message:
            for level, line in message["log"]:
                _core.put_log(str(level), str(line))
        elif "hello" in message:
            _check(message["hello"])
        elif "reserve" in message and self._is_loading:
            needs, beside = sizes(message["reserve"]), sizes(message["beside"])
            others = LEDGER.promise(id(self), needs, beside)
            self.tell({"action": "reserved", "beside": others})
        else:
            raise ProtocolError(f"an unknown message: {message!r:.60}")
        return []

    def _tell_progress(self, fraction: float) -> None:
        try:
            self._progress(fraction)
        except BaseException as error:  # the user's; it ends the load
            self._interrupted = error

    def _take_answer(self, message: Message) -> None:
        with self._lock:
            answer = self._answers.pop(message["id"], None)
        if answer is None:
            return  # Ctrl-C struck who had asked
        if "error" in message:
            answer(None, error_of(message["error"]))
        else:
            answer(unpack(message["value"], message.get("data", ()), self._object), None)

    def _object(self, described: Message) -> RemoteObject:
        is_prompt = described["kind"] == "ChatPrompt"
        return (RemotePrompt if is_prompt else RemoteObject)(self, described)

    def _note_silence(self, seconds: float) -> None:
        self._silent_s = self._silent_s + seconds if seconds else 0.0
        if self._silent_s >= max(self._config.watchdog_s, 0.0 if self._has_begun else START_S):
            raise self.end(self._crash(f" after {self._silent_s:.0f} s without a sign of life"))

    def _note_beat(self, pulse: Any, is_busy: Any, rss_mb: Any) -> None:
        self._last_rss_mb = rss_mb
        stands_still = is_busy and pulse == self._pulse
        self._stuck_s = self._stuck_s + self._beat_s if stands_still else 0.0
        self._pulse = pulse
        if self._stuck_s >= self._config.watchdog_s:
            why = f" after its engine had stood still for {self._stuck_s:.0f} s"
            raise self.end(self._crash(why))

    def _crash(self, why: str) -> WorkerCrashedError:
        """What it died of, as far as it can be known; it is killed if it has not ended."""
        code = self._process.poll() if why else self.wait(1.0)
        was_hanging = code is None
        if code is None:
            self._process.kill()
            code = self.wait()
            how = f"was killed{why or ' after it had hung up'}"
        elif code < 0:
            how = f"was killed by {_signal_name(code)}{why}"
        else:
            how = f"ended with exit code {code}{why}"
        signal_name = _signal_name(code) if code is not None and code < 0 else None
        last_words = last_line(self._notes)
        said = f"; its last words: {last_words}" if last_words else ""
        num = len(self._under_way)
        lost = f" with {num} request{'s' * (num > 1)} under way" if num else ""
        return WorkerCrashedError(
            f"the worker process {self.pid} of `{self._name}` {how}{lost}{said}",
            signal=signal_name,
            exit_code=code if code is not None and code >= 0 else None,
            last_line=last_words,
            request_ids=tuple(self._under_way),
            was_hanging=was_hanging,
        )


class RemoteObject:
    """Something that lives in a worker: its plain facts are here, its methods are called there."""

    def __init__(self, child: Child, described: Message) -> None:
        self._child = child
        self._number: int = described["number"]
        self._facts: dict[str, Any] = unpack(described["facts"], [])
        self._methods: list[str] = described["methods"]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            if name in self._facts:
                return self._facts[name]
            if name in self._methods:
                return lambda *given, **named: self._ask(name, *given, **named)
        raise AttributeError(f"there is no `{name}` in the worker")

    def _ask(self, method: str, *given: Any, **named: Any) -> Any:
        return self._child.call(self._number, method, given, named)

    def __del__(self) -> None:
        self._child.released.append(self._number)


class RemotePrompt(RemoteObject):
    """A conversation that was written out."""

    rendered_from: Sequence[Any] = ()
    """What another worker can write it out from again."""

    def tokens(self, after: str | None = None, limit: int | None = None) -> list[int] | None:
        """All of them came along, unless they are too many for the context."""
        ids: list[int] | None = self._facts.get("ids") if after is None else None
        return self._ask("tokens", after, limit) if ids is None else ids

    def told_to(self, child: Child) -> int | list[Any]:
        """As a message names it."""
        return self._number if child is self._child else [*self.rendered_from]


def calling(
    on: int | str, method: str, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Message, list[bytes]]:
    data: list[bytes] = []
    packed = [pack(each, data) for each in arguments]
    named = {name: pack(each, data) for name, each in keywords.items()}
    question = {
        "action": "call",
        "on": on,
        "method": method,
        "arguments": packed,
        "keywords": named,
    }
    return question, data


def _signal_name(code: int) -> str:
    import signal

    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _check(hello: Any) -> None:
    ours = {"protocol": PROTOCOL, "version": _core.__version__}
    theirs = {name: hello[name] for name in ours}
    if theirs != ours:
        raise ProtocolError(f"this side speaks {ours}, the other one {theirs}")
