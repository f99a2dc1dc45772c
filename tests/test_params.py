import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from tabagent_model import GenerationConfig, InvalidRequestError, ModelConfig
from tabagent_model.params import GenerationFields, ModelFields


def test_the_defaults_are_the_documented_ones():
    assert ModelConfig().to_dict() == {
        "model_path": None,
        "n_ctx": 4096,
        "n_batch": 512,
        "n_threads": 0,
        "max_parallel": 0,
        "queue_size": 1024,
        "prompt_cache_mb": -1,
        "gpu_layers": "auto",
        "device": "auto",
        "fallback": "auto",
        "n_ctx_min": 0,
        "main_gpu": 0,
        "split_mode": "layer",
        "tensor_split": [],
        "use_mmap": True,
        "use_mlock": False,
        "repack": "auto",
        "flash_attn": "auto",
        "kv_type": "auto",
        "vocab_only": False,
        "warmup": True,
        "isolation": "none",
        "watchdog_s": 60.0,
    }
    assert GenerationConfig().to_dict() == {
        "max_tokens": 512,
        "temperature": 0.7,
        "dynatemp_range": 0.0,
        "dynatemp_exponent": 1.0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": 0.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "penalty_last_n": 64,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_penalty_last_n": 64,
        "dry_sequence_breakers": ["\n", ":", '"', "*"],
        "mirostat": 0,
        "mirostat_tau": 5.0,
        "mirostat_eta": 0.1,
        "logit_bias": {},
        "banned_tokens": [],
        "logprobs": None,
        "stop": [],
        "stop_tokens": [],
        "json_schema": None,
        "regex": None,
        "lark": None,
        "grammar": None,
        "seed": -1,
        "ignore_eos": False,
        "min_tokens": 0,
        "timeout_s": None,
        "deadline": None,
        "max_queue_wait_s": None,
        "priority": "normal",
        "overflow": "error",
        "n_keep": -1,
        "add_bos": True,
        "special": False,
    }


def test_builders_give_changed_copies():
    config = ModelConfig("m.gguf")
    changed = config.with_gpu_layers(32).with_context_size(8192).with_mlock(True)
    assert changed == ModelConfig("m.gguf", gpu_layers=32, n_ctx=8192, use_mlock=True)
    assert config == ModelConfig("m.gguf")
    assert config.with_mmap(False).with_threads(4).with_batch(64).with_main_gpu(1) == replace(
        config, use_mmap=False, n_threads=4, n_batch=64, main_gpu=1
    )
    assert config.with_gpu_layers("all").with_parallel(2).cpu_only() == replace(
        config, gpu_layers=0, max_parallel=2
    )
    assert config.with_model_path(None).with_queue_size(7) == ModelConfig(queue_size=7)

    generation = GenerationConfig()
    assert generation.with_max_tokens(8).with_temperature(0).with_stop("\n", "END") == replace(
        generation, max_tokens=8, temperature=0.0, stop=("\n", "END")
    )
    assert generation.with_seed(42).with_top_p(0.5).with_top_k(1).with_min_p(0.1) == replace(
        generation, seed=42, top_p=0.5, top_k=1, min_p=0.1
    )
    assert generation.with_timeout(3).with_priority("low").with_repeat_penalty(1, 8) == replace(
        generation, timeout_s=3.0, priority="low", repeat_penalty=1.0, penalty_last_n=8
    )
    assert generation.greedy() == replace(generation, temperature=0.0, repeat_penalty=1.0)


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        ModelConfig().n_ctx = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig("m.gguf", n_ctx=8192, gpu_layers="all", use_mmap=False),
        GenerationConfig(),
        GenerationConfig(stop=["a", "b"], timeout_s=1.5, seed=7, priority="high"),
        GenerationConfig(logit_bias={5: 1.5, 7: -100}, banned_tokens=[1, 2], logprobs=0),
    ],
    ids=repr,
)
def test_a_config_survives_dict_json_and_pickle(config: ModelConfig | GenerationConfig):
    kind = type(config)
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_json(config.to_json()) == config
    assert kind.from_json(json.dumps(config.to_dict()).encode()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_none_stands_for_the_default():
    assert ModelConfig(n_ctx=None, gpu_layers=None) == ModelConfig()  # type: ignore[arg-type]
    assert GenerationConfig(stop=None, max_tokens=None) == GenerationConfig()  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers():
    config = GenerationConfig(
        max_tokens=numpy.int64(5), top_p=numpy.float32(0.5), ignore_eos=numpy.True_
    )
    assert config == GenerationConfig(max_tokens=5, top_p=0.5, ignore_eos=True)
    assert json.loads(config.to_json())["max_tokens"] == 5


def test_a_path_may_be_a_path_object_and_home_is_resolved():
    assert ModelConfig(Path("m.gguf")) == ModelConfig("m.gguf")
    assert ModelConfig("~/m.gguf").path == str(Path.home() / "m.gguf")
    assert ModelConfig("").path == ""
    assert ModelConfig().path.endswith("assets/tiny-chat.gguf")


def test_one_stop_string_need_not_be_a_list():
    assert GenerationConfig(stop="END") == GenerationConfig(stop=["END"])


def test_ids_of_biases_may_be_strings_as_they_are_in_json():
    config = GenerationConfig(logit_bias={"5": 1, "17": -100})
    assert config == GenerationConfig(logit_bias={5: 1.0, 17: -100.0})
    assert config.logit_bias == {5: 1.0, 17: -100.0}


def test_a_config_with_biases_can_be_a_key():
    assert {GenerationConfig(logit_bias={5: 1}): 1}[GenerationConfig(logit_bias={5: 1})] == 1


def test_a_hook_is_part_of_the_config_but_no_plain_value():
    def hook(tokens: list[int], logits: "memoryview[float]") -> None:
        raise AssertionError

    config = GenerationConfig(logits_hook=hook)
    assert config.logits_hook is hook
    assert config != GenerationConfig()
    assert GenerationConfig.from_json(config.to_json()) == GenerationConfig()


def test_the_old_name_of_gpu_layers_is_understood():
    assert ModelConfig(n_gpu_layers=5) == ModelConfig(gpu_layers=5)  # type: ignore[call-arg]
    assert ModelConfig.from_dict({"n_gpu_layers": "all"}) == ModelConfig(gpu_layers="all")
    with pytest.raises(InvalidRequestError, match="given twice"):
        ModelConfig(gpu_layers=1, n_gpu_layers=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [0, -1, 7, 2**24 + 1, 2**31, 2**64, "4096", 4096.5, 4096.0, True])
def test_a_wrong_n_ctx_is_refused_by_name_with_its_range(value: Any):
    with pytest.raises(InvalidRequestError) as caught:
        ModelConfig(n_ctx=value)
    assert (caught.value.name, caught.value.message) == (
        "n_ctx",
        f"`n_ctx` must be a whole number between 8 and 16777216, got {value!r}",
    )


WRONG_MODEL: list[tuple[str, Any]] = [
    ("n_batch", 0),
    ("n_batch", 65_537),
    ("n_threads", -1),
    ("n_threads", 100_000),
    ("max_parallel", 257),
    ("queue_size", 0),
    ("gpu_layers", -5),
    ("gpu_layers", "some"),
    ("gpu_layers", 1.0),
    ("device", "tpu"),
    ("device", "CUDA0"),
    ("device", "cpu:1"),
    ("device", "cuda:"),
    ("device", "cuda:one"),
    ("device", 1),
    ("fallback", "cuda"),
    ("n_ctx_min", -1),
    ("main_gpu", -1),
    ("tensor_split", [0, 0.0]),
    ("tensor_split", [1] * 17),
    ("tensor_split", "11"),
    ("tensor_split", 1.0),
    ("split_mode", "diagonal"),
    ("split_mode", 1),
    ("flash_attn", 7),
    ("kv_type", "q9"),
    ("use_mmap", "yes"),
    ("use_mlock", 1),
    ("repack", "always"),
    ("repack", 1),
    ("model_path", 5),
]
WRONG_GENERATION: list[tuple[str, Any]] = [
    ("max_tokens", -2),
    ("max_tokens", 2**31),
    ("temperature", -1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 10**400),
    ("top_k", -1),
    ("top_k", 2**31),
    ("top_p", 0),
    ("top_p", -1),
    ("top_p", 1.1),
    ("min_p", 1.0),
    ("min_p", -0.1),
    ("repeat_penalty", 0),
    ("repeat_penalty", 11),
    ("presence_penalty", math.nan),
    ("frequency_penalty", 2.1),
    ("penalty_last_n", -2),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a", 5]),
    ("stop", b"END"),
    ("stop", 5),
    ("stop", ["x"] * 65),
    ("stop", iter(["x"] * 10_000)),
    ("stop", "x" * 1025),
    ("seed", -2),
    ("seed", 2**63),
    ("timeout_s", 0),
    ("timeout_s", -1),
    ("timeout_s", math.inf),
    ("deadline", -1),
    ("max_queue_wait_s", 0),
    ("overflow", "drop"),
    ("n_keep", -2),
    ("priority", "urgent"),
    ("min_tokens", -1),
    ("ignore_eos", None.__class__),
    ("dynatemp_range", -0.1),
    ("dynatemp_exponent", math.inf),
    ("typical_p", 0),
    ("typical_p", 1.1),
    ("top_n_sigma", -2),
    ("top_n_sigma", math.nan),
    ("xtc_probability", 1.1),
    ("xtc_threshold", -0.1),
    ("repeat_penalty", math.nan),
    ("penalty_last_n", 2**31 - 1),
    ("dry_multiplier", math.nan),
    ("dry_base", 0),
    ("dry_base", 0.9),
    ("dry_allowed_length", -1),
    ("dry_penalty_last_n", -2),
    ("dry_sequence_breakers", ["x"] * 10_000),
    ("dry_sequence_breakers", "x" * 2**20),
    ("dry_sequence_breakers", "é" * 33),
    ("dry_sequence_breakers", [""]),
    ("mirostat", 3),
    ("mirostat", True),
    ("mirostat_tau", -1),
    ("mirostat_eta", math.nan),
    ("logit_bias", 5),
    ("logit_bias", "5"),
    ("logit_bias", {-5: 1.0}),
    ("logit_bias", {"abc": 1.0}),
    ("logit_bias", {"-5": 1.0}),
    ("logit_bias", {1.5: 1.0}),
    ("logit_bias", {2**31: 1.0}),
    ("banned_tokens", 5),
    ("banned_tokens", {1: 2}),
    ("banned_tokens", "12"),
    ("stop_tokens", iter(range(10_000))),
    ("logits_hook", "a name"),
    ("logprobs", 10**6),
    ("logprobs", -1),
    ("logprobs", True),
]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(ModelConfig, *wrong) for wrong in WRONG_MODEL]
    + [(GenerationConfig, *wrong) for wrong in WRONG_GENERATION],
)
def test_a_value_out_of_range_is_refused_by_name(kind: Any, name: str, value: Any):
    with pytest.raises(InvalidRequestError, match=f"`{name}` must be .+, got ") as caught:
        kind(**{name: value})
    assert caught.value.name == name
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {3: math.nan}}, "`logit_bias[3]` must be a number between -3.4e+38 and"),
        ({"logit_bias": {3: math.inf}}, "`logit_bias[3]` must be a number between -3.4e+38 and"),
        ({"logit_bias": {"3": "x"}}, "`logit_bias[3]` must be a number between -3.4e+38 and"),
        ({"banned_tokens": [5, -1]}, "`banned_tokens[1]` must be a token id: a whole number"),
        ({"stop_tokens": [True]}, "`stop_tokens[0]` must be a token id: a whole number between"),
    ],
    ids=str,
)
def test_one_wrong_entry_among_many_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(InvalidRequestError) as caught:
        GenerationConfig(**fields)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("share", [-1, math.nan, math.inf, "1"])
def test_a_wrong_share_of_a_gpu_is_named(share: Any):
    with pytest.raises(
        InvalidRequestError, match=r"`tensor_split\[1\]` must be a number between 0"
    ):
        ModelConfig(tensor_split=[1, share])


def test_a_value_that_cannot_be_shown_is_still_refused():
    class Strange:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(InvalidRequestError, match="a Strange that cannot be shown"):
        GenerationConfig(max_tokens=Strange())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "typed", "meant"),
    [
        (ModelConfig, "n_ctxx", "n_ctx"),
        (ModelConfig, "N_CTX", "n_ctx"),
        (ModelConfig, "mlock", "use_mlock"),
        (GenerationConfig, "max_token", "max_tokens"),
        (GenerationConfig, "temprature", "temperature"),
        (GenerationConfig, "stops", "stop"),
    ],
)
def test_an_unknown_keyword_gets_a_suggestion(kind: Any, typed: str, meant: str):
    for make in (kind, kind().with_fields, lambda **given: kind.from_dict(given)):
        with pytest.raises(InvalidRequestError) as caught:
            make(**{typed: 1})
        assert (caught.value.name, caught.value.hint) == (typed, f"did you mean `{meant}`?")


def test_a_keyword_like_no_other_gets_the_list():
    with pytest.raises(InvalidRequestError, match="there are max_tokens, temperature"):
        GenerationConfig(xyz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"max_tokens": "x"}', '{"nope": 1}'])
def test_json_that_is_no_config_is_refused(text: str):
    with pytest.raises(InvalidRequestError):
        GenerationConfig.from_json(text)


def test_the_keywords_for_type_checkers_are_the_fields():
    names = [field.name for field in fields(ModelConfig)]
    assert sorted(ModelFields.__annotations__) == sorted([*names, "n_gpu_layers"])
    names = [field.name for field in fields(GenerationConfig)]
    assert list(GenerationFields.__annotations__) == names
