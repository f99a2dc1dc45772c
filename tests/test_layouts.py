"""Whether weights are laid out anew: by the built-in rule, or by what was clearly faster here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gguf_shapes import SHAPES, hollow_gguf
from machines import CPU, machine
from tabagent_model import InvalidRequestError, _core, _layouts, _native, estimate
from tabagent_model.__main__ import layouts_table
from tabagent_model._layouts import Times, Work, choose, pays
from tabagent_model.placement import Estimate

TILED = Times(in_file=(10.0, 50.0), anew=(20.0, 40.0))
"""The file's layout reads prompts faster, the other one writes answers."""
ANEW = Times(in_file=(30.0, 60.0), anew=(10.0, 30.0))
EVEN = Times(in_file=(10.0, 40.0), anew=(10.0, 40.0))
SIZES = {"Q4_K": 700, "Q6_K": 300}


class Stopwatch:
    """Gives the measurements it was told to, and notes what it was asked for."""

    def __init__(self, times: dict[str, Times] | None) -> None:
        self.times = times
        self.asked: list[tuple[list[str], int]] = []

    def __call__(self, types: list[str], n_threads: int) -> dict[str, Times] | None:
        self.asked.append((types, n_threads))
        return self.times and {kind: self.times[kind] for kind in types if kind in self.times}


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch, uncalibrated: None):
    """Puts other measurements in the place of the real ones."""

    def measures(times: dict[str, Times] | None) -> Stopwatch:
        stopwatch = Stopwatch(times)
        monkeypatch.setattr(_native.core, "measure_layouts", stopwatch)
        return stopwatch

    return measures


def slower(factor: float) -> Times:
    """Laid out anew, compared with how it is in the file."""
    return Times(EVEN.in_file, (EVEN.anew[0] * factor, EVEN.anew[1] * factor))


def test_the_built_in_rule_is_left_for_what_is_clearly_faster():
    factors = (0.94, 0.96, 1.0, 1.04, 1.06)
    by_rule = [
        [pays({"Q4_0": 1}, {"Q4_0": slower(factor)}, built_in) for factor in factors]
        for built_in in (True, False)
    ]
    assert by_rule == [[True, True, True, True, False], [True, False, False, False, False]]


def test_a_prompt_counts_twice_as_many_tokens_as_its_answer():
    # 2 x 10 + 50 in the file, 2 x 20 + 40 laid out anew
    assert [_layouts.cost(pace) for pace in TILED] == [70, 80]
    assert not pays({"Q4_K": 1}, {"Q4_K": TILED}, True)


def test_each_type_counts_by_its_bytes():
    times = {"Q4_K": TILED, "Q6_K": ANEW}
    assert pays({"Q4_K": 50, "Q6_K": 50}, times, False)
    assert not pays({"Q4_K": 950, "Q6_K": 50}, times, True)


def test_what_was_not_measured_of_every_type_decides_nothing():
    for built_in in (True, False):
        assert pays(SIZES, {}, built_in) is built_in
        assert pays(SIZES, {"Q4_K": TILED}, built_in) is built_in
        assert pays(SIZES, {"Q6_K": ANEW}, built_in) is built_in
        assert pays({}, {"Q4_K": TILED}, built_in) is built_in


def test_what_was_measured_is_remembered_by_the_process_and_by_the_home(measures, monkeypatch):
    stopwatch = measures({"Q4_K": TILED, "Q6_K": TILED, "Q8_0": ANEW})
    assert choose(SIZES, 2, True) is False
    assert choose({"Q4_K": 1}, 2, True) is False
    assert stopwatch.asked == [(["Q4_K", "Q6_K"], 2)]

    monkeypatch.setattr(_layouts, "_known", {})  # another process
    assert choose({"Q8_0": 1, "Q4_K": 1}, 2, False) is True
    assert choose(SIZES, 1, True) is False
    assert stopwatch.asked == [(["Q4_K", "Q6_K"], 2), (["Q8_0"], 2), (["Q4_K", "Q6_K"], 1)]
    assert _layouts.measured() == {
        Work("Q4_K", 2): TILED,
        Work("Q6_K", 2): TILED,
        Work("Q8_0", 2): ANEW,
        Work("Q4_K", 1): TILED,
        Work("Q6_K", 1): TILED,
    }


def test_weights_without_another_layout_are_not_measured(measures):
    stopwatch = measures({})
    assert [choose({}, 2, built_in) for built_in in (True, False)] == [True, False]
    assert stopwatch.asked == []


def test_a_busy_machine_gets_the_built_in_rule_and_nothing_is_kept(measures, monkeypatch):
    stopwatch = measures(None)
    assert [choose(SIZES, 2, True) for _ in range(2)] == [True, True]
    assert (len(stopwatch.asked), _layouts.measured()) == (1, {})

    stopwatch.times = {"Q4_K": TILED, "Q6_K": TILED}
    monkeypatch.setattr(_layouts, "_known", {})
    assert choose(SIZES, 2, True) is False


def test_calibration_can_be_turned_off_but_not_by_a_slip(measures, monkeypatch):
    stopwatch = measures({"Q4_K": TILED, "Q6_K": TILED})
    monkeypatch.setenv("TABAGENT_CALIBRATE", "0")
    assert [choose(SIZES, n_threads, True) for n_threads in (1, 2)] == [True, True]
    assert stopwatch.asked == []
    monkeypatch.setattr(_layouts, "_known", {})
    monkeypatch.setenv("TABAGENT_CALIBRATE", "off")
    with pytest.raises(InvalidRequestError, match="`TABAGENT_CALIBRATE` must be 0 or 1, got off"):
        choose(SIZES, 2, True)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{",
        '{"KEY": 5}',
        '{"KEY": {"Q4_K 2": 5}}',
        '{"KEY": {"Q4_K": [[1, 2], [3, 4]]}}',
        '{"KEY": {"Q4_K two": [[1, 2], [3, 4]]}}',
        '{"KEY": {"Q4_K 2": [[1, 2]]}}',
        '{"KEY": {"Q4_K 2": [[1, 2], [3]]}}',
        '{"KEY": {"Q4_K 2": [[1, 2], [3, "fast"]]}}',
        '{"KEY": {"Q4_K 2": [[1, 2], [3, 0]]}}',
        '{"KEY": {"Q4_K 2": [[1, 2], [3, NaN]]}}',
        '{"another processor": {"Q4_K 2": [[1, 2], [3, 4]]}}',
    ],
)
def test_a_damaged_or_foreign_memory_is_measured_again(measures, damage, tmp_path):
    stopwatch = measures({"Q4_K": TILED})
    choose({"Q4_K": 1}, 2, True)
    file = tmp_path / "layouts.json"
    ((key, _),) = json.loads(file.read_text()).items()
    file.write_text(damage.replace("KEY", key))
    assert _layouts.measured() == {}
    _layouts._known.clear()
    assert choose({"Q4_K": 1}, 2, True) is False
    assert stopwatch.asked == [(["Q4_K"], 2)] * 2
    assert _layouts.measured() == {Work("Q4_K", 2): TILED}


def test_the_doctor_shows_what_was_measured(measures):
    measures({"Q4_K": TILED, "Q6_K": ANEW})
    assert layouts_table().endswith("not measured yet; the first load of a model does")
    choose(SIZES, 2, True)
    assert layouts_table().splitlines()[1:] == [
        "  Q4_K, threads 2: as in the file 10.0 + 50, laid out anew 20.0 + 40, 0.88 times as fast",
        "  Q6_K, threads 2: as in the file 30.0 + 60, laid out anew 10.0 + 30, 2.40 times as fast",
    ]


def estimated(file: Path, cpu: dict[str, object]) -> Estimate:
    return estimate(file, n_threads=1, device="cpu", machine=machine(cpu=CPU | cpu))


def test_an_estimate_goes_by_what_is_remembered_of_this_machine_and_measures_nothing(
    measures, monkeypatch, tmp_path
):
    file = hollow_gguf(tmp_path / "q4_k.gguf", SHAPES["llama-3.1-8b"])
    stopwatch = measures({"Q4_K": TILED, "Q6_K": TILED})
    here = {"name": _core.detect_cpu()["brand"], "module": _native.start()}
    plain = estimated(file, here)
    assert (plain.is_repacked, stopwatch.asked) == (True, [])

    choose(SIZES, 1, True)
    monkeypatch.setattr(_layouts, "_known", {})  # another process
    in_file = estimated(file, here)
    assert (in_file.is_repacked, in_file.on("cpu").weights) == (False, 0)
    assert estimated(file, {}) == plain  # of another processor


def test_another_machine_has_the_rule_that_it_was_described_with(tmp_path):
    file = hollow_gguf(tmp_path / "q4_k.gguf", SHAPES["llama-3.1-8b"])
    found = [estimated(file, {"keeps_k_quants": keeps}).is_repacked for keeps in (True, False)]
    assert found == [False, True]
