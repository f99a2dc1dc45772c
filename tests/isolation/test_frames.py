"""What travels between a worker and its parent, and what is refused."""

from __future__ import annotations

import inspect
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tabagent_model import ProtocolError, QueueFullError, TabAgentModelError, errors
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
from workers import VALUES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


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


def test_who_must_not_wait_sends_nothing_where_there_is_no_room(ends: tuple[socket.socket, Wire]):
    ours, wire = ends
    sent = [{"n": number, "text": "x" * 1000} for number in range(100_000)]
    count = next(n for n, message in enumerate(sent) if not wire.send(message, waits=False))
    assert not wire.send({"n": 0}, [b"data"], waits=False)
    other = Wire(ours)
    assert [other.receive() for _ in range(count)] == sent[:count]
    assert wire.send({"n": -1}, waits=False)
    assert other.receive() == {"n": -1}


def test_who_must_not_wait_does_not_wait_for_another_who_sends(ends: tuple[socket.socket, Wire]):
    ours, wire = ends
    big = os.urandom(3_000_000)
    sender = threading.Thread(target=wire.send, args=({}, [big]))
    sender.start()
    other = Wire(ours)
    assert ours.recv(1, socket.MSG_PEEK)  # it has begun
    assert not wire.send({"n": 1}, waits=False)
    assert other.receive() == {"data": [big]}
    sender.join()
    assert wire.send({"n": 2}, waits=False)
    assert other.receive() == {"n": 2}


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
    deltas = [["content", "a"], ["tool_call", 0, "id", "name", "{"]]
    read = RemoteEvent(7, "a", [1], logprobs=logprobs, read=(deltas, None))
    whole = end._replace(read=([], {"content": "a"}))
    events = (pieces, end, read, whole)
    assert [event_of(told_of(event)) for event in events] == [*events]
    failed = RemoteEvent(8, "", [], True, "error", error=QueueFullError("full"))
    twin = event_of(told_of(failed))
    assert (type(twin.error), twin._replace(error=failed.error)) == (QueueFullError, failed)


def test_the_news_of_a_step_arrives_as_it_was_told():
    texts = ["", " a", 'Ünï "quoted" \\ 字 🙂\n\t\x00\x7f\u2028']
    events = [RemoteEvent(number, text, [number, 7]) for number, text in enumerate(texts)]
    events.append(RemoteEvent(8, "b", [1], read=([["content", "b"]], None)))
    events.append(RemoteEvent(9, "end", [], True, "stop", stats={"seed": 1.0}))
    here, there = map(Wire, socket.socketpair())
    here.send({"events": [*map(told_of, events)]})
    message = there.receive(5) or {}
    assert [event_of(told) for told in message["events"]] == events
    with pytest.raises(errors.TokenizationError, match="half a surrogate pair"):
        here.send({"events": [told_of(RemoteEvent(1, "\ud800", []))]})
    for wire in (here, there):
        wire.close()


@pytest.mark.parametrize("told", [None, [], [1, "a"], ["1", "a", []], [1, 2, []], [1, "", [], 3]])
def test_an_event_that_is_none_is_refused(told: Any):
    with pytest.raises(ProtocolError):
        event_of(told)
