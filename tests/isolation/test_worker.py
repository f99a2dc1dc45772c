"""A model in a process of its own: it is loaded there, and answers as one in this process. The
worker is the real one, the engine in it is scripted."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
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
    ModelQuarantinedError,
    OutOfMemoryError,
    WorkerCrashedError,
    errors,
)
from tabagent_model.isolation import child as starting
from tabagent_model.params import BUNDLED_MODEL
from tabagent_model.stream import ChatStream
from workers import ANSWER, VALUES, children, is_alive, pid_of, until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


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
        for too_long in ("word " * 5000, [1] * 5000):
            with pytest.raises(ContextLimitExceededError):
                await model.generate(too_long)
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


def test_what_a_chat_means_is_read_in_the_worker(model: Model):
    with model.stream_chat("think") as deltas:
        found = list(deltas)
    assert deltas.text == "<think>Hm</think>" + ANSWER
    assert (deltas.result.reasoning, deltas.result.content) == ("Hm", ANSWER)
    assert "".join(delta.reasoning for delta in found) == "Hm"
    assert "".join(delta.content for delta in found) == ANSWER
    assert model.chat("think") == deltas.result


def test_a_chat_that_is_content_only_comes_as_text(model: Model):
    with model.stream_chat("plain") as deltas:
        assert [delta.content for delta in deltas] == ["One", ", two", "."]
    assert (deltas.result.content, deltas.result.reasoning) == (ANSWER, None)


def test_a_prompt_of_a_worker_that_died_is_written_out_again(model: Model):
    [request] = model._chat_requests("think", None, {})
    request.prompt()  # type: ignore[operator]
    first = pid_of(model)
    os.kill(first, signal.SIGKILL)
    assert until(lambda: pid_of(model) != first)
    again = replace(request, prompt="think")
    answer = ChatStream(model._open_courier, again, model._source, model).collect()
    assert (answer.reasoning, answer.content) == ("Hm", ANSWER)


def test_logprobs_come_with_their_tokens(model: Model):
    with model.stream("Count", logprobs=1) as pieces:
        told = [len(pieces.logprobs or ()) for _ in pieces]
    assert told == [1, 2, 3]
    assert [one.text for one in pieces.result.logprobs or ()] == ["One", ", two", "."]


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
    # The engine's copy of the socket, and one of the notes for the last line of the log.
    assert kinds == ["/memfd", "socket", "socket"]
    assert len(set(found.values())) == 2


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
