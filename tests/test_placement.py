"""Where a model would go on recorded machines. Nothing is loaded, and no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_shapes import SHAPES, hollow_gguf
from machines import (
    CARD_4,
    CARD_6,
    CARD_24,
    CONTAINER,
    FULL_GPU,
    MIG,
    NO_GPU,
    TWO_CARDS,
    UNUSED_GPU,
)
from tabagent_model import ModelConfig, estimate
from tabagent_model.errors import GpuNotAvailableError, InvalidRequestError
from tabagent_model.hardware import GIB, MIB, Machine
from tabagent_model.placement import Rung, gpu_settings, ladder, margin_on, rungs_of
from tabagent_model.placement._estimate import Header


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: hollow_gguf(folder / f"{name}.gguf", shape) for name, shape in SHAPES.items()}


@pytest.fixture
def climb(files: dict[str, Path]):
    def rungs(name: str, machine: Machine, **fields: Any) -> tuple[Rung, ...]:
        fields = {"n_ctx": 4096, "max_parallel": 1} | fields
        return rungs_of(files[name], machine=machine, **fields)

    return rungs


def told(rungs: tuple[Rung, ...]) -> list[tuple[str, bool]]:
    return [(rung.what, rung.fits) for rung in rungs]


def test_without_a_gpu_there_is_the_cpu(climb):
    assert told(climb("qwen2.5-3b", NO_GPU)) == [("the CPU", True)]
    assert told(climb("qwen2.5-3b", UNUSED_GPU)) == [("the CPU", True)]


def test_with_a_large_card_everything_goes_there(climb):
    rungs = climb("qwen2.5-7b", CARD_24)
    assert (rungs[0].what, rungs[0].fits) == ("all 29 layers on CUDA0", True)
    estimate = rungs[0].estimate
    assert (estimate.devices, estimate.gpu_layers) == (("CUDA0",), 29)
    assert estimate.on("CUDA0").weights > 4 * estimate.on("cpu").mapped
    assert estimate.on("cpu").kv == 0


def test_the_whole_ladder_of_a_card_that_is_too_small(climb):
    rungs = climb("llama-3.1-8b", CARD_4, n_ctx=16384, n_ctx_min=4096)
    whats = [rung.what for rung in rungs]
    fewer = [rung.estimate.gpu_layers for rung in rungs if " of 33 " in rung.what]
    assert whats[0] == "all 33 layers on CUDA0"
    assert whats[1] == f"{fewer[0]} of 33 layers on CUDA0"
    assert whats[2] == "all 33 layers on CUDA0, keys and values in q8_0"
    assert whats[3] == f"{fewer[1]} of 33 layers on CUDA0, keys and values in q8_0"
    assert whats[4] == "all 33 layers on CUDA0, keys and values in q8_0, n_ctx 8192"
    assert whats[-3:] == ["the CPU", "the CPU, n_ctx 8192", "the CPU, n_ctx 4096"]
    assert 0 < fewer[0] < fewer[1] < fewer[2] < 33
    assert [rung.fits for rung in rungs[:4]] == [False, True, False, True]
    assert rungs[0].told.startswith("all 33 layers on CUDA0: needs ")


def test_one_layer_more_than_the_most_that_fit_does_not_fit(climb):
    chosen = climb("llama-3.1-8b", CARD_4)[1].estimate.gpu_layers
    most, more = (climb("llama-3.1-8b", CARD_4, gpu_layers=n)[0] for n in (chosen, chosen + 1))
    assert (most.fits, more.fits) == (True, False)


@pytest.mark.parametrize(
    ("fields", "fallbacks"),
    [
        ({"fallback": "error"}, set()),
        ({"fallback": "cpu"}, {"the CPU"}),
        ({"fallback": "partial"}, {"fewer", "q8_0"}),
        ({"fallback": "auto"}, {"fewer", "q8_0", "the CPU"}),
        ({"fallback": "auto", "kv_type": "f16"}, {"fewer", "the CPU"}),
        ({"fallback": "auto", "flash_attn": "off"}, {"fewer", "the CPU"}),
        ({"fallback": "auto", "device": "gpu"}, {"fewer", "q8_0"}),
        ({"fallback": "cpu", "device": "cuda"}, {"the CPU"}),
    ],
    ids=str,
)
def test_the_caller_says_what_may_be_given_up(climb, fields, fallbacks):
    rungs = climb("llama-3.1-8b", CARD_4, **fields)
    assert not rungs[0].fits
    found = set()
    for rung in rungs[1:]:
        found |= {word for word in ("q8_0", "the CPU") if word in rung.what}
        found |= {"fewer"} if " of 33 " in rung.what else set()
    assert found == fallbacks


def test_nothing_is_smaller_than_asked_unless_that_was_allowed(climb):
    for rung in climb("llama-3.1-8b", CARD_4, n_ctx=8192):
        assert rung.n_ctx == rung.estimate.n_ctx == 8192
    least = {rung.n_ctx for rung in climb("llama-3.1-8b", CARD_4, n_ctx=8192, n_ctx_min=3000)}
    assert least == {8192, 4096}


def test_a_gpu_that_others_have_filled_leaves_the_cpu(climb):
    rungs = climb("qwen2.5-7b", FULL_GPU)
    assert [rung.what for rung in rungs if rung.fits] == ["the CPU"]
    assert climb("qwen2.5-7b", FULL_GPU, device="cpu")[0].fits


def test_two_cards_share_a_model_by_their_free_memory(climb):
    estimate = climb("llama-3.1-8b", TWO_CARDS)[0].estimate
    large, small = estimate.on("CUDA0"), estimate.on("CUDA1")
    assert estimate.devices == ("CUDA0", "CUDA1")
    assert 1.6 < large.kv / small.kv < 2.6
    even = climb("llama-3.1-8b", TWO_CARDS, tensor_split=[1, 1])[0].estimate
    assert even.on("CUDA0").kv / even.on("CUDA1").kv == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("fields", "devices", "settings"),
    [
        ({}, ("CUDA0", "CUDA1"), {"gpu_layers": 33, "split_mode": "layer", "main_gpu": 0}),
        ({"main_gpu": 1}, ("CUDA0", "CUDA1"), {"main_gpu": 1}),
        ({"split_mode": "none", "main_gpu": 1}, ("CUDA1",), {"split_mode": "none", "main_gpu": 1}),
        ({"device": "cuda:1"}, ("CUDA1",), {"split_mode": "none", "main_gpu": 1}),
        ({"tensor_split": [3, 1]}, ("CUDA0", "CUDA1"), {"tensor_split": [3.0, 1.0]}),
        ({"tensor_split": [1]}, ("CUDA0", "CUDA1"), {"tensor_split": [1.0, 0.0]}),
        ({"tensor_split": [0, 1]}, ("CUDA0", "CUDA1"), {"tensor_split": [0.0, 1.0]}),
        ({"split_mode": "row"}, ("CUDA0", "CUDA1"), {"split_mode": "row"}),
        ({"device": "cpu"}, ("cpu",), {"gpu_layers": 0}),
        ({"gpu_layers": 0}, ("cpu",), {"gpu_layers": 0}),
    ],
    ids=str,
)
def test_llama_cpp_is_told_which_cards(files, fields, devices, settings):
    config = ModelConfig(files["llama-3.1-8b"], n_ctx=4096, max_parallel=1, **fields)
    rung = ladder(Header(config.path), config, TWO_CARDS)[0]
    assert rung.estimate.devices == devices
    assert gpu_settings(config, TWO_CARDS, rung.estimate).items() >= settings.items()


def test_a_part_of_a_card_is_as_large_as_the_part(climb):
    assert climb("llama-3.1-8b", MIG)[0].fits
    assert not climb("llama-3.1-8b", MIG, max_parallel=16, n_ctx=8192)[0].fits


def test_in_a_container_its_own_limit_counts(climb):
    (rung,) = climb("llama-3.1-8b", CONTAINER)
    assert rung.short is not None
    device, needed, free = rung.short
    assert (device, free) == ("cpu", 700 * MIB)
    assert needed > free


def test_more_sequences_are_taken_only_as_memory_suggests(climb):
    some = [climb("qwen2.5-3b", m, max_parallel=0)[0].estimate for m in (NO_GPU, CARD_6, CARD_24)]
    assert [estimate.max_parallel for estimate in some] == [8, 3, 8]


@pytest.mark.parametrize(
    ("machine", "fields", "kind", "message"),
    [
        (NO_GPU, {"device": "cuda"}, GpuNotAvailableError, "`device` is 'cuda', and there is no"),
        (CARD_6, {"device": "cuda:1"}, GpuNotAvailableError, "`device` is 'cuda:1'"),
        (CARD_6, {"device": "vulkan"}, GpuNotAvailableError, r"there are \['CUDA0'\]"),
        (UNUSED_GPU, {"device": "gpu"}, GpuNotAvailableError, "GTX 1660 cannot be used"),
        (CARD_6, {"main_gpu": 1}, InvalidRequestError, "`main_gpu` must be below 1"),
        (TWO_CARDS, {"main_gpu": 9}, InvalidRequestError, "`main_gpu` must be below 2"),
        (CARD_6, {"tensor_split": [1, 1]}, InvalidRequestError, "has 2 entries, and 1 GPUs"),
        (
            TWO_CARDS,
            {"device": "cuda:0", "tensor_split": [1, 1]},
            InvalidRequestError,
            "has 2 entries, and 1 GPUs",
        ),
        (TWO_CARDS, {"tensor_split": [1, 1, 1]}, InvalidRequestError, "3 entries, and 2 GPUs"),
        (
            TWO_CARDS,
            {"split_mode": "none", "main_gpu": 2},
            InvalidRequestError,
            "`main_gpu` must be below 2",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_name(climb, machine, fields, kind, message):
    with pytest.raises(kind, match=message):
        climb("qwen2.5-3b", machine, **fields)


def test_a_gpu_that_is_missing_may_be_made_up_for_by_the_cpu(climb):
    assert told(climb("qwen2.5-3b", NO_GPU, device="cuda", fallback="cpu")) == [("the CPU", True)]


def test_a_card_that_tells_nothing_of_its_memory_is_tried(climb):
    unknown = replace(CARD_6, gpus=(replace(CARD_6.gpus[0], total=None, free=None),))
    assert climb("llama-3.1-8b", unknown)[0].fits


def test_the_margin_grows_with_the_card():
    assert margin_on("cpu", CARD_6) == 64 * MIB
    assert margin_on("CUDA0", CARD_6) == 384 * MIB
    assert margin_on("CUDA0", CARD_24) == GIB


def test_estimate_tells_of_the_rung_that_would_be_taken(files):
    fields: dict[str, Any] = {"n_ctx": 4096, "max_parallel": 1}
    taken = estimate(files["llama-3.1-8b"], machine=CARD_4, **fields)
    assert 0 < taken.gpu_layers < 33
    config = ModelConfig(files["llama-3.1-8b"], **fields)
    assert estimate(config, machine=CARD_4) == taken
    refused = estimate(config, machine=CARD_4, fallback="error")
    assert refused.gpu_layers == 33
    with pytest.raises(InvalidRequestError, match="`machine` must be a Machine, got a dict"):
        estimate(config, machine={})  # type: ignore[arg-type]


def test_keys_and_values_are_what_the_header_says(climb):
    # 32 layers of 8 heads, 128 numbers of a key and as many of a value
    one = 32 * 8 * 256 * 4096
    for kv_type, size in (("f32", 4), ("f16", 2), ("bf16", 2), ("q8_0", 34 / 32)):
        share = climb("llama-3.1-8b", NO_GPU, kv_type=kv_type)[0].estimate.on("cpu")
        assert share.kv == one * size
    assert (
        climb("llama-3.1-8b", NO_GPU, kv_type="f16", max_parallel=3)[0].estimate.on("cpu").kv
        == 3 * one * 2
    )


def test_weights_are_mapped_copied_or_laid_out_anew(climb, files):
    size = files["llama-3.1-8b"].stat().st_size
    mapped, copied, anew = (
        climb("llama-3.1-8b", NO_GPU, **fields)[0].estimate.on("cpu")
        for fields in ({"repack": False}, {"repack": False, "use_mmap": False}, {"repack": True})
    )
    header = 5000
    assert (mapped.weights, copied.mapped) == (0, 0)
    assert size - header * 10 < mapped.mapped <= size
    assert copied.weights == mapped.mapped
    # all but the embedding, the output in q6_k, and the norms
    assert 0.8 * size < anew.weights < size
    assert 0 < anew.mapped < 0.2 * size


@pytest.mark.parametrize("machine", [NO_GPU, CARD_24, CARD_6])
def test_a_draft_model_takes_its_share_and_finds_its_place_first(files, machine):
    size: dict[str, Any] = {"n_ctx": 4096, "max_parallel": 2}
    both = estimate(files["qwen2.5-7b"], draft=files["qwen2.5-3b"], machine=machine, **size)
    small = estimate(files["qwen2.5-3b"], machine=machine, **size)
    large = estimate(files["qwen2.5-7b"], machine=machine.less(small.needs), **size)
    assert both.gpu_layers == large.gpu_layers
    assert {share.device: share.draft for share in both.shares} == small.needs
    assert both.needs == {
        device: need + small.on(device).needed for device, need in large.needs.items()
    }
    assert both.on("cpu").mapped == large.on("cpu").mapped + small.on("cpu").mapped
    assert "draft model " in str(both)
    assert "draft model " not in str(large)


def test_a_draft_model_pushes_layers_of_the_other_off_the_card(files):
    def layers(**draft: Any) -> int:
        return estimate(files["qwen2.5-7b"], machine=CARD_6, n_ctx=4096, **draft).gpu_layers

    assert 0 < layers(draft=files["qwen2.5-3b"]) < layers()
