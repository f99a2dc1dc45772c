"""The benchmarks of the seeds, on the package's own interface: `tabagent-bench`.

    spike3         load, ask and unload a 3B and a 7B model, swap one for the other: a gate
    standard       load a model and write 256 tokens, beside what was expected once
    gpu-vs-cpu     the same model on both
    concurrency N  so many requests together, against one alone

Exit codes: 0 all passed, 1 something failed, 2 nothing could be measured, 3 not all was measured.
How this package does next to others is another question, which the repository's `benches` answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import TabAgentModelError
from ._files import LARGE, SMALL, Chosen, Size, choose, named
from ._machine import Reading
from ._report import BenchmarkResult, Report, Target
from ._spike3 import spike3
from ._throughput import concurrency, gpu_vs_cpu, standard


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `tabagent-bench`."""
    asked = _parser().parse_args(arguments)
    try:
        report = _run(asked)
    except TabAgentModelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _say(report, asked.json)
    return report.exit_code


def _run(asked: argparse.Namespace) -> Report:
    common: dict[str, Any] = {
        "n_gpu_layers": asked.n_gpu_layers,
        "n_ctx": asked.n_ctx,
        "tell": _tell,
    }
    if asked.benchmark == "spike3":
        small = _chosen(SMALL, asked.model_3b, asked.model_dir)
        large = _chosen(LARGE, asked.model_7b, asked.model_dir)
        return spike3(small, large, use_mmap=not asked.no_mmap, **common)
    if asked.model is not None:
        model = named(asked.model, "--model")
    else:
        model = choose(LARGE, asked.model_dir)
    if asked.benchmark == "concurrency":
        return concurrency(model, asked.num_requests, **common)
    if asked.benchmark == "standard":
        return standard(model, rounds=asked.rounds, **common)
    return gpu_vs_cpu(model, **common)


def _chosen(size: Size, path: str | None, folder: str) -> Chosen:
    return choose(size, folder) if path is None else named(path, size.option)


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _say(report: Report, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report.text(sys.stdout.encoding or "utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tabagent-bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model-dir", default="./models", help="where the models are looked for (./models)"
    )
    common.add_argument(
        "--n-gpu-layers", type=int, default=99, help="layers on the GPU; 0: CPU only (99)"
    )
    common.add_argument("--n-ctx", type=int, default=2048, help="tokens of context (2048)")
    common.add_argument("--json", action="store_true", help="for programs")
    spike = benchmarks.add_parser("spike3", parents=[common], help="3B, 7B, hot swap, and a gate")
    for size in (SMALL, LARGE):
        help_ = f"this file, instead of one with {size.range}"
        spike.add_argument(size.option, metavar="FILE", help=help_)
    spike.add_argument("--no-mmap", action="store_true", help="read the files into memory")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--model", metavar="FILE", help="this file, instead of the 7B model")
    both = [common, one]
    benchmarks.add_parser("gpu-vs-cpu", parents=both, help="one model, on both")
    crowd = benchmarks.add_parser("concurrency", parents=both, help="N requests together")
    crowd.add_argument("num_requests", metavar="N", type=int)
    usual = benchmarks.add_parser("standard", parents=both, help="load, 256 tokens, unload")
    usual.add_argument("--rounds", type=int, default=3, help="answers of 256 tokens each (3)")
    return parser


__all__ = [
    "BenchmarkResult",
    "Chosen",
    "Reading",
    "Report",
    "Target",
    "choose",
    "concurrency",
    "gpu_vs_cpu",
    "main",
    "named",
    "spike3",
    "standard",
]
