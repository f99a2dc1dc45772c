"""Models in a process of their own: what travels, what is refused, and what happens when the worker
dies. The worker is the real one, the engine in it is scripted."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    ContextLimitExceededError,
    GenerationTimeoutError,
    InvalidRequestError,
    LoadCancelledError,
    Model,
    ModelNotLoadedError,
    ModelQuarantinedError,
    OutOfMemoryError,
    ProtocolError,
    QueueFullError,
    TabAgentModelError,
    WorkerCrashedError,
    errors,
)
from tabagent_model.isolation import child as starting
from tabagent_model.isolation import remote, respawn, spawn, verdicts
from tabagent_model.isolation.frames import (
    MAX_FRAME,
    RemoteEvent,
    Wire,
    error_of,
    event_of,
    pack,
    told_error,
    told_of,
    unpack,
)
from tabagent_model.params import BUNDLED_MODEL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")

# What the scripted engine in the worker does, by the prompt.
WORKER = """
import json, os, signal, sys, time; sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from tabagent_model.isolation import worker
from tabagent_model.errors import OutOfMemoryError, QueueFullError
from tabagent_model.testing import ScriptedContext

FATAL = False

def lines(prompt):
    if FATAL and type(prompt) is list:
        os.abort()
    yield "One"
    if prompt == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)  # another thread may have to hear it first
    if prompt == "abort":
        os.write(2, b"ggml.c:12: GGML_ASSERT(a == b) failed\\n")
        os.abort()
    if prompt == "exit":
        os._exit(3)
    if prompt == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if prompt == "nonsense":
        os.write(int(sys.argv[2]), b"HTTP/1.1 200 OK")
    if prompt == "error":
        yield OutOfMemoryError("`m` needs 3, but 2 is free", hint="less", needed=3, free=2)
    if prompt == "hang":
        context.pause()
    if prompt == "forever":
        while True:
            yield " and"
    yield ", two"
    if prompt == "log":
        worker._core.put_log("warning", "a line of the engine")
    yield "."

class ChatParser:
    def __init__(self):
        self.pieces = []
    def feed(self, text):
        self.pieces.append(text)
        return [("content", text)]
    def finish(self, is_complete=True):
        return [("content", "!")], {"pieces": "".join(self.pieces), "complete": is_complete}

class ChatPrompt:
    is_plain = True
    def parser(self, patience=50):
        return 1 / 0

class ScriptedModel:
    path, load_time_ms, gpu_layers = "scripted.gguf", 1.5, 0
    size_bytes, n_params, is_repacked = 10, 2, False
    def tokenize(self, text, add_bos=True, special=False):
        return context.tokenize(text, add_bos)
    def detokenize(self, tokens, special=False):
        return context.detokenize(tokens)
    def render_chat(self, *given):
        return context.render_chat(*given)
    def vocab_size(self):
        return 3
    context_train_size = embedding_dim = layer_count = vocab_size
    def open_files(self):
        return {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")}
    def parser(self):
        return ChatParser()
    def prompt(self):
        return ChatPrompt()
    def echo(self, *given, **named):
        return given, named
    def fail(self):
        return 1 / 0
    def _secret(self):
        return 1

def load(config, progress):
    global context
    progress(0.25)
    LOADING
    context = ScriptedContext(
        lines, delay=0.001, n_ctx=config.n_ctx, n_seq_max=4, queue_size=config.queue_size
    )
    progress(1.0)
    return None if config.vocab_only else context, ScriptedModel()

worker.main(sys.argv[2:], load)
"""
ANSWER = "One, two."


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """The workers of a test are scripted, and may do something more when they load."""
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "_crashes", {})
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(respawn, "BACKOFF_S", 0.0)

    def loading(what: str) -> None:
        monkeypatch.setattr(spawn, "_PROGRAM", WORKER.replace("LOADING", what))

    loading("pass")
    return loading


@pytest.fixture
def model() -> Iterator[Model]:
    with Model.load(isolation="process", queue_size=4) as model:
        yield model


def pid_of(model: Model | AsyncModel) -> int:
    return int(model.info()["worker_pid"])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(is_so: Callable[[], bool]) -> bool:
    for _ in range(2000):
        if is_so():
            return True
        time.sleep(0.005)
    return False


# Frames


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Wire]]:
    ours, theirs = socket.socketpair()
    wire = Wire(theirs)
    with ours:
        yield ours, wire
    wire.close()


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def test_messages_arrive_whole_however_they_are_cut(ends: tuple[socket.socket, Wire]):
    ours, wire = ends
    sent = framed(b'{"a":"\xc3\xa9"}') + framed(b'{"data":[3,0,1]}') + b"abcd" + framed(b"{}")
    arrived = []
    for at in range(len(sent)):
        ours.sendall(sent[at : at + 1])
        while (message := wire.receive(0.001)) is not None:
            arrived.append(message)
    ours.sendall(sent)
    arrived += [wire.receive() for _ in range(3)]
    assert arrived == [{"a": "é"}, {"data": [b"abc", b"", b"d"]}, {}] * 2


def test_what_is_sent_is_what_is_received(ends: tuple[socket.socket, Wire]):
    ours, wire = ends
    big = os.urandom(3_000_000)
    sender = threading.Thread(target=Wire(ours).send, args=({"n": [1.5, None, "字"]}, [big, b""]))
    sender.start()
    assert wire.receive() == {"n": [1.5, None, "字"], "data": [big, b""]}
    sender.join()


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\0",
        b"\0\0\0\1{",
        struct.pack(">I", MAX_FRAME + 1),
        b"\xff\xff\xff\xff",
        b"HTTP/1.1 200 OK",
        framed(b"[]"),
        framed(b"12"),
        framed(b'"x"'),
        framed(b"{'a':1}"),
        framed(b'{"a":'),
        framed(b'{"a":"\xff"}'),
        framed(b'{"a":' + b"[" * 200_000),
        framed(b'{"data":3}'),
        framed(b'{"data":[-1]}'),
        framed(b'{"data":[true]}'),
        framed(b'{"data":[9999999999999999999]}'),
    ],
)
def test_a_frame_that_is_none_is_refused_before_it_takes_memory(
    ends: tuple[socket.socket, Wire], sent: bytes
):
    ours, wire = ends
    ours.sendall(sent)
    with pytest.raises(ProtocolError):
        wire.receive(1)


@pytest.mark.parametrize("sent", [b"", b"\0\0", framed(b"{}")[:5], framed(b'{"data":[9]}') + b"x"])
def test_an_end_in_the_middle_is_an_end(ends: tuple[socket.socket, Wire], sent: bytes):
    ours, wire = ends
    ours.sendall(sent)
    ours.close()
    with pytest.raises(EOFError):
        wire.receive()


def test_a_message_that_is_too_large_is_not_sent(
    ends: tuple[socket.socket, Wire], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tabagent_model.isolation.frames.MAX_FRAME", 100)
    with pytest.raises(ProtocolError, match="100"):
        ends[1].send({"a": "x" * 100})


VALUES: list[Any] = [
    *(None, True, 0, 2**70, 1.5, float("inf"), "", "字\0", [], {}, (), b"", b"\0\xff"),
    [1, "a", None, [2, [3]]],
    {"a": 1, "b": {"c": [(1, 2), b"x"]}},
    {1: 0.5, 2: -1.0},
    {"$tuple": 1},
    {"$odd": [1], "b": ({},)},
    (("content", "text"), ("tool_call", 0, None)),
    {(1, "a"): {2.5: b"y"}},
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_come_back_as_they_were(value: Any):
    data: list[bytes] = []
    twin = unpack(pack(value, data), data)
    assert (twin, repr(twin)) == (value, repr(value))


@pytest.mark.parametrize(
    "value",
    [{"$bytes": 1}, {"$bytes": "a"}, {"$map": [1]}, {"$map": 2}, {"$eval": "1"}, {"$object": {}}],
    ids=str,
)
def test_values_that_are_none_are_refused(value: Any):
    with pytest.raises((ProtocolError, LookupError, TypeError, ValueError)):
        unpack(value, [])


def test_what_cannot_travel_is_said():
    with pytest.raises(TypeError, match="a Thread cannot travel"):
        pack({"a": [threading.Thread()]}, [])


ALL = [
    error
    for error in vars(errors).values()
    if inspect.isclass(error) and issubclass(error, TabAgentModelError)
]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_arrives_with_its_class_and_its_facts(kind: type[TabAgentModelError]):
    facts: dict[str, Any] = {"needed": 3, "request_ids": (1, 2), "name": "x"}
    error = kind("`x` is wrong", hint="right it", **facts)
    twin = error_of(told_error(error))
    assert isinstance(twin, kind)
    assert (str(twin), twin._facts) == (str(error), facts)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"kind": "TypeError", "message": "x"}, TypeError("x")),
        (
            {"kind": "KeyboardInterrupt", "message": "x"},
            errors.InternalError("KeyboardInterrupt: x"),
        ),
        ({"kind": "Any", "message": "x"}, errors.InternalError("Any: x")),
        ({"kind": "_restore"}, errors.InternalError("_restore: ")),
        ({"kind": "eval", "message": "1"}, errors.InternalError("eval: 1")),
    ],
    ids=lambda value: str(value)[:30],
)
def test_only_errors_can_be_named(told: Any, found: Exception):
    error = error_of(told)
    assert (type(error), str(error)) == (type(found), str(found))


@pytest.mark.parametrize(
    "told",
    [
        *(None, [], {}, {"kind": 1}),
        {"kind": "InternalError", "facts": {"hint": 1}},
        {"kind": "InternalError", "facts": 1},
    ],
    ids=str,
)
def test_an_error_that_is_none_is_refused(told: Any):
    with pytest.raises(ProtocolError):
        error_of(told)


def test_events_arrive_as_they_were():
    pieces = RemoteEvent(7, "a", [1, 2])
    logprobs = [[[1, "a", -0.5], [[1, "a", -0.5]]]]
    end = RemoteEvent(7, "", [], True, "stop", ".", None, {"total_ms": 1.5}, logprobs)
    assert [event_of(told_of(event)) for event in (pieces, end)] == [pieces, end]
    failed = RemoteEvent(8, "", [], True, "error", error=QueueFullError("full"))
    twin = event_of(told_of(failed))
    assert (type(twin.error), twin._replace(error=failed.error)) == (QueueFullError, failed)


def test_the_news_of_a_step_arrives_as_it_was_told():
    texts = ["", " a", 'Ünï "quoted" \\ 字 🙂\n\t\x00\x7f\u2028']
    events = [RemoteEvent(number, text, [number, 7]) for number, text in enumerate(texts)]
    events.append(RemoteEvent(9, "end", [], True, "stop", stats={"seed": 1.0}))
    here, there = map(Wire, socket.socketpair())
    here.tell(events)
    message = there.receive(5) or {}
    assert [event_of(told) for told in message["events"]] == events
    with pytest.raises(errors.TokenizationError, match="half a surrogate pair"):
        here.tell([RemoteEvent(1, "\ud800", [])])
    for wire in (here, there):
        wire.close()


@pytest.mark.parametrize("told", [None, [], [1, "a"], ["1", "a", []], [1, 2, []], [1, "", [], 3]])
def test_an_event_that_is_none_is_refused(told: Any):
    with pytest.raises(ProtocolError):
        event_of(told)


# A worker at work


def test_an_isolated_model_answers_as_one_in_this_process(model: Model):
    answer = model.generate("Count")
    assert (answer.text, answer.finish_reason, answer.model) == (ANSWER, "stop", "scripted")
    assert answer.usage.completion_tokens == len(answer.tokens) == 3
    assert answer.metrics.memory_used_mb > 1
    assert model.generate(["a", "b"]) == [answer] * 2
    with model.stream("Count") as pieces:
        assert list(pieces) == ["One", ", two", "."]
    assert model.chat("hello").text == ANSWER
    assert model.apply_chat_template("hello") == "user: hello\nassistant: "
    assert model.detokenize(model.tokenize("to be or")) == "to be or"
    session = model.session()
    assert session.send("hello").text == session.send("again").text == ANSWER
    assert (model.n_ctx, model.load_time_ms, len(model.slots())) == (4096, 1.5, 4)
    metrics = model.metrics()
    assert (metrics["requests"], metrics["running"], metrics["worker_restarts"]) == (7, 0, 0)
    assert is_alive(pid_of(model))


async def test_so_does_the_async_twin():
    async with await AsyncModel.load(isolation="process") as model:
        assert (await model.generate("Count")).text == ANSWER
        async with model.stream("Count") as pieces:
            assert [piece async for piece in pieces] == ["One", ", two", "."]
        assert (await model.chat("hello")).text == ANSWER
        assert await model.detokenize(await model.tokenize("to be")) == "to be"
        with pytest.raises(ContextLimitExceededError):
            await model.generate("word " * 5000)
        pid = pid_of(model)
    assert not is_alive(pid)


def test_errors_of_the_worker_are_errors_here(model: Model):
    with pytest.raises(ContextLimitExceededError) as caught:
        model.stream("word " * 5000)
    assert (caught.value.max, caught.value.required) == (4096, 5002)
    with pytest.raises(OutOfMemoryError, match="hint: less") as memory:
        model.generate("error")
    assert (memory.value.needed, memory.value.free) == (3, 2)
    running = [model.stream("forever", max_tokens=-1) for _ in range(4)]
    for stream in running:
        next(stream)
    for stream in running:
        stream.close()
    with pytest.raises(GenerationTimeoutError):
        model.generate("forever", timeout_s=0.05)
    with pytest.raises(errors.InternalError, match="ZeroDivisionError: division by zero"):
        model._native.fail()  # type: ignore[union-attr]
    assert model.generate("Count").text == ANSWER


def test_values_of_every_kind_travel_both_ways(model: Model):
    native: Any = model._native
    assert native.echo(*VALUES, key=VALUES) == (tuple(VALUES), {"key": VALUES})
    big = os.urandom(2_000_000)
    assert native.echo(big) == ((big,), {})


def test_a_parser_is_not_asked_for_every_piece(model: Model):
    parser: Any = model._native.parser()  # type: ignore[union-attr]
    deltas = [parser.feed(letter) for letter in "abc" * 50]
    assert deltas[0] == [("content", "a")]
    assert [] in deltas
    rest, message = parser.finish(False)
    assert "".join(text for found in (*deltas, rest) for _, text in found) == "abc" * 50 + "!"
    assert message == {"pieces": "abc" * 50, "complete": False}


def test_an_answer_that_is_only_content_is_read_here(model: Model):
    parser: Any = model._native.prompt().parser()  # type: ignore[union-attr]
    assert [parser.feed(piece) for piece in ("a", "", "b")] == [
        [("content", "a")],
        [],
        [("content", "b")],
    ]
    whole = {"content": "ab", "reasoning": "", "tool_calls": [], "error": None}
    assert parser.finish(False) == ([], whole)


def test_only_public_methods_can_be_called(model: Model):
    keeper = model._native._keeper  # type: ignore[union-attr]
    for method in ("_secret", "__class__", "load", "unload", "close", "next_events"):
        with pytest.raises(InvalidRequestError, match="from outside"):
            keeper.call("model", method)
    for attribute in ("_secret", "nothing", "create_context"):
        assert not hasattr(model._native, attribute)


def test_a_logits_hook_cannot_travel(model: Model):
    with pytest.raises(InvalidRequestError, match="isolation='none'") as caught:
        model.generate("Count", logits_hook=lambda tokens, logits: None)
    assert caught.value.name == "logits_hook"


def test_a_prompt_that_somebody_dropped_is_dropped_there(model: Model):
    child = model._native._keeper._child  # type: ignore[union-attr]
    for _ in range(3):
        model.apply_chat_template("hello")
    model.generate("Count")
    assert len(child.released) == 0


def test_the_worker_has_a_socket_and_nothing_else_of_ours(model: Model, tmp_path: Path):
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        found = dict(model._native.open_files())  # type: ignore[union-attr]
    assert (found.pop(0), found.pop(1)) == ("/dev/null", "/dev/null")
    assert "memfd" in found.pop(2)
    kinds = sorted(path.partition(":")[0] for path in found.values())
    # Its own copy of the notes, for the last line of the log.
    assert kinds == ["/memfd", "socket"]


def test_its_log_arrives_in_our_logger(model: Model, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="tabagent_model")
    model.generate("log")
    told = ("tabagent_model.llama", 30, "a line of the engine")
    assert until(lambda: told in caplog.record_tuples)


# Loading


def test_progress_and_errors_of_a_load_travel(scripted: Callable[[str], None]):
    seen: list[float] = []
    with Model.load(isolation="process", on_progress=seen.append):
        assert seen == [0.25, 1.0]
    scripted("raise OutOfMemoryError('no', needed=3, free=2)")
    with pytest.raises(OutOfMemoryError) as caught:
        Model.load(isolation="process")
    assert caught.value.needed == 3


def test_a_load_ends_as_the_callback_says():
    with pytest.raises(LoadCancelledError):
        Model.load(isolation="process", on_progress=lambda fraction: False)

    def fail(fraction: float) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        Model.load(isolation="process", on_progress=fail)


async def test_a_load_that_is_cancelled_leaves_nothing(scripted: Callable[[str], None]):
    scripted("time.sleep(60)")
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(
        AsyncModel.load(
            isolation="process", on_progress=lambda _: loop.call_soon_threadsafe(began.set)
        )
    )
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == []


def test_a_file_that_is_none_needs_no_worker(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"<html>" * 10)
    with pytest.raises(errors.InvalidModelError):
        Model.load(tmp_path / "bad.gguf", isolation="process")
    with pytest.raises(FileNotFoundError):
        Model.load("/nowhere/m.gguf", isolation="process")


def test_the_tokenizer_alone_can_be_isolated():
    with Model.load(isolation="process", vocab_only=True) as model:
        assert model.detokenize(model.tokenize("to be")) == "to be"
        os.kill(pid_of(model), signal.SIGKILL)
        assert until(lambda: tokenized_again(model) == "to be")
    assert children() == []


def tokenized_again(model: Model) -> str | None:
    try:
        return model.detokenize(model.tokenize("to be"))
    except WorkerCrashedError:
        return None


def test_another_version_is_refused(scripted: Callable[[str], None], monkeypatch: Any):
    monkeypatch.setattr(starting, "PROTOCOL", 99)
    with pytest.raises(WorkerCrashedError, match="'protocol': 99"):
        Model.load(isolation="process")


def test_a_file_that_was_never_seen_is_tried_first(scripted: Callable[[str], None], tmp_path: Path):
    path = shutil.copy(BUNDLED_MODEL, tmp_path / "m.gguf")
    fatal = "globals().update(FATAL=True)"
    scripted(fatal)
    with pytest.raises(WorkerCrashedError, match="SIGABRT"):
        Model.load(path, isolation="process")
    for probe in (None, False):
        with pytest.raises(ModelQuarantinedError):
            Model.load(path, isolation="process", probe=probe)
    with pytest.raises(WorkerCrashedError):
        Model.load(path, probe=True)  # before it is loaded into this process
    scripted("pass")
    with Model.load(path, isolation="process", probe=True) as model:
        assert model.generate("Count").text == ANSWER
    scripted(fatal)
    with Model.load(path, isolation="process"):  # it is known by now
        pass
    os.utime(path, (1, 1))  # and now it is another one
    with pytest.raises(WorkerCrashedError):
        Model.load(path, isolation="process")


# Deaths


@pytest.mark.parametrize(
    ("prompt", "signal_name", "exit_code", "last_line"),
    [
        ("SIGSEGV", "SIGSEGV", None, None),
        ("abort", "SIGABRT", None, "ggml.c:12: GGML_ASSERT(a == b) failed"),
        ("exit", None, 3, None),
        ("nonsense", "SIGKILL", None, None),
    ],
)
def test_a_death_is_one_error_for_each_and_the_next_request_is_answered(
    model: Model, prompt: str, signal_name: str | None, exit_code: int | None, last_line: str | None
):
    others = [model.stream("forever", max_tokens=-1) for _ in range(2)]
    for stream in others:
        next(stream)
    before = pid_of(model)
    fatal = model.stream(prompt)
    ids = {stream.request_id for stream in (*others, fatal)}
    for stream in (*others, fatal):
        with pytest.raises(WorkerCrashedError) as caught:
            for _ in stream:
                pass
        error = caught.value
        assert set(error.request_ids) == ids
        assert (error.signal, error.exit_code) == (signal_name, exit_code)
        assert error.last_line == last_line or last_line is None
        assert "3 requests under way" in str(error)
    assert model.generate("Count").text == ANSWER
    assert pid_of(model) != before
    assert not is_alive(before)
    assert model.metrics()["worker_restarts"] == 1


def test_the_third_death_within_a_minute_is_a_quarantine_until_a_probe_goes_well(model: Model):
    for _ in range(3):
        with pytest.raises(WorkerCrashedError):
            model.generate("SIGSEGV")
    for use in (
        lambda: model.generate("Count"),
        lambda: model.tokenize("a"),
        lambda: Model.load(model.config),
        lambda: Model.load(model.config, probe=False),
    ):
        with pytest.raises(ModelQuarantinedError, match=r"SIGSEGV.*\n\nhint: .*`probe=True`"):
            use()
    with Model.load(model.config, n_ctx=32) as other:  # with other settings it is another matter
        assert other.generate("Count").text == ANSWER
    # Another process hears of it, too.
    verdicts._crashes.clear()
    verdicts._verdicts.clear()
    with pytest.raises(ModelQuarantinedError):
        Model.load(model.config)
    with Model.load(model.config, probe=True) as again:
        assert again.generate("Count").text == ANSWER
    with Model.load(model.config):
        pass


def test_a_death_in_a_load_is_an_error_and_the_third_a_quarantine(scripted: Callable[[str], None]):
    scripted("os.kill(os.getpid(), signal.SIGBUS)")
    for _ in range(3):
        with pytest.raises(WorkerCrashedError) as caught:
            Model.load(isolation="process")
        assert (caught.value.signal, caught.value.request_ids) == ("SIGBUS", ())
    with pytest.raises(ModelQuarantinedError):
        Model.load(isolation="process")
    assert children() == []


def test_what_is_asked_while_a_worker_starts_is_held_for_it(
    model: Model, scripted: Callable[[str], None]
):
    scripted("time.sleep(0.5)")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    held = [model.stream("Count", timeout_s=timeout) for timeout in (None, None, 0.1)]
    held[1].close()
    assert model.metrics()["waiting"] in (1, 2)
    assert held[0].collect().text == ANSWER
    assert held[1].result.finish_reason == "cancelled"
    with pytest.raises(GenerationTimeoutError):
        held[2].collect()


async def test_an_event_loop_does_not_wait_for_the_counters_of_a_worker_that_stands_still(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "GLIMPSE_S", 3600)  # as long as a thread would wait
    before, slots = await asyncio.to_thread(lambda: (model.metrics(), model.slots()))
    os.kill(pid_of(model), signal.SIGSTOP)
    assert (model.metrics(), model.slots()) == (before, slots)
    os.kill(pid_of(model), signal.SIGCONT)
    await asyncio.to_thread(model.generate, "Count")
    after = await asyncio.to_thread(model.metrics)
    assert after["requests"] == before["requests"] + 1


def test_no_more_is_held_than_may_wait(model: Model, scripted: Callable[[str], None]):
    scripted("time.sleep(60)")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    held = [model.stream("Count") for _ in range(4)]
    with pytest.raises(QueueFullError):
        model.stream("Count")
    model.unload()
    for stream in held:
        with pytest.raises(ModelNotLoadedError):
            stream.collect()
    assert until(lambda: children() == [])


def test_a_worker_that_cannot_be_started_again_is_tried_when_it_is_wanted(
    model: Model, scripted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(respawn, "TICK_S", 0.01)
    scripted("raise OutOfMemoryError('no', needed=3, free=2)")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    with pytest.raises(OutOfMemoryError):
        model.generate("Count")
    scripted("pass")
    assert until(lambda: answer_of(model) == ANSWER)


def answer_of(model: Model) -> str | None:
    try:
        return model.generate("Count").text
    except OutOfMemoryError:
        return None


@pytest.mark.parametrize("prompt", ["stop", "hang"])
def test_a_worker_that_hangs_is_killed(prompt: str):
    with Model.load(isolation="process", watchdog_s=0.4) as model:
        why = "sign of life" if prompt == "stop" else "stood still"
        with pytest.raises(WorkerCrashedError, match=why):
            model.generate(prompt)
        assert model.generate("Count").text == ANSWER


async def test_an_event_loop_goes_on_beside_a_worker_that_hangs():
    async with await AsyncModel.load(isolation="process", watchdog_s=3) as model:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        turning = asyncio.ensure_future(turn())
        os.kill(pid_of(model), signal.SIGSTOP)
        failed = await asyncio.gather(
            *(model.generate("Count") for _ in range(3)),
            model.tokenize("a"),
            return_exceptions=True,
        )
        turning.cancel()
        assert {type(error) for error in failed} == {WorkerCrashedError}
        assert turns > 20
        assert (await model.generate("Count")).text == ANSWER


# Ends


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    tasks = Path("/proc/self/task").iterdir() if path.exists() else []
    found = " ".join((task / "children").read_text() for task in tasks)
    return [int(pid) for pid in found.split() if is_alive(int(pid))]


def test_unload_ends_the_worker_and_gives_everything_back():
    with Model.load(isolation="process"):  # what is made once per process
        pass
    before = num_files(), threading.active_count(), children()
    for _ in range(3):
        model = Model.load(isolation="process")
        stream = model.stream("forever", max_tokens=-1)
        next(stream)
        report = model.unload()
        assert report["was_loaded"]
        assert report["rss_after_mb"] == 0.0
        assert (report["freed_mb"] or 0) > 1
        with pytest.raises(ModelNotLoadedError):
            stream.collect()
        assert not model.unload()["was_loaded"]
        with pytest.raises(ModelNotLoadedError):
            model.generate("Count")
    after = num_files(), threading.active_count(), children()
    assert after == before


def test_a_model_that_nobody_holds_ends_its_worker():
    model = Model.load(isolation="process")
    pid = pid_of(model)
    del model
    assert until(lambda: not is_alive(pid))


HOST = """
import os, sys, threading, time
from tabagent_model import Model
from tabagent_model.isolation import spawn
spawn._PROGRAM = sys.argv[1]
models = []
def load():
    model = Model.load(isolation="process")
    stream = model.stream("forever", max_tokens=-1)
    next(stream)
    models.append((model, stream))
thread = threading.Thread(target=load); thread.start(); thread.join()
print(models[0][0].info()["worker_pid"], flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then",
    [
        "time.sleep(60)",
        "os._exit(3)",
        "sys.exit(3)",
        "os.abort()",
        "os.kill(models[0][0].info()['worker_pid'], 19); time.sleep(60)",
    ],
    ids=["killed", "_exit", "exit", "abort", "killed beside a stopped worker"],
)
def test_the_worker_ends_with_its_parent(then: str):
    program = HOST.replace("{then}", then)
    with subprocess.Popen(
        [sys.executable, "-c", program, spawn._PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        if "sleep" in then:
            time.sleep(0.05)
            host.kill()
        said, complaints = host.communicate(timeout=20)
    assert (said, complaints) == ("", "")
    assert until(lambda: not is_alive(pid))


def test_ctrl_c_is_not_for_the_worker():
    program = HOST.replace(
        "{then}",
        """
try:
    print("interrupt me", flush=True)
    while True: next(models[0][1])
except KeyboardInterrupt:
    models[0][1].close()
    print(models[0][0].generate("Count").text, models[0][0].metrics()["worker_restarts"])
""",
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, spawn._PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as host:
        assert host.stdout is not None
        while host.stdout.readline() != "interrupt me\n":
            pass
        os.killpg(host.pid, signal.SIGINT)
        said, _ = host.communicate(timeout=20)
    assert (host.returncode, said) == (0, f"{ANSWER} 0\n")


def test_a_forked_child_gets_an_error_and_the_parent_serves_on():
    then = """
import warnings
warnings.simplefilter("ignore")
model, stream = models[0]
from tabagent_model import ForkedProcessError
if (child := os.fork()) == 0:
    refusals = 0
    for use in (
        lambda: model.generate("Count"),
        lambda: model.tokenize("a"),
        lambda: next(stream),
        lambda: model.metrics(),
        lambda: model.unload(),
    ):
        try: use()
        except ForkedProcessError: refusals += 1
    models.clear()
    del model, stream
    sys.exit(refusals)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
stream.close()
print(model.generate("Count").text, model.metrics()["worker_restarts"])
"""
    done = subprocess.run(
        [sys.executable, "-c", HOST.replace("{then}", then), spawn._PROGRAM],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [f"{ANSWER} 0"]


def test_a_program_that_is_no_python_is_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(errors.BackendError, match="isolation='none'"):
        Model.load(isolation="process")


def test_200_streams_share_a_worker(model: Model):
    with Model.load(isolation="process", queue_size=256) as model:
        assert [a.text for a in model.generate(["Count"] * 200)] == [ANSWER] * 200
