"""The soak, short enough for every day, and that it would notice what it is there to notice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soak.ledger import Ledger
from soak.plan import REFERENCE_FIELDS, Ask, Plan
from soak.users import SoakError, Users
from tabagent_model import Completion

pytestmark = pytest.mark.model

ANSWER = Completion("la la", (1,) * 24, "length")


def test_five_hundred_requests_of_eight_users_leave_nothing_behind(tmp_path: Path):
    report = tmp_path / "report.json"
    sizes = ["--requests", "500", "--users", "8", "--loads", "20", "--cancels", "0.1"]
    ran = subprocess.run(
        [sys.executable, "-m", "soak", *sizes, "--mistakes", "0.1", "--json", str(report)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    found = json.loads(report.read_text())
    assert found["faults"] == []
    assert sum(kind["requests"] for kind in found["kinds"].values()) == 500
    assert found["kinds"]["load"]["ended"] == {"answered": 20}
    assert found["kinds"]["reference"]["ended"] == {"answered": 5}


def test_seconds_of_it_over_http_leave_nothing_behind_either(tmp_path: Path):
    report = tmp_path / "report.json"
    sizes = ["--http", "--minutes", "0.1", "--users", "8", "--json", str(report)]
    ran = subprocess.run(
        [sys.executable, "-m", "soak", *sizes],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    found = json.loads(report.read_text())
    assert (found["faults"], found["kills"]) == ([], 1)
    kinds = {"dawdle", "leave", "look", "mistake", "reference", "stream", "whole"}
    assert found["kinds"].keys() == kinds


def test_a_seed_makes_the_same_requests_again():
    plans = [
        Plan(seed=seed, requests=300, cancels=0.1, mistakes=0.1, loads=3) for seed in (1, 1, 2)
    ]
    first, again, other = ([plan[number] for number in range(-10, 300)] for plan in plans)
    assert first == again
    assert first != other


def test_memory_that_grows_is_a_fault():
    ledger = Ledger(requests=10_000, warm_up=0)
    ledger.counts["ended"] = 10_000
    ledger.memory = [(number, 40 + number / 800) for number in range(0, 10_000, 100)]
    ledger.close()
    assert ledger.faults == ["memory grows by 1.25 MiB per 1,000 requests, 12.4 in all"]


def test_memory_that_goes_up_and_down_is_none():
    ledger = Ledger(requests=10_000, warm_up=0)
    ledger.counts["ended"] = 10_000
    ledger.memory = [(number, 40 + number // 100 % 7 * 2) for number in range(0, 10_000, 100)]
    ledger.close()
    assert ledger.faults == []


def test_a_request_that_never_ends_is_a_fault():
    ledger = Ledger(requests=2, warm_up=1)
    for number in (-1, 0):
        ledger.note(number, "generate", "answered", 0.1)
    ledger.close()
    assert ledger.faults == ["2 of 3 requests came to an end"]


@pytest.mark.parametrize(
    ("kind", "fields", "change"),
    [
        ("reference", {}, {"text": "la lo"}),
        ("reference", {}, {"tokens": (2,) * 24}),
        ("generate", {}, {"finish_reason": "cancelled"}),
        ("generate", {"max_tokens": 23}, {}),
        ("generate", {"max_tokens": 25}, {}),
        ("generate", {"stop": [" la"]}, {}),
    ],
)
def test_a_wrong_answer_is_a_fault(kind: str, fields: dict[str, Any], change: dict[str, Any]):
    plan = Plan(seed=1, requests=1, cancels=0, mistakes=0, loads=0)
    users = Users(None, plan, Ledger(1, 0), iter(()), ANSWER)
    assert users.check(Ask(kind, "a", REFERENCE_FIELDS), ANSWER) == "answered"
    with pytest.raises(SoakError):
        users.check(Ask(kind, "a", REFERENCE_FIELDS | fields), replace(ANSWER, **change))
