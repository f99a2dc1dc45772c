"""The tables of what to run where, row by row."""

from __future__ import annotations

import pytest

import machines
from tabagent_model import ModelConfig, recommend
from tabagent_model.advice import (
    Optimized,
    Split,
    loading_strategy,
    optimize,
    ram_tier,
    recommend_split,
    vram_tier,
)
from tabagent_model.errors import InvalidRequestError
from tabagent_model.hardware import GIB


@pytest.mark.parametrize(
    ("vram", "model", "n_ctx"),
    [
        (2, "llama3.2-1b", 2048),
        (4, "llama3.2-1b", 4096),
        (6, "llama3.2-1b", 4096),
        (8, "qwen2.5-7b", 4096),
        (12, "qwen2.5-7b", 8192),
        (16, "qwen2.5-14b", 8192),
        (24, "qwen2.5-14b", 8192),
    ],
)
def test_a_gpu_gets_a_model_and_a_context_and_all_layers(vram, model, n_ctx):
    found = recommend(vram=vram, ram=64)
    assert (found.model, found.n_ctx, found.gpu_layers) == (model, n_ctx, -1)


@pytest.mark.parametrize(
    ("ram", "model"),
    [(4, "llama3.2-1b"), (8, "llama3.2-1b"), (16, "qwen2.5-7b"), (32, "qwen2.5-14b")],
)
def test_a_cpu_gets_the_row_for_seven_tenths_of_its_memory(ram, model):
    found = recommend(ram=ram)
    assert (found.model, found.n_ctx, found.gpu_layers) == (model, 2048, 0)


def test_shared_memory_makes_the_context_by_its_size():
    assert [recommend(ram=ram, unified=True).n_ctx for ram in (8, 16, 64)] == [4096, 8192, 8192]
    assert recommend(ram=16, unified=True).gpu_layers == -1


def test_a_recommendation_is_a_config():
    assert recommend(vram=12).config("m.gguf") == ModelConfig("m.gguf", n_ctx=8192, gpu_layers=-1)
    assert str(recommend(vram=8)) == (
        "qwen2.5-7b, n_ctx 4096, all layers on the GPU (8 GB of VRAM)"
    )


def test_a_machine_is_looked_at_when_nothing_is_given():
    assert recommend(machine=machines.CARD_6).model == "llama3.2-1b"
    assert recommend(machine=machines.CARD_24).model == "qwen2.5-14b"
    assert recommend(machine=machines.NO_GPU).reason == "no GPU, 16 GB of RAM"
    assert recommend(machine=machines.CONTAINER).reason == "no GPU, 2 GB of RAM"
    assert recommend().model


@pytest.mark.parametrize(
    ("vram", "parallel", "batch", "n_ctx"),
    [
        (6, 1, 128, 2048),
        (8, 2, 256, 4096),
        (16, 3, 512, 8192),
        (24, 4, 1024, 16384),
        (80, 4, 1024, 16384),
    ],
)
def test_settings_grow_with_the_gpu(vram, parallel, batch, n_ctx):
    assert optimize(vram, 16) == Optimized(parallel, batch, n_ctx, -1, 0, 1, "5m")


@pytest.mark.parametrize(
    ("ram", "loaded", "keep_alive"),
    [(8, 1, "5m"), (16, 1, "5m"), (32, 2, "15m"), (64, 3, "30m"), (128, 4, "1h")],
)
def test_the_pool_grows_with_the_memory(ram, loaded, keep_alive):
    assert optimize(0, ram) == Optimized(1, 128, 2048, 0, 0, loaded, keep_alive)


def test_a_report_names_what_changes():
    better = optimize(8, 16)
    config = ModelConfig(n_ctx=8192, n_batch=256, max_parallel=2)
    assert better.report(config) == "n_ctx: 8192 → 4096\ngpu_layers: auto → -1"
    assert better.report(better.config()) == "No changes recommended"


def test_a_split_by_size_leaves_a_gigabyte_of_the_card():
    size = 8 * GIB
    assert recommend_split(size, 9 * GIB) == Split(32, 0, "fast")
    assert recommend_split(size, 6 * GIB) == Split(20, 12, "medium")
    assert recommend_split(size, 2 * GIB, total_layers=16) == Split(2, 14, "slow")
    assert recommend_split(size, None) == Split(0, 32, "slow")


def test_a_model_goes_to_the_card_with_a_fifth_to_spare():
    found = [loading_strategy(5 * GIB, vram and vram * GIB) for vram in (6, 5, 1, 0, None)]
    assert found == ["gpu", "split", "cpu", "cpu", "cpu"]


def test_tiers():
    assert [ram_tier(ram) for ram in (4, 8, 16, 32)] == ["low", "medium", "high", "very_high"]
    assert [vram_tier(v) for v in (2, 4, 8, 16)] == ["low", "medium", "high", "very_high"]


@pytest.mark.parametrize("wrong", [-1, True, "8", float("nan"), float("inf")])
def test_what_is_no_size_is_refused_by_name(wrong):
    with pytest.raises(InvalidRequestError, match="`vram` must be a number from 0") as caught:
        recommend(vram=wrong)
    assert caught.value.name == "vram"
