"""Installs whom we are compared with, from PyPI into a cache folder.

The source distribution of llama-cpp-python carries the whole llama.cpp. It is compiled once for
this very processor (`GGML_NATIVE`), and llama-bench, llama-batched-bench, llama-server and
llama-cpp-python all run on that one build. xllamacpp comes as the wheel that its users get.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("llama-bench", "llama-batched-bench", "llama-server", "llama-cpp-python", "xllamacpp")

ATTENTIVE = ("llama-bench", "llama-batched-bench")
"""Those who can be told how to compute attention."""
_TOOLS = ("llama-bench", "llama-batched-bench", "llama-server")
_SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def cache() -> Path:
    """Where models, peers and results lie: `$TABAGENT_BENCH_CACHE`, or below `~/.cache`."""
    given = os.environ.get("TABAGENT_BENCH_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "tabagent_model" / "benches"


@dataclass(frozen=True)
class Peers:
    """What has been installed."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def tools(self) -> Path:
        return self.folder / "build" / "bin"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that import llama-cpp-python: the libraries it is to load."""
        return {**os.environ, "LLAMA_CPP_LIB_PATH": str(self.tools)}

    def versions(self, names: Sequence[str]) -> dict[str, str]:
        found = {}
        source = _source(self.folder)
        if source and set(names) - {"xllamacpp"}:
            found["llama-cpp-python"] = source.name.removeprefix("llama_cpp_python-")
            done = subprocess.run(
                [self.tools / "llama-bench", "--version"], capture_output=True, text=True
            )
            words = (done.stdout + done.stderr).split()
            found["with llama.cpp"] = words[words.index("version:") + 1]
        if "xllamacpp" in names:
            program = "from importlib.metadata import version; print(version('xllamacpp'))"
            done = subprocess.run([self.python, "-c", program], capture_output=True, text=True)
            found["xllamacpp"] = done.stdout.strip()
        return found


def install(names: Sequence[str]) -> Peers:
    """Install and compile what the named peers need and is not there yet."""
    peers = Peers(cache() / "peers")
    if not names:
        return peers
    if not peers.python.exists():
        _say("an environment for the peers")
        _run([sys.executable, "-m", "venv", str(peers.folder / "venv")])
        packages = ["numpy", "diskcache", "jinja2", "typing-extensions", "cmake", "ninja"]
        _pip(peers, "install", *packages)
    if "xllamacpp" in names and not _has(peers, "xllamacpp"):
        _say("xllamacpp")
        _pip(peers, "install", "xllamacpp")
    if set(names) - {"xllamacpp"}:
        _build(peers)
    return peers


def _build(peers: Peers) -> None:
    source = _source(peers.folder)
    if source is None:
        _say("the source distribution of llama-cpp-python")
        folder = peers.folder / "download"
        options = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
        _pip(peers, "download", *options, "llama-cpp-python")
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(peers.folder / "source", filter="data")
        source = _source(peers.folder)
        assert source is not None
    if not all((peers.tools / tool).exists() for tool in _TOOLS):
        _say("llama.cpp for this processor, which takes a quarter of an hour on two cores")
        bin_folder = peers.python.parent
        build = peers.folder / "build"
        settings = [f"-D{name}={value}" for name, value in _SETTINGS.items()]
        environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        llama = source / "vendor" / "llama.cpp"
        configure = ["cmake", "-S", str(llama), "-B", str(build), "-G", "Ninja", *settings]
        _run(configure, environment)
        jobs = os.environ.get("TABAGENT_BENCH_JOBS") or str(len(os.sched_getaffinity(0)))
        _run(["nice", "ninja", "-C", str(build), "-j", jobs, *_TOOLS], environment)
    if not _has(peers, "llama_cpp"):
        packages = next((peers.folder / "venv" / "lib").glob("python*/site-packages"))
        shutil.copytree(source / "llama_cpp", packages / "llama_cpp")


def _source(folder: Path) -> Path | None:
    return next((folder / "source").glob("llama_cpp_python-*"), None)


def _has(peers: Peers, package: str) -> bool:
    return any((peers.folder / "venv" / "lib").glob(f"python*/site-packages/{package}"))


def _pip(peers: Peers, *arguments: str) -> None:
    _run([str(peers.python), "-m", "pip", "-q", "--disable-pip-version-check", *arguments])


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    log = cache() / "peers" / "install.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command[:4])} …` failed; `{log}` tells why")


def _say(what: str) -> None:
    print(f"getting {what}", file=sys.stderr, flush=True)
