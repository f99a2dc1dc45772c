"""Two real models that share one place: nobody is lost, nothing is computed twice."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_gguf
from tabagent_model import (
    AsyncModelManager,
    InvalidRequestError,
    Model,
    ModelBusyError,
    ModelConfig,
    ModelCorruptedError,
    ModelEvent,
    ModelManager,
    ModelNotFoundError,
    ModelNotLoadedError,
    NoRoomError,
    OutOfMemoryError,
    QueueTimeoutError,
    WorkerCrashedError,
    estimate,
    memory,
)
from tabagent_model.params import BUNDLED_MODEL

pytestmark = pytest.mark.model

# How often two models are swapped; the long checks raise it to 200.
ROUNDS = int(os.environ.get("TABAGENT_SWAP_ROUNDS", "100"))

FILES = {"chat": BUNDLED_MODEL, "draft": BUNDLED_MODEL.with_name("tiny-draft.gguf")}
FIELDS: Any = {"n_ctx": 512, "max_parallel": 4}
GREEDY: Any = {"max_tokens": 12, "temperature": 0}
LONG: Any = {"max_tokens": -1, "ignore_eos": True, "temperature": 0}
PROMPT = "Once upon a time"


def with_both(models: Any) -> Any:
    for name, path in FILES.items():
        models.register_model(name, path, **FIELDS)
    return models


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """What each says with the process to itself."""
    answers = {}
    for name, path in FILES.items():
        with Model.load(path, **FIELDS) as model:
            answers[name] = model.generate(PROMPT, **GREEDY).text
    return answers


def states(models: Any) -> dict[str, str]:
    return {each.name: each.state for each in models.list_models()}


def eventually(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.005)
    return False


def test_a_model_is_there_while_it_is_used_and_leaves_for_the_next(alone: dict[str, str]):
    with with_both(ModelManager(max_loaded=1)) as models:
        for name in ("chat", "draft", "chat"):
            with models.use(name) as model:
                assert model.generate(PROMPT, **GREEDY).text == alone[name]
            assert states(models)[name] == "loaded"
        usage = models.usage("chat")
        assert (usage.requests, usage.num_loads, usage.generated_tokens) == (2, 2, 24)
        assert time.time() - usage.last_used < 60
    assert states(models) == {"chat": "unloaded", "draft": "unloaded"}


def test_a_swap_waits_for_who_is_answering_and_the_object_comes_back(alone: dict[str, str]):
    with with_both(ModelManager(max_loaded=1)) as models:
        chat = models.load_model()
        whole = chat.generate(PROMPT, **{**LONG, "max_tokens": 200}).text
        stream = chat.stream(PROMPT, **{**LONG, "max_tokens": 200})
        with ThreadPoolExecutor() as pool:
            swapping = pool.submit(models.swap, "draft")
            assert stream.collect().text == whole
            draft = swapping.result(20)
        assert (models.default_model, states(models)["chat"]) == ("draft", "unloaded")
        assert draft.generate(PROMPT, **GREEDY).text == alone["draft"]
        with pytest.raises(ModelNotLoadedError, match="unloaded"):
            chat.generate(PROMPT)
        assert models.swap("chat") is chat
        assert chat.generate(PROMPT, **GREEDY).text == alone["chat"]


@pytest.mark.parametrize("max_loaded", [1, 2])
def test_a_swap_with_a_grace_cancels_who_goes_on(max_loaded: int):
    with with_both(ModelManager(max_loaded=max_loaded)) as models:
        chat = models.load_model()
        with chat.stream(PROMPT, **LONG, overflow="shift") as stream:
            next(stream)
            models.swap("draft", grace="50ms")
            assert states(models) == {"chat": "unloaded", "draft": "loaded"}
            with pytest.raises(ModelNotLoadedError, match="unloaded"):
                stream.collect()


def test_many_threads_with_two_models_and_one_place(alone: dict[str, str]):
    with with_both(ModelManager(max_loaded=1)) as models:

        def one(number: int) -> str:
            name = ("chat", "draft")[number % 3 == 0]
            with models.use(name) as model:
                assert model.generate(PROMPT, **GREEDY).text == alone[name]
            return name

        with ThreadPoolExecutor(16) as pool:
            names = list(pool.map(one, range(60)))
        loads = sum(models.usage(name).num_loads for name in FILES)
        assert sum(models.usage(name).requests for name in FILES) == len(names)
        assert loads < len(names) / 2, "those who want the same are served together"


async def test_many_tasks_with_two_models_and_one_place(alone: dict[str, str]):
    async with with_both(AsyncModelManager(max_loaded=1)) as models:

        async def one(number: int) -> None:
            name = ("chat", "draft")[number % 3 == 0]
            async with models.use(name) as model:
                assert (await model.generate(PROMPT, **GREEDY)).text == alone[name]

        await asyncio.gather(*(one(number) for number in range(60)))
        assert (await models.swap("draft")).is_loaded
        await models.unload_model("draft")
        assert states(models) == {"chat": "unloaded", "draft": "unloaded"}


def test_whatever_users_do_the_next_answer_is_right(alone: dict[str, str]):
    """Waiting, giving up, swapping and throwing out, in any order."""
    with with_both(ModelManager(max_loaded=1, snapshots="memory")) as models:

        def one(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(20):
                name, what = dice.choice(list(FILES)), dice.random()
                grace, timeout_s = dice.choice([-1, 0, "20ms"]), dice.choice([None, 20, 0.02])
                try:
                    if what < 0.1:
                        models.swap(name, grace=grace, timeout_s=timeout_s)
                    elif what < 0.2:
                        models.unload_model(name, grace=grace, timeout_s=timeout_s)
                    elif what < 0.3:
                        models.load_model(name, preload=True)
                    else:
                        with models.use(name, timeout_s=timeout_s) as model:
                            assert model.generate(PROMPT, **GREEDY).text == alone[name]
                except (QueueTimeoutError, ModelNotLoadedError):
                    pass  # gave up, or was thrown out

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, range(8))) == [None] * 8
        for name in FILES:
            with models.use(name, timeout_s=20) as model:
                assert model.generate(PROMPT, **GREEDY).text == alone[name]
        assert all(each.num_waiting == 0 for each in models.list_models())


def test_a_manager_that_is_dropped_unloads_its_models():
    models = with_both(ModelManager(max_loaded=2))
    model = models.load_model()
    del models
    gc.collect()
    assert eventually(lambda: not model.is_loaded)


def test_threads_that_ask_for_one_model_load_it_once():
    """K05"""
    with with_both(ModelManager(max_loaded=2)) as models:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: models.load_model("chat"), range(8)))
        assert {id(model) for model in found} == {id(models.get_model("chat"))}
        assert models.usage("chat").num_loads == 1


@pytest.mark.parametrize("where", ["memory", "disk", None])
def test_sessions_survive_a_swap(where: Any):
    with with_both(ModelManager(max_loaded=1, snapshots=where)) as models:
        session = models.load_model().session("You are helpful.", temperature=0, max_tokens=24)
        both = [session, session.fork()]
        # What takes no time to compute is not taken from a cache, so there are a few turns.
        asked = ["What is the capital of France?", "What is the capital of Spain?"] * 2
        before = [[each.send(text) for text in asked][-1] for each in both]
        models.swap("draft")
        models.swap("chat")
        after = [each.send("What is the capital of Italy?").usage for each in both]
        if where is None:
            assert after[0].cached_tokens == 0
        else:
            for usage, answer in zip(after, before, strict=True):
                assert usage.cached_tokens >= answer.usage.prompt_tokens
        assert "Rome" in session.history[-1]["content"]


async def test_the_sessions_of_tasks_survive_a_swap():
    async with with_both(AsyncModelManager(max_loaded=1, snapshots="memory")) as models:
        session = (await models.load_model()).session(temperature=0, max_tokens=24)
        for of in ("France", "Spain", "France"):
            first = await session.send(f"What is the capital of {of}?")
        await models.swap("draft")
        await models.swap("chat")
        second = await session.send("What is the capital of Italy?")
        assert second.usage.cached_tokens >= first.usage.prompt_tokens
        assert "Rome" in second.text


def test_a_model_in_a_process_of_its_own_comes_and_goes_as_well(alone: dict[str, str]):
    with ModelManager(max_loaded=1, snapshots="memory") as models:
        models.register_model("apart", isolation="process", **FIELDS)
        models.register_model("draft", FILES["draft"], **FIELDS)
        apart = models.load_model()
        session = apart.session(temperature=0, max_tokens=24)
        asked = [f"What is the capital of {of}?" for of in ("France", "Spain", "Italy")]
        *_, last = [session.send(text) for text in asked]
        models.swap("draft")
        models.swap("apart")
        assert session.send(asked[0]).usage.cached_tokens >= last.usage.prompt_tokens
        stream = apart.stream(PROMPT, **LONG, overflow="shift")
        next(stream)
        os.kill(apart.info()["worker_pid"], signal.SIGKILL)
        with pytest.raises(WorkerCrashedError):
            stream.collect()
        with models.use("apart", timeout_s=30) as again:
            assert again.generate(PROMPT, **GREEDY).text == alone["chat"]
        models.swap("draft")
        assert states(models) == {"apart": "unloaded", "draft": "loaded"}


def test_another_file_at_the_same_path_gets_no_old_state(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(FILES["chat"].read_bytes())
    with ModelManager(max_loaded=1, snapshots="memory") as models:
        models.register_model("it", path, **FIELDS)
        session = models.load_model().session(temperature=0, max_tokens=8)
        for _ in range(5):
            session.send("Hello")
        models.unload_model()
        path.write_bytes(FILES["draft"].read_bytes())
        models.load_model()
        assert session.send("Hello").usage.cached_tokens == 0


def test_what_cannot_be_loaded_is_refused_before_anything_leaves(tmp_path: Path):
    """K07"""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(FILES["chat"].read_bytes()[:200_000])
    with with_both(ModelManager(max_loaded=1)) as models:
        models.register_model("missing", tmp_path / "missing.gguf")
        models.register_model("broken", broken)
        chat = models.load_model()
        for name, kind in (("missing", ModelNotFoundError), ("broken", ModelCorruptedError)):
            for ask in (models.swap, models.load_model):
                with pytest.raises(kind):
                    ask(name)
            with pytest.raises(kind), models.use(name):
                raise AssertionError
        assert (models.default_model, models.usage("chat").num_loads) == ("chat", 1)
        assert chat.is_loaded


@pytest.mark.parametrize("max_loaded", [1, 2])
def test_a_swap_that_fails_late_leaves_the_old_model_or_brings_it_back(
    max_loaded: int, tmp_path: Path
):
    """K07: a context that no memory can hold is found out only when it is made."""
    path = tiny_gguf(tmp_path / "huge.gguf", keys={"llama.context_length": 2**24})
    with with_both(ModelManager(max_loaded=max_loaded, estimate=lambda config: 1)) as models:
        models.register_model("huge", path, n_ctx=2**24, max_parallel=256)
        chat = models.load_model()
        with pytest.raises(OutOfMemoryError, match="16777216 tokens"):
            models.swap("huge")
        assert eventually(lambda: states(models)["chat"] == "loaded")
        assert (models.default_model, models.usage("chat").num_loads) == ("chat", 3 - max_loaded)
        assert chat.generate(PROMPT, **GREEDY).text


@pytest.mark.parametrize("is_linked", [False, True], ids=["one path", "a link to it"])
def test_c11_of_one_file_under_two_names_one_goes_and_the_other_serves_on(
    tmp_path: Path, alone: dict[str, str], is_linked: bool
):
    path = FILES["chat"]
    if is_linked:
        path = tmp_path / "linked.gguf"
        path.symlink_to(FILES["chat"])
    with ModelManager() as models:
        models.register_model("one", FILES["chat"], **FIELDS)
        models.register_model("two", path, **FIELDS)
        one, two = models.load_model("one"), models.load_model("two")
        whole = two.generate(PROMPT, **{**LONG, "max_tokens": 64}).text
        with two.stream(PROMPT, **{**LONG, "max_tokens": 64}) as pieces:
            first = next(pieces)
            models.unload_model("one")
            assert first + "".join(pieces) == whole
        with pytest.raises(ModelNotLoadedError):
            one.generate(PROMPT)
        assert two.generate(PROMPT, **GREEDY).text == alone["chat"]
        assert states(models) == {"one": "unloaded", "two": "loaded"}
        assert models.load_model("one").generate(PROMPT, **GREEDY).text == alone["chat"]


async def test_available_is_what_is_loaded_or_has_a_sound_file(tmp_path: Path):
    gone, damaged = tmp_path / "gone.gguf", tmp_path / "damaged.gguf"
    gone.write_bytes(FILES["draft"].read_bytes())
    damaged.write_bytes(FILES["draft"].read_bytes()[:5000])
    with ModelManager() as models:
        for name, path in {**FILES, "gone": gone, "damaged": damaged, "no": tmp_path / "n"}.items():
            models.register_model(name, path, n_ctx=256)
        models.load_model("gone")
        gone.unlink()
        listed = models.list_models()
        assert models.list_available_models() == [listed[0], listed[1], listed[2]]
        models.unload_model("gone")
        available = models.list_available_models()
        assert {each.name: each.state for each in available} == dict.fromkeys(FILES, "unloaded")
    async with AsyncModelManager() as twins:
        assert await twins.list_available_models() == []
        twins.register_model("chat")
        assert await twins.list_available_models() == twins.list_models()


def test_a_budget_in_bytes_is_kept():
    with ModelManager(max_bytes=44 << 20) as models:
        on_cpu: Any = {"n_ctx": 512, "max_parallel": 1, "device": "cpu"}
        models.register_model("chat", FILES["chat"], **on_cpu)
        models.register_model("draft", FILES["draft"], **on_cpu)
        models.register_model("wide", FILES["draft"], **{**on_cpu, "max_parallel": 16})
        models.load_model("chat")
        models.load_model("draft")
        assert 30 << 20 < sum(each.needs_bytes for each in models.list_models()) < 44 << 20
        models.pin("chat")
        with pytest.raises(NoRoomError, match=r"what could leave is pinned: `chat` \("):
            models.load_model("wide")
        assert states(models) == {"chat": "loaded", "draft": "loaded", "wide": "unloaded"}


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_what_a_model_takes_is_estimated_and_then_what_the_ledger_says(isolation: Any):
    fields: Any = {"n_ctx": 512, "max_parallel": 2, "kv_type": "f16", "device": "cpu"}
    config = ModelConfig(isolation=isolation, **fields)
    with ModelManager(max_bytes={"cpu": 1 << 30}) as models:
        models.register_model("chat", config)
        ticket = models._ticket("load", "chat", None)
        models._keeper.measure(ticket)
        (share,) = estimate(config).shares
        assert share.mapped > 0
        assert ticket.needs == {"cpu": share.needed + share.mapped}
        models.load_model("chat")
        (held,) = memory().models
        (share,) = held.shares
        taken = {"cpu": share.needed + share.mapped}
        assert eventually(lambda: models.list_models()[0].needs == taken)
        assert models.list_models()[0].needs_bytes == sum(taken.values())


def test_an_estimate_of_ones_own_is_asked_before_and_after():
    asked: list[ModelConfig] = []

    def told(config: ModelConfig) -> dict[str, int]:
        asked.append(config)
        return {"cpu": 5 << 20, "CUDA0": 1 << 20}

    with ModelManager(estimate=told) as models:
        models.register_model("chat", n_ctx=512, max_parallel=0)
        models.load_model("chat")
        assert eventually(lambda: len(asked) == 2)
        assert (asked[0].max_parallel, asked[1].max_parallel > 0) == (0, True)
        (described,) = models.list_models()
        assert (described.needs, described.needs_bytes) == (told(asked[0]), 6 << 20)
    for wrong in (-1, {"cpu": 1.5}, {3: 4}, "many"):
        with ModelManager(estimate=lambda config, wrong=wrong: wrong) as models:  # type: ignore[misc]
            models.register_model("chat", n_ctx=512)
            with pytest.raises(InvalidRequestError, match="`estimate` must be"):
                models.load_model("chat")


# What a manager does with models in workers leaves the program itself without llama.cpp.
APART = """
from tabagent_model import ModelManager, _native, memory
with ModelManager(max_bytes=1 << 30) as models:
    for name in ("one", "two"):
        models.register_model(name, isolation="process", n_ctx=512, max_parallel=1)
        models.load_model(name)
    pids = {each.info()["worker_pid"] for each in map(models.get_model, ("one", "two"))}
    report = memory()
    assert {each.worker.pid for each in report.models} == pids, report
    assert report.devices[0].free and report.devices[0].total, report
print(_native.is_started(), "libggml-cpu" in open("/proc/self/maps").read(), len(pids))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_models_in_workers_are_managed_without_starting_llama_cpp_here():
    ran = subprocess.run(
        [sys.executable, "-c", APART], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == ("False False 2\n", "")


def test_who_is_in_use_stays_and_whoever_waits_may_stop_waiting():
    with with_both(ModelManager(max_loaded=1)) as models:
        with models.use("chat") as model, ThreadPoolExecutor() as pool:
            with pytest.raises(QueueTimeoutError, match="`draft` could not be had"):
                pool.submit(lambda: models.load_model("draft", timeout_s=0.05)).result()
            assert model.generate(PROMPT, **GREEDY).finish_reason == "length"
        assert models.load_model("draft", timeout_s=20).is_loaded


def test_one_who_holds_what_would_have_to_leave_is_told_so():
    with with_both(ModelManager(max_loaded=1)) as models, models.use("chat"):
        for ask in (models.load_model, models.swap):
            with pytest.raises(ModelBusyError, match="`chat` would have to leave"):
                ask("draft")


def test_an_idle_model_leaves_after_its_keep_alive():
    with ModelManager(keep_alive=0) as models:
        models.register_model("chat", **FIELDS)
        models.register_model("draft", FILES["draft"], keep_alive="100ms", **FIELDS)
        assert models.load_model("chat").generate(PROMPT, **GREEDY).text
        models.load_model("draft", preload=True)
        assert eventually(lambda: set(states(models).values()) == {"unloaded"})


def test_a_model_that_its_user_closed_is_loaded_again(alone: dict[str, str]):
    with with_both(ModelManager()) as models:
        with models.load_model("chat") as model:
            assert model.is_loaded
        with pytest.raises(ModelNotLoadedError):
            models.get_model("chat")
        with models.use("chat") as again:
            assert again is model
            assert again.generate(PROMPT, **GREEDY).text == alone["chat"]


def test_what_is_loaded_cannot_be_registered_anew():
    with with_both(ModelManager()) as models:
        models.load_model("chat")
        with pytest.raises(InvalidRequestError, match="`chat` is loaded, so it cannot be"):
            models.register_model("chat", FILES["draft"])
        models.unload_model("chat")
        models.register_model("chat", FILES["draft"], **FIELDS)
        assert models.load_model("chat").info()["path"] == str(FILES["draft"])


def test_every_step_is_told_with_its_time():
    events: list[ModelEvent] = []
    watched: list[ModelEvent] = []
    first: list[ModelEvent] = []
    with with_both(ModelManager(max_loaded=1, on_event=events.append)) as models:
        models.watch(watched.append)
        stop = models.watch(lambda event: (first.append(event), stop()))
        stream = models.load_model("chat").stream(PROMPT, **{**LONG, "max_tokens": 100})
        swapping = threading.Thread(target=models.swap, args=("draft",))
        swapping.start()
        stream.collect()
        swapping.join()
    ends = [(e.model, e.step) for e in events if e.progress == 1.0]
    drained = [("chat", "drain")] if ("chat", "drain") in ends else []
    assert ends == [
        ("chat", "load"),
        *drained,
        ("chat", "unload"),
        ("draft", "load"),
        ("draft", "unload"),
    ]
    assert next(e.progress for e in events if (e.model, e.step) == ("draft", "load")) == 0.0
    assert all(e.seconds >= 0 and e.error is None for e in events)
    assert (watched, first) == (events, events[:1])


def test_an_event_that_raises_or_asks_the_manager_harms_nobody():
    asked: list[Any] = []

    def hear(event: ModelEvent) -> None:
        asked.append(models.list_models())
        raise ValueError("not my problem")

    with with_both(ModelManager(max_loaded=1, on_event=hear)) as models:
        assert models.load_model("chat").is_loaded
    assert asked


async def test_a_cancelled_task_gives_up_its_load_and_the_next_one_loads():
    """X05"""
    async with with_both(AsyncModelManager(max_loaded=1)) as models:
        for _ in range(5):
            task = asyncio.create_task(models.load_model("chat"))
            await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with models.use("draft") as model:
            assert (await model.generate(PROMPT, **GREEDY)).text
        async with models.use("chat", timeout_s=20) as model:
            assert (await model.generate(PROMPT, **GREEDY)).text
        with pytest.raises(QueueTimeoutError):
            async with models.use("chat"):
                await asyncio.create_task(models.swap("draft", timeout_s=0.05))


async def test_tasks_of_two_event_loops_share_a_manager():
    """K04"""
    async with with_both(AsyncModelManager(max_loaded=1)) as models:

        async def one(name: str) -> int:
            async with models.use(name) as model:
                return len((await model.generate(PROMPT, **GREEDY)).tokens)

        def in_a_loop_of_its_own() -> list[int]:
            async def several() -> list[int]:
                return await asyncio.gather(*(one(name) for name in ("draft", "chat", "draft")))

            return asyncio.run(several())

        other = asyncio.to_thread(in_a_loop_of_its_own)
        ours = asyncio.gather(*(one(name) for name in ("chat", "draft", "chat")))
        assert await asyncio.gather(other, ours) == [[12] * 3] * 2


FORK = """
import os, sys
from tabagent_model import ForkedProcessError, ModelManager

models = ModelManager()
models.register_model("chat", n_ctx=256)
models.load_model()
if os.fork() == 0:
    try:
        models.load_model()
    except ForkedProcessError:
        os._exit(0 if ModelManager() is not models else 2)
    os._exit(1)
code = os.waitstatus_to_exitcode(os.wait()[1])
assert models.load_model().generate("a", max_tokens=2).tokens
sys.exit(code)
"""

# Alternating, in a process of its own, whose memory nothing else has shaped. Each swap meets the
# other model, loaded and just asked, and lets it go.
SWAPS = """
import gc, json, sys, threading
from pathlib import Path
from tabagent_model import ModelManager

def private_mib():
    status = Path("/proc/self/status").read_text()
    kinds = ("RssAnon:", "VmSwap:")
    return sum(int(status.partition(kind)[2].split(None, 1)[0]) for kind in kinds) / 1024

def others():
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

# What there is in memory when one was swapped for the other and has been asked, by its name.
def there_and_back():
    found = {}
    for name in NAMES:
        (other,) = {*NAMES} - {name}
        was_there = models.get_model(other).is_loaded
        models.swap(name).generate("Hello", max_tokens=8, temperature=0)
        states = {each.name: each.state for each in models.list_models()}
        assert was_there and states == {name: "loaded", other: "unloaded"}, (was_there, states)
        gc.collect()
        found[name] = private_mib()
    return found

NAMES = "chat", "draft"
with ModelManager(max_loaded=1) as models:
    for name, path in zip(NAMES, sys.argv[2:]):
        models.register_model(name, path, n_ctx=512, max_parallel=4, device="cpu")
    models.load_model("draft")
    warm_up = [there_and_back() for _ in range(10)]
    before = others()
    after = [there_and_back() for _ in range(int(sys.argv[1]) // 2)]
    loads = [models.usage(name).num_loads for name in NAMES]
    print(json.dumps({
        "baseline": warm_up[-1], "after": after, "loads": loads, "same": before == others(),
    }))
"""


def test_swapping_there_and_back_leaves_no_memory_behind():
    ran = subprocess.run(
        [sys.executable, "-c", SWAPS, str(ROUNDS), *map(str, FILES.values())],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        timeout=100 + ROUNDS,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    for name in FILES:
        baseline, after = found["baseline"][name], [each[name] for each in found["after"]]
        slope = statistics.linear_regression(range(0, 2 * len(after), 2), after).slope
        low, high = min(after), max(after)
        print(f"{name}: {baseline:.1f} MiB, then {low:.1f} to {high:.1f}, {slope:.4f} a swap")
        assert max(abs(value - baseline) for value in after) <= 100
        # malloc keeps up to 4 MiB from one swap to another, or does not: a slope in a short run.
        assert abs(slope) < max(0.05, 6 / ROUNDS), "MiB per swap"
    assert found["loads"] == [10 + ROUNDS // 2, 11 + ROUNDS // 2], "each swap is a load"
    assert found["same"], "file descriptors or threads were left behind"


def test_a_forked_child_makes_a_manager_of_its_own():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "sys.exit(3)",
        "raise SystemExit(3)",
        "threading.Thread(target=wait, daemon=True).start()",
    ],
)
def test_a_program_may_end_with_an_open_manager(ending: str):
    program = f"""
import sys, threading
from tabagent_model import ModelManager

def wait():
    with models.use("draft"): pass

models = ModelManager(max_loaded=1)
models.register_model("chat", {str(FILES["chat"])!r})
models.register_model("draft", {str(FILES["draft"])!r})
entered = models.use("chat")
entered.__enter__()
models.load_model("chat", preload=True)
{ending}
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr) == (3 if "3" in ending else 0, "")
