"""Measures tabagent_model, alone or side by side with others, with models made on the spot.

python -m benches                      a short look at this package, in under a minute
python -m benches --full               every case, this package alone
python -m benches --full --peers all   every case, everybody; the first time compiles llama.cpp
python -m benches decode crowd-8 --peers llama-bench,llama-server
python -m benches decode-3500 --also flash_attn=off,kv_type=bf16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import machine, peers, report
from .cases import CASES, OURS, OURS_ASYNC, Case
from .models import model_file
from .worker import MARK

ROOT = Path(__file__).parent.parent
PATIENCE_S = 20
MOST_SECONDS = 900


def main() -> int:
    asked = _arguments().parse_args()
    if asked.list:
        for case in CASES:
            print(f"{case.name:15} {case.title}")
        return 0
    if asked.cpu:
        asked.anyway, asked.threads = True, 1
    cases = _cases(asked)
    contenders = _contenders(asked)
    installed = peers.install([c.engine for c in contenders if c.engine in peers.NAMES])
    if not asked.anyway:
        _wait_for_quiet()
    facts = _facts(asked, contenders, installed)
    bench = Bench(installed, asked.threads, asked.rounds, tries=1 if asked.anyway else 3)
    results: list[report.Result] = []
    folder = asked.out or peers.cache() / "results" / time.strftime("%Y-%m-%d-%H%M")
    text = ""
    try:
        for case in cases:
            results.append(bench.measure(case, contenders))
            text = report.write(results, facts, folder)
    except KeyboardInterrupt:
        print("stopped; what is complete is kept", file=sys.stderr)
    print(text)
    print(f"{folder}/results.md, .json and .svg", file=sys.stderr)
    return 0 if text else 130


@dataclass(frozen=True)
class Contender:
    """An engine, and settings of ours that differ from the defaults."""

    engine: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changes = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.engine} {changes}".strip()


@dataclass
class Bench:
    """Runs every contender of a case in turn, again and again."""

    installed: peers.Peers
    threads: int
    rounds: int
    tries: int
    """How often a run is repeated, at most, in which somebody else computed."""

    def measure(self, case: Case, contenders: Sequence[Contender]) -> report.Result:
        there = [c for c in contenders if c.engine in case.engines]
        result = report.Result(case, {c.name: [] for c in there})
        model = model_file(case.model, peers.cache() / "models")
        print(case.title, file=sys.stderr, flush=True)
        for number in range(self.rounds):
            turn = number % max(len(there), 1)
            for contender in there[turn:] + there[:turn]:
                if contender.name in result.failures:
                    continue
                try:
                    figures = self._undisturbed(case, contender, model, number)
                except WorkerError as failed:
                    result.failures[contender.name] = str(failed)
                    print(f"  {contender.name}: {failed}", file=sys.stderr, flush=True)
                    continue
                result.runs[contender.name].append(figures)
                print(
                    f"  {contender.name}: {_in_short(case, figures)}", file=sys.stderr, flush=True
                )
        result.runs = {name: runs for name, runs in result.runs.items() if runs}
        return result

    def _undisturbed(
        self, case: Case, contender: Contender, model: Path, number: int
    ) -> dict[str, float]:
        """The first run in which nobody else computed, or the quietest of all."""
        tries = []
        for _ in range(self.tries):
            with machine.disturbance() as noise:
                figures = self._run(case, contender, model, number)
            tries.append({**figures, "others_cpus": noise.cpus, "disturbed": noise.is_too_much})
            if not noise.is_too_much:
                break
        return min(tries, key=lambda figures: figures["others_cpus"])

    def _run(self, case: Case, contender: Contender, model: Path, number: int) -> dict[str, float]:
        order = {
            "engine": contender.engine,
            "job": case.job,
            "parameters": {**case.parameters, "seed": number + 1},
            "neighbour": case.neighbour,
            "setting": {
                "model": str(model),
                "threads": self.threads,
                "n_ctx": case.n_ctx,
                "streams": case.streams,
                "tools": str(self.installed.tools),
                "options": contender.options,
            },
        }
        python, environment = sys.executable, dict(os.environ)
        if contender.engine in peers.NAMES and self.installed.python.exists():
            python, environment = str(self.installed.python), self.installed.environment
        try:
            done = subprocess.run(
                [python, "-m", "benches.worker", json.dumps(order)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(f"not done after {MOST_SECONDS} s") from None
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                return dict(json.loads(line[len(MARK) :]))
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise WorkerError(last)


class WorkerError(Exception):
    pass


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which cases; see --list")
    parser.add_argument("--full", action="store_true", help="all cases, at full length")
    parser.add_argument("--quick", action="store_true", help="the short run, which is the default")
    parser.add_argument("--peers", default="", help="whom to measure as well: all, or names")
    parser.add_argument("--also", action="append", default=[], help="other settings of ours")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (5)")
    parser.add_argument("--threads", type=int, default=machine.num_cores())
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, too")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="tokens per CPU second on one thread: for machines that are never quiet",
    )
    parser.add_argument("--list", action="store_true", help="list the cases")
    return parser


def _cases(asked: argparse.Namespace) -> list[Case]:
    by_name = {case.name: case for case in CASES}
    unknown = [name for name in asked.cases if name not in by_name]
    if unknown:
        raise SystemExit(f"no case is called `{unknown[0]}`; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in asked.cases]
    if asked.full and not chosen:
        chosen = list(CASES)
    elif asked.quick or not chosen:
        chosen = [c.shortened() for c in chosen or CASES if c.short is not None or chosen]
    if asked.cpu:
        by_cpu = ("decode", "prefill", "crowd", "event_loop")
        return [case.by_cpu_time() for case in chosen if case.job in by_cpu]
    return chosen


def _contenders(asked: argparse.Namespace) -> list[Contender]:
    names = [name for name in asked.peers.split(",") if name]
    if names == ["all"]:
        names = list(peers.NAMES)
    for name in names:
        if name not in peers.NAMES:
            raise SystemExit(f"no peer is called `{name}`; there are {', '.join(peers.NAMES)}")
    variants: list[dict[str, Any]] = [{}, *map(_options, asked.also)]
    ours = [Contender(engine, options) for options in variants for engine in (OURS, OURS_ASYNC)]
    return ours + [Contender(name) for name in names]


def _options(text: str) -> dict[str, Any]:
    """`flash_attn=off,n_batch=1024` as keywords of `Model.load`."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


def _in_short(case: Case, figures: dict[str, float]) -> str:
    known = [metric for metric in case.metrics if metric.key in figures]
    shown = [f"{metric.title} {figures[metric.key]:.4g} {metric.unit}" for metric in known]
    return ", ".join(shown) + (" (disturbed)" if figures["disturbed"] else "")


def _wait_for_quiet() -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        busy = machine.who_is_busy()
        used = sum(share for share, _ in busy)
        if used <= machine.QUIET:
            return
        if time.monotonic() > deadline:
            greedy = "; ".join(f"{share:.1f} by `{name}`" for share, name in busy[:3])
            raise SystemExit(
                f"others use {used:.1f} CPUs ({greedy}), which would be measured as well: "
                "wait until they are done, or say --anyway"
            )


def _facts(
    asked: argparse.Namespace, contenders: Sequence[Contender], installed: peers.Peers
) -> dict[str, Any]:
    import tabagent_model
    from tabagent_model import _core, _native

    return {
        **machine.facts(),
        "threads": asked.threads,
        "rounds": asked.rounds,
        "tabagent_model": f"{tabagent_model.__version__}, llama.cpp {_core.LLAMA_CPP_VERSION}",
        "CPU module": _native.choose(),
        "peers": installed.versions([c.engine for c in contenders if c.engine in peers.NAMES]),
    }


if __name__ == "__main__":
    sys.exit(main())
