"""`PyModel` and `PyContext` as the TabAgent host scripts call them (S2.16 to S2.30)."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

import pytest

import tabagent_model
from gguf_files import tiny_gguf, u32
from tabagent_model import ModelConfig, PyContext, PyModel
from tabagent_model.errors import (
    InternalError,
    InvalidRequestError,
    LoadCancelledError,
    ModelCorruptedError,
    ModelNotFoundError,
    ModelNotLoadedError,
)

pytestmark = pytest.mark.model

BUNDLED = str(ModelConfig().path)


@pytest.fixture
def model():
    model = PyModel()
    model.load(model_path=BUNDLED)
    yield model
    model.unload()


@pytest.fixture
def context(model) -> PyContext:
    return model.create_context(n_ctx=512, n_seq_max=2)


def test_a_host_script_runs_unchanged():
    model = tabagent_model.PyModel()
    with pytest.warns(DeprecationWarning, match="`dll_path` and `library_path` are ignored"):
        model.load(
            dll_path="BitNet/Release/cpu/windows/bitnet-portable/llama.dll",
            model_path=BUNDLED,
            gpu_layers=32,
            mlock=True,
        )
    assert model.vocab_size() > 256
    assert model.context_train_size() > 0
    assert model.embedding_dim() > 0
    assert -1 <= model.token_bos() < model.vocab_size()
    assert 0 <= model.token_eos() < model.vocab_size()
    assert -1 <= model.token_nl() < model.vocab_size()
    context = model.create_context(n_ctx=512)
    ids = context.tokenize("Hello", add_bos=True)
    assert context.detokenize(ids) == "Hello"
    assert context.generate(ids, 10, temperature=0) == context.generate("Hello", 10, temperature=0)
    assert model.generate("Hello", max_tokens=5, temperature=0)
    assert model.unload()["was_loaded"]
    assert tabagent_model.get_cpu_variant().startswith("bitnet-")


def test_no_dll_path_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with PyModel() as model:
            model.load(dll_path=None, model_path=BUNDLED, n_gpu_layers=0, use_mlock=False)
            assert model.gpu_layers == 0
        assert not model.is_loaded


def test_the_model_describes_itself(model):
    info = model.model_info()
    assert (info["architecture"], info["quantization"]) == ("llama", "Q8_0")
    assert (model.path, model.device) == (BUNDLED, "cpu")
    assert model.n_params == info["n_params"]
    assert model.layer_count() == info["n_layers"]
    assert model.metadata()["general.architecture"] == "llama"
    assert model.load_time_ms > 0
    assert Path(BUNDLED).stat().st_size > model.size_bytes > model.n_params


def test_progress_is_told_and_rises_to_the_end():
    heard: list[float] = []
    with PyModel() as model:
        model.load(model_path=BUNDLED, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_progress_that_says_false_cancels_the_load():
    model = PyModel()
    with pytest.raises(LoadCancelledError, match=re.escape(f"loading `{BUNDLED}` was cancelled")):
        model.load(model_path=BUNDLED, progress=lambda fraction: fraction < 0.5)
    assert not model.is_loaded
    model.load(model_path=BUNDLED)
    model.unload()


def test_what_progress_raises_ends_the_load_and_is_raised():
    def fail(fraction: float) -> bool:
        raise LookupError("not my file")

    model = PyModel()
    with pytest.raises(LookupError, match="not my file"):
        model.load(model_path=BUNDLED, progress=fail)
    assert not model.is_loaded


def test_what_only_llama_cpp_can_refuse_carries_its_own_reason(tmp_path):
    # The header is sound, and which tensors experts need is llama.cpp's knowledge.
    path = tmp_path / "experts.gguf"
    tiny_gguf(path, keys={"llama.expert_count": u32(2), "llama.expert_used_count": u32(1)})
    with pytest.raises(
        ModelCorruptedError, match=r"llama\.cpp says: .*blk\.0\.ffn_gate_inp\.weight"
    ):
        PyModel().load(model_path=str(path))


def test_nothing_works_before_loading_and_says_so():
    model = PyModel()
    for call in (model.vocab_size, model.create_context, lambda: model.generate("Hello")):
        with pytest.raises(ModelNotLoadedError, match="the model is not loaded"):
            call()
    assert model.unload()["was_loaded"] is False
    with pytest.raises(InvalidRequestError, match="`model_path` must be"):
        model.load()
    with pytest.raises(ModelNotFoundError):
        model.load(model_path="missing.gguf")


def test_a_callback_gets_the_pieces_and_stops_by_saying_false(context):
    pieces: list[str] = []
    fields = {"temperature": 0, "ignore_eos": True}
    whole = context.generate("Once upon a time", 30, callback=pieces.append, **fields)
    assert "".join(pieces) == whole
    cut = context.generate("Once upon a time", 30, callback=lambda piece: False, **fields)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_what_a_callback_raises_is_raised_and_the_context_goes_on(context):
    def fail(piece: str) -> bool:
        raise LookupError(piece)

    before = context.generate("Once", 5, temperature=0)
    with pytest.raises(LookupError):
        context.generate("Once", 30, callback=fail)
    assert context.generate("Once", 5, temperature=0) == before


def read_to_the_end(context: PyContext, count: int) -> dict[int, list]:
    events: dict[int, list] = {}
    num_ended = 0
    while num_ended < count:
        for event in context.next_events():
            events.setdefault(event.request_id, []).append(event)
            num_ended += event.is_last
    return events


def test_every_request_gets_its_events_and_one_last(context):
    for request_id in range(10):
        context.submit(request_id, "Once upon a time", {"max_tokens": 5, "temperature": 0})
    events = read_to_the_end(context, 10)
    texts = {"".join(event.text for event in events[request_id]) for request_id in range(10)}
    assert len(texts) == 1
    for request_id in range(10):
        assert [event.is_last for event in events[request_id]].count(True) == 1
        last = events[request_id][-1]
        assert (last.is_last, last.error) == (True, None)
        assert last.stats["generated_tokens"] == sum(len(e.tokens) for e in events[request_id])


def test_an_aborted_request_says_so_and_an_unknown_id_is_fine(context):
    context.submit(1, "Once", {"max_tokens": -1, "ignore_eos": True})
    context.abort(1)
    context.abort(1)
    context.abort(99)
    last = read_to_the_end(context, 1)[1][-1]
    assert (last.finish_reason, last.error) == ("cancelled", None)


def test_closing_gives_every_request_a_typed_end(context):
    for request_id in range(4):
        context.submit(request_id, "Once", {"max_tokens": -1, "ignore_eos": True})
    threading.Thread(target=context.close).start()
    events = read_to_the_end(context, 4)
    assert {type(events[i][-1].error) for i in events} == {ModelNotLoadedError}
    assert context.next_events() == []
    assert context.is_closed
    context.close()
    with pytest.raises(ModelNotLoadedError):
        context.submit(5, "Once", {})


def test_unload_ends_what_runs_with_a_typed_error(model, context):
    context.submit(1, "Once", {"max_tokens": -1, "ignore_eos": True})
    model.unload()
    assert isinstance(read_to_the_end(context, 1)[1][-1].error, ModelNotLoadedError)
    with pytest.raises(ModelNotLoadedError):
        context.tokenize("Hello")


def test_dropping_the_model_unloads_it_and_its_context_says_so():
    model = PyModel()
    model.load(model_path=BUNDLED)
    context = model.create_context(n_ctx=256, n_seq_max=1)
    del model
    with pytest.raises(ModelNotLoadedError):
        context.generate("Once", 3)


@pytest.mark.parametrize("fault", ["panic", "throw"])
def test_faults_below_come_up_as_ordinary_exceptions(fault):
    with pytest.raises(InternalError) as caught:
        tabagent_model._core._inject(fault)
    assert isinstance(caught.value, Exception)
    assert "on purpose" in str(caught.value) or "asked to panic" in str(caught.value)


def test_a_panic_in_a_step_ends_its_requests_and_the_engine_goes_on(context, capfd):
    before = context.generate("Once", 5, temperature=0)
    context._inject_panic()
    context.submit(1, "Once upon a time", {"max_tokens": 10})
    assert isinstance(read_to_the_end(context, 1)[1][-1].error, InternalError)
    assert context.generate("Once", 5, temperature=0) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_ctx", 0),
        ("n_ctx", -1),
        ("n_ctx", 2**40),
        ("n_batch", 0),
        ("n_seq_max", 257),
        ("n_threads", -1),
        ("queue_size", 0),
        ("kv_type", "q9"),
        ("flash_attn", "perhaps"),
    ],
)
def test_context_settings_out_of_range_are_named(model, field, value):
    with pytest.raises(InvalidRequestError, match=rf"`{field}` must be .*{value}"):
        model.create_context(**{field: value})


def test_more_sequences_than_rows_are_refused(model):
    # llama.cpp would end the process.
    with pytest.raises(InvalidRequestError, match=r"`n_seq_max` must be at most `n_batch` \(4\)"):
        model.create_context(n_ctx=64, n_batch=4, n_seq_max=8)
