"""What was measured as a table, a picture and a file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from .cases import OURS, OURS_ASYNC, Case, Metric

Runs = list[dict[str, float]]


@dataclass
class Result:
    """All runs of one case, by contender."""

    case: Case
    runs: dict[str, Runs]
    failures: dict[str, str] = field(default_factory=dict)


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
        return self.spreads.get(OURS) or self.spreads.get(OURS_ASYNC)

    def ratio_to(self, name: str) -> float | None:
        """Above one where we are better, whichever way the figure counts."""
        ours, peer = self.ours(), self.spreads.get(name)
        if not self.metric.has_factor or ours is None or peer is None:
            return None
        if not (ours.middle > 0 and peer.middle > 0):
            return None
        ratio = ours.middle / peer.middle
        return ratio if self.metric.more_is_better else 1 / ratio


def write(results: Sequence[Result], facts: Mapping[str, Any], folder: Path) -> str:
    """Writes results.json, results.md and results.svg; gives the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(results, facts)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.svg").write_text(svg(list(rows(results))), encoding="utf-8")
    data = {
        "facts": dict(facts),
        "cases": {
            result.case.name: {
                "title": result.case.title,
                "model": result.case.model,
                "job": result.case.job,
                "parameters": result.case.parameters,
                "runs": result.runs,
                "failures": result.failures,
            }
            for result in results
        },
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    return text


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
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {_fact(value)} |" for name, value in facts.items()]
    lines.append("")
    found = list(rows(results))
    names = [name for name in _order(found) if name not in (OURS, OURS_ASYNC)]
    heads = ["what", "unit", OURS, *names]
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row in found:
        cells = [row.title, row.metric.unit, str(row.ours() or "")]
        for name in names:
            cells.append(str(row.spreads.get(name, "")) + _times(row.ratio_to(name)))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Medians, with the least and the greatest of all runs in brackets. The factor"]
    lines += ["says how much better ours is (below 1: worse), for speeds and times alike."]
    for result in results:
        for name, why in result.failures.items():
            lines.append(f"\n{name} failed at “{result.case.title}”: {why}")
    noisy = [
        f"{result.case.name} ({name}, {max(run['others_cpus'] for run in runs):.1f} CPUs)"
        for result in results
        for name, runs in result.runs.items()
        if any(run.get("disturbed") for run in runs)
    ]
    if noisy:
        lines.append("\nSomebody else computed during at least one run of: " + ", ".join(noisy))
    return "\n".join(lines) + "\n"


_COLOURS = ("#3b6fb6", "#d1742a", "#4d9a56", "#a3478f", "#8a6d3b", "#777777")


def svg(found: Sequence[Row]) -> str:
    """A dot for each contender: how fast it is next to us, who are the line in the middle."""
    names = [name for name in _order(found) if name not in (OURS, OURS_ASYNC)]
    shown = [row for row in found if any(map(row.ratio_to, names))]
    left, width, step, top = 290, 480, 24, 56
    height = top + step * len(shown) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]

    def x(speed: float) -> float:
        """From a quarter of our speed to four times of it."""
        return left + width * (math.log2(min(max(speed, 0.25), 4)) + 2) / 4

    for mark in (0.25, 0.5, 1, 2, 4):
        colour, wide = ("#222", 1.5) if mark == 1 else ("#ddd", 1)
        parts.append(
            f'<line x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top - 12}" y2="{height - 34}" '
            f'stroke="{colour}" stroke-width="{wide}"/>'
        )
        label = OURS if mark == 1 else f"{mark:g}x"
        parts.append(_label(x(mark), height - 16, label, "middle"))
    for index, name in enumerate(names):
        at = 16 + index * 150
        parts.append(f'<circle cx="{at}" cy="20" r="5" fill="{_COLOURS[index % 6]}"/>')
        parts.append(_label(at + 10, 24, name, "start"))
    for line, row in enumerate(shown):
        y = top + step * line
        parts.append(_label(left - 12, y + 4, row.label, "end"))
        for index, name in enumerate(names):
            if ratio := row.ratio_to(name):
                parts.append(
                    f'<circle cx="{x(1 / ratio):.1f}" cy="{y}" r="5" '
                    f'fill="{_COLOURS[index % 6]}"><title>{escape(name)}: {1 / ratio:.2f}x '
                    "our speed</title></circle>"
                )
    parts.append(_label(left - 12, height - 16, "to the right: faster than we are", "end"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _order(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in found for name in row.spreads))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" **{ratio:.2f}x**"


def _short(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
