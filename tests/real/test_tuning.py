"""What is chosen for speed on the real engine: it is made, seen, and changes no answer."""

from __future__ import annotations

import pytest

from tabagent_model import Model, ModelConfig, _core, _layouts, estimate, hardware
from tabagent_model.placement._estimate import Header

pytestmark = pytest.mark.model

CHOICES = [("on", "f16"), ("off", "f16"), ("off", "bf16"), ("off", "f32")]
PROMPTS = [
    "Once upon a time",
    "The cat",
    "Why is the sky blue?",
    "One, two, three, four, five, six, seven,",
    "Ünïcödé and 字 and 🙂",
    "What is the capital of France?",
]


def load(**fields) -> Model:
    return Model.load(n_ctx=256, max_parallel=1, n_threads=1, device="cpu", **fields)


def test_every_choice_gives_the_same_answers():
    answers = []
    for flash_attn, kv_type in CHOICES:
        with load(flash_attn=flash_attn, kv_type=kv_type) as model:
            assert (model.info()["flash_attn"], model.info()["kv_type"]) == (flash_attn, kv_type)
            answers.append(
                [model.generate(p, max_tokens=24, temperature=0, repeat_penalty=1) for p in PROMPTS]
            )
    assert answers == [answers[0]] * len(CHOICES)


def test_automatic_means_one_of_them_and_keeps_what_is_fixed():
    with load() as model:
        info = model.info()
    assert (info["flash_attn"], info["kv_type"]) in CHOICES
    with load(kv_type="f16") as model:
        info = model.info()
    assert (info["flash_attn"] in ("on", "off"), info["kv_type"]) == (True, "f16")
    with load(flash_attn="on") as model:
        info = model.info()
    assert (info["flash_attn"], info["kv_type"]) == ("on", "f16")


def test_whether_weights_are_laid_out_anew_can_be_said_and_seen():
    for repack in (True, False):
        with load(repack=repack) as model:
            assert model.info()["is_repacked"] is repack


@pytest.fixture
def bundled_types() -> list[str]:
    """Those of its weights that the CPU module lays out anew; some modules lay none out."""
    layers = Header(ModelConfig().path).sizes["layers"]
    return sorted(set(layers[0]["matrices"]) & set(hardware.detect().cpu.layouts))


def test_a_measurement_covers_the_bundled_model_or_says_that_the_machine_is_busy(bundled_types):
    found = _core.measure_layouts([*bundled_types, "F16", "Q9_9"], 1)
    if found is not None:
        assert sorted(found) == bundled_types
        assert all(time > 0 for times in found.values() for pace in times for time in pace)


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize("anew_is_faster", [True, False])
def test_what_is_remembered_of_layouts_decides_the_load_and_its_estimate(
    anew_is_faster: bool, bundled_types: list[str]
):
    times = [[10, 40], [5, 20]] if anew_is_faster else [[5, 20], [10, 40]]
    for kind in bundled_types:
        _layouts._cache().keep(f"{kind} 1", times)
    expected = estimate(n_ctx=256, max_parallel=1, n_threads=1, device="cpu")
    with load() as model:
        found = model.info()["is_repacked"]
    is_repacked = anew_is_faster or not bundled_types
    assert (found, expected.is_repacked) == (is_repacked, is_repacked)
    assert (expected.on("cpu").weights > 0) is bool(anew_is_faster and bundled_types)


@pytest.mark.parametrize(("flash_attn", "kv_type"), [*CHOICES, ("on", "bf16"), ("on", "q8_0")])
def test_a_full_context_goes_on_with_every_kind_of_cache(flash_attn, kv_type):
    asked = {"max_tokens": 300, "ignore_eos": True, "overflow": "shift"}
    with load(flash_attn=flash_attn, kv_type=kv_type) as model:
        answer = model.generate("Once upon a time", **asked)
    assert (len(answer.tokens), answer.finish_reason) == (300, "length")
    assert answer.usage.dropped_tokens > 0
