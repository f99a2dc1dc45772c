"""Which attention is chosen: the fastest that was measured, clearly, and remembered."""

from __future__ import annotations

import json

import pytest

from tabagent_model import InvalidRequestError, _attention, _native
from tabagent_model.__main__ import attention_table
from tabagent_model._attention import Choice, Times, Work, choose, fastest

OWN, PLAIN, BF16, F32 = ("on", "f16"), ("off", "f16"), ("off", "bf16"), ("off", "f32")
ALL = [OWN, PLAIN, BF16, F32]
WORK = Work(64, 14, 2, 4096, 2)
TIMES: Times = {OWN: (30.0, 370.0), PLAIN: (50.0, 300.0), BF16: (40.0, 240.0), F32: (60.0, 300.0)}


class Machine:
    """Gives the measurements it was told to, and counts them."""

    def __init__(self, times: Times | None) -> None:
        self.times = times
        self.asked: list[Work] = []

    def __call__(self, *work: int) -> Times | None:
        self.asked.append(Work(*work))
        return self.times


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch, uncalibrated: None):
    """Puts other measurements in the place of the real ones."""

    def measures(times: Times | None) -> Machine:
        machine = Machine(times)
        monkeypatch.setattr(_native.core, "measure_attention", machine)
        return machine

    return measures


def slower(times: Times, choice: Choice, factor: float) -> Times:
    prompt, answer = TIMES[OWN]
    return {**times, choice: (prompt * factor, answer * factor)}


def test_the_fastest_of_what_is_left_to_choose_is_taken():
    assert fastest(TIMES, ALL, 4096) == BF16
    assert fastest(TIMES, [OWN, PLAIN, F32], 4096) == PLAIN
    assert fastest(TIMES, [PLAIN, F32], 4096) == PLAIN
    assert fastest(TIMES, [OWN], 4096) == OWN


def test_another_choice_than_llama_cpps_must_be_clearly_faster():
    assert fastest(slower(TIMES, BF16, 0.97), [OWN, BF16], 4096) == OWN
    assert fastest(slower(TIMES, BF16, 0.94), [OWN, BF16], 4096) == BF16
    assert fastest(slower(TIMES, F32, 0.94), [OWN, F32], 4096) == OWN
    assert fastest(slower(TIMES, F32, 0.90), [OWN, F32], 4096) == F32


def test_what_was_measured_is_remembered_by_the_process_and_by_the_home(measures, monkeypatch):
    machine = measures(TIMES)
    assert choose(WORK, ALL, OWN) == BF16
    assert choose(WORK, [OWN, PLAIN], OWN) == PLAIN
    assert machine.asked == [WORK]

    monkeypatch.setattr(_attention, "_known", {})  # another process
    assert choose(WORK, ALL, OWN) == BF16
    assert machine.asked == [WORK]
    assert _attention.measured() == {WORK: TIMES}

    assert choose(WORK._replace(n_threads=1), ALL, OWN) == BF16
    assert machine.asked == [WORK, WORK._replace(n_threads=1)]


def test_where_there_is_no_choice_nothing_is_measured(measures):
    machine = measures(TIMES)
    assert choose(WORK, [F32], OWN) == F32
    assert machine.asked == []


def test_a_busy_machine_gets_the_built_in_rule_and_nothing_is_kept(measures, monkeypatch):
    machine = measures(None)
    assert [choose(WORK, ALL, PLAIN) for _ in range(2)] == [PLAIN, PLAIN]
    assert machine.asked == [WORK]
    assert _attention.measured() == {}

    machine.times = TIMES
    monkeypatch.setattr(_attention, "_known", {})
    assert choose(WORK, ALL, PLAIN) == BF16


def test_calibration_can_be_turned_off_but_not_by_a_slip(measures, monkeypatch):
    machine = measures(TIMES)
    monkeypatch.setenv("TABAGENT_CALIBRATE", "0")
    assert choose(WORK, ALL, PLAIN) == PLAIN
    assert machine.asked == []
    monkeypatch.setattr(_attention, "_known", {})
    monkeypatch.setenv("TABAGENT_CALIBRATE", "off")
    with pytest.raises(InvalidRequestError, match="`TABAGENT_CALIBRATE` must be 0 or 1, got off"):
        choose(WORK, ALL, PLAIN)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{",
        '{"KEY": 5}',
        '{"KEY": {"NAME": 5}}',
        '{"KEY": {"64 14": {}}}',
        '{"KEY": {"NAME": {"on+f16": [1]}}}',
        '{"KEY": {"NAME": {"f16": [1, 2]}}}',
    ],
)
def test_a_damaged_memory_is_measured_again(measures, damage, tmp_path):
    machine = measures(TIMES)
    choose(WORK, ALL, OWN)
    file = tmp_path / "attention.json"
    ((key, facts),) = json.loads(file.read_text()).items()
    file.write_text(damage.replace("KEY", key).replace("NAME", *facts))
    assert _attention.measured() == {}
    _attention._known.clear()
    assert choose(WORK, ALL, OWN) == BF16
    assert machine.asked == [WORK, WORK]
    assert _attention.measured() == {WORK: TIMES}


def test_a_home_that_cannot_be_written_costs_only_time(measures, monkeypatch, tmp_path):
    machine = measures(TIMES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TABAGENT_HOME", str(tmp_path / "file"))
    assert choose(WORK, ALL, OWN) == BF16
    assert machine.asked == [WORK]


def test_the_doctor_shows_what_was_measured(measures):
    measures(TIMES)
    assert attention_table().endswith("not measured yet; the first load of a model does")
    choose(WORK, ALL, OWN)
    assert attention_table().splitlines()[1:] == [
        "  heads of 64 x 14/2, n_ctx 4096, threads 2: off+bf16, 1.34 times as fast as on+f16",
        "    on+f16 30.0 + 370, off+f16 50.0 + 300, off+bf16 40.0 + 240, off+f32 60.0 + 300",
    ]
