import asyncio
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

from tabagent_model import AsyncModel, ForkedProcessError, InternalError, InvalidRequestError, Model
from tabagent_model._courier import Courier, Inbox, LoopInbox, Request
from tabagent_model.errors import ModelNotLoadedError
from tabagent_model.results import Source
from tabagent_model.stream import AsyncTextStream
from tabagent_model.testing import ScriptedContext, ScriptedEvent


def endless(prompt: Any) -> Any:
    return itertools.repeat("la ")


def events_of(inbox: Inbox) -> list[Any]:
    events = [inbox.get()]
    while not events[-1].is_last:
        events.append(inbox.get())
    return events


def test_events_of_many_requests_come_in_order_and_once():
    courier = Courier(ScriptedContext(lambda prompt: [f"{prompt}{n}" for n in range(9)]))
    inboxes = {number: Inbox() for number in range(1, 20)}
    for number, inbox in inboxes.items():
        courier.send(Request(number, f"{number}:", {}), inbox)
    for number, inbox in inboxes.items():
        events = events_of(inbox)
        assert {event.request_id for event in events} == {number}
        assert [e.text for e in events if e.text] == [f"{number}:{n}" for n in range(9)]
        assert not courier.carries(number)
    courier.close()


def test_what_is_wrong_with_a_request_is_raised_where_it_is_sent():
    context = ScriptedContext(n_ctx=2)
    courier = Courier(context)
    with pytest.raises(InvalidRequestError):
        courier.send(Request(1, "far too many words", {}), Inbox())
    assert not courier.carries(1)
    courier.close()
    with pytest.raises(ModelNotLoadedError):
        courier.send(Request(2, "a", {}), Inbox())


def test_each_refusal_is_an_error_of_its_own():
    courier = Courier(ScriptedContext())
    courier.close()
    errors = []
    for _ in range(2):
        with pytest.raises(ModelNotLoadedError) as caught:
            courier.check()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_closing_twice_is_fine_and_ends_the_thread():
    courier = Courier(ScriptedContext())
    courier.close()
    courier.close()
    assert not courier.is_alive()


def test_a_context_has_one_courier():
    context = ScriptedContext()
    model = Model(context)
    with pytest.raises(InvalidRequestError, match="belongs to another model"):
        AsyncModel(context)
    assert model.generate("a").text == "Hello!"


def test_what_kills_the_courier_reaches_every_reader():
    class Broken(ScriptedContext):
        def next_events(self) -> list[ScriptedEvent]:
            raise RuntimeError("no idea")

    context, inboxes = Broken(), [Inbox(), Inbox()]
    began = threading.Event()

    class Late(Broken):
        def next_events(self) -> list[ScriptedEvent]:
            began.wait(10)
            raise RuntimeError("no idea")

        def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
            pass

    context = Late()
    courier = Courier(context)
    for number, inbox in enumerate(inboxes):
        courier.send(Request(number, "a", {}), inbox)
    began.set()
    for inbox in inboxes:
        (event,) = events_of(inbox)
        assert isinstance(event.error, InternalError)
        assert "no idea" in str(event.error)
    courier.join(10)
    with pytest.raises(InternalError, match="no idea"):
        courier.send(Request(9, "a", {}), Inbox())


async def test_a_loop_is_woken_once_for_all_its_streams():
    batches = [
        [ScriptedEvent(number, "x") for number in range(5)],
        [ScriptedEvent(number, is_last=True, finish_reason="stop") for number in range(5)],
        [],
    ]
    sent = threading.Event()

    class Prepared(ScriptedContext):
        def next_events(self) -> list[ScriptedEvent]:
            sent.wait(10)
            return batches.pop(0)

        def submit(self, request_id: int, prompt: Any, params: Any, *chat: Any) -> None:
            pass

    loop, wakes = asyncio.get_running_loop(), 0
    plain = loop.call_soon_threadsafe

    def counted(*args: Any, **fields: Any) -> Any:
        nonlocal wakes
        wakes += 1
        return plain(*args, **fields)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    courier = Courier(Prepared())
    inboxes = [LoopInbox(loop) for _ in range(5)]
    for number, inbox in enumerate(inboxes):
        courier.send(Request(number, "a", {}), inbox)
    sent.set()
    for inbox in inboxes:
        assert (await inbox.get()).text == "x"
        assert (await inbox.get()).is_last
    assert wakes == 2


class FarContext(ScriptedContext):
    """As one in another process: what is posted is taken when `take` is called."""

    def post(self, request_id: int, prompt: Any, params: Any, reply: Any) -> bool:
        def take() -> None:
            self.submit(request_id, prompt, params)
            reply(None)

        self.take = take
        return True


async def test_who_is_cancelled_while_the_answer_to_the_submit_arrives_leaves_nothing_behind():
    context = FarContext(endless)
    courier = Courier(context)
    request = Request(1, "a", {}, is_far=True)
    stream = AsyncTextStream(courier, request, Source(), owner=None)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(reading.cancel)
    context.take()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (context.aborted, courier.is_idle) == ([1], True)
    courier.close()


def test_events_wait_for_a_reader_that_is_slow():
    context = ScriptedContext(["x"] * 300)
    with Model(context) as model:
        stream = model.stream("a")
        while context.metrics()["running"] or not context.metrics()["steps"]:
            time.sleep(0.001)
        assert "".join(stream) == "x" * 300


def test_a_burst_of_cancels_leaves_nothing_behind():
    context = ScriptedContext(endless, delay=0.0001, n_seq_max=4)
    with Model(context) as model:
        for number in range(200):
            with model.stream("x") as pieces:
                for _ in range(number % 3):
                    next(pieces)
        assert (context.metrics()["running"], context.metrics()["waiting"]) == (0, 0)
        courier = model._courier
        assert courier is not None and courier._inboxes == {}


def run_child(program: str, *, interrupt_after: str | None = None) -> tuple[int, str]:
    """Run a program; send it Ctrl-C when it has printed that line. Its exit code and stdout."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert child.stdout is not None
    try:
        printed = ""
        while interrupt_after is not None and interrupt_after not in printed:
            line = child.stdout.readline()
            assert line, printed
            printed += line
        if interrupt_after is not None:
            child.send_signal(signal.SIGINT)
        rest, _ = child.communicate(timeout=20)
        return child.returncode, printed + rest
    finally:
        child.kill()


INTERRUPTED = """
    import itertools, sys, time
    from tabagent_model import Model
    from tabagent_model.testing import ScriptedContext

    def endless(prompt):
        return itertools.repeat("la ")

    context = ScriptedContext(endless, delay={delay}, n_ctx=10**9)
    model = Model(context)
    try:
        print("ready", flush=True)
        {use}
    except KeyboardInterrupt:
        while context.metrics()["running"] or context.metrics()["waiting"]:
            time.sleep(0.001)
        context._script = ["still ", "alive"]
        print(model.generate("x"))
"""


@pytest.mark.parametrize("delay", [0.001, 0.2])
@pytest.mark.parametrize(
    "use",
    [
        "model.generate('x', max_tokens=-1)",
        "model.generate(['x', 'y', 'z'], max_tokens=-1)",
        "[piece for piece in model.stream('x', max_tokens=-1)]",
        "with model.stream('x', max_tokens=-1) as pieces: [time.sleep(0.001) for _ in pieces]",
    ],
)
def test_ctrl_c_ends_a_generation_and_the_model_stays_usable(use: str, delay: float):
    program = textwrap.dedent(INTERRUPTED).format(use=use, delay=delay)
    assert run_child(program, interrupt_after="ready\n") == (0, "ready\nstill alive\n")


class InterruptedLock:
    """Ctrl-C strikes in the moment in which it is let go, as it may after any call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.generate("x"),
        lambda model: model.generate(["x", "y", "z"]),
        lambda model: model.stream("x"),
    ],
    ids=["generate", "generate many", "stream"],
)
def test_ctrl_c_just_before_the_submit_leaves_nobody_waiting(use: Any):
    context = ScriptedContext(["still ", "alive"])
    model = Model(context)
    courier = model._courier
    assert courier is not None
    lock, courier._lock = courier._lock, InterruptedLock()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        use(model)
    courier._lock = lock
    assert context.submitted == []
    assert courier._inboxes == {}
    assert model.generate("x").text == "still alive"
    context.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_gets_an_error_and_the_parent_goes_on():
    program = """
        import itertools, os, sys, warnings
        warnings.simplefilter("ignore")  # Python itself warns of a fork beside threads
        from tabagent_model import AsyncModel, ForkedProcessError, Model
        from tabagent_model.testing import ScriptedContext

        context = ScriptedContext(lambda prompt: itertools.repeat("la "), delay=0.001, n_ctx=10**6)
        model = Model(context)
        stream = model.stream("x", max_tokens=-1)
        next(stream)
        if (child := os.fork()) == 0:
            for use in (lambda: next(stream), lambda: model.generate("x"), model.unload):
                try:
                    use()
                except ForkedProcessError as error:
                    assert "hint: load the model in the child" in str(error)
                else:
                    os._exit(1)
            stream.close()
            del stream, model
            model = Model(ScriptedContext(["a model ", "of its own"]))
            print(model.generate("x"), flush=True)
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert next(stream) == "la "
        stream.close()
        print(stream.result.finish_reason)
    """
    assert run_child(program) == (0, "a model of its own\ncancelled\n")


def test_a_forked_courier_refuses_at_once():
    courier = Courier(ScriptedContext())
    context = courier._context
    courier.disown()  # what happens in a child
    with pytest.raises(ForkedProcessError):
        courier.send(Request(1, "a", {}), Inbox())
    courier.abort(1)
    courier.close()
    assert not context.is_closed
    context.close()
