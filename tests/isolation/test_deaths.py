"""Workers that die or hang, and what is kept for the next one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    GenerationTimeoutError,
    Model,
    ModelNotLoadedError,
    ModelQuarantinedError,
    OutOfMemoryError,
    QueueFullError,
    WorkerCrashedError,
    generate_with_fallback,
    recovery,
    strategy_for,
)
from tabagent_model.isolation import remote, respawn, spawn, verdicts
from workers import ANSWER, children, is_alive, pid_of, until

NO_ROOM = "memory allocation of 3 bytes failed"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


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
        assert error.was_hanging == (prompt == "nonsense")  # it lives on, and we end it
        assert error.last_line == last_line or last_line is None
        assert "3 requests under way" in str(error)
    assert model.generate("Count").text == ANSWER
    assert pid_of(model) != before
    assert not is_alive(before)
    assert model.metrics()["worker_restarts"] == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", None),
        ("a.c:1: GGML_ASSERT(a) failed\n", "a.c:1: GGML_ASSERT(a) failed"),
        (
            "first\n\nmemory allocation of 3 bytes failed\nnote: run with `RUST_BACKTRACE=1`\n",
            NO_ROOM,
        ),
        (f"{NO_ROOM}\nskipping backtrace printing to avoid potential recursion\n", NO_ROOM),
    ],
)
def test_the_last_words_are_those_that_say_what_happened(said: str, words: str | None):
    notes = spawn.new_notes()
    os.write(notes, said.encode())
    assert spawn.last_line(notes) == words
    os.close(notes)


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


# The scripted engine has layers on a GPU unless it is told not to.
HAS_A_GPU = "ScriptedModel.gpu_layers = 0 if config.device == 'cpu' else 5"


def test_a_worker_that_a_gpu_ended_is_replaced_by_one_on_the_cpu_where_that_is_asked_for(
    scripted: Callable[[str], None], caplog: pytest.LogCaptureFixture
):
    scripted(HAS_A_GPU)
    with Model.load(isolation="process") as model:
        with pytest.raises(WorkerCrashedError) as caught:
            model.generate("CUDA")
        assert strategy_for(caught.value) == recovery.ReinitializeGpu()
        others = [model.stream("forever", max_tokens=-1) for _ in range(2)]
        assert generate_with_fallback(model, "CUDA").text == ANSWER
        assert "GPU error, falling back to CPU" in caplog.text
        assert (model.config.device, model.info()["gpu_layers"]) == ("cpu", 0)
        for stream in others:
            with pytest.raises((WorkerCrashedError, ModelNotLoadedError)):
                stream.collect()
        with pytest.raises(WorkerCrashedError):  # of which a GPU is innocent
            generate_with_fallback(model, "SIGSEGV")
        assert model.generate("Count").text == ANSWER


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


def pins_of(model: Model) -> tuple[dict[int, Any], list[int]]:
    """What was submitted to the worker that lives now, and what was unpinned in it."""
    found: tuple[dict[int, Any], list[int]] = model._native.pins(True)  # type: ignore[union-attr]
    return found


def test_what_was_pinned_is_pinned_in_the_next_worker_until_it_is_released(model: Model):
    kept, released = model.pin("You are", timeout_s=60), model.pin("Once upon")
    released.release()
    assert pins_of(model)[1] == [released._request_id]
    for _ in range(2):
        with pytest.raises(WorkerCrashedError):
            model.generate("SIGSEGV")
        assert model.generate("Count").text == ANSWER
        assert until(lambda: kept._request_id in pins_of(model)[0])
        submitted, unpinned = pins_of(model)
        again = submitted[kept._request_id]
        assert (again["pin"], "timeout_s" in again) == (True, False)
        assert (released._request_id in submitted, unpinned) == (False, [])
    assert until(lambda: model._native._keeper._renewing == set())  # type: ignore[union-attr]
    kept.release()
    assert until(lambda: pins_of(model)[1] == [kept._request_id])
    assert model.metrics()["running"] == 0


def test_a_pin_that_finds_no_place_in_the_next_worker_tries_again(
    model: Model, scripted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(respawn, "RENEW_AGAIN_S", 0.01)
    pin = model.pin("You are")
    scripted("refuse_pins(*[QueueFullError('full')] * 3)")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    assert until(lambda: pin._request_id in pins_of(model)[0])


def test_a_pin_may_be_released_while_no_worker_lives(model: Model, scripted: Callable[[str], None]):
    pin = model.pin("You are")
    scripted("time.sleep(0.3)")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    pin.release()
    pin.release()
    assert model.generate("Count").text == ANSWER
    submitted, unpinned = pins_of(model)
    assert (pin._request_id in submitted, unpinned) == (False, [])


def test_a_pin_that_cannot_be_renewed_is_told_in_the_log(
    model: Model, scripted: Callable[[str], None], caplog: pytest.LogCaptureFixture
):
    pin = model.pin("You are")
    scripted("refuse_pins(OutOfMemoryError('no', needed=3, free=2))")
    with pytest.raises(WorkerCrashedError):
        model.generate("SIGSEGV")
    with pin:
        assert until(lambda: "kept no longer" in caplog.text)
    assert model.generate("Count").text == ANSWER


@pytest.mark.parametrize("prompt", ["stop", "hang"])
def test_a_worker_that_hangs_is_killed(prompt: str):
    with Model.load(isolation="process", watchdog_s=0.4) as model:
        why = "sign of life" if prompt == "stop" else "stood still"
        with pytest.raises(WorkerCrashedError, match=why) as caught:
            model.generate(prompt)
        assert caught.value.was_hanging
        assert model.generate("Count").text == ANSWER


async def test_an_event_loop_goes_on_beside_a_worker_that_reads_nothing():
    async with await AsyncModel.load(isolation="process", queue_size=500) as model:
        os.kill(pid_of(model), signal.SIGSTOP)
        prompts = ["Count " * 500] * 200 + ["Count " * 1300] * 20
        answers = [asyncio.ensure_future(model.generate(prompt)) for prompt in prompts]
        left = asyncio.ensure_future(model.generate("Count"))
        await asyncio.sleep(0.1)  # more than the socket holds is on its way
        assert left.cancel()
        await asyncio.sleep(0.1)
        os.kill(pid_of(model), signal.SIGCONT)
        assert {(await answer).text for answer in answers} == {ANSWER}
        with pytest.raises(asyncio.CancelledError):
            await left


async def test_who_is_cancelled_on_the_way_to_the_worker_leaves_nothing_there():
    async with await AsyncModel.load(isolation="process") as model:
        os.kill(pid_of(model), signal.SIGSTOP)
        asked = asyncio.ensure_future(model.generate("Count"))
        refused = asyncio.ensure_future(model.generate([1] * 5000))
        await asyncio.sleep(0.05)
        assert asked.cancel() and refused.cancel()
        await asyncio.sleep(0.05)
        os.kill(pid_of(model), signal.SIGCONT)
        ends = await asyncio.gather(asked, refused, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
        metrics = await asyncio.to_thread(model.metrics)
        assert (metrics["requests"], metrics["running"], metrics["waiting"]) == (1, 0, 0)


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
