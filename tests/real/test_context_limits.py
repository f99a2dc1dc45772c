"""Contexts that are too large, too small or contradict themselves (fault cases C02, C03, C08, C14).

Values that make no sense alone are refused earlier; `test_params` has the list (C01).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_files import u32
from gguf_memories import tiny_command_r
from tabagent_model import Model
from tabagent_model.errors import (
    InvalidRequestError,
    OutOfMemoryError,
    TabAgentModelError,
)

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says that it was trained with as long texts as one may ask for."""
    model = tiny_command_r()
    model.keys["command-r.context_length"] = u32(2**24)
    path = tmp_path_factory.mktemp("limits") / "endless.gguf"
    path.write_bytes(model.to_bytes())
    return path


@pytest.fixture(autouse=True)
def the_next_one_is_fine(endless: Path) -> Iterator[None]:
    yield
    with Model.load(endless, n_ctx=64, n_threads=1) as model:
        assert len(model.generate("a", **GREEDY).tokens) == 8


def test_c08_more_than_the_memory_holds_is_refused_with_both_numbers(endless: Path):
    with pytest.raises(OutOfMemoryError, match=r"256 x 16777216 tokens") as caught:
        Model.load(endless, n_ctx=2**24, max_parallel=256)
    assert caught.value.needed > 2**40 > caught.value.free


def test_c08_with_nothing_said_about_parallel_it_takes_what_there_is(endless: Path):
    with Model.load(endless, n_ctx=2**17, n_threads=1) as model:
        assert 1 <= model.info()["max_parallel"] <= 8


@pytest.mark.parametrize(
    "fields",
    [{"n_ctx": 4, "max_parallel": 8}, {"n_batch": 0}, {"max_parallel": 257}],
)
def test_c03_c14_sizes_that_make_no_sense_are_refused_by_name(
    endless: Path, fields: dict[str, Any]
):
    with pytest.raises(InvalidRequestError) as caught:
        Model.load(endless, **fields)
    assert caught.value.name in fields


def test_c03_the_error_names_the_field_as_it_was_typed(endless: Path):
    with pytest.raises(InvalidRequestError, match="`max_parallel` must be") as caught:
        Model.load(endless, n_batch=4, max_parallel=8)
    assert caught.value.name == "max_parallel"


def test_c03_more_sequences_than_rows_of_a_batch_are_refused(endless: Path):
    with pytest.raises(InvalidRequestError, match=r"at most `n_batch` \(4\), got 8"):
        Model.load(endless, n_batch=4, max_parallel=8)


@pytest.mark.parametrize("flash_attn", ["on", "off"])
def test_c14_keys_that_cannot_be_cut_into_blocks_are_refused(endless: Path, flash_attn: Any):
    # q8_0 takes 32 numbers at a time, and a head has 16.
    with pytest.raises(TabAgentModelError, match=r"q8_0|quantized"):
        Model.load(endless, n_ctx=64, kv_type="q8_0", flash_attn=flash_attn)


def test_c07_c14_the_error_names_the_kind_of_the_keys(endless: Path):
    with pytest.raises(InvalidRequestError, match="`kv_type` must be"):
        Model.load(endless, n_ctx=64, kv_type="q8_0")


@pytest.mark.parametrize("fields", [{"n_batch": 1}, {"n_ctx": 8}, {"n_ctx": 8, "n_batch": 512}])
def test_c02_the_smallest_sizes_work(endless: Path, fields: dict[str, Any]):
    with Model.load(endless, max_parallel=1, n_threads=1, **fields) as model:
        answer = model.generate([1, 2, 3], **GREEDY | {"max_tokens": 5})
        assert len(answer.tokens) == 5
        assert model.info()["n_batch"] <= max(model.config.n_batch, 1)
        with Model.load(endless, n_ctx=64, n_threads=1) as roomy:
            assert roomy.generate([1, 2, 3], **GREEDY | {"max_tokens": 5}) == answer
