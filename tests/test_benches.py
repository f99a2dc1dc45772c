"""The benches' own logic: what is chosen, what is run, and what the report makes of it."""

from __future__ import annotations

import json
import os
import random
from argparse import Namespace
from dataclasses import replace
from math import prod
from xml.etree import ElementTree

import pytest
from benches import load, machine, report
from benches.__main__ import Contender, _cases, _contenders, _is_complete, _plan
from benches.cases import (
    BATCHED_LIKE_US,
    CASES,
    OURS,
    OURS_ASYNC,
    OURS_SERVED,
    Case,
    Metric,
    Target,
)
from benches.engines import ENGINES, Answer, Setting, _attention
from benches.jobs import JOBS, percentile_99
from benches.models import SHAPES, _tensors, words
from benches.report import Result

from serving import Served, scripted

SPEED = Metric("rate", "tokens/s", "tok/s", more_is_better=True, targets=(Target(1.5, "them"),))
LAG = Metric("lag", "lag", "ms", targets=(Target(5), Target(1.05, "them")))
CASE = Case("case", "a case", "group", "tiny", "decode", {}, (OURS, "them"), (SPEED, LAG))
FACTS = {"commit": "abc", "versions": {"one": 1}, "load": [0.5, 1.0], "virtual": True}


def result(ours: list[float], theirs: list[float], **more: object) -> Result:
    runs = {
        name: [{"rate": rate, "lag": 10 / rate, "others_cpus": 0.0, **more} for rate in rates]
        for name, rates in ((OURS, ours), ("them", theirs))
        if rates
    }
    return Result(CASE, "2026-11-21", runs)


def checks(of: Result) -> list[tuple[str, float | None, bool | None]]:
    found = [check for row in report.rows([of]) for check in row.checks()]
    return [(c.demand, c.measured, c.is_reached) for c in found]


def asked(*cases: str, **given: object) -> Namespace:
    usual = {"full": False, "quick": False, "cpu": False, "peers": "", "also": []}
    return Namespace(**{**usual, "cases": list(cases), **given})


def test_a_target_counts_medians_and_the_direction_of_its_figure():
    assert checks(result([2.0, 8.0, 4.0], [1.0, 2.0, 9.0])) == [
        ("≥ 1.5 x them", 2.0, True),
        ("≤ 5 ms", 2.5, True),
        ("≤ 1.05 x them", 0.5, True),
    ]
    assert checks(result([1.0], [2.0])) == [
        ("≥ 1.5 x them", 0.5, False),
        ("≤ 5 ms", 10.0, False),
        ("≤ 1.05 x them", 2.0, False),
    ]


def test_a_target_against_somebody_who_was_not_measured_is_open():
    assert checks(result([4.0], [])) == [
        ("≥ 1.5 x them", None, None),
        ("≤ 5 ms", 2.5, True),
        ("≤ 1.05 x them", None, None),
    ]


def test_a_target_that_is_met_exactly_is_reached():
    assert checks(result([3.0], [2.0]))[0] == ("≥ 1.5 x them", 1.5, True)


def test_the_factor_is_above_one_where_we_are_better():
    rate, lag = report.rows([result([2.0, 4.0, 9.0], [2.0])])
    assert (rate.ratio_to("them"), lag.ratio_to("them")) == (2.0, 2.0)
    assert rate.ratio_to("nobody") is None


def test_the_markdown_tells_targets_figures_facts_and_what_went_wrong():
    found = result([1000.0, 1234.0, 1500.0], [617.0], disturbed=True)
    found.failures["they"] = "crashed"
    found.attention["like us"] = {"flash_attn": "off", "kv_type": "bf16"}
    assert report.markdown([found], FACTS).splitlines() == [
        "| | |",
        "|---|---|",
        "| date | 2026-11-21 |",
        "| commit | abc |",
        "| versions | one 1 |",
        "| load | 0.5, 1.0 |",
        "| virtual | yes |",
        "",
        "| what | must reach | measured | reached |",
        "|---|---|---:|---|",
        "| a case: tokens/s | ≥ 1.5 x them | 2.00 | yes |",
        "| a case: lag | ≤ 5 ms | 0.01 | yes |",
        "| a case: lag | ≤ 1.05 x them | 0.50 | yes |",
        "",
        "3 of 3 reached.",
        "",
        "| what | unit | tabagent_model | them |",
        "|---|---|---:|---:|",
        "| a case: tokens/s | tok/s | 1,234 (1,000-1,500) | 617 (617-617) **2.00x** |",
        "| a case: lag | ms | 0.01 (0.01-0.01) | 0.02 (0.02-0.02) **2.00x** |",
        "",
        "Medians, with the least and the greatest of all runs in brackets. The factor says how",
        "much better ours is (below 1: worse), for speeds and times alike.",
        "",
        "- they failed at “a case”: crashed",
        "- like us: case flash_attn off, kv_type bf16",
        "- Somebody else computed during at least one run of: "
        "case (tabagent_model, 0.0 CPUs), case (them, 0.0 CPUs)",
    ]


def test_a_group_that_we_are_not_in_has_no_column_of_ours():
    tools_only = Result(CASE, "today", {"them": [{"rate": 1.0}]})
    assert "| what | unit | them |" in report.markdown([tools_only], {})


def test_the_picture_is_sound_xml_and_has_a_dot_for_each_contender_of_each_figure():
    found = list(report.rows([result([4.0], [1.0])]))
    picture = ElementTree.fromstring(report.svg(found))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["them: 0.25x our speed"] * 2


def test_results_are_read_again_only_for_the_same_code_machine_and_case(tmp_path):
    found = result([4.0], [1.0])
    report.write([found], FACTS, tmp_path)
    changed = replace(CASE, parameters={"depth": 1})
    assert report.read(tmp_path, [CASE], {**FACTS, "load": 3}) == [found]
    assert report.read(tmp_path, [changed], FACTS) == []
    assert report.read(tmp_path, [CASE], {**FACTS, "commit": "def"}) == []
    assert report.read(tmp_path, [CASE], {**FACTS, "threads": 3}) == []
    assert report.read(tmp_path / "empty", [CASE], FACTS) == []


def test_results_of_several_days_show_the_first_and_the_last():
    days = [replace(result([1.0], []), date=day) for day in ("2026-11-23", "2026-11-21")]
    assert "| date | 2026-11-21 to 2026-11-23 |" in report.markdown(days, {})


def test_the_file_for_programs_holds_the_targets(tmp_path):
    report.write([result([3.0], [])], FACTS, tmp_path)
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["facts"] == FACTS
    assert data["cases"]["case"]["targets"][0] == {
        "figure": "rate",
        "must reach": "≥ 1.5 x them",
        "measured": None,
        "reached": None,
    }


def test_publishing_writes_the_page_and_its_picture(tmp_path):
    page = report.publish([result([4.0], [1.0])], FACTS, tmp_path)
    assert "](results.svg)" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "results.svg"]


def test_every_case_can_be_run_by_those_it_names():
    known = {name.removesuffix(", our attention") for case in CASES for name in case.engines}
    assert known <= set(ENGINES)
    lone = [c.name for c in CASES if c.job not in JOBS and c.engines != (BATCHED_LIKE_US,)]
    assert lone == []
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_target_names_a_contender_of_its_case():
    strange = [
        (case.name, target)
        for case in CASES
        for metric in case.metrics
        for target in metric.targets
        if target.against not in (None, *case.engines)
    ]
    assert strange == []


def test_cases_are_chosen_by_name_and_by_group():
    names = [case.name for case in _cases(asked("decode", "kv-layout"))]
    assert names == ["decode", *(case.name for case in CASES if case.group == "kv-layout")]
    assert _cases(asked(full=True)) == list(CASES)


def test_a_case_that_nobody_knows_is_answered_with_those_there_are():
    with pytest.raises(
        SystemExit, match=r"no case is called `decod`; there are .*crowd-32.*latency"
    ):
        _cases(asked("decod"))


def test_a_short_run_uses_the_tiny_model_and_keeps_only_the_targets_of_that_model():
    short = {case.name: case for case in _cases(asked())}
    assert {case.model for case in short.values()} == {"tiny"}
    assert short["prefill"].metrics[0].targets == ()
    assert short["decode-tiny"].metrics[0].targets != ()


def test_tools_that_can_compute_attention_as_we_do_are_measured_both_ways():
    contenders = _contenders(asked(peers="llama-batched-bench,xllamacpp", also=["kv_type=bf16"]))
    assert [c.name for c in contenders] == [
        OURS,
        OURS_ASYNC,
        OURS_SERVED,
        f"{OURS} kv_type=bf16",
        f"{OURS_ASYNC} kv_type=bf16",
        f"{OURS_SERVED} kv_type=bf16",
        "llama-batched-bench",
        "xllamacpp",
        BATCHED_LIKE_US,
        f"{BATCHED_LIKE_US} kv_type=bf16",
    ]


def test_the_plan_counts_the_runs_and_their_time():
    cases = [replace(CASE, takes_s=30), replace(CASE, engines=("them",), takes_s=60)]
    assert _plan(cases, [Contender(OURS), Contender("them")], rounds=5) == (
        "2 cases, 3 runs in each of 5 rounds: about 10 minutes on two quiet cores"
    )


def test_a_case_is_complete_when_everybody_was_measured_as_often_as_asked():
    both, nobody = [Contender(OURS), Contender("them")], [Contender("not in it")]
    found = result([4.0, 5.0], [1.0])
    assert [_is_complete(found, both, rounds) for rounds in (1, 2)] == [True, False]
    assert _is_complete(found, nobody, 5)
    assert not _is_complete(None, both, 1)


def test_attention_is_told_in_the_flags_of_llama_cpp():
    setting = Setting("m", 1, 1, options={"flash_attn": "off", "kv_type": "bf16", "n_batch": 8})
    assert _attention(setting) == ["-fa", "off", "-ctk", "bf16", "-ctv", "bf16"]
    assert _attention(Setting("m", 1, 1)) == []


def test_an_answer_tells_its_rate_and_gaps():
    answer = Answer(asked=1.0, pieces=[3.0, 4.0, 6.0], tokens=3)
    assert (answer.rate, answer.gaps_s, answer.tokens) == (2 / 3, [1.0, 2.0], 3)


def test_the_99th_percentile_lies_within_what_was_seen():
    assert percentile_99([float(n) for n in range(101)]) == 99
    assert percentile_99([1.0, 2.0]) == pytest.approx(1.99)


def test_a_text_has_a_word_for_each_token_and_another_seed_begins_differently():
    assert len(words(100, 1).split()) == 100
    assert words(4, 1) != words(4, 2)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-3b-q4_k", 3_085_938_688), ("qwen2.5-7b-q4_k", 7_615_616_512)],
)
def test_a_shape_has_as_many_parameters_as_the_model_it_is_named_after(name: str, parameters: int):
    assert sum(prod(sizes) for _, sizes, _, _ in _tensors(SHAPES[name])) == parameters


def test_a_neighbour_is_held_to_its_core_and_is_gone_afterwards():
    with machine.neighbours(nice=19, cores=1) as found:
        (process,) = found.process_ids
        held, nice = os.sched_getaffinity(process), os.getpriority(os.PRIO_PROCESS, process)
    assert (held, nice) == ({min(os.sched_getaffinity(0))}, 19)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


WHY = [{"role": "user", "content": "Why?"}]


async def test_clients_that_ask_in_turns_hear_every_token():
    _, model = scripted()
    with model, Served(model) as served:
        heard = await load.in_turns(served.port, [load.Chat(WHY, 3)] * 6, clients=2)
    assert [(len(each.pieces), each.tokens, each.failure) for each in heard] == [(3, 3, None)] * 6
    assert all(each.asked < each.pieces[0] for each in heard)


async def test_clients_that_come_as_they_like_are_all_heard():
    _, model = scripted()
    with model, Served(model) as served:
        chats = [load.Chat(WHY, 3)] * 4
        heard = await load.as_they_come(served.port, chats, 1000, random.Random(1))
    assert [each.failure for each in heard] == [None] * 4


async def test_an_answer_that_is_not_as_asked_is_a_failure():
    _, model = scripted()
    with model, Served(model) as served:
        chats = [load.Chat(WHY, 5), load.Chat(WHY, 3, {"temperature": 9}), load.Chat(WHY, 3)]
        heard = await load.in_turns(served.port, chats, clients=1)
    few, refused, good = [each.failure for each in heard]
    assert (few, good) == ("3 tokens instead of 5", None)
    assert refused is not None and refused.startswith("status 400")


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_events_are_read_however_they_arrive(size: int):
    told = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "", "b")]
    told.append({"choices": [], "usage": {"completion_tokens": 2}})
    events = [f"data: {json.dumps(each)}\n\n".encode() for each in told]
    events += [b": ping\n\n", b"data: [DONE]\n\n"]
    body = b"".join(events)
    chunks = [body[:60], body[60:200], body[200:]]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
    found = load.Exchange()
    found.arrived = [(float(at), answer[at : at + size]) for at in range(0, len(answer), size)]
    heard = found.heard(2)
    assert (len(heard.pieces), heard.tokens, heard.failure) == (2, 2, None)
    assert heard.pieces == sorted(heard.pieces)
    found.arrived = [(0.0, answer[:-40])]
    assert found.heard(2).failure == "it ended before its end"
