"""A program written for llama-cpp-python, with one import changed."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from tabagent_model import (
    InvalidRequestError,
    ModelNotFoundError,
    NotSupportedError,
    TabAgentModelError,
    TokenizationError,
    compat,
)
from tabagent_model.compat import Llama, LlamaGrammar, LogitsProcessorList
from tabagent_model.params import BUNDLED_MODEL

pytestmark = pytest.mark.model

PATH = str(BUNDLED_MODEL)
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    with Llama(model_path=PATH, n_ctx=512, n_gpu_layers=0, seed=1, verbose=False) as llm:
        yield llm


def told(body: Any) -> Any:
    """Without what each reply has of its own."""
    assert body.pop("id").split("-")[0] in ("cmpl", "chatcmpl")
    assert body.pop("created") > 1e9
    assert body.pop("model") == PATH
    return body


def test_a_call_is_a_completion_in_a_dict(llm: Llama):
    answer = llm("Once upon a time", max_tokens=8, temperature=0, repeat_penalty=1.1, echo=True)
    expected = llm.model.generate(
        "Once upon a time", max_tokens=8, temperature=0, repeat_penalty=1.1
    )
    assert told(answer) == {
        "object": "text_completion",
        "choices": [
            {
                "text": "Once upon a time" + expected.text,
                "index": 0,
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": expected.usage.prompt_tokens,
            "completion_tokens": 8,
            "total_tokens": expected.usage.prompt_tokens + 8,
        },
    }


def test_a_completion_is_16_tokens_long_if_nothing_is_said(llm: Llama):
    assert llm("Once upon a time", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_a_streamed_completion_has_the_same_words(llm: Llama):
    whole = llm("Once upon a time", max_tokens=8, temperature=0)["choices"][0]["text"]
    chunks = [told(c) for c in llm("Once upon a time", max_tokens=8, temperature=0, stream=True)]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert chunks[0] == {
        "object": "text_completion",
        "choices": [
            {
                "text": chunks[0]["choices"][0]["text"],
                "index": 0,
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_is_answered_in_a_dict(llm: Llama):
    answer = told(llm.create_chat_completion(messages=FRANCE, temperature=0))
    usage = answer.pop("usage")
    text = answer["choices"][0]["message"]["content"]
    assert "Paris" in text
    assert sorted(usage) == ["completion_tokens", "prompt_tokens", "total_tokens"]
    assert answer == {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }


def test_a_streamed_chat_begins_with_the_role(llm: Llama):
    whole = llm.create_chat_completion(FRANCE, temperature=0)["choices"][0]["message"]["content"]
    chunks = [told(c) for c in llm.create_chat_completion(FRANCE, temperature=0, stream=True)]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert (deltas[-1], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "stop")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_leaving_a_stream_frees_its_place(llm: Llama):
    stream = llm("Once upon a time", max_tokens=None, ignore_eos=True, stream=True)
    next(stream)
    stream.close()
    assert llm.model.metrics()["running"] == 0


def test_tools_are_called(llm: Llama):
    asked: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = llm.create_chat_completion(asked, tools=[WEATHER], tool_choice="auto", temperature=0)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_a_response_format_with_a_schema_is_kept(llm: Llama):
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 12}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    answer = llm.create_chat_completion(
        FRANCE, response_format={"type": "json_object", "schema": schema}, temperature=0
    )
    assert list(json.loads(answer["choices"][0]["message"]["content"])) == ["capital"]


def test_a_grammar_is_kept(llm: Llama):
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"')
    assert llm("Is it true?", grammar=grammar)["choices"][0]["text"] in ("yes", "no")
    answer = llm.create_chat_completion(FRANCE, grammar=grammar)
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")


def test_logits_processors_see_and_change_logits(llm: Llama):
    wanted = llm.tokenize(b"blue", add_bos=False)[0]

    def only_blue(ids: Any, scores: Any) -> Any:
        assert len(ids) > 0
        masked = numpy.full_like(scores, -1e9)
        masked[wanted] = 0
        return masked

    answer = llm("The sky is", max_tokens=1, logits_processor=LogitsProcessorList([only_blue]))
    assert answer["choices"][0]["text"] == llm.detokenize([wanted]).decode()


def test_text_becomes_ids_and_back_as_bytes(llm: Llama):
    ids = llm.tokenize("Grüße 🦙".encode())
    assert llm.detokenize(ids).decode() == "Grüße 🦙"
    pieces = [llm.detokenize([token]) for token in ids]
    assert b"".join(pieces).decode() == "Grüße 🦙"
    with pytest.raises(TokenizationError, match="no UTF-8 at byte 1"):
        llm.tokenize(b"a\xff")


def test_the_model_tells_about_itself(llm: Llama):
    assert (llm.n_ctx(), llm.context_params.n_ctx) == (512, 512)
    assert (llm.n_vocab(), llm.n_embd()) == (2560, 256)
    assert 0 <= llm.token_eos() < 2560
    assert llm.metadata["general.architecture"] == "llama"
    assert llm.model_path == PATH


def test_the_same_seed_gives_the_same_answer(llm: Llama):
    def ask(**fields: Any) -> str:
        return llm("Once", temperature=1.5, max_tokens=12, **fields)["choices"][0]["text"]

    assert ask() == ask()
    assert ask(seed=5) == ask(seed=5) != ask(seed=6)


def test_embeddings_are_not_there_yet(llm: Llama):
    for call in (llm.create_embedding, llm.embed):
        with pytest.raises(NotImplementedError, match="embeddings are not supported yet"):
            call("text")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"n_contxt": 5}, InvalidRequestError, "Llama has no keyword `n_contxt`"),
        ({"lora_path": "x"}, NotSupportedError, "`lora_path` is not supported, got 'x'"),
        ({"rope_freq_base": 1e6}, NotSupportedError, "`rope_freq_base` is not supported"),
        ({"type_k": 8}, NotSupportedError, "`type_k` and `type_v` must be the same"),
        ({"type_k": 2, "type_v": 2}, InvalidRequestError, "`type_k` must be one of 0, 1, 8, 30"),
        ({"split_mode": 9}, InvalidRequestError, "`split_mode` must be one of 0, 1, 2, got 9"),
        ({"tensor_split": [-1]}, InvalidRequestError, "`tensor_split[0]` must be a number"),
    ],
)
def test_what_cannot_be_had_is_refused(fields: Any, kind: Any, message: str):
    with pytest.raises(kind) as refused:
        Llama(PATH, **fields)
    assert message in refused.value.message


def test_a_wrong_keyword_gets_the_right_one_as_hint(llm: Llama):
    with pytest.raises(InvalidRequestError) as refused:
        Llama(PATH, n_treads=1)
    assert refused.value.hint == "did you mean `n_threads`?"
    with pytest.raises(InvalidRequestError) as refused:
        llm("x", max_token=1)
    assert refused.value.hint == "did you mean `max_tokens`?"
    with pytest.raises(NotSupportedError):
        llm("x", stopping_criteria=[lambda ids, logits: True])
    with pytest.raises(NotSupportedError):
        llm("x", suffix="y")


ODD: list[Any] = [
    [],
    {},
    "x",
    -1e9,
    1e308,
    [None],
    {"a": {}},
    2**70,
    True,
    [[]],
    0.5,
    b"x",
    object(),
]


KEYWORDS = """prompt messages max_tokens temperature top_p top_k min_p typical_p logprobs stop seed
top_logprobs grammar logit_bias tools tool_choice response_format mirostat_mode logits_processor
repeat_penalty functions suffix echo"""


@pytest.mark.parametrize("name", KEYWORDS.split())
def test_an_odd_value_is_refused_with_an_error_of_ours_or_answered(llm: Llama, name: str):
    for value in ODD:
        for ask, said in (
            (llm, {"prompt": "x"}),
            (llm.create_chat_completion, {"messages": FRANCE}),
        ):
            with contextlib.suppress(TabAgentModelError):
                ask(**{**said, "max_tokens": 1, name: value})


def test_odd_text_is_refused_with_an_error_of_ours(llm: Llama):
    for value in ODD:
        with contextlib.suppress(TabAgentModelError):
            llm.tokenize(value)
        with contextlib.suppress(TabAgentModelError):
            llm.detokenize(value)


def test_keywords_that_change_nothing_are_noted_once(caplog: pytest.LogCaptureFixture):
    compat._noted.clear()
    with caplog.at_level(logging.INFO, "tabagent_model"):
        for _ in range(2):
            Llama(PATH, n_ctx=64, n_ubatch=64, logits_all=True, lora_path=None).close()
    noted = [r.getMessage() for r in caplog.records if "llama-cpp-python" in r.getMessage()]
    assert noted == [
        "`n_ubatch` of llama-cpp-python changes nothing here",
        "`logits_all` of llama-cpp-python changes nothing here",
    ]


def test_no_context_size_is_the_one_of_the_training():
    with Llama(PATH, n_ctx=0) as llm:
        assert llm.n_ctx() == 2048


def test_chatml_is_what_it_says():
    with Llama(PATH, n_ctx=256, chat_format="chatml") as llm:
        answer = llm.create_chat_completion(FRANCE, temperature=0)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_missing_file_is_an_error_of_ours_and_of_python():
    with pytest.raises(ModelNotFoundError) as missing:
        Llama("missing.gguf")
    assert isinstance(missing.value, FileNotFoundError)


# The libraries that are built on llama-cpp-python.


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # it is taken out again after the test
    del sys.modules["llama_cpp"]
    compat.install()


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("installed")
def test_langchain_runs_on_it():
    reason = "langchain-community is not installed"
    llms = pytest.importorskip("langchain_community.llms.llamacpp", reason=reason)
    llm = llms.LlamaCpp(model_path=PATH, n_ctx=256, max_tokens=8, temperature=0.0)
    assert llm.invoke("Once upon a time")
    assert "".join(llm.stream("Once upon a time")) == llm.invoke("Once upon a time")
    assert llm.get_num_tokens("Once upon a time") > 0
    llm.client.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("installed")
def test_langchains_chat_runs_on_it():
    reason = "langchain-community is not installed"
    models = pytest.importorskip("langchain_community.chat_models.llamacpp", reason=reason)
    chat = models.ChatLlamaCpp(model_path=PATH, n_ctx=512, max_tokens=64, temperature=0.0)
    question = FRANCE[0]["content"]
    assert "Paris" in chat.invoke(question).content
    assert "Paris" in "".join(str(chunk.content) for chunk in chat.stream(question))
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    called = chat.bind_tools([WEATHER], tool_choice=choice).invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["args"] == {"city": "Paris"}
    chat.client.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("installed")
def test_llamaindex_runs_on_it():
    reason = "llama-index-llms-llama-cpp is not installed"
    base = pytest.importorskip("llama_index.llms.llama_cpp.base", reason=reason)
    llm = base.LlamaCPP(
        model_path=PATH,
        temperature=0.0,
        max_new_tokens=8,
        context_window=256,
        messages_to_prompt=lambda messages: str(messages[-1].content),
        completion_to_prompt=str,
    )
    whole = llm.complete("Once upon a time").text
    assert whole
    assert [part.text for part in llm.stream_complete("Once upon a time")][-1] == whole
    assert llm.metadata.context_window == 256
    llm._model.close()


def test_another_llama_cpp_is_not_pushed_aside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", logging)
    with pytest.raises(InvalidRequestError) as refused:
        compat.install()
    assert refused.value.hint == "call `compat.install()` first"
