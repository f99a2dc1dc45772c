"""What is chosen for speed on the real engine: it is made, seen, and changes no answer."""

from __future__ import annotations

import pytest

from tabagent_model import Model

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


@pytest.mark.parametrize(("flash_attn", "kv_type"), [*CHOICES, ("on", "bf16"), ("on", "q8_0")])
def test_a_full_context_goes_on_with_every_kind_of_cache(flash_attn, kv_type):
    asked = {"max_tokens": 300, "ignore_eos": True, "overflow": "shift"}
    with load(flash_attn=flash_attn, kv_type=kv_type) as model:
        answer = model.generate("Once upon a time", **asked)
    assert (len(answer.tokens), answer.finish_reason) == (300, "length")
    assert answer.usage.dropped_tokens > 0
