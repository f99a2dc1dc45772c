"""The end of a program, forks, and what it prints: with the real core, in child processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.model

# How often each way out is taken; the long checks raise it to 100.
RUNS = int(os.environ.get("TABAGENT_LIFE_RUNS", "2"))

PREPARE = """
import asyncio, atexit, gc, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from tabagent_model import AsyncModel, ForkedProcessError, Model, ModelNotLoadedError

LONG = dict(max_tokens=-1, ignore_eos=True)

# One thread: on a busy machine llama.cpp's threads wait for each other, and the clock with them.
ONE = dict(n_threads=1)

def busy(model):
    "More than can end before the program does."
    streams = [model.stream("Once upon a time", **LONG) for _ in range(200)]
    next(streams[0])
    return streams

def leaving():
    "The last thing a program says, for the clock."
    print(time.time(), flush=True)

def slowly(fraction):
    "For `on_progress`."
    if fraction == 0:
        leaving()
    time.sleep(0.1)

async def read(model):
    async for _ in model.stream("Once upon a time", **LONG):
        pass
"""

# What happens, the exit code, and the last line of stderr.
WAYS: dict[str, tuple[str, int, str]] = {
    "a loaded model": ("model = Model.load(**ONE); leaving()", 0, ""),
    "an unloaded model": ("model = Model.load(**ONE); model.unload(); leaving()", 0, ""),
    "an answered model": (
        "model = Model.load(**ONE); model.generate('a', max_tokens=2); leaving()",
        0,
        "",
    ),
    "running streams": ("model = Model.load(**ONE); streams = busy(model); leaving()", 0, ""),
    "running streams and an exit code": (
        "model = Model.load(**ONE); streams = busy(model); leaving(); sys.exit(3)",
        3,
        "",
    ),
    "an exception between pieces": (
        "model = Model.load(**ONE); streams = busy(model); leaving(); 1 / 0",
        1,
        "ZeroDivisionError: division by zero",
    ),
    "sys.exit in a callback": (
        """
        def stop(piece):
            leaving()
            sys.exit(4)
        Model.load(**ONE).generate("a", on_token=stop, **LONG)
        """,
        4,
        "",
    ),
    "os._exit in the middle": (
        "model = Model.load(**ONE); streams = busy(model); leaving(); os._exit(5)",
        5,
        "",
    ),
    "a daemon thread that reads": (
        """
        model = Model.load(**ONE)
        started = threading.Event()
        def read_all():
            for stream in busy(model):
                started.set()
                for _ in stream: pass
        threading.Thread(target=read_all, daemon=True).start()
        started.wait()
        leaving()
        """,
        0,
        "",
    ),
    "a daemon thread with a running loop": (
        """
        model = asyncio.run(AsyncModel.load(**ONE))
        async def read_all():
            tasks = [asyncio.ensure_future(read(model)) for _ in range(100)]
            await asyncio.sleep(0.05)
            started.set()
            await asyncio.gather(*tasks)
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(read_all()), daemon=True).start()
        started.wait()
        leaving()
        """,
        0,
        "",
    ),
    "an executor that nobody joined": (
        """
        model = Model.load(**ONE)
        pool = ThreadPoolExecutor(4)
        answers = [pool.submit(model.generate, "a", max_tokens=5) for _ in range(8)]
        leaving()
        """,
        0,
        "",
    ),
    "tasks that asyncio.run cancels": (
        """
        async def main():
            model = await AsyncModel.load(**ONE)
            tasks = [asyncio.ensure_future(read(model)) for _ in range(100)]
            await asyncio.sleep(0.05)
            leaving()
        asyncio.run(main())
        """,
        0,
        "",
    ),
    "SystemExit in a task": (
        """
        async def main():
            model = await AsyncModel.load(**ONE)
            async with model.stream("a", **LONG) as pieces:
                async for _ in pieces:
                    leaving()
                    sys.exit(6)
        asyncio.run(main())
        """,
        6,
        "",
    ),
    "a loop that was stopped, not closed": (
        """
        loop = asyncio.new_event_loop()
        model = loop.run_until_complete(AsyncModel.load(**ONE))
        stream = model.stream("a", **LONG)
        loop.run_until_complete(stream.__anext__())
        leaving()
        """,
        0,
        "",
    ),
    "a reference cycle": (
        """
        class Holder: pass
        holder = Holder()
        holder.model, holder.self = Model.load(**ONE), holder
        holder.streams = busy(holder.model)
        leaving()
        """,
        0,
        "",
    ),
    "use in __del__ and at exit": (
        """
        class Last:
            def __del__(self):
                try: model.generate("a", max_tokens=1)
                except ModelNotLoadedError: pass
        last, model = Last(), Model.load(**ONE)
        atexit.register(lambda: model.generate("a", max_tokens=1))
        atexit.register(gc.collect)
        leaving()
        """,
        0,
        "",
    ),
    "an async load that has not ended": (
        """
        began = threading.Event()
        def slowly(fraction):
            began.set()
            time.sleep(0.05)
        async def load():
            await AsyncModel.load(on_progress=slowly)
        threading.Thread(target=lambda: asyncio.run(load()), daemon=True).start()
        began.wait()
        leaving()
        """,
        0,
        "",
    ),
    "a load that has not ended": (
        """
        began = threading.Event()
        def slowly(fraction):
            began.set()
            time.sleep(0.05)
        threading.Thread(target=Model.load, kwargs=dict(on_progress=slowly), daemon=True).start()
        began.wait()
        leaving()
        """,
        0,
        "",
    ),
}


def run(program: str, *, send: int | None = None) -> tuple[int, str, str, float]:
    """A child's exit code, stdout, last line of stderr, and the seconds since its last word."""
    program = PREPARE + textwrap.dedent(program)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            printed = ""
            if send is not None:
                assert child.stdout is not None
                printed = child.stdout.readline()
                child.send_signal(send)
            rest, complaints = child.communicate(timeout=30)
            ended = time.time()
        finally:
            child.kill()
    printed += rest
    said, _, word = printed.rstrip("\n").rpartition("\n")
    seconds = ended - float(word) if word else 0.0
    lines = complaints.strip().splitlines()
    assert len(lines) < 2 or lines[0].startswith("Traceback"), complaints
    return child.returncode, said, lines[-1] if lines else "", seconds


@pytest.mark.parametrize("turn", range(RUNS))
@pytest.mark.parametrize("way", WAYS)
def test_a_program_ends_with_its_code_soon_and_quietly(way: str, turn: int):
    program, code, complaint = WAYS[way]
    ended, said, complained, seconds = run(program)
    assert (ended, said, complained) == (code, "", complaint)
    assert seconds < 2


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_program_as_usual(number: signal.Signals):
    program = "model = Model.load(**ONE); streams = busy(model); leaving(); time.sleep(20)"
    code, _, complaint, seconds = run(program, send=number)
    assert code == -number
    assert complaint == ("KeyboardInterrupt" if number == signal.SIGINT else "")
    assert seconds < 2


INTERRUPTED = """
try:
    {use}
except KeyboardInterrupt:
    interrupted = time.time()
    assert Model.load(**ONE).generate("a", max_tokens=2, ignore_eos=True).tokens
    print(f"came back\\n{{interrupted}}")
    leaving()
"""


@pytest.mark.parametrize(
    "use",
    [
        "model = Model.load(**ONE); leaving(); model.generate(['a'] * 500, **LONG)",
        "model = Model.load(**ONE); leaving(); [model.generate('a', **LONG) for _ in range(1000)]",
        "Model.load(**ONE, on_progress=slowly)",
        "asyncio.run(AsyncModel.load(**ONE, on_progress=slowly))",
    ],
    ids=["batch", "one by one", "load", "async load"],
)
def test_ctrl_c_comes_back_within_a_second(use: str):
    code, said, complaint, _ = run(INTERRUPTED.format(use=use), send=signal.SIGINT)
    last_word, *_, came_back, interrupted = said.splitlines()
    assert (code, complaint, came_back) == (0, "", "came back")
    assert float(interrupted) - float(last_word) < 1


FORK = """
import warnings
warnings.simplefilter("ignore")  # Python itself warns of a fork beside threads
model = Model.load(**ONE)
streams = busy(model)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("way_out", ["sys.exit(0)", "os._exit(0)", "gc.collect()", "del model"])
def test_a_forked_child_gets_an_error_and_the_parent_serves_on(way_out: str):
    program = f"""
{FORK}
if (child := os.fork()) == 0:
    refusals = 0
    for use in (
        lambda: model.generate("a"),
        lambda: model.tokenize("a"),
        lambda: next(streams[0]),
        lambda: model.metrics(),
        lambda: model.unload(),
    ):
        try: use()
        except ForkedProcessError: refusals += 1
    if refusals != 5: os._exit(9)
    streams.clear()
    {way_out}
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert next(streams[1])
for stream in streams: stream.close()
assert len(model.generate("a", max_tokens=3, ignore_eos=True).tokens) == 3
leaving()
"""
    assert run(program)[:3] == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_that_loaded_nothing_before_may_load():
    program = """
import warnings
warnings.simplefilter("ignore")
if (child := os.fork()) == 0:
    print(len(Model.load(**ONE).generate("a", max_tokens=3, ignore_eos=True).tokens), flush=True)
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert Model.load(**ONE).generate("a", max_tokens=3, ignore_eos=True).tokens
leaving()
"""
    assert run(program)[:3] == (0, "3", "")


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path):
    if method != "spawn" and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(f"""
            import multiprocessing, warnings
            from tabagent_model import ForkedProcessError, GenerationConfig, Model, ModelConfig

            model = None

            def work(config, generation):
                "A new process may load; a forked one cannot use what its parent loaded."
                try:
                    return len((model or Model.load(config)).generate("a", generation).tokens)
                except ForkedProcessError:
                    return "forked"

            if __name__ == "__main__":
                warnings.simplefilter("ignore")
                model = Model.load()
                generation = GenerationConfig(max_tokens=3, ignore_eos=True)
                with multiprocessing.get_context("{method}").Pool(2) as pool:
                    print(pool.starmap(work, [(ModelConfig(n_ctx=64), generation)] * 4))
                print(len(model.generate("a", generation).tokens))
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    answers = ["forked"] * 4 if method == "fork" else [3] * 4
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{answers}\n3\n")


def test_nothing_is_printed_by_import_load_and_exit():
    program = """
        from tabagent_model import Model, get_cpu_variant
        get_cpu_variant()
        model = Model.load(n_ctx=100_000)  # more than the model was trained with: a warning
        model.generate("a", max_tokens=5)
        try: Model.load("/nowhere/m.gguf")
        except FileNotFoundError: pass
        model.unload()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_llama_cpp_talks_to_the_logger():
    program = """
        import logging, time
        from tabagent_model import Model

        class Keep(logging.Handler):
            def emit(self, record):
                lines.append(record)
                Model.load  # a handler may use the package
                raise ZeroDivisionError  # and may fail

        lines = []
        logging.getLogger("tabagent_model.llama").addHandler(Keep())
        logging.getLogger("tabagent_model").setLevel("DEBUG")
        for _ in range(2):
            before = len(lines)
            with Model.load():
                pass
            until = time.monotonic() + 10
            while len(lines) < before + 5 and time.monotonic() < until:
                time.sleep(0.01)
        print(len(lines) > 10, {record.name for record in lines})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", "True {'tabagent_model.llama'}\n")
