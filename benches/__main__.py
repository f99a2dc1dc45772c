"""Measures tabagent_model, alone or side by side with others, with models made on the spot.

python -m benches                      a short look at this package, in under a minute
python -m benches --full               every case, this package alone
python -m benches --full --peers all   every case, everybody; the first time compiles llama.cpp
python -m benches --full --peers all --publish   the same, written into the repository
python -m benches decode latency --peers llama-bench,llama-server   a case, and a group of cases
python -m benches decode-3500 --also flash_attn=off,kv_type=bf16    other settings of ours
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import machine, peers, report
from .cases import ALL_OURS, CASES, GROUPS, LIKE_US, OURS, Case
from .models import model_file
from .worker import MARK

ROOT = Path(__file__).parent.parent
PATIENCE_S = 20
MOST_SECONDS = 900


def main() -> int:
    asked = _arguments().parse_args()
    if asked.list:
        for case in CASES:
            demands = [metric.demand(t) for metric in case.metrics for t in metric.targets]
            print(f"{case.group:11} {case.name:22} {'; '.join([case.title, *demands])}")
        return 0
    if asked.cpu:
        asked.anyway, asked.threads = True, 1
    cases = _cases(asked)
    contenders = _contenders(asked)
    installed = peers.install([c.tool for c in contenders if c.tool in peers.NAMES])
    facts = _facts(asked, contenders, installed)
    folder = asked.out or peers.cache() / "results" / time.strftime("%Y-%m-%d-%H%M")
    all_cases = CASES if all(case in CASES for case in cases) else cases
    kept = report.read(folder, all_cases, facts) if asked.keep else []
    results = {result.case.name: result for result in kept}
    to_do = [c for c in cases if not _is_complete(results.get(c.name), contenders, asked.rounds)]
    print(_plan(to_do, contenders, asked.rounds), file=sys.stderr)
    if not asked.anyway:
        _wait_for_quiet()
    bench = Bench(installed, asked.threads, asked.rounds, tries=1 if asked.anyway else 3)
    is_stopped = False
    try:
        for case in to_do:
            results[case.name] = bench.measure(case, contenders)
            report.write(_in_order(results, all_cases), facts, folder)
    except KeyboardInterrupt:
        print("stopped; what is complete is kept", file=sys.stderr)
        is_stopped = True
    print(report.write(_in_order(results, all_cases), facts, folder))
    print(f"{folder}/results.md, .json and .svg", file=sys.stderr)
    if asked.publish and not is_stopped:
        page = report.publish(_in_order(results, all_cases), facts, ROOT / "benches")
        print(page, file=sys.stderr)
    return 130 if is_stopped else 0


@dataclass(frozen=True)
class Contender:
    """An engine as the cases name it, and settings of ours that differ from the defaults."""

    engine: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changes = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.engine} {changes}".strip()

    @property
    def tool(self) -> str:
        """What runs."""
        return self.engine.removesuffix(LIKE_US)

    @property
    def is_like_us(self) -> bool:
        """Whether it computes attention as we do with these settings."""
        return self.engine.endswith(LIKE_US)


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
        date = time.strftime("%Y-%m-%d %H:%M %Z")
        result = report.Result(case, date, {c.name: [] for c in there})
        model = model_file(case.model, peers.cache() / "models")
        print(case.title, file=sys.stderr, flush=True)
        for contender in there:
            if contender.is_like_us:
                settings = self._attention(case, contender, model)
                result.attention[contender.name] = settings
        for number in range(self.rounds):
            turn = number % max(len(there), 1)
            for contender in there[turn:] + there[:turn]:
                if contender.name in result.failures:
                    continue
                order = self._order(case, contender, model)
                order["parameters"] = {**case.parameters, "seed": number + 1}
                if contender.is_like_us:
                    order["setting"]["options"] = result.attention[contender.name]
                try:
                    figures = self._undisturbed(order)
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

    def _attention(self, case: Case, contender: Contender, model: Path) -> dict[str, str]:
        """What our own context chooses for this case."""
        order = self._order(case, Contender(OURS, contender.options), model)
        chosen = self._run({**order, "job": "attention", "parameters": {}})
        return {name: chosen[name] for name in ("flash_attn", "kv_type")}

    def _undisturbed(self, order: dict[str, Any]) -> dict[str, float]:
        """The first run in which nobody else computed, or the quietest of all."""
        tries = []
        for _ in range(self.tries):
            with machine.disturbance() as noise:
                figures = self._run(order)
            tries.append({**figures, "others_cpus": noise.cpus, "disturbed": noise.is_too_much})
            if not noise.is_too_much:
                break
        return min(tries, key=lambda figures: figures["others_cpus"])

    def _order(self, case: Case, contender: Contender, model: Path) -> dict[str, Any]:
        return {
            "engine": contender.tool,
            "job": case.job,
            "parameters": case.parameters,
            "setting": {
                "model": str(model),
                "threads": self.threads,
                "n_ctx": case.n_ctx,
                "streams": case.streams,
                "tools": str(self.installed.tools),
                "options": contender.options,
            },
        }

    def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        python, environment = sys.executable, dict(os.environ)
        if order["engine"] in peers.NAMES and self.installed.python.exists():
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
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="which cases or groups of cases; see --list"
    )
    parser.add_argument("--full", action="store_true", help="all cases, at full length")
    parser.add_argument("--quick", action="store_true", help="the short run, which is the default")
    parser.add_argument("--peers", default="", help="whom to measure as well: all, or names")
    parser.add_argument("--also", action="append", default=[], help="other settings of ours")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (5)")
    parser.add_argument("--threads", type=int, default=machine.num_cores())
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="measure only what --out does not hold yet of this commit",
    )
    parser.add_argument(
        "--publish", action="store_true", help="write benches/RESULTS.md and its picture"
    )
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine, too")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="tokens per CPU second on one thread: for machines that are never quiet",
    )
    parser.add_argument("--list", action="store_true", help="list the cases")
    return parser


def _cases(asked: argparse.Namespace) -> list[Case]:
    names = {case.name for case in CASES}
    for name in asked.cases:
        if name not in names and name not in GROUPS:
            known = ", ".join(sorted(names))
            raise SystemExit(
                f"no case is called `{name}`; there are {known}, and the groups {', '.join(GROUPS)}"
            )
    chosen = [case for case in CASES if {case.name, case.group} & set(asked.cases)]
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
    ours = [Contender(engine, options) for options in variants for engine in ALL_OURS]
    tools = [name for name in names if name in peers.ATTENTIVE]
    like_us = [Contender(tool + LIKE_US, options) for options in variants for tool in tools]
    return ours + [Contender(name) for name in names] + like_us


def _plan(cases: Sequence[Case], contenders: Sequence[Contender], rounds: int) -> str:
    """How much there is to do, and how long that takes on two cores."""
    takes_s = [case.takes_s for case in cases for c in contenders if c.engine in case.engines]
    minutes = math.ceil(sum(takes_s) * rounds / 60)
    return (
        f"{len(cases)} cases, {len(takes_s)} runs in each of {rounds} rounds: "
        f"about {minutes} minutes on two quiet cores"
    )


def _is_complete(
    result: report.Result | None, contenders: Sequence[Contender], rounds: int
) -> bool:
    """Whether everybody has already been measured often enough."""
    if result is None:
        return False
    names = [c.name for c in contenders if c.engine in result.case.engines]
    return all(len(result.runs.get(name, [])) >= rounds for name in names)


def _in_order(results: Mapping[str, report.Result], cases: Sequence[Case]) -> list[report.Result]:
    return [results[case.name] for case in cases if case.name in results]


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
        "commit": _commit(),
        "threads": asked.threads,
        "rounds": asked.rounds,
        "tabagent_model": f"{tabagent_model.__version__}, llama.cpp {_core.LLAMA_CPP_VERSION}",
        "CPU module": _native.choose(),
        "peers": installed.versions([c.tool for c in contenders if c.tool in peers.NAMES]),
    }


def _commit() -> str:
    """The commit that is checked out, and whether something was changed since."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
