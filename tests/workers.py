"""Workers with a scripted engine, and what tests ask of their processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tabagent_model import AsyncModel, Model

# What the scripted engine in the worker does, by the prompt.
WORKER = """
import json, os, signal, sys, time; sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from tabagent_model.isolation import worker
from tabagent_model.errors import OutOfMemoryError, QueueFullError
from tabagent_model.testing import ScriptedContext, ScriptedPrompt

FATAL = False

def lines(prompt):
    if FATAL and type(prompt) is list:
        os.abort()
    if "think" in (prompt if type(prompt) is str else context.detokenize(prompt)):
        yield "<think>Hm</think>"
    yield "One"
    if prompt in ("SIGSEGV", "SIGKILL"):
        os.kill(os.getpid(), signal.Signals[prompt])
        time.sleep(60)  # another thread may have to hear it first
    if prompt == "abort":
        os.write(2, b"ggml.c:12: GGML_ASSERT(a == b) failed\\n")
        os.abort()
    if prompt == "CUDA" and ScriptedModel.gpu_layers:
        os.write(2, b"/ggml/src/ggml-cuda/ggml-cuda.cu:98: CUDA error\\n")
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

class ChatPrompt(ScriptedPrompt):
    pass

class ScriptedModel:
    path, load_time_ms, gpu_layers = "scripted.gguf", 1.5, 0
    size_bytes, n_params, is_repacked = 10, 2, False
    def tokenize(self, text, add_bos=True, special=False):
        return context.tokenize(text, add_bos)
    def detokenize(self, tokens, special=False):
        return context.detokenize(tokens)
    def render_chat(self, *given):
        prompt = context.render_chat(*given)
        return ChatPrompt(**{**vars(prompt), "is_plain": "plain" in prompt.text})
    def vocab_size(self):
        return 3
    context_train_size = embedding_dim = layer_count = vocab_size
    def open_files(self):
        return {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{fd}")}
    def pins(self, now):
        submitted = {s.request_id: dict(s.params) for s in context.submitted}
        return submitted, context.unpinned
    def echo(self, *given, **named):
        return given, named
    def fail(self):
        return 1 / 0
    def _secret(self):
        return 1

def refuse_pins(*errors):
    submit, left = ScriptedContext.submit, [*errors]
    def refuse(self, request_id, prompt, params, *chat):
        if params.get("pin") and left:
            raise left.pop()
        submit(self, request_id, prompt, params, *chat)
    ScriptedContext.submit = refuse

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


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children(parent: int | None = None) -> list[int]:
    """By the parent that each names: a list by thread lacks those of a thread that has just
    ended."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            state, its_parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(its_parent) == (parent or os.getpid()) and state != "Z":
                found.append(int(process.name))
    return sorted(found)
