"""What a benchmark found: figures beside their targets, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ._machine import Reading

Verdict = Literal["passed", "failed", "undecided"]

EXIT_CODES: dict[Verdict, int] = {"passed": 0, "failed": 1, "undecided": 3}
"""2 is what went wrong before anything was measured."""


@dataclass(frozen=True)
class Target:
    """`< 10`, `≥ 5`, `±100` or `= 4`, in the unit of the figure."""

    sign: Literal["<", "≥", "±", "="]
    limit: float

    def allows(self, value: float) -> bool:
        if self.sign == "±":
            return abs(value) <= self.limit
        return {
            "<": value < self.limit,
            "≥": value >= self.limit,
            "=": value == self.limit,
        }[self.sign]

    def __str__(self) -> str:
        return f"{self.sign}{'' if self.sign == '±' else ' '}{self.limit:,g}"


@dataclass(frozen=True)
class BenchmarkResult:
    """One figure. It can only pass if it was measured."""

    name: str
    value: float | None
    """None: it was not measured, and `note` says why."""
    unit: str
    target: Target | None = None
    """None: a figure that is told, and decides nothing."""
    note: str = ""
    is_broken: bool = False
    """What should have been measured ended in an error, which is in `note`."""

    @property
    def passed(self) -> bool | None:
        """None: there is no target, or nobody measured."""
        if self.target is None:
            return None
        if self.is_broken:
            return False
        return None if self.value is None else self.target.allows(self.value)

    @property
    def shown(self) -> str:
        if self.value is None:
            return "failed" if self.is_broken else "not measured"
        return f"{self.value:{_FORMATS.get(self.unit, ',.4g')}} {self.unit}"

    def to_dict(self) -> dict[str, Any]:
        target = None if self.target is None else str(self.target)
        facts = {"name": self.name, "value": self.value, "unit": self.unit, "target": target}
        return {**facts, "passed": self.passed, "note": self.note}


_FORMATS = {"s": ",.2f", "ms": ",.0f", "MB": "+,.0f", "tok/s": ",.1f", "x": ",.2f"}


@dataclass(frozen=True)
class Report:
    benchmark: str
    facts: Mapping[str, str]
    """What the figures depend on: the machine, the files, the settings."""
    results: tuple[BenchmarkResult, ...]
    readings: Mapping[str, Reading] = field(default_factory=dict)
    """The memory at each stage."""
    consequences: Mapping[Verdict, str] = field(default_factory=dict)
    """What a verdict means for whoever has to decide."""

    @property
    def gates(self) -> tuple[BenchmarkResult, ...]:
        return tuple(result for result in self.results if result.target is not None)

    @property
    def verdict(self) -> Verdict:
        """Undecided as long as one gate was not measured and none has failed."""
        passed = [gate.passed for gate in self.gates]
        if False in passed:
            return "failed"
        return "undecided" if None in passed else "passed"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return {
            "benchmark": self.benchmark,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "facts": dict(self.facts),
            "results": [result.to_dict() for result in self.results],
            "memory_bytes": {stage: vars(reading) for stage, reading in self.readings.items()},
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, encoding: str = "utf-8") -> str:
        """For a person; `encoding` is what the terminal can show."""
        spelling = _spelling(encoding)
        facts = [f"{name:10}{fact}" for name, fact in self.facts.items()]
        parts = [facts, _table(self.results, spelling), _stages(self.readings)]
        told = "\n\n".join("\n".join(part) for part in [*parts, [self._conclusion()]] if part)
        return told.translate(spelling).encode(encoding, "backslashreplace").decode(encoding)

    def _conclusion(self) -> str:
        passed = [gate.passed for gate in self.gates]
        counted = f"{passed.count(True)} of {len(passed)} passed"
        if failed := passed.count(False):
            counted += f", {failed} failed"
        if missing := passed.count(None):
            counted += f", {missing} not measured"
        head = {
            "passed": "ALL BENCHMARKS PASSED",
            "failed": "SOME BENCHMARKS FAILED",
            "undecided": "NOT DECIDED",
        }[self.verdict]
        consequence = self.consequences.get(self.verdict)
        return f"{head}: {counted}." + (f" {consequence}" if consequence else "")


def _table(results: tuple[BenchmarkResult, ...], spelling: Mapping[int, str]) -> list[str]:
    marks = {True: "✓", False: "✗", None: "-"}
    rows: list[tuple[str, ...]] = [("Benchmark", "Result", "Target", "Pass", "")]
    for result in results:
        target = "" if result.target is None else f"{result.target} {result.unit}"
        mark = "" if result.target is None else marks[result.passed]
        cells = (result.name, result.shown, target, mark, result.note)
        rows.append(tuple(cell.translate(spelling) for cell in cells))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:{wide[0]}}  {value:>{wide[1]}}  {target:>{wide[2]}}  {mark:^{wide[3]}}  {note}"
        for name, value, target, mark, note in rows
    ]
    lines.insert(1, "-" * (sum(wide) + 6))
    return [line.rstrip() for line in lines]


def _stages(readings: Mapping[str, Reading]) -> list[str]:
    if not readings:
        return []
    wide = max(map(len, readings))
    return ["Memory", *(f"  {stage:{wide}}  {reading}" for stage, reading in readings.items())]


def _spelling(encoding: str) -> dict[int, str]:
    """A tick that a terminal shows as a question mark would look like a cross shown so."""
    plain = {"✓": "yes", "✗": "no", "≥": ">=", "±": "+-", "→": "->"}
    try:
        "".join(plain).encode(encoding)
    except UnicodeEncodeError:
        return str.maketrans(plain)
    return {}
