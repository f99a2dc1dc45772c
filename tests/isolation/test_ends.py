"""Workers end with their model and with their parent, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tabagent_model import Model, ModelNotLoadedError, errors
from tabagent_model.isolation import spawn
from workers import ANSWER, children, is_alive, num_files, pid_of, until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no workers here")


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
