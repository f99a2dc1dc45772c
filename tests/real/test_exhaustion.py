"""Memory, threads, files and disks that run out: a typed error each, and the next normal request
gives the reference answer. Each case is a program of its own, so that an abort is a failure."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tabagent_model import ContextTooSmallError, Model, OutOfMemoryError, memory
from tabagent_model.placement import _climb

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's"),
]

HEADER = """
import json, os, resource, sys
from contextlib import suppress
from pathlib import Path
from tabagent_model import InternalError, Model, TabAgentModelError
from tabagent_model.isolation import respawn, verdicts

verdicts.CRASHES, respawn.BACKOFF_S = 1000, 0.0
FIELDS = {"n_ctx": 256, "max_parallel": 1, "n_threads": 2, "isolation": sys.argv[1]}

def answer(model):
    return model.generate("Once upon a time", max_tokens=8, temperature=0, ignore_eos=True).text

def tried(work):
    try:
        work()
        return "ok"
    except InternalError as error:
        return str(error)  # nobody expects it
    except TabAgentModelError as error:
        return type(error).__name__

def load():
    with Model.load(**FIELDS) as model:
        assert answer(model) == REFERENCE

def proven(outcome):
    "What came of a try, after which the next one is answered."
    if outcome != "ok":
        load()
    return outcome

def grown(kind, pid, more):
    "Let a process have so many bytes more than it has."
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.prlimit(pid, kind, (limit, resource.RLIM_INFINITY))

def freed(kind, pid):
    with suppress(ProcessLookupError):  # a worker that died of it
        resource.prlimit(pid, kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

with Model.load(**FIELDS) as model:
    REFERENCE = answer(model)
"""
MEMORY = {"OutOfMemoryError", "ContextTooSmallError"}
# What a worker may die of, a program of a user's may not.
BY_ISOLATION = {"none": set(), "process": {"WorkerCrashedError", "BackendError"}}


@pytest.fixture(params=["none", "process"])
def isolation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def run(program: str, *arguments: str, before: tuple[str, ...] = (), **extra: str) -> Any:
        """What a program printed as JSON; it must end well and complain of nothing."""
        ran = subprocess.run(
            [*before, sys.executable, "-c", HEADER + program, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            # A driver has an address space, threads and files of its own, which are not looked at.
            env={
                **os.environ,
                **{"TABAGENT_HOME": str(tmp_path / "home"), "TABAGENT_GPU_BACKEND": "none"},
                **extra,
            },
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        return json.loads(ran.stdout)

    return run


# Memory

# Not with nothing at all: then Python itself can start no thread, and waits for it for ever.
LOADS = """
outcomes = []
for mib in (3, 7, 12, 24, 512):
    grown(resource.RLIMIT_AS, os.getpid(), mib << 20)
    outcome = tried(load)
    freed(resource.RLIMIT_AS, os.getpid())
    outcomes.append(proven(outcome))
print(json.dumps(outcomes))
"""


def test_address_space_that_ends_in_a_load_is_a_typed_error(isolation: str, run: Any):
    """R02"""
    outcomes = run(LOADS, isolation)
    assert outcomes[-1] == "ok"
    assert set(outcomes) <= {"ok", *MEMORY, *BY_ISOLATION[isolation]}
    assert len(set(outcomes)) > 1


CONTEXTS = """
FIELDS |= {"n_ctx": 2048, "max_parallel": 64, "kv_type": "f32"}
grown(resource.RLIMIT_AS, os.getpid(), 300 << 20)
outcome = tried(load)
freed(resource.RLIMIT_AS, os.getpid())
FIELDS |= {"n_ctx": 256, "max_parallel": 1, "kv_type": "auto"}
load()
print(json.dumps(outcome))
"""


def test_address_space_that_ends_in_the_making_of_a_context_is_one(isolation: str, run: Any):
    """C08, R02: the estimate compares with what is free, and knows no such limit."""
    assert run(CONTEXTS, isolation) in MEMORY


# Long prompts fill the slots, and pins the prompt cache.
PREFILLS = """
outcomes = []
for mib in (1, 4):
    fields = {**FIELDS, "n_ctx": 2048, "n_batch": 2048, "max_parallel": 2}
    with Model.load(**fields) as model:
        pid = model.info().get("worker_pid", os.getpid())
        grown(resource.RLIMIT_AS, pid, mib << 20)

        def work():
            for token in (5, 6, 7):
                model.generate([token] * 1900, max_tokens=2)
                model.pin([token] * 1800)

        outcomes.append(tried(work))
        freed(resource.RLIMIT_AS, pid)
        assert answer(model) == REFERENCE
print(json.dumps(outcomes))
"""


def test_address_space_that_ends_in_a_prefill_is_one(isolation: str, run: Any):
    """R02"""
    assert set(run(PREFILLS, isolation)) <= {"ok", *MEMORY, *BY_ISOLATION[isolation]}


class Group:
    """A cgroup of its own within that of these tests."""

    def __init__(self, folder: Path, limits: tuple[str, str]) -> None:
        self.folder = folder
        self.processes = folder / "cgroup.procs"
        self.limit_file = next((folder / name for name in limits if (folder / name).exists()), None)

    def limit(self, value: int) -> None:
        assert self.limit_file is not None
        self.limit_file.write_text(str(value))


@pytest.fixture
def memory_group() -> Iterator[Group]:
    yield from a_group("memory", ("memory.limit_in_bytes", "memory.max"))


@pytest.fixture
def cpu_group() -> Iterator[Group]:
    """Its limit is in microseconds out of 100,000."""
    yield from a_group("cpu", ("cpu.cfs_quota_us", "cpu.max"))


def a_group(kind: str, limits: tuple[str, str]) -> Iterator[Group]:
    """By the names of the limit in version 1 and 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):  # version 2 has one tree, and it has no name
            continue
        folder = Path("/sys/fs/cgroup", kinds, path.lstrip("/"), f"tabagent-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (made := Group(folder, limits)).limit_file is not None:
                yield made
                return
        finally:
            folder.rmdir()
    pytest.skip("no cgroup can be made here")


LIMITED = """
Path(sys.argv[2]).write_text("0")
FIELDS |= {"n_ctx": 2048, "max_parallel": 64, "kv_type": "f32"}
outcome = tried(load)
FIELDS |= {"n_ctx": 256, "max_parallel": 1, "kv_type": "auto"}
load()
Path(sys.argv[2]).parent.parent.joinpath("cgroup.procs").write_text("0")
print(json.dumps(outcome))
"""


def test_a_load_that_does_not_fit_the_cgroup_is_refused_and_nobody_is_killed(
    isolation: str, run: Any, memory_group: Group
):
    """R01"""
    memory_group.limit(250 << 20)
    assert run(LIMITED, isolation, str(memory_group.processes)) == "OutOfMemoryError"


KILLED = """
with Model.load(**{**FIELDS, "n_ctx": 2048}, prompt_cache_mb=512) as model:
    pid = model.info()["worker_pid"]
    Path(sys.argv[2]).write_text(str(pid))
    try:
        for token in range(5, 500):
            model.pin([token] * 1900)
        died = None
    except TabAgentModelError as error:
        died = type(error).__name__, error.signal
    assert answer(model) == REFERENCE
    print(json.dumps([died, model.info()["worker_pid"] != pid]))
"""


def test_a_worker_that_the_system_kills_for_its_memory_is_one_error_and_another_serves(
    run: Any, memory_group: Group
):
    memory_group.limit(8 << 20)
    outcome = run(KILLED, "process", str(memory_group.processes))
    assert outcome == [["WorkerCrashedError", "SIGKILL"], True]


SLOWED = """
from concurrent.futures import ThreadPoolExecutor
from starlette.testclient import TestClient
from tabagent_model.serve import app

Path(sys.argv[2]).write_text("0")
answers = []
with Model.load(**{**FIELDS, "max_parallel": 4}) as model:
    client = TestClient(app(model), base_url="http://localhost")

    def ask(_):
        return tried(lambda: answers.append(answer(model))), client.get("/health").json()

    outcomes = list(ThreadPoolExecutor(4).map(ask, range(4)))
load()
print(json.dumps([outcomes, answers == [REFERENCE] * 4]))
Path(sys.argv[2]).parent.parent.joinpath("cgroup.procs").write_text("0")
"""


def test_a_tenth_of_a_processor_is_slow_and_nobody_is_lost(
    isolation: str, run: Any, cpu_group: Group
):
    """R07"""
    cpu_group.limit(10_000)
    health = {"status": "ok", "slow": "a cgroup allows this process 0.1 of one processor"}
    outcome = run(SLOWED, isolation, str(cpu_group.processes))
    assert outcome == [[["ok", health]] * 4, True]


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("num_failures", range(1, 5))
def test_memory_that_is_refused_n_times_is_had_further_down_the_ladder(
    num_failures: int, monkeypatch: pytest.MonkeyPatch
):
    """R02: each try that failed is a rung that is told, and nothing of it is left."""
    left, make = [num_failures], _climb._context_of

    def failing(*given: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise (OutOfMemoryError, ContextTooSmallError)[left[0] % 2]("no")
        return make(*given)

    monkeypatch.setattr(_climb, "_context_of", failing)
    fields: Any = {"n_ctx": 2048, "max_parallel": 1, "kv_type": "f16", "device": "cpu"}
    with Model.load(n_ctx_min=128, **fields) as model:
        info = model.info()
        assert info["n_ctx"] == 2048 >> num_failures
        assert [line.rpartition(": ")[2] for line in info["failed_rungs"]] == ["no"] * num_failures
    left[0] = 99
    with pytest.raises((OutOfMemoryError, ContextTooSmallError), match="no"):
        Model.load(n_ctx_min=128, **fields)
    assert (memory().models, memory().devices[0].reserved) == ((), 0)
    left[0] = 0
    with Model.load(**fields) as model:
        assert model.info()["failed_rungs"] == []


# One allocation of the engine's that fails: the n-th since a load began, of some 16,000. Python has
# memory of its own, and always gets it.
FAILING_MALLOC = Path(__file__).with_name("failing_malloc.c")
NTH = sorted({round(16_000 ** (step / 24)) for step in range(25)})
ARMED = """
import ctypes

def armed(nth, work):
    preloaded = ctypes.CDLL(None)
    preloaded.arm(ctypes.c_long(int(nth)), ctypes.c_long(1))
    try:
        return work()
    finally:
        preloaded.disarm()
"""


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library for LD_PRELOAD."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    library = tmp_path_factory.mktemp("preloaded") / "failing_malloc.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", library, FAILING_MALLOC, "-ldl"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        pytest.skip(f"no malloc can be preloaded here: {compiled.stderr:.200}")
    return str(library)


# The library is for the worker alone; the one that answers next has none.
WORKERS_WITHOUT_MEMORY = """
from tabagent_model.isolation import spawn

FIELDS |= {"flash_attn": "on", "kv_type": "f16"}  # nothing is measured, so there are as many
healthy, outcomes = spawn._PROGRAM, []
for nth in sys.argv[4:]:
    os.environ |= {"LD_PRELOAD": sys.argv[2], "NTH": nth}
    spawn._PROGRAM = sys.argv[3]
    outcome = tried(load)
    del os.environ["LD_PRELOAD"]
    spawn._PROGRAM = healthy
    outcomes.append(proven(outcome))
print(json.dumps(outcomes))
"""
WORKER_WITHOUT_MEMORY = f"""
import json, os, sys; sys.path[:] = json.loads(sys.argv[1])
from tabagent_model.isolation import worker
from tabagent_model._loading import load_here
{ARMED}
def load(config, progress):
    return armed(os.environ["NTH"], lambda: load_here(config, progress))

worker.main(sys.argv[2:], load)
"""


def test_an_allocation_that_fails_in_the_load_of_a_worker_is_a_typed_error(
    failing_malloc: str, run: Any
):
    """R02: ggml ends the worker at a few of them, and none ends the program."""
    nths = [str(nth) for nth in NTH]
    outcomes = run(WORKERS_WITHOUT_MEMORY, "process", failing_malloc, WORKER_WITHOUT_MEMORY, *nths)
    assert len(outcomes) == len(NTH)
    assert set(outcomes) <= {"ok", *MEMORY, *BY_ISOLATION["process"]}
    assert set(outcomes) & MEMORY


LOADS_WITHOUT_MEMORY = """
FIELDS |= {"flash_attn": "on", "kv_type": "f16"}
for nth in sys.argv[2:]:
    print(json.dumps(proven(tried(lambda: armed(nth, load)))), flush=True)
"""


def test_an_allocation_that_fails_in_a_load_here_is_a_typed_error_unless_it_is_ggmls_own(
    failing_malloc: str, tmp_path: Path
):
    """R02: and nobody is told that the file is damaged."""
    program = HEADER + ARMED + LOADS_WITHOUT_MEMORY
    outcomes: list[str] = []
    while left := NTH[len(outcomes) :]:
        ran = subprocess.run(
            [sys.executable, "-c", program, "none", *map(str, left)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={
                **os.environ,
                "TABAGENT_HOME": str(tmp_path / "home"),
                "TABAGENT_GPU_BACKEND": "none",
                "LD_PRELOAD": failing_malloc,
            },
        )
        outcomes += map(json.loads, ran.stdout.splitlines())
        if ran.returncode:
            assert ran.returncode == -signal.SIGABRT
            assert re.search(r"ggml\.c:\d+: ", ran.stderr)
            outcomes.append("abort")
    assert set(outcomes) <= {"ok", *MEMORY, "BackendError", "abort"}
    assert {"ok"} < set(outcomes) & {"ok", *MEMORY}
    assert outcomes.count("abort") <= 1


# Files and threads

FILES = """
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
outcomes, before = [], len(os.listdir("/proc/self/fd"))
for num_left in range(8):
    taken = []
    while len(taken) < 64:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break
    for descriptor in taken[:num_left]:
        os.close(descriptor)
    outcome = tried(load)
    for descriptor in taken[num_left:]:
        os.close(descriptor)
    outcomes.append(proven(outcome))
assert len(os.listdir("/proc/self/fd")) == before
print(json.dumps(outcomes))
"""


def test_a_load_without_a_file_descriptor_is_a_typed_error_and_leaves_none(
    isolation: str, run: Any
):
    """R05"""
    outcomes = run(FILES, isolation)
    assert (outcomes[0], outcomes[-1]) == ("UnreadableModelError", "ok")
    assert set(outcomes) <= {"ok", "UnreadableModelError", *BY_ISOLATION[isolation]}


# The limit is for a user's threads, and never holds for root: so this is another user from here
# on, who may read what root may.
THREADS = """
import ctypes

def become_somebody():
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(), (ctypes.c_uint32 * 6)()
    header[0] = 0x20080522
    os.setresuid(54321, 0, 0)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << 21 | 1 << 24)  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
    assert libc.capset(header, sets) == 0

def num_threads():
    return len(os.listdir("/proc/self/task"))

_, hard = resource.getrlimit(resource.RLIMIT_NPROC)
if os.geteuid() == 0:
    become_somebody()
    limits = range(num_threads(), num_threads() + 30, 5 if sys.argv[1] == "process" else 1)
else:
    limits = [1]
outcomes = []
for limit in limits:
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, hard))
    outcome = tried(load)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    outcomes.append(proven(outcome))
print(json.dumps(outcomes))
"""


def test_a_load_without_a_thread_is_a_typed_error(isolation: str, run: Any):
    """R05: ggml would end the process when it gets none."""
    outcomes = run(THREADS, isolation)
    assert outcomes[0] == "OutOfMemoryError"
    assert set(outcomes) <= {"ok", "OutOfMemoryError", *BY_ISOLATION[isolation]}


# Disks

DISK = """
import errno
from tabagent_model import ModelManager
from tabagent_model.params import BUNDLED_MODEL

LAST = "What is the capital of Italy?"

def asked(session):
    for of in ("France", "Spain"):
        session.send(f"What is the capital of {of}?")
    return session

folder, outcomes = Path(sys.argv[2]), []
fields = {**FIELDS, "n_ctx": 1024, "max_parallel": 2}
few = {"temperature": 0, "max_tokens": 16}
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
with Model.load(**fields) as model:
    expected = asked(model.session(**few)).send(LAST).text
    session = asked(model.session(**few))
    (folder / "saved").write_bytes(b"as it was")
    try:
        session.save(folder / "saved")
    except OSError as error:
        outcomes.append([errno.errorcode[error.errno], error.filename == str(folder / "saved")])
    outcomes.append((folder / "saved").read_bytes().decode())
    outcomes.append([path.name for path in folder.glob("*saved*")])
    assert session.send(LAST).text == expected
with ModelManager(max_loaded=1, snapshots="disk") as models:
    models.register_model("chat", **fields)
    models.register_model("other", BUNDLED_MODEL.with_name("tiny-draft.gguf"), **fields)
    session = asked(models.load_model("chat").session(**few))
    models.swap("other")
    models.swap("chat")
    answer = session.send(LAST)
    assert answer.text == expected
    outcomes.append(answer.usage.cached_tokens)
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("disk", ["limit", "full"])
def test_a_full_disk_keeps_nothing_and_serving_goes_on(
    disk: str, isolation: str, run: Any, tmp_path: Path
):
    """R06: a session that is saved, states that are kept over a swap, what is remembered of this
    machine."""
    folder, before, code = tmp_path / "disk", (), "EFBIG"
    folder.mkdir()
    if disk == "full":
        before, code = _with_a_small_disk(folder), "ENOSPC"
    found = run(
        DISK,
        isolation,
        str(folder),
        disk,
        before=before,
        TMPDIR=str(folder),
        TABAGENT_HOME=str(folder),
    )
    assert found == [[code, True], "as it was", ["saved"], 0]


def _with_a_small_disk(folder: Path) -> tuple[str, ...]:
    """What starts a program that has one there, and nobody else."""
    mount = f"mount -t tmpfs -o size=32k tabagent '{folder}'"
    before = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*before, "true"], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    return before


@pytest.mark.parametrize("number", range(4))
def test_a_session_that_cannot_be_written_leaves_the_file_as_it_was(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Model
):
    """Each call that writes fails once."""
    session, path = tiny_model.session(temperature=0, max_tokens=4), tmp_path / "saved"
    session.send("Hello")
    session.save(path)
    before = path.read_bytes()
    session.send("And now?")

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    places: list[tuple[Any, str]] = [(Path, "open"), (os, "fsync"), (Path, "replace")]
    if number < len(places):
        with monkeypatch.context() as broken:
            broken.setattr(*places[number], failing)
            with pytest.raises(OSError, match="Input/output error") as caught:
                session.save(path)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before
    else:
        session.save(path)
        assert path.read_bytes() != before
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]
    assert tiny_model.load_session(path).history
