"""A real engine in a process of its own: it answers as one in this process, and its death, in
whatever way and at whatever moment, is an error here and nothing more."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from chat_templates import THINKER
from tabagent_model import (
    AsyncModel,
    Completion,
    Model,
    ModelQuarantinedError,
    TabAgentModelError,
    WorkerCrashedError,
)
from tabagent_model.isolation import child as starting
from tabagent_model.isolation import respawn, spawn, verdicts
from tabagent_model.params import BUNDLED_MODEL
from workers import children, num_files, pid_of, until

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here"),
]

# One thread: on a busy machine two would mostly wait for each other. What `auto` chooses is
# measured, and may differ from one process to the next where nothing can be remembered.
CONFIG: dict[str, Any] = {
    "n_ctx": 512,
    "n_batch": 32,
    "max_parallel": 4,
    "n_threads": 1,
    "flash_attn": "on",
    "kv_type": "f16",
    "device": "cpu",  # a GPU's first steps may take longer than the watchdog waits here
}
APART: dict[str, Any] = {**CONFIG, "isolation": "process", "watchdog_s": 1.0}
GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": -1, "ignore_eos": True, "overflow": "shift"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PROMPTS = [
    "Once upon a time",
    "The cat",
    "a",
    "Ünïcödé and 字 and 🙂",
    "One, two, three, four, five, six,",
]


@pytest.fixture(scope="module")
def here() -> Iterator[Model]:
    with Model.load(**CONFIG) as model:
        yield model


@pytest.fixture(scope="module")
def there() -> Iterator[Model]:
    with Model.load(**CONFIG, isolation="process") as model:
        yield model


@pytest.fixture(scope="module")
def reference(here: Model) -> Completion:
    return here.generate(PROMPTS[0], **GREEDY)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test kills more workers than a user would stand."""
    monkeypatch.setattr(verdicts, "CRASHES", 1000)
    monkeypatch.setattr(verdicts, "_crashes", {})
    monkeypatch.setattr(respawn, "BACKOFF_S", 0.0)


USES: dict[str, Callable[[Model], Any]] = {
    "greedy": lambda m: m.generate(PROMPTS, **GREEDY),
    "ids": lambda m: m.generate([m.tokenize(prompt) for prompt in PROMPTS], **GREEDY),
    "sampled": lambda m: m.generate(PROMPTS[1], max_tokens=16, seed=7, temperature=1.5, n=3),
    "pieces": lambda m: list(m.stream(PROMPTS[3], **GREEDY)),
    "stop": lambda m: (
        (a := m.generate(PROMPTS[0], stop=["e", "t"], **GREEDY)).text,
        a.finish_reason,
        a.stop,
    ),
    "logprobs": lambda m: m.generate(PROMPTS[0], logprobs=3, **GREEDY).logprobs,
    "biases": lambda m: m.generate(PROMPTS[0], logit_bias={5: 9.0}, banned_tokens=[7], **GREEDY),
    "shift": lambda m: m.generate([5] * 500, **{**GREEDY, "max_tokens": 40}, overflow="shift"),
    "usage": lambda m: m.generate("Something new that nobody asked before", **GREEDY).usage,
    "chat": lambda m: m.chat("hello", **GREEDY),
    "pieces of a chat": lambda m: [*m.stream_chat("hello", **GREEDY)],
    "a thought": lambda m: m.chat("hello", template=THINKER, **GREEDY),
    "pieces of a thought": lambda m: "".join(
        delta.reasoning for delta in m.stream_chat("hello", template=THINKER, **GREEDY)
    ),
    "a tool": lambda m: [
        (call.name, call.arguments)
        for call in m.chat(
            "What is the weather in Paris?", tools=[WEATHER], temperature=0
        ).tool_calls
    ],
    "reading": lambda m: m.parse_chat("Hm.\n</think>\n\nWarm.", template=THINKER),
    "template": lambda m: m.apply_chat_template([{"role": "user", "content": "hi"}]),
    "session": lambda m: [*map(m.session(**GREEDY).send, ("hi", "and?"))],
    "tokens": lambda m: [m.tokenize(p, False) for p in PROMPTS],
    "text": lambda m: [m.detokenize(m.tokenize(p)) for p in PROMPTS],
    "count": lambda m: [m.count_tokens(a) for a in ("to be", [{"role": "user", "content": "a"}])],
    "pin": lambda m: m.pin("Once upon").tokens,
    "slots": lambda m: [sorted(slot) for slot in m.slots()],
    "metrics": lambda m: sorted(m.metrics().keys() - {"worker_restarts"}),
    "buckets": lambda m: list(m.metrics()["queue_s"]["buckets"]),
    "info": lambda m: {
        name: fact
        for name, fact in m.info().items()
        if name != "load_time_ms" and not name.startswith("worker")
    },
}


@pytest.mark.parametrize("use", USES)
def test_it_is_as_in_this_process(here: Model, there: Model, use: str):
    assert USES[use](there) == USES[use](here)


MISTAKES: dict[str, Callable[[Model], Any]] = {
    "too long": lambda m: m.generate([5] * 600),
    "no token": lambda m: m.generate([2**30]),
    "no context": lambda m: m.stream("x" * 20_000),
    "a bias": lambda m: m.generate("a", logit_bias={2**30: 1.0}),
    "half a character": lambda m: m.tokenize("\ud800"),
    "no id": lambda m: m.detokenize([2**30]),
    "no template": lambda m: m.chat("a", template="{% for %}"),
    "a role": lambda m: m.chat([{"role": "user", "content": None}]),
    "no time": lambda m: m.generate("a", timeout_s=1e-6, **LONG),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_the_same_errors(here: Model, there: Model, mistake: str):
    caught = []
    for model in (here, there):
        with pytest.raises(TabAgentModelError) as error:
            MISTAKES[mistake](model)
        words = str(error.value).split("hint:")[0]
        facts = {name: fact for name, fact in error.value._facts.items() if fact is not None}
        caught.append((type(error.value), words if "time" not in mistake else "", facts))
    assert caught[0] == caught[1]


async def test_the_async_twin_is_the_same(here: Model):
    async with await AsyncModel.load(**CONFIG, isolation="process") as twin:
        assert await twin.generate(PROMPTS, **GREEDY) == here.generate(PROMPTS, **GREEDY)
        async with twin.stream(PROMPTS[0], **LONG) as pieces:
            async for _ in pieces:
                break
        assert twin.metrics()["running"] == 0  # already when the `with` is over
        task = asyncio.ensure_future(twin.generate(PROMPTS[0], **LONG))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert twin.metrics()["running"] == 0
        assert await twin.chat("hello", **GREEDY) == here.chat("hello", **GREEDY)


def test_a_session_goes_from_one_to_the_other_and_back(here: Model, there: Model, tmp_path: Path):
    session = here.session()
    session.send("Tell me a story about a cat.", **{**GREEDY, "max_tokens": 60})
    session.save(tmp_path / "one")
    moved = there.load_session(tmp_path / "one")
    answer = moved.send("Go on.", **GREEDY)
    assert answer.usage.cached_tokens > 0
    assert answer == session.send("Go on.", **GREEDY)
    moved.save(tmp_path / "two")
    assert here.load_session(tmp_path / "two").history == session.history


def test_200_streams_at_once(here: Model, there: Model):
    prompts = [f"{prompt} {number}" for number in range(40) for prompt in PROMPTS]
    fields = {**GREEDY, "max_tokens": 4}
    assert there.generate(prompts, **fields) == here.generate(prompts, **fields)


def test_the_program_itself_never_starts_llama_cpp():
    program = """
from tabagent_model import Model, _native, _core
with Model.load(isolation="process") as model:
    model.chat("hello", max_tokens=4)
    print(_native._module, "libggml-cpu" in open("/proc/self/maps").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("None False\n", "")


# Deaths

SIGNALS = [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGSTOP]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_worker_may_die_while_it_loads(
    number: signal.Signals, reference: Completion, monkeypatch: pytest.MonkeyPatch
):
    """R08, R09"""
    others = children()

    def kill(fraction: float) -> None:
        for pid in {*children()} - {*others}:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    with monkeypatch.context() as slow:
        slow.setattr(spawn, "_PROGRAM", program("import time; time.sleep(60)"))
        with pytest.raises(WorkerCrashedError) as caught:
            Model.load(**APART, on_progress=kill)
    assert (caught.value.signal, caught.value.request_ids) == (told(number), ())
    assert children() == others
    with Model.load(**APART) as model:
        assert reference_of(model) == reference


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("moment", ["idle", "prefill", "decode"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_worker_may_die_at_any_moment(number: signal.Signals, moment: str, reference: Completion):
    """R08, R09: one error for each request that was under way, and the next one is answered."""
    with Model.load(**APART) as model:
        prompt = [5] * 480 if moment == "prefill" else PROMPTS[0]
        streams = [] if moment == "idle" else [model.stream(prompt, **LONG) for _ in range(6)]
        if moment == "decode":
            for stream in streams[:4]:
                next(stream)
        os.kill(pid_of(model), number)
        if moment == "idle" and number == signal.SIGSTOP:
            with pytest.raises(WorkerCrashedError, match="sign of life"):
                model.stream(prompt, **LONG)
        for stream in streams:
            with pytest.raises(WorkerCrashedError) as caught:
                for _ in stream:
                    pass
            assert caught.value.signal == told(number)
            assert stream.request_id in caught.value.request_ids
        ask = eventually if moment == "idle" else reference_of
        assert ask(model) == reference
        assert model.metrics()["running"] == 0


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("number", SIGNALS[:3], ids=lambda number: number.name)
def test_each_request_under_way_ends_once_with_a_death(
    number: signal.Signals, reference: Completion, monkeypatch: pytest.MonkeyPatch
):
    """R08: four that are read, two that wait for a place, and nobody whose end came before."""
    ends: list[tuple[int, str | None]] = []
    hear = respawn.Keeper.next_events

    def heard(keeper: respawn.Keeper) -> list[Any]:
        events = hear(keeper)
        last = (event for event in events if event.is_last)
        ends.extend((e.request_id, e.error and type(e.error).__name__) for e in last)
        return events

    monkeypatch.setattr(respawn.Keeper, "next_events", heard)
    with Model.load(**APART) as model:
        first = model.stream(PROMPTS[0], **GREEDY)
        assert first.collect() == reference
        under_way = [model.stream(PROMPTS[0], **LONG) for _ in range(6)]
        for stream in under_way[:4]:
            next(stream)
        os.kill(pid_of(model), number)
        errors = []
        for stream in under_way:
            with pytest.raises(WorkerCrashedError) as caught:
                stream.collect()
            errors.append(caught.value)
        again = model.stream(PROMPTS[0], **GREEDY)
        assert again.collect() == reference
    ids = [stream.request_id for stream in under_way]
    assert [(error.signal, sorted(error.request_ids)) for error in errors] == [
        (number.name, ids)
    ] * 6
    assert len(set(map(id, errors))) == 6  # each has one of its own, with a traceback of its own
    assert ends == [
        (first.request_id, None),
        *((request_id, "WorkerCrashedError") for request_id in ids),
        (again.request_id, None),
    ]


@pytest.mark.parametrize(
    ("numbers", "is_of_the_file"),
    [
        ([signal.SIGSEGV, signal.SIGABRT, signal.SIGSEGV], True),
        ([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], False),
    ],
    ids=["quarantine", "rest"],
)
def test_the_third_death_within_a_minute_is_the_last_until_a_probe_goes_well(
    numbers: list[signal.Signals],
    is_of_the_file: bool,
    reference: Completion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """R08"""
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    monkeypatch.setattr(respawn, "BACKOFF_S", 0.0)
    for what in ("_crashes", "_resting", "_verdicts"):
        monkeypatch.setattr(verdicts, what, {})
    with Model.load(**APART) as model:
        died = []
        for number in numbers:
            stream = model.stream(PROMPTS[0], **LONG)
            next(stream)
            os.kill(pid_of(model), number)
            with pytest.raises(WorkerCrashedError) as caught:
                stream.collect()
            died.append((caught.value.signal, caught.value.request_ids == (stream.request_id,)))
        assert died == [(number.name, True) for number in numbers]
        for use in (lambda: reference_of(model), lambda: Model.load(**APART)):
            with pytest.raises(ModelQuarantinedError, match=f"`{BUNDLED_MODEL.name}`") as refused:
                use()
            assert (refused.value.retry_after_s is None) == is_of_the_file
            assert ("`probe=True`" in (refused.value.hint or "")) == is_of_the_file
    for probe in (True, None):  # and what it found is remembered
        with Model.load(**APART, probe=probe) as model:
            assert reference_of(model) == reference


def told(number: signal.Signals) -> str:
    """Whoever is stopped is killed by its watchdog."""
    return "SIGKILL" if number == signal.SIGSTOP else number.name


@pytest.mark.usefixtures("lenient")
def test_what_was_pinned_is_computed_again_by_the_next_worker():
    beginning = [5] * 300
    with Model.load(**APART) as model:
        pin = model.pin(beginning)
        for _ in range(2):
            os.kill(pid_of(model), signal.SIGKILL)
            eventually(model)
            assert until(lambda: model.metrics()["prompt_cache_bytes"] > 0)
            for token in range(10, 16):  # nothing of it is left in a slot
                model.generate([token] * 400, max_tokens=1)
            usage = model.generate([*beginning, 6], max_tokens=1).usage
            assert usage.cached_tokens == pin.tokens
        pin.release()


def eventually(model: Model) -> Completion:
    """An idle worker's death is noticed when its socket closes; who asks just then is under way."""
    try:
        return reference_of(model)
    except WorkerCrashedError:
        return reference_of(model)


def reference_of(model: Model) -> Completion:
    return model.generate(PROMPTS[0], **GREEDY)


def program(after_load: str) -> str:
    """A worker that does something more after it has loaded."""
    return f"""
import json, sys; sys.path[:] = json.loads(sys.argv[1])
import ctypes
from tabagent_model.isolation import worker
from tabagent_model._loading import load_here

def load(config, progress):
    context, model = load_here(config, progress)
    {after_load}
    return context, model

worker.main(sys.argv[2:], load)
"""


@pytest.mark.usefixtures("lenient")
def test_an_engine_that_stands_still_is_killed_although_python_lives(
    monkeypatch: pytest.MonkeyPatch, reference: Completion
):
    healthy = spawn._PROGRAM
    monkeypatch.setattr(spawn, "_PROGRAM", program("context._inject_hang()"))
    with Model.load(**CONFIG, isolation="process", watchdog_s=1.0) as model:
        monkeypatch.setattr(spawn, "_PROGRAM", healthy)
        streams = [model.stream(PROMPTS[0], **LONG) for _ in range(2)]
        assert len(model.tokenize("still here")) > 1
        for stream in streams:
            with pytest.raises(WorkerCrashedError, match="stood still"):
                next(stream)
        assert model.generate(PROMPTS[0], **GREEDY) == reference


@pytest.mark.usefixtures("lenient")
def test_the_words_of_an_abort_arrive(monkeypatch: pytest.MonkeyPatch):
    words = "b'x.c', 7, b'GGML_ASSERT(%s) failed', b'a == b'"
    abort = f"ctypes.CDLL(worker._core.__file__).ggml_abort({words})"
    monkeypatch.setattr(spawn, "_PROGRAM", program(abort))
    with pytest.raises(WorkerCrashedError) as caught:
        Model.load(**CONFIG, isolation="process")
    assert caught.value.signal == "SIGABRT"
    assert caught.value.last_line == "x.c:7: GGML_ASSERT(a == b) failed"


@pytest.mark.usefixtures("lenient")
def test_without_such_words_it_is_the_last_line_of_the_log():
    with Model.load(**CONFIG, isolation="process") as model:
        stream = model.stream(PROMPTS[0], **LONG)
        next(stream)
        os.kill(pid_of(model), signal.SIGSEGV)
        with pytest.raises(WorkerCrashedError) as caught:
            stream.collect()
    assert caught.value.last_line


def test_a_pulse_grows_only_with_work(here: Model):
    context: Any = here._context
    here.generate(PROMPTS[0], **GREEDY)
    before, _ = context.pulse()
    with here.stream(PROMPTS[0], **LONG) as stream:
        next(stream)
        during, is_busy = context.pulse()
        assert is_busy
    assert during > before + 20  # each node of a graph counts
    here.generate(PROMPTS[0], **GREEDY)
    for _ in range(1000):
        idle = context.pulse()
        if not idle[1]:
            break
        time.sleep(0.002)
    assert not idle[1]
    assert context.pulse() == idle


# Files that are tried first


def test_a_new_file_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Completion
):
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path))
    path = shutil.copy(BUNDLED_MODEL, tmp_path / "m.gguf")
    started: list[int] = []
    start = starting.Child.__init__

    def counted(child: Any, config: Any) -> None:
        start(child, config)
        started.append(child.pid)

    monkeypatch.setattr(starting.Child, "__init__", counted)
    for expected in (2, 3):
        with Model.load(path, **CONFIG, isolation="process") as model:
            assert model.generate(PROMPTS[0], **GREEDY) == reference
        assert len(started) == expected
    with Model.load(path, **CONFIG, probe=True) as model:
        assert "worker_pid" not in model.info()
        assert len(started) == 4


def test_memory_threads_and_files_come_back():
    with Model.load(**CONFIG, isolation="process") as model:
        worker_mb = model.info()["worker_rss_mb"]
        assert worker_mb > 5
        answer = model.generate("a", **GREEDY)
        assert abs(answer.metrics.memory_used_mb - worker_mb) < worker_mb
    before = num_files(), threading.active_count(), children()
    for _ in range(3):
        with Model.load(**CONFIG, isolation="process") as model:
            model.generate("a", **GREEDY)
            streams = [model.stream("a", **LONG) for _ in range(5)]
        del streams
    after = num_files(), threading.active_count(), children()
    assert after == before
