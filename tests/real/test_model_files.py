"""Model files that are damaged, foreign or odd: faults F01 to F26 of the catalogue.

The cases of one fault run in one child process, so that an abort is a failed test with a name and
not the end of the run. After each case the child loads the sound tiny model, and must get the
reference answer with as many open files as before.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gguf_files import Value, array, flag, i32, split_gguf, string, tiny_gguf, u16, u32

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

DEADLINE_S = 10.0
FORMAT, CORRUPTED, UNSUPPORTED = (
    "InvalidFormatError",
    "ModelCorruptedError",
    "UnsupportedModelError",
)
NOT_FOUND, UNREADABLE = "ModelNotFoundError", "UnreadableModelError"
REFUSED = "InvalidRequestError"
SOUND = "sound"


@dataclass(frozen=True)
class Case:
    """`make` writes the file into an empty folder and gives its path.

    `says` are words of the message.
    `then` is what is done with a model that loads: nothing, or prompts to generate from, each with
    the class of the error that it must give, or None.
    """

    name: str
    make: Callable[[Path], Any]
    error: str
    says: tuple[str, ...] = ()
    then: tuple[tuple[Any, str | None], ...] = ()
    as_nobody: bool = False
    with_broken_disk: bool = False


def tiny(**fields: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_gguf(folder / "model.gguf", **fields)


def with_keys(**keys: Any) -> Callable[[Path], Path]:
    """`with_keys(block_count=u32(3))` is about `llama.block_count`; two underscores are a dot."""
    return tiny(keys={f"llama.{name.replace('__', '.')}": value for name, value in keys.items()})


def with_token_keys(vocabulary: str = "bpe", **keys: Any) -> Callable[[Path], Path]:
    keys = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return tiny(vocabulary=vocabulary, keys=keys)


def content(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(data)
        return path

    return make


def edited(edit: Callable[[bytes], bytes], **fields: Any) -> Callable[[Path], Path]:
    return tiny(edit=edit, **fields)


def raw(number: int, data: bytes) -> Value:
    return Value("raw", (number, data))


def _link(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _unreadable(folder: Path) -> Path:
    path = tiny_gguf(folder / "model.gguf")
    path.chmod(0)
    return path


def _shards(change: Callable[[list[Path]], Path | None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        paths = split_gguf(folder)
        return change(paths) or paths[0]

    return make


def _swap(paths: list[Path]) -> None:
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)


def _of_another_model(number: int) -> Callable[[list[Path]], None]:
    """The second shard becomes one of a model in three, which says that it is the second of two."""

    def change(paths: list[Path]) -> None:
        data = split_gguf(paths[0].parent, "other", n_shards=3)[number].read_bytes()
        for key, value in (("split.no", 1), ("split.count", 2)):
            place = data.index(key.encode()) + len(key) + 4
            data = data[:place] + struct.pack("<H", value) + data[place + 2 :]
        paths[1].write_bytes(data)

    return change


def _truncated(percent: int) -> Callable[[Path], Path]:
    return edited(lambda data: data[: len(data) * percent // 100])


def _without_bytes(folder: Path) -> Path:
    from gguf_files import tiny_llama

    tokens = tiny_llama("spm").keys["tokenizer.ggml.tokens"].value
    tokens = [token.replace("<0x", "<1x") for token in tokens]
    keys = {"tokenizer.ggml.tokens": array("string", tokens)}
    return tiny_gguf(folder / "model.gguf", vocabulary="spm", keys=keys)


def _token_twice(folder: Path) -> Path:
    from gguf_files import tiny_llama

    tokens = list(tiny_llama().keys["tokenizer.ggml.tokens"].value)
    tokens[290] = tokens[270]
    return tiny_gguf(folder / "model.gguf", keys={"tokenizer.ggml.tokens": tokens})


def _fewer_tokens(folder: Path) -> Path:
    from gguf_files import tiny_llama

    keys = tiny_llama().keys
    tokens = keys["tokenizer.ggml.tokens"].value[1:]
    types = keys["tokenizer.ggml.token_type"].value[1:]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    changes |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    return tiny_gguf(folder / "model.gguf", keys=changes)


QUERY = "blk.0.attn_q.weight"
SAFETENSORS = struct.pack("<Q", 16) + b'{"a":{"x":"yyy"}}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4368439584\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"

CASES: dict[str, list[Case]] = {
    "F01": [
        Case("absent", lambda folder: folder / "absent.gguf", NOT_FOUND, ("absent.gguf",)),
        Case("empty path", lambda folder: "", NOT_FOUND),
        Case("directory", lambda folder: folder, FORMAT, ("a directory",)),
        Case("pipe", _pipe, FORMAT, ("a named pipe",)),
        Case("device", lambda folder: "/dev/zero", FORMAT, ("/dev/zero", "a device")),
    ],
    "F02": [
        Case("0 bytes", content(b""), FORMAT, ("empty",)),
        Case("1 byte", content(b"G"), FORMAT, ("only 1 bytes",)),
        Case("3 bytes", content(b"GGU"), FORMAT, ("only 3 bytes",)),
        Case("4 bytes", content(b"GGUF"), CORRUPTED, ("ends at byte 4",)),
        Case("23 bytes", edited(lambda data: data[:23]), CORRUPTED, ("ends at byte 23",)),
        Case("GGML", content(b"GGML" + bytes(60)), FORMAT, ("old GGML format",)),
        Case("ggjt", content(b"tjgg" + bytes(60)), FORMAT, ("old GGJT format",)),
        Case("safetensors", content(SAFETENSORS), FORMAT, ("safetensors",)),
        Case("HTML", content(HTML), FORMAT, ("HTML",)),
        Case("git-LFS", content(LFS), FORMAT, ("git-LFS", "4368439584", "git lfs pull")),
        Case("JSON", content(b'{"error": "no such model"}'), FORMAT, ("JSON",)),
        Case("zip", content(b"PK\x03\x04" + bytes(60)), FORMAT, ("PyTorch",)),
    ],
    "F03": [
        *(
            Case(f"version {number}", tiny(version=number), UNSUPPORTED, (f"version is {number}",))
            for number in (0, 1, 4, 2**32 - 1)
        ),
        Case("big-endian", tiny(big_endian=True), UNSUPPORTED, ("version 3", "byte order")),
    ],
    "F04": [
        Case(
            f"{field} {number}",
            edited(lambda data: data[:1024], **{field: number}),
            CORRUPTED,
            (f"claims {number} {field[2:]}", "1024 bytes"),
        )
        for field in ("n_keys", "n_tensors")
        for number in (10**9, 2**63, 2**64 - 1)
    ],
    "F05": [
        Case(
            "key of 2^64-1 bytes",
            edited(lambda data: data[:24] + b"\xff" * 8 + data[32:]),
            CORRUPTED,
            ("name of key 0 at byte 24", "18446744073709551615"),
        ),
        Case(
            "string past the end",
            tiny(keys={"x": raw(8, struct.pack("<Q", 2**29))}),
            CORRUPTED,
            ("value of key `x`", "536870912"),
        ),
        Case("empty key", tiny(keys={"": u32(1)}), CORRUPTED, ("name of key", "is empty")),
    ],
    "F06": [
        Case(
            "array of arrays",
            tiny(keys={"x": raw(9, struct.pack("<IQ", 9, 1))}),
            CORRUPTED,
            ("`x`", "array of arrays"),
        ),
        Case(
            "array size overflow",
            tiny(keys={"x": raw(9, struct.pack("<IQ", 10, 2**61))}),
            CORRUPTED,
            ("`x`", "2305843009213693952"),
        ),
        Case(
            "array type 99",
            tiny(keys={"x": raw(9, struct.pack("<IQ", 99, 1))}),
            CORRUPTED,
            ("`x`", "type 99"),
        ),
        Case("type 99", tiny(keys={"x": raw(99, b"")}), CORRUPTED, ("`x`", "type 99")),
    ],
    "F07": [
        Case(f"{percent} %", _truncated(percent), FORMAT if percent == 0 else CORRUPTED, ())
        for percent in range(100)
    ],
    "F08": [
        *(
            Case(
                f"offset {offset}",
                tiny(tensors={QUERY: {"offset": offset}}),
                CORRUPTED,
                (QUERY, f"offset {offset}"),
            )
            for offset in (1, 0, 2**40, 2**64 - 1)
        ),
        Case(
            "sizes beyond 64 bit",
            tiny(tensors={name: {"shape": [2**31, 2**30]} for name in (QUERY, "output.weight")}),
            CORRUPTED,
            ("`output.weight`",),
        ),
    ],
    "F09": [
        Case("dimension 0", tiny(tensors={QUERY: {"shape": [32, 0]}}), CORRUPTED, (QUERY, "is 0,")),
        Case("no dimension", tiny(tensors={QUERY: {"shape": []}}), CORRUPTED, ()),
        Case(
            "dimension -32", tiny(tensors={QUERY: {"shape": [32, -32]}}), CORRUPTED, (QUERY, "-32")
        ),
        Case(
            "5 dimensions",
            tiny(tensors={QUERY: {"shape": [32, 32, 1, 1, 1]}}),
            CORRUPTED,
            (QUERY, "5 dimensions"),
        ),
        Case(
            "overflow", tiny(tensors={QUERY: {"shape": [2**32] * 4}}), CORRUPTED, (QUERY, "64 bits")
        ),
        Case("no whole block", tiny(tensors={QUERY: {"type": 12}}), CORRUPTED, (QUERY, "256")),
        *(
            Case(
                f"type {kind}",
                tiny(tensors={QUERY: {"type": kind}}),
                CORRUPTED,
                (QUERY, f"type {kind}"),
            )
            for kind in (999, 4, 5, 31, 32, 33)
        ),
    ],
    "F10": [
        Case("tensor twice", tiny(repeated=[QUERY]), CORRUPTED, (QUERY, "twice")),
        Case("key twice", tiny(repeated=["general.name"]), CORRUPTED, ("general.name", "twice")),
        Case("long name", tiny(tensors={QUERY: {"name": "x" * 64}}), CORRUPTED, ("64 bytes", "63")),
    ],
    "F11": [
        Case("embedding 33", with_keys(embedding_length=33), CORRUPTED, ("embedding_length", "33")),
        Case(
            "embedding 64",
            with_keys(embedding_length=64, rope__dimension_count=32),
            CORRUPTED,
            ("token_embd.weight", "32", "64"),
        ),
        Case("feed forward 65", with_keys(feed_forward_length=65), CORRUPTED, ("ffn_gate", "65")),
        Case(
            "file smaller than its tensors",
            edited(lambda data: data[:-4096]),
            CORRUPTED,
            ("blk.1.ffn_down.weight", "the file ends at byte"),
        ),
    ],
    "F12": [
        Case(
            f"alignment {number}",
            tiny(keys={"general.alignment": number}),
            CORRUPTED,
            ("general.alignment", f"is {number},", "power of two"),
        )
        for number in (0, 1, 3, 2**31)
    ],
    "F13": [
        Case("0 layers", with_keys(block_count=0), CORRUPTED, ("block_count", "is 0", "1 to 512")),
        Case("3 layers", with_keys(block_count=3), CORRUPTED, ("blk.2.", "missing")),
        Case("1 layer", with_keys(block_count=1), CORRUPTED, ("blk.1.", "block_count", "is 1")),
        Case("513 layers", with_keys(block_count=513), CORRUPTED, ("is 513", "1 to 512")),
        Case("i32", with_keys(block_count=i32(2)), CORRUPTED, ("block_count", "u32", "i32")),
        Case("string", with_keys(block_count=string("2")), CORRUPTED, ("block_count", "string")),
    ],
    "F14": [
        Case("no heads", with_keys(attention__head_count=0), CORRUPTED, ("head_count", "is 0")),
        Case(
            "4 key heads", with_keys(attention__head_count_kv=4), CORRUPTED, ("head_count_kv", "4")
        ),
        Case("3 heads", with_keys(attention__head_count=3), CORRUPTED, ("32", "3 heads")),
        Case("odd rope", with_keys(rope__dimension_count=15), CORRUPTED, ("dimension_count", "15")),
        Case(
            "long rope", with_keys(rope__dimension_count=18), CORRUPTED, ("dimension_count", "18")
        ),
        Case(
            "5 experts of 4",
            with_keys(expert_count=u32(4), expert_used_count=u32(5)),
            CORRUPTED,
            ("expert_used_count", "5", "1 to 4"),
        ),
        Case(
            "epsilon NaN",
            with_keys(attention__layer_norm_rms_epsilon=float("nan")),
            CORRUPTED,
            ("layer_norm_rms_epsilon", "NaN"),
        ),
        Case("base 0", with_keys(rope__freq_base=0.0), CORRUPTED, ("freq_base", "above 0")),
        Case(
            "other value heads",
            with_keys(attention__value_length=u32(8)),
            CORRUPTED,
            ("value_length",),
        ),
    ],
    "F15": [
        Case("unknown", tiny(keys={"general.architecture": "flux"}), UNSUPPORTED, ("`flux`",)),
        Case("clip", tiny(keys={"general.architecture": "clip"}), UNSUPPORTED, ("mmproj",)),
        Case(
            "lora",
            tiny(keys={"general.type": string("adapter"), "adapter.type": string("lora")}),
            UNSUPPORTED,
            ("adapter", "`lora`"),
        ),
        Case("no tensors", edited(lambda data: data, n_tensors=0), UNSUPPORTED, ("no weights",)),
        Case("draft head", tiny(keys={"general.architecture": "eagle3"}), UNSUPPORTED, ("draft",)),
    ],
    "F16": [
        Case(
            "rope scaling", with_keys(rope__scaling__type=string("bogus")), CORRUPTED, ("`bogus`",)
        ),
        Case(
            "pooling 77",
            with_keys(pooling_type=u32(77)),
            CORRUPTED,
            ("pooling_type", "77", "0 to 4"),
        ),
    ],
    "F17": [Case("token twice", _token_twice, CORRUPTED, ("twice", "270", "290"))],
    "F18": [
        Case(
            "no tokenizer",
            tiny(vocabulary="none"),
            SOUND,
            then=(("hello", "TokenizationError"), ([5, 6, 7], None)),
        ),
    ],
    "F19": [Case("no byte tokens", _without_bytes, CORRUPTED, ("232 of the 256 bytes", "<0x00>"))],
    "F20": [
        *(
            Case(
                f"{name} {number}",
                with_token_keys(**{f"{name}_token_id": number}),
                CORRUPTED,
                (f"{name}_token_id", str(number), "0 to 299"),
            )
            for name in ("bos", "eos")
            for number in (300, 2**32 - 1)
        ),
        Case(
            "sentence pieces, bos out of range",
            with_token_keys("spm", bos_token_id=295),
            CORRUPTED,
            ("bos_token_id", "295"),
        ),
        Case(
            "unigrams add a bos that is not there",
            with_token_keys("ugm", add_bos_token=flag(True)),
            CORRUPTED,
            ("begin-of-text", "bos_token_id"),
        ),
    ],
    "F21": [
        Case(
            "fewer tokens than rows", _fewer_tokens, CORRUPTED, ("token_embd.weight", "300", "299")
        ),
        Case(
            "fewer scores",
            with_token_keys("spm", scores=[0.0] * 294),
            CORRUPTED,
            ("scores", "294", "295"),
        ),
        Case(
            "fewer types", with_token_keys(token_type=[1] * 299), CORRUPTED, ("token_type", "299")
        ),
    ],
    # Nobody renders a template while loading, so the worst of them harms no raw completion.
    "F22": [
        Case(
            name,
            tiny(keys={"tokenizer.chat_template": string(template)}),
            SOUND,
            then=(("hello", None),),
        )
        for name, template in {
            "syntax error": "{% for message in %}{{",
            "endless range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
            "macro calling itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "large output": "{{ 'x' * 100000000 }}",
            "attribute access": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "not UTF-8": b"\xff\xfe",
        }.items()
    ],
    "F23": [
        Case("NaN", tiny(weights="nan"), SOUND, then=(("the cat", "InternalError"),)),
        Case("infinite", tiny(weights="inf"), SOUND, then=(("the cat", "InternalError"),)),
        Case("zero output", tiny(weights="zero output"), SOUND, then=(("the cat", None),)),
    ],
    "F24": [
        Case("no permission", _unreadable, UNREADABLE, ("ermission",), as_nobody=True),
        Case("read error", tiny(), UNREADABLE, ("nput/output",), with_broken_disk=True),
    ],
    "F25": [
        Case("sound", _shards(lambda paths: None), SOUND, then=(("the cat", None),)),
        Case(
            "missing",
            _shards(lambda paths: paths[1].unlink()),
            CORRUPTED,
            ("00002-of-00002", "missing"),
        ),
        Case(
            "second", _shards(lambda paths: paths[1]), CORRUPTED, ("shard 2 of 2", "00001-of-00002")
        ),
        Case("wrong order", _shards(_swap), CORRUPTED, ("shard 2 of 2",)),
        Case(
            "another model",
            _shards(_of_another_model(2)),
            CORRUPTED,
            ("split.tensors.count", "21", "another model"),
        ),
        Case(
            "tensors of the first",
            _shards(_of_another_model(1)),
            CORRUPTED,
            ("00002-of-00002", "another shard"),
        ),
        Case(
            "truncated",
            _shards(lambda paths: os.truncate(paths[1], 50_000)),
            CORRUPTED,
            ("00002-of-00002", "50000"),
        ),
        Case(
            "number as u32",
            tiny(keys={"split.count": u16(2), "split.no": u32(0)}),
            CORRUPTED,
            ("split.no", "u16"),
        ),
    ],
    "F26": [
        Case("NUL", lambda folder: f"{tiny()(folder)}\0.gguf", NOT_FOUND),
        Case("newline", lambda folder: tiny_gguf(folder / "a\nb.gguf"), SOUND),
        Case("5,000 characters", lambda folder: folder / ("x" * 5_000), UNREADABLE),
        Case("not UTF-8", lambda folder: tiny_gguf(folder / os.fsdecode(b"\xff.gguf")), REFUSED),
        Case("unknown home", lambda folder: "~nobody-at-all/model.gguf", NOT_FOUND),
        Case("symlink loop", _link, UNREADABLE, ("loop",)),
    ],
}


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        pytest.param(fault, case, id=f"{fault}-{case.name}")
        for fault, cases in CASES.items()
        for case in cases
    ],
)
def test_a_model_file(fault: str, case: Case, results: Callable[[str], dict[str, Any]]) -> None:
    if case.with_broken_disk and not shutil.which("cc"):
        pytest.skip("needs a C compiler to make reads fail")
    result = results(fault)[case.name]
    assert "died" not in result, result["died"]
    assert result["after"] == result["reference"], "the sound model gave another answer afterwards"
    assert result["left_open"] == 0, "files stayed open"
    if case.error == SOUND:
        assert (result["class"], result["told"]) == (SOUND, "")
        assert result["then"] == [error or SOUND for _, error in case.then]
    else:
        assert result["class"] == case.error, result["told"]
        assert result["is_ours"], f"a foreign exception: {result['told']}"
        assert [word for word in case.says if word not in result["told"]] == [], result["told"]
        if case.error != REFUSED:  # that is about what `load` can do with the path
            assert result["inspected"] == result["told"], "`inspect` and `load` disagree"
    assert result["seconds"] < DEADLINE_S
    assert result["inspect_seconds"] < DEADLINE_S  # a hang, not a benchmark
    assert result["grown_mb"] < 10 or case.error == SOUND


# The children


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The results of all cases of a fault, computed at the first question."""

    @functools.cache
    def of(fault: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(fault)
        found: dict[str, Any] = {}
        for broken in (False, True):
            cases = [case for case in CASES[fault] if case.with_broken_disk == broken]
            if broken and not shutil.which("cc"):
                continue
            while missing := [case for case in cases if case.name not in found]:
                found |= _run(folder, missing, broken)
        return found

    return of


def _run(folder: Path, cases: list[Case], with_broken_disk: bool) -> dict[str, Any]:
    """Results of as many cases as one child lives through; the one that kills it has `died`."""
    sound = tiny_gguf(folder / "sound.gguf")
    jobs = [_job(folder, case) for case in cases]
    (folder / "jobs.json").write_text(json.dumps({"sound": str(sound), "jobs": jobs}))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    if with_broken_disk:
        environment["LD_PRELOAD"] = str(_broken_disk(folder))
    out = folder / "results.jsonl"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", CHILD, str(folder / "jobs.json"), str(out)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment
        )
        end = f"exit status {child.returncode}: {child.stderr[-1500:]}"
        noise = child.stdout + "".join(re.findall(r".*(?:panicked|GGML_ASSERT).*", child.stderr))
    except subprocess.TimeoutExpired as error:
        end, noise = f"no end after {error.timeout:.0f} s", ""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found = {line["name"]: line for line in lines}
    if len(found) < len(cases):
        found[cases[len(found)].name] = {"died": end}
    elif noise or not end.startswith("exit status 0"):
        found[cases[-1].name] = {"died": f"{end} {noise}"}
    return found


def _job(folder: Path, case: Case) -> dict[str, Any]:
    place = folder / re.sub(r"\W", "_", case.name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = os.fsencode(case.make(place)).hex()
    prompts = [prompt for prompt, _ in case.then]
    return {"name": case.name, "path": path, "prompts": prompts, "as_nobody": case.as_nobody}


def _broken_disk(folder: Path) -> Path:
    """A library that makes every read of a `model.gguf` fail."""
    source, library = folder / "eio.c", folder / "eio.so"
    source.write_text(
        r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
ssize_t read(int file, void * to, size_t size) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length > 0 && (path[length] = 0, strstr(path, "/model.gguf"))) { errno = EIO; return -1; }
    return ((ssize_t (*)(int, void *, size_t)) dlsym(RTLD_NEXT, "read"))(file, to, size);
}
"""
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


CHILD = r"""
import json, os, sys, time
from pathlib import Path

from tabagent_model import Model, errors, inspect

GREEDY = dict(max_tokens=8, temperature=0, repeat_penalty=1.0)

def answer(path):
    with Model.load(path, n_ctx=256, n_threads=1) as model:
        return list(model.generate("the cat", **GREEDY).tokens)

def memory_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def open_files():
    return len(os.listdir("/proc/self/fd"))

def attempt(do):
    start = time.perf_counter()
    try:
        do()
        found = ("sound", "", True)
    except Exception as error:
        told = getattr(error, "message", str(error))
        found = (type(error).__name__, told, isinstance(error, errors.TabAgentModelError))
    return *found, time.perf_counter() - start

def run(job):
    path = os.fsdecode(bytes.fromhex(job["path"]))
    then = []

    def load():
        with Model.load(path, n_ctx=256, n_threads=1) as model:
            for prompt in job["prompts"]:
                then.append(attempt(lambda: model.generate(prompt, **GREEDY))[0])

    before = memory_mb()
    if job["as_nobody"] and os.geteuid() == 0:
        os.seteuid(65534)
    _, inspected, is_fine, inspect_seconds = attempt(lambda: inspect(path))
    kind, told, is_ours, seconds = attempt(load)
    if os.getuid() == 0:
        os.seteuid(0)
    return {
        "name": job["name"], "class": kind, "told": told, "is_ours": is_ours and is_fine,
        "inspected": inspected,
        "then": then, "seconds": seconds, "inspect_seconds": inspect_seconds,
        "grown_mb": memory_mb() - before,
    }

work = json.loads(Path(sys.argv[1]).read_text())
reference = answer(work["sound"])
files = open_files()
with open(sys.argv[2], "w", buffering=1) as out:
    files += 1
    for job in work["jobs"]:
        result = run(job)
        after = answer(work["sound"])
        result |= {"reference": reference, "after": after, "left_open": open_files() - files}
        print(json.dumps(result), file=out)
"""
