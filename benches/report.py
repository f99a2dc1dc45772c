"""What was measured as tables, a picture and a file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from .cases import ALL_OURS, OURS, Case, Metric, Target

Runs = list[dict[str, float]]


@dataclass
class Result:
    """All runs of one case, by contender."""

    case: Case
    date: str
    runs: dict[str, Runs]
    failures: dict[str, str] = field(default_factory=dict)
    attention: dict[str, dict[str, str]] = field(default_factory=dict)
    """The settings of those who computed it as we did."""


@dataclass(frozen=True)
class Spread:
    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.middle)} ({_short(self.low)}-{_short(self.high)})"


@dataclass(frozen=True)
class Check:
    """A target, and what came of it."""

    row: Row
    target: Target

    @property
    def measured(self) -> float | None:
        """Our figure as the target counts it; None if somebody's is missing."""
        ours = self.row.ours()
        if ours is None:
            return None
        if self.target.against is None:
            return ours.middle
        theirs = self.row.spreads.get(self.target.against)
        return ours.middle / theirs.middle if theirs and theirs.middle > 0 else None

    @property
    def is_reached(self) -> bool | None:
        if self.measured is None:
            return None
        if self.row.metric.more_is_better:
            return self.measured >= self.target.bound
        return self.measured <= self.target.bound

    @property
    def demand(self) -> str:
        return self.row.metric.demand(self.target)


@dataclass(frozen=True)
class Row:
    """One figure of one case; a column for each contender."""

    case: Case
    metric: Metric
    spreads: Mapping[str, Spread]

    @property
    def title(self) -> str:
        is_alone = len(self.case.metrics) == 1
        return self.case.title if is_alone else f"{self.case.title}: {self.metric.title}"

    @property
    def label(self) -> str:
        """The short one of pictures."""
        is_alone = len(self.case.metrics) == 1
        return self.case.name if is_alone else f"{self.case.name}: {self.metric.title}"

    def ours(self) -> Spread | None:
        return next((self.spreads[name] for name in ALL_OURS if name in self.spreads), None)

    def ratio_to(self, name: str) -> float | None:
        """Above one where we are better, whichever way the figure counts."""
        ours, peer = self.ours(), self.spreads.get(name)
        if not self.metric.has_factor or ours is None or peer is None:
            return None
        if not (ours.middle > 0 and peer.middle > 0):
            return None
        ratio = ours.middle / peer.middle
        return ratio if self.metric.more_is_better else 1 / ratio

    def checks(self) -> list[Check]:
        return [Check(self, target) for target in self.metric.targets]


def write(results: Sequence[Result], facts: Mapping[str, Any], folder: Path) -> str:
    """Writes results.json, results.md and results.svg; gives the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(results, facts)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.svg").write_text(svg(list(rows(results))), encoding="utf-8")
    data = {"facts": dict(facts), "cases": {r.case.name: _plain(r) for r in results}}
    (folder / "results.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    return text


_DECIDING = ("commit", "tabagent_model", "processor", "cpus", "CPU module", "threads")


def read(folder: Path, cases: Sequence[Case], facts: Mapping[str, Any]) -> list[Result]:
    """The results of these cases that lie there, if they are of the same code and machine."""
    path = folder / "results.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    if any(data["facts"].get(name) != facts.get(name) for name in _DECIDING):
        return []
    found = [(case, data["cases"].get(case.name)) for case in cases]
    return [
        Result(case, kept["date"], kept["runs"], kept["failures"], kept["attention"])
        for case, kept in found
        if kept and (kept["title"], kept["parameters"]) == (case.title, case.parameters)
    ]


def publish(results: Sequence[Result], facts: Mapping[str, Any], folder: Path) -> Path:
    """The page that the documentation points to, and its picture."""
    page = folder / "RESULTS.md"
    page.write_text(_PAGE + markdown(results, facts), encoding="utf-8")
    (folder / "results.svg").write_text(svg(list(rows(results))), encoding="utf-8")
    return page


_PAGE = """# Measured side by side

Written by `python -m benches --full --peers all --publish`; do not edit. `docs/performance.md` says
how it is measured and what was learnt.

![How fast the others are next to us](results.svg)

"""


def rows(results: Sequence[Result]) -> Iterator[Row]:
    for result in results:
        for metric in result.case.metrics:
            spreads = {
                name: Spread.of([run[metric.key] for run in runs if metric.key in run])
                for name, runs in result.runs.items()
                if any(metric.key in run for run in runs)
            }
            if spreads:
                yield Row(result.case, metric, spreads)


def markdown(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    found = list(rows(results))
    dates = sorted({result.date for result in results})
    lines = [
        "| | |",
        "|---|---|",
        f"| date | {' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))} |",
    ]
    lines += [f"| {name} | {_fact(value)} |" for name, value in facts.items()]
    lines += ["", *_target_table(found)]
    for group in dict.fromkeys(row.case.group for row in found):
        lines += _figure_table([row for row in found if row.case.group == group])
    lines += [
        "Medians, with the least and the greatest of all runs in brackets. The factor says how"
    ]
    lines += ["much better ours is (below 1: worse), for speeds and times alike.", ""]
    lines += [f"- {note}" for note in _notes(results)]
    return "\n".join(lines) + "\n"


def _target_table(found: Sequence[Row]) -> list[str]:
    checks = [check for row in found for check in row.checks()]
    if not checks:
        return []
    lines = ["| what | must reach | measured | reached |", "|---|---|---:|---|"]
    for check in checks:
        words = {True: "yes", False: "**no**", None: ""}
        measured = "" if check.measured is None else _short(check.measured)
        cells = [check.row.title, check.demand, measured, words[check.is_reached]]
        lines.append("| " + " | ".join(cells) + " |")
    reached = sum(check.is_reached is True for check in checks)
    missing = sum(check.is_reached is None for check in checks)
    total = f"{reached} of {len(checks) - missing} reached"
    return [*lines, "", total + (f", {missing} not measured." if missing else "."), ""]


def _figure_table(found: Sequence[Row]) -> list[str]:
    names = [name for name in _order(found) if name not in ALL_OURS]
    is_ours_there = any(row.ours() for row in found)
    heads = ["what", "unit", *([OURS] if is_ours_there else []), *names]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in found:
        cells = [row.title, row.metric.unit]
        if is_ours_there:
            cells.append(str(row.ours() or ""))
        for name in names:
            cells.append(str(row.spreads.get(name, "")) + _times(row.ratio_to(name)))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _notes(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        for name, why in result.failures.items():
            yield f"{name} failed at “{result.case.title}”: {why}"
    for name in dict.fromkeys(name for result in results for name in result.attention):
        chosen = [
            f"{result.case.name} {_fact(result.attention[name])}"
            for result in results
            if name in result.attention
        ]
        yield f"{name}: " + "; ".join(chosen)
    noisy = [
        f"{result.case.name} ({name}, {max(run['others_cpus'] for run in runs):.1f} CPUs)"
        for result in results
        for name, runs in result.runs.items()
        if any(run.get("disturbed") for run in runs)
    ]
    if noisy:
        yield "Somebody else computed during at least one run of: " + ", ".join(noisy)


def _plain(result: Result) -> dict[str, Any]:
    """A result in values that JSON knows."""
    checks = [check for row in rows([result]) for check in row.checks()]
    return {
        "title": result.case.title,
        "date": result.date,
        "model": result.case.model,
        "job": result.case.job,
        "parameters": result.case.parameters,
        "runs": result.runs,
        "failures": result.failures,
        "attention": result.attention,
        "targets": [
            {
                "figure": check.row.metric.key,
                "must reach": check.demand,
                "measured": check.measured,
                "reached": check.is_reached,
            }
            for check in checks
        ],
    }


# The picture

_COLOURS = ("#3b6fb6", "#d1742a", "#4d9a56", "#a3478f", "#b59a1d", "#777777", "#2a9d9d", "#8a4b2a")
_LEFT, _WIDTH, _STEP = 350, 500, 24
_LEGEND_COLUMNS, _LEGEND_STEP = 3, 290


def svg(found: Sequence[Row]) -> str:
    """A dot for each contender: how fast it is next to us, who are the line in the middle."""
    names = [name for name in _order(found) if name not in ALL_OURS]
    shown = [row for row in found if any(map(row.ratio_to, names))]
    speeds = [1 / ratio for row in shown for ratio in map(row.ratio_to, names) if ratio]
    lowest, highest = _range(speeds)
    top = 40 + 20 * math.ceil(len(names) / _LEGEND_COLUMNS)
    height = top + _STEP * len(shown) + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 50} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]

    def x(speed: float) -> float:
        place = math.log2(min(max(speed, 2.0**lowest), 2.0**highest)) - lowest
        return _LEFT + _WIDTH * place / (highest - lowest)

    for power in range(lowest, highest + 1):
        colour, wide = ("#222", 1.5) if power == 0 else ("#ddd", 1)
        parts.append(
            f'<line x1="{x(2.0**power):.1f}" x2="{x(2.0**power):.1f}" y1="{top - 14}" '
            f'y2="{height - 52}" stroke="{colour}" stroke-width="{wide}"/>'
        )
        label = "ours" if power == 0 else f"{2**power}x" if power > 0 else f"1/{2**-power}"
        parts.append(_label(x(2.0**power), height - 36, label, "middle"))
    for index, name in enumerate(names):
        line, column = divmod(index, _LEGEND_COLUMNS)
        at, y = 16 + column * _LEGEND_STEP, 20 + 20 * line
        parts.append(f'<circle cx="{at}" cy="{y}" r="5" fill="{_COLOURS[index % 8]}"/>')
        parts.append(_label(at + 10, y + 4, name, "start"))
    for line, row in enumerate(shown):
        y = top + _STEP * line
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="#eee"/>')
        parts.append(_label(_LEFT - 12, y + 4, row.label, "end"))
        for index, name in enumerate(names):
            if ratio := row.ratio_to(name):
                parts.append(
                    f'<circle cx="{x(1 / ratio):.1f}" cy="{y}" r="5" fill-opacity="0.8" '
                    f'fill="{_COLOURS[index % 8]}"><title>{escape(name)}: {_short(1 / ratio)}x '
                    "our speed</title></circle>"
                )
    parts.append(_label(x(1), height - 14, "to the right: better than we are", "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _range(speeds: Sequence[float]) -> tuple[int, int]:
    """Powers of two that hold them all, within reason: what lies outside is drawn at the edge."""
    lowest = math.floor(math.log2(min(speeds, default=1)))
    highest = math.ceil(math.log2(max(speeds, default=1)))
    return max(min(lowest, -1), -5), min(max(highest, 1), 3)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _order(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in found for name in row.spreads))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" **{ratio:.2f}x**"


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
