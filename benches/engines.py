"""The contenders behind one interface: a model is opened, asked, and seen answering.

Each runs in a process of its own (see `worker`), in the interpreter that has it installed, so an
import belongs into the class that needs it. All sample alike, produce text, and never end early.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

SAMPLING = dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.0, repeat_penalty=1.1, seed=1)
GREEDY = dict(temperature=0.0, repeat_penalty=1.0, seed=1)
EVERYTHING = dict(SAMPLING, min_p=0.05, presence_penalty=0.1, frequency_penalty=0.1)


@dataclass(frozen=True)
class Ask:
    prompt: str
    tokens: int
    after_s: float = 0.0
    sampling: Mapping[str, Any] = field(default_factory=lambda: SAMPLING)


@dataclass
class Answer:
    """When it was asked, and when each piece of text arrived in Python."""

    cpu_clock: Callable[[], float] = time.process_time
    asked: float = 0.0
    pieces: list[float] = field(default_factory=list)
    asked_cpu: float = 0.0
    pieces_cpu: list[float] = field(default_factory=list)
    """The same in CPU seconds of whoever answers."""
    tokens: int = 0
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self.asked_cpu = self.cpu_clock()
        self.asked = time.perf_counter()

    def saw(self) -> None:
        self.pieces.append(time.perf_counter())
        self.pieces_cpu.append(self.cpu_clock())

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.asked

    @property
    def total_s(self) -> float:
        return self.pieces[-1] - self.asked

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.pieces[-1] - self.pieces[0])

    @property
    def cpu_rate(self) -> float:
        """Tokens per CPU second after the first."""
        return (self.tokens - 1) / (self.pieces_cpu[-1] - self.pieces_cpu[0])

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True)
class Setting:
    """How a model is opened; the same for everybody."""

    model: str
    threads: int
    n_ctx: int
    """Tokens that each stream can hold."""
    streams: int = 1
    """0: as many as it takes when nothing is said, and as many tokens."""
    tools: str = ""
    """The folder of llama.cpp's programs."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keywords for `Model.load`, to compare settings of our own; llama.cpp's own tools
    take the two that choose the attention."""


class Ours:
    """`Model`, in the thread that asks."""

    def __init__(self, setting: Setting) -> None:
        from tabagent_model import Model

        self.setting = setting
        self.model = Model.load(setting.model, **_our_fields(setting))

    def one(self, ask: Ask) -> Answer:
        answer = Answer()
        with self.model.stream(ask.prompt, **_our_sampling(ask)) as pieces:
            for _ in pieces:
                answer.saw()
        answer.tokens = pieces.usage.completion_tokens
        answer.prompt_tokens = pieces.usage.prompt_tokens
        return answer

    def attention(self, **_: Any) -> dict[str, str]:
        """How this model computes attention, in the words of llama.cpp's tools."""
        found = {**vars(self.model.config), **self.model.info()}
        return {"flash_attn": found["flash_attn"], "kv_type": found["kv_type"]}

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self.model.close()


class OursAsync:
    """`AsyncModel`, all streams in one event loop."""

    def __init__(self, setting: Setting) -> None:
        from tabagent_model import AsyncModel

        self.setting = setting
        self.loop = asyncio.new_event_loop()
        load = AsyncModel.load(setting.model, **_our_fields(setting))
        self.model = self.loop.run_until_complete(load)

    def one(self, ask: Ask) -> Answer:
        return self.together([ask])[0]

    def together(self, asks: list[Ask]) -> list[Answer]:
        return self.loop.run_until_complete(_gather(map(self.ask, asks)))

    def stream(self, ask: Ask) -> Any:
        return self.model.stream(ask.prompt, **_our_sampling(ask))

    async def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        await asyncio.sleep(ask.after_s)
        answer = answer or Answer()
        async with self.stream(ask) as pieces:
            async for _ in pieces:
                answer.saw()
        answer.tokens = pieces.usage.completion_tokens
        answer.prompt_tokens = pieces.usage.prompt_tokens
        return answer

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self.loop.run_until_complete(self.model.close())


class LlamaCppPython:
    """`Llama`: one request at a time."""

    def __init__(self, setting: Setting) -> None:
        from llama_cpp import Llama, llama_vocab_is_eog

        self.setting = setting
        self.model = Llama(
            setting.model,
            n_ctx=setting.n_ctx,
            n_threads=setting.threads,
            n_threads_batch=setting.threads,
            verbose=False,
        )
        vocabulary = self.model._model.vocab
        ends = (i for i in range(self.model.n_vocab()) if llama_vocab_is_eog(vocabulary, i))
        self.never_end = dict.fromkeys(ends, -1e9)

    def one(self, ask: Ask) -> Answer:
        answer = Answer()
        pieces = self.model.create_completion(
            ask.prompt,
            max_tokens=ask.tokens,
            stream=True,
            logit_bias=self.never_end,
            **ask.sampling,
        )
        for piece in pieces:
            if piece["choices"][0]["text"]:
                answer.saw()
                answer.tokens += 1
        return answer

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self.model.close()


class Xllamacpp:
    """llama-server inside the process; a callback for each stream, a thread for each request."""

    def __init__(self, setting: Setting) -> None:
        import xllamacpp

        self.setting = setting
        params = xllamacpp.CommonParams()
        params.model.path = setting.model
        params.n_ctx = setting.n_ctx * setting.streams
        params.n_parallel = setting.streams
        params.cpuparams.n_threads = setting.threads
        params.cpuparams_batch.n_threads = setting.threads
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def one(self, ask: Ask) -> Answer:
        answer = Answer()

        def take(chunk: Any) -> None:
            if chunk["choices"][0]["text"]:
                answer.saw()
            if usage := chunk.get("usage"):
                answer.tokens = usage["completion_tokens"]

        asked = {"prompt": ask.prompt, "max_tokens": ask.tokens, "stream": True, "ignore_eos": True}
        self.server.handle_completions({**asked, **ask.sampling}, take)
        return answer

    def together(self, asks: list[Ask]) -> list[Answer]:
        return in_threads([(self, ask) for ask in asks])

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        del self.server


class _Server:
    """A server as a process of its own."""

    def __init__(self, setting: Setting, command: list[str]) -> None:
        self.setting = setting
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        self._wait_until_ready(Path(command[0]).name)

    def cpu_seconds(self) -> float:
        """Of the process that was started, without its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _wait_until_ready(self, name: str) -> None:
        for _ in range(1200):
            if self.process.poll() is not None:
                raise RuntimeError(f"{name} ended with {self.process.returncode}")
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{name} was not ready within a minute")


class OurServer(_Server):
    """`tabagent-model serve`: it speaks HTTP, and the engine is in a worker, its child.

    The options are those of the command; `in_process` is one without a value.
    """

    def __init__(self, setting: Setting) -> None:
        command = [sys.executable, "-m", "tabagent_model", "serve", setting.model]
        command += ["--threads", str(setting.threads)]
        if setting.streams:
            command += ["--n-ctx", str(setting.n_ctx), "--parallel", str(setting.streams)]
        for name, value in setting.options.items():
            command += [f"--{name.replace('_', '-')}", *([str(value)] if value != "" else [])]
        super().__init__(setting, command)

    def door_seconds(self) -> float:
        """CPU seconds of all but the engine."""
        return self.cpu_seconds()


class LlamaServer(_Server):
    """llama-server, read over HTTP by one event loop with as little code as can be."""

    def __init__(self, setting: Setting) -> None:
        command = [str(Path(setting.tools) / "llama-server"), "-m", setting.model]
        command += ["-t", str(setting.threads), "--no-webui"]
        if setting.streams:
            command += ["-c", str(setting.n_ctx * setting.streams), "-np", str(setting.streams)]
        super().__init__(setting, command)
        self.loop = asyncio.new_event_loop()

    def one(self, ask: Ask) -> Answer:
        return self.together([ask])[0]

    def together(self, asks: list[Ask]) -> list[Answer]:
        return self.loop.run_until_complete(_gather(map(self.ask, asks)))

    async def ask(self, ask: Ask) -> Answer:
        await asyncio.sleep(ask.after_s)
        answer = Answer(self.cpu_seconds)
        asked = {"prompt": ask.prompt, "n_predict": ask.tokens, "stream": True, "ignore_eos": True}
        async for chunk in self._post("/completion", {**asked, **ask.sampling}):
            if chunk["content"]:
                answer.saw()
            if chunk["stop"]:
                answer.tokens = chunk["tokens_predicted"]
                answer.prompt_tokens = chunk["tokens_evaluated"]
        return answer

    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            async for line in reader:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    yield chunk
                    if chunk["stop"]:
                        return
        finally:
            writer.close()


class LlamaBench:
    """llama.cpp's own figures: its engine without sampling, text, or anybody who reads."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def decode(self, depth: int, tokens: int, **_: Any) -> dict[str, float]:
        return {"rate": self._run(["-p", "0", "-n", str(tokens), "-d", str(depth)])}

    def prefill(self, prompt: int, **_: Any) -> dict[str, float]:
        rate = self._run(["-p", str(prompt), "-n", "0"])
        return {"rate": rate, "first_ms": prompt / rate * 1e3}

    def close(self) -> None:
        pass

    def _run(self, arguments: list[str]) -> float:
        setting = self.setting
        command = [str(Path(setting.tools) / "llama-bench"), "-m", setting.model, "-r", "1"]
        command += ["-t", str(setting.threads), "-o", "json", *_attention(setting), *arguments]
        return float(json.loads(_output(command))[0]["avg_ts"])


class BatchedBench:
    """The same for many streams: all prompts one after the other, then all tokens in step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def crowd(self, streams: int, prompt: int, tokens: int, **_: Any) -> dict[str, float]:
        found = self._run(streams, prompt, tokens)
        seconds = found["t_pp"] + found["t_tg"]
        return {
            "seconds": seconds,
            "rate": streams * tokens / seconds,
            "prefill_rate": found["speed_pp"],
            "decode_rate": found["speed_tg"],
        }

    def kv_layout(
        self, streams: int, prompt: int, tokens: int, shared: bool, **_: Any
    ) -> dict[str, float]:
        """One cache for all sequences against a stream of its own for each."""
        figures = {}
        for layout, flag in (("streams", "--no-kv-unified"), ("unified", "--kv-unified")):
            found = self._run(streams, prompt, tokens, flag, *(["-pps"] if shared else []))
            figures[f"{layout}_s"] = found["t_pp"] + found["t_tg"]
            figures[f"{layout}_prefill_rate"] = found["speed_pp"]
            figures[f"{layout}_decode_rate"] = found["speed_tg"]
        return {**figures, "factor": figures["unified_s"] / figures["streams_s"]}

    def close(self) -> None:
        pass

    def _run(self, streams: int, prompt: int, tokens: int, *more: str) -> dict[str, float]:
        setting = self.setting
        command = [str(Path(setting.tools) / "llama-batched-bench"), "-m", setting.model]
        command += ["-c", str(setting.n_ctx * streams), "-t", str(setting.threads)]
        # It may end before its log is written, so another short run follows the one that counts.
        command += ["-npp", str(prompt), "-ntg", str(tokens), "-npl", f"{streams},1"]
        command += ["--output-format", "jsonl", *_attention(setting), *more]
        for line in _output(command).splitlines():
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"llama-batched-bench wrote no figures for {streams} streams")


ENGINES: dict[str, Callable[[Setting], Any]] = {
    "tabagent_model": Ours,
    "tabagent_model async": OursAsync,
    "tabagent_model serve": OurServer,
    "llama-bench": LlamaBench,
    "llama-batched-bench": BatchedBench,
    "llama-server": LlamaServer,
    "llama-cpp-python": LlamaCppPython,
    "xllamacpp": Xllamacpp,
}


def in_threads(pairs: Sequence[tuple[Any, Ask]]) -> list[Answer]:
    """Engines that are asked at the same time, each in a thread of its own."""
    answers: dict[int, Answer] = {}

    def run(index: int, engine: Any, ask: Ask) -> None:
        time.sleep(ask.after_s)
        answers[index] = engine.one(ask)

    threads = [threading.Thread(target=run, args=(i, *pair)) for i, pair in enumerate(pairs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[index] for index in range(len(pairs))]


def _our_fields(setting: Setting) -> dict[str, Any]:
    fields = {
        "n_ctx": setting.n_ctx,
        "n_threads": setting.threads,
        "max_parallel": setting.streams,
    }
    return {**fields, **setting.options}


def _our_sampling(ask: Ask) -> dict[str, Any]:
    return {"max_tokens": ask.tokens, "ignore_eos": True, **ask.sampling}


async def _gather(coroutines: Iterator[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    return list(await asyncio.gather(*coroutines))


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise RuntimeError(f"{Path(command[0]).name}: {last}")
    return done.stdout


def _attention(setting: Setting) -> list[str]:
    """The flags of llama.cpp's tools for what we call `flash_attn` and `kv_type`."""
    flags = {"flash_attn": ["-fa"], "kv_type": ["-ctk", "-ctv"]}
    return [
        word
        for name, value in setting.options.items()
        for flag in flags.get(name, [])
        for word in (flag, str(value))
    ]
