"""What is asked and answered in OpenAI's shapes, without a model and without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tabagent_model import (
    AsyncModel,
    ContextLimitExceededError,
    GenerationConfig,
    GenerationTimeoutError,
    GrammarError,
    InternalError,
    InvalidRequestError,
    Model,
    ModelNotFoundError,
    NoRoomError,
    OutOfMemoryError,
    QueueFullError,
    QueueTimeoutError,
    TemplateError,
    TokenLogprob,
)
from tabagent_model.results import (
    ChatCompletion,
    ChatDelta,
    Completion,
    InferenceMetrics,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tabagent_model.serve._request import ChatRequest, CompletionRequest
from tabagent_model.serve._shapes import ChatShape, CompletionShape
from tabagent_model.serve.openai import Events, Reply, handle, refusal_of
from tabagent_model.serve.service import Service
from tabagent_model.testing import ScriptedContext

ASKED = [{"role": "user", "content": "Why?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.of({"messages": ASKED, **fields})


# What is asked.


def test_a_bare_request_has_the_defaults_of_the_package_and_ends_where_the_model_ends():
    assert chat(model="tiny") == ChatRequest(
        model="tiny",
        config=GenerationConfig(max_tokens=-1),
        n=1,
        is_streamed=False,
        includes_usage=False,
        tells_progress=False,
        num_ctx=None,
        keep_alive=None,
        messages=ASKED,
        fields={},
    )


def test_every_field_of_openai_finds_its_place():
    asked = chat(
        temperature=1.5,
        top_p=0.5,
        presence_penalty=-1,
        frequency_penalty=1.0,
        max_completion_tokens=7,
        n=3,
        seed=5,
        stop="end",
        logit_bias={"11": -100, "12": 2.5},
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
        reasoning_effort="low",
        user="somebody",
        store=True,
        a_field_of_next_year={"x": 1},
    )
    assert asked == ChatRequest(
        model=None,
        config=GenerationConfig(
            temperature=1.5,
            top_p=0.5,
            presence_penalty=-1,
            frequency_penalty=1.0,
            max_tokens=7,
            seed=5,
            stop=("end",),
            logit_bias={11: -100, 12: 2.5},
            logprobs=2,
        ),
        n=3,
        is_streamed=True,
        includes_usage=True,
        tells_progress=False,
        num_ctx=None,
        keep_alive=None,
        messages=ASKED,
        fields={
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            "parallel_tool_calls": False,
            "chat_template_kwargs": {"reasoning_effort": "low"},
        },
    )


def test_what_local_servers_have_besides_finds_its_place():
    asked = chat(
        top_k=5,
        min_p=0.1,
        repeat_penalty=1.2,
        repeat_last_n=32,
        dry_multiplier=0.5,
        cache_prompt=True,
        priority="high",
        chat_template_kwargs={"enable_thinking": False},
        grammar='root ::= "yes"',
        num_ctx=512,
        keep_alive="5m",
        return_progress=True,
    )
    assert asked.config == GenerationConfig(
        top_k=5,
        min_p=0.1,
        repeat_penalty=1.2,
        penalty_last_n=32,
        dry_multiplier=0.5,
        priority="high",
        max_tokens=-1,
    )
    assert (asked.num_ctx, asked.keep_alive, asked.tells_progress) == (512, "5m", True)
    assert asked.fields == {
        "schema": {"grammar": 'root ::= "yes"'},
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_null_is_as_good_as_absent():
    names = [
        *("temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop"),
        *("logit_bias", "logprobs", "top_logprobs", "stream", "stream_options", "tools"),
        *("tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort", "model"),
        *("grammar", "json_schema", "top_k", "chat_template_kwargs", "functions", "modalities"),
    ]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    ("wish", "schema"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {"type": "null"}}},
            {"type": "null"},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "number"}},
                }
            },
            {"type": "number"},
        ),
        ({"json_schema": {"type": "string"}}, {"type": "string"}),
    ],
)
def test_each_way_to_ask_for_a_form_is_understood(wish: dict[str, Any], schema: Any):
    assert chat(**wish).fields.get("schema") == schema


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature must be between 0 and 2, got 3"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_p": -0.1}, "top_p must be between 0 and 1, got -0.1"),
        ({"frequency_penalty": 2.5}, "frequency_penalty must be between -2 and 2, got 2.5"),
        ({"presence_penalty": -3}, "presence_penalty must be between -2 and 2, got -3"),
        ({"max_tokens": 0}, "max_tokens must be between 1 and 32768, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
        (
            {"max_completion_tokens": 40_000},
            "max_completion_tokens must be between 1 and 32768, got 40000",
        ),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens must be equal to `max_completion_tokens` (2), got 1",
        ),
        ({"n": 0}, "n must be between 1 and 128, got 0"),
        ({"n": 1000}, "n must be between 1 and 128, got 1000"),
        ({"seed": 2**64}, f"seed must be between -1 and {2**63 - 1}, got {2**64}"),
        ({"stream": "yes"}, "stream must be true or false, got 'yes'"),
        ({"stream_options": []}, "stream_options must be a JSON object, got []"),
        (
            {"stream_options": {"include_usage": 1}},
            "stream_options.include_usage must be true or false, got 1",
        ),
        ({"logprobs": 3}, "logprobs must be true or false, got 3"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20, got 21"),
        (
            {"top_logprobs": 2},
            "top_logprobs cannot be granted: set `logprobs` to true as well",
        ),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 must be between -100 and 100, got 101"),
        ({"model": 5}, "model must be a string, got 5"),
        ({"messages": "Why?"}, "messages must be a list of messages, got 'Why?'"),
        ({"messages": None}, "messages must be a list of messages, got None"),
        (
            {"response_format": {"type": "xml"}},
            'response_format.type must be one of "text", "json_object", "json_schema", got \'xml\'',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema must be a JSON schema, got None",
        ),
        (
            {"grammar": "root ::= x", "response_format": {"type": "json_object"}},
            "response_format cannot be granted: `grammar` is given as well, "
            "and there can be one of them",
        ),
        (
            {"tools": [WEATHER], "response_format": {"type": "json_object"}},
            "response_format cannot be granted: `tools` say already how an answer looks",
        ),
        ({"reasoning_effort": "huge"}, None),
        ({"functions": []}, "functions cannot be granted: use `tools` and `tool_choice`"),
        ({"modalities": ["audio"]}, "modalities cannot be granted: text is all there is"),
        ({"top_k": -1}, "`top_k` must be a whole number between 0 and 2147483647, got -1"),
        ({"stop": [""]}, "`stop` must be at most 64 strings of 1 to 1024 characters, got ''"),
        ({"priority": "urgent"}, "`priority` must be one of 'high', 'normal', 'low', got 'urgent'"),
        (
            {"keep_alive": "soon"},
            '`keep_alive` must be seconds, or text like "90s", "5m" or "1h30m"; -1 is for ever; '
            "got 'soon'",
        ),
        ({"keep_alive": True}, None),
        ({"return_progress": 1}, "return_progress must be true or false, got 1"),
        ({"num_ctx": 0}, "num_ctx must be between 1 and 2147483647, got 0"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_its_range(fields: dict[str, Any], message: str):
    with pytest.raises(InvalidRequestError) as refused:
        chat(**fields)
    assert refused.value.name.split(".")[0].split("[")[0] in fields
    if message is not None:
        assert refused.value.message == message


@pytest.mark.parametrize("body", [None, [], "x", 5, True])
def test_a_body_that_is_no_object_is_refused(body: Any):
    with pytest.raises(InvalidRequestError, match="body must be a JSON object"):
        ChatRequest.of(body)


def test_a_line_for_the_log_tells_sizes_and_no_words():
    asked = chat(model="tiny", temperature=0.5, max_tokens=9, stream=True)
    assert asked.summary() == "model='tiny', messages=1, temp=0.5, max_tokens=9, stream=True"


def test_a_completion_takes_text_ids_and_lists_of_both():
    def prompts(prompt: Any) -> list[Any]:
        return CompletionRequest.of({"prompt": prompt}).prompts

    assert [prompts(p) for p in ("a", ["a", "b"], [1, 2], [[1], [2, 3]])] == [
        ["a"],
        ["a", "b"],
        [[1, 2]],
        [[1], [2, 3]],
    ]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "echo": 1}, "echo"),
    ],
)
def test_a_completion_refuses_by_name(fields: dict[str, Any], name: str):
    with pytest.raises(InvalidRequestError) as refused:
        CompletionRequest.of(fields)
    assert refused.value.name == name


# What is answered.

USAGE = Usage(
    prompt_tokens=10,
    completion_tokens=4,
    total_tokens=14,
    cached_tokens=6,
    reasoning_tokens=3,
    n_ctx=64,
)
METRICS = InferenceMetrics(
    prompt_tokens=10,
    generated_tokens=4,
    tokens_per_second=100.0,
    prompt_eval_ms=20.0,
    time_to_first_token_ms=25.0,
    queue_ms=5.0,
    cached_tokens=6,
)
TIMINGS = {
    "cache_n": 6,
    "prompt_n": 4,
    "prompt_ms": 20.0,
    "prompt_per_second": 200.0,
    "predicted_n": 4,
    "predicted_ms": 30.0,
    "predicted_per_second": 100.0,
    "queue_ms": 5.0,
    "first_token_ms": 25.0,
    "n_ctx": 64,
}
COUNTED = {
    "prompt_tokens": 10,
    "completion_tokens": 4,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 6},
    "completion_tokens_details": {"reasoning_tokens": 3},
    "n_ctx": 64,
}


def answered(text: str = "", **facts: Any) -> ChatCompletion:
    given = {"content": text, "reasoning": None, "tool_calls": (), "finish_reason": "stop", **facts}
    return ChatCompletion(text=text, tokens=(1, 2), usage=USAGE, metrics=METRICS, **given)


def told(shape: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Without what each reply has of its own."""
    head = {name: body.pop(name) for name in ("id", "created", "model", "system_fingerprint")}
    assert (head["id"].split("-")[0], head["model"]) == (shape.prefix, "tiny")
    return body


def test_a_chat_completion_has_openais_shape():
    shape = ChatShape("tiny")
    call = ToolCall("call_1", "get_weather", '{"city": "Rome"}')
    result = answered(reasoning="Hm.", tool_calls=(call,), finish_reason="tool_calls")
    assert told(shape, shape.whole([result])) == {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "reasoning_content": "Hm.",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                        }
                    ],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": COUNTED,
        "timings": TIMINGS,
    }


def test_chunks_have_openais_shape():
    shape = ChatShape("tiny", includes_usage=True)
    deltas = [
        ChatDelta("Be"),
        ChatDelta(reasoning="Hm."),
        ChatDelta(tool_call=ToolCallDelta(0, "call_1", "get_weather", "")),
        ChatDelta(tool_call=ToolCallDelta(0, None, None, '{"ci')),
    ]
    chunks = [*shape.first(0), *(shape.piece(0, delta) for delta in deltas)]
    chunks.append(shape.last(0, answered("Be")))
    told_deltas = [told(shape, chunk)["choices"][0]["delta"] for chunk in chunks]
    begin = {"id": "call_1", "type": "function"}
    assert told_deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Be"},
        {"reasoning_content": "Hm."},
        {
            "tool_calls": [
                {"index": 0, **begin, "function": {"name": "get_weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {},
    ]
    assert chunks[0] == {
        "object": "chat.completion.chunk",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        "usage": None,
    }
    assert chunks[-1] == {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
        "usage": None,
        "timings": TIMINGS,
    }
    assert told(shape, shape.usage([answered()])) == {
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": COUNTED,
    }


def test_a_prompt_with_several_answers_is_counted_once():
    results = [answered("a"), answered("b"), answered("c"), answered("d")]
    usage = ChatShape("tiny", n=2).whole(results)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, 16)


def test_what_was_dropped_is_told():
    usage = Usage(prompt_tokens=5, dropped_tokens=7, dropped_messages=2, n_ctx=16)
    result = Completion("x", (1,), "stop", usage)
    told_usage = CompletionShape("tiny").whole([result])["usage"]
    assert (told_usage["dropped_tokens"], told_usage["dropped_messages"]) == (7, 2)


def test_logprobs_have_openais_shapes():
    half = TokenLogprob(2, "\ufffd", -3.0)
    logprobs = (TokenLogprob(1, "Bé", -0.5, top=(TokenLogprob(1, "Bé", -0.5), half)),)
    assert ChatShape("tiny").whole([answered("Bé", logprobs=logprobs)])["choices"][0][
        "logprobs"
    ] == {
        "content": [
            {
                "token": "Bé",
                "logprob": -0.5,
                "bytes": [66, 195, 169],
                "top_logprobs": [
                    {"token": "Bé", "logprob": -0.5, "bytes": [66, 195, 169]},
                    {"token": "\ufffd", "logprob": -3.0, "bytes": None},
                ],
            }
        ],
        "refusal": None,
    }
    shape = CompletionShape("tiny", echoes=["Why? "])
    choice = shape.whole([Completion("Bé", (1,), "stop", logprobs=logprobs)])["choices"][0]
    assert choice == {
        "text": "Why? Bé",
        "index": 0,
        "logprobs": {
            "tokens": ["Bé"],
            "token_logprobs": [-0.5],
            "top_logprobs": [{"Bé": -0.5, "\ufffd": -3.0}],
            "text_offset": [5],
        },
        "finish_reason": "stop",
    }


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidRequestError("x", name="n"), 400, "invalid_request_error", "invalid_request", "n"),
        (
            ContextLimitExceededError("x", name="prompt", max=1, required=2),
            *(400, "invalid_request_error", "context_limit_exceeded", "prompt"),
        ),
        (TemplateError("x"), 400, "invalid_request_error", "template_error", None),
        (
            GrammarError("x", name="grammar", position=(1, 2)),
            *(400, "invalid_request_error", "grammar_error", "grammar"),
        ),
        (
            ModelNotFoundError("x", name="model"),
            *(404, "invalid_request_error", "model_not_found", "model"),
        ),
        (GenerationTimeoutError("x"), 408, "timeout_error", "generation_timeout", None),
        (QueueFullError("x"), 503, "overloaded_error", "queue_full", None),
        (QueueTimeoutError("x"), 503, "overloaded_error", "queue_timeout", None),
        (NoRoomError("x"), 507, "server_error", "no_room", None),
        (OutOfMemoryError("x"), 500, "server_error", "out_of_memory", None),
        (InternalError("x"), 500, "server_error", "internal_error", None),
    ],
)
def test_an_error_has_its_status_and_openais_form(
    error: Exception, status: int, kind: str, code: str, param: str | None
):
    body = {"error": {"message": "x", "type": kind, "param": param, "code": code}}
    assert refusal_of(error) == (status, body)


def test_a_fault_of_ours_tells_nothing_of_itself_but_to_the_log(caplog: pytest.LogCaptureFixture):
    status, body = refusal_of(KeyError("a secret"))
    assert (status, "secret" in json.dumps(body)) == (500, False)
    assert "a secret" in caplog.text


# The door.


@pytest.fixture
def model() -> Iterator[Model]:
    with Model(ScriptedContext(["Be", "cause", "!"])) as scripted:
        yield scripted


async def post(service: Service, path: str, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await handle(service, "POST", path, raw, headers)


async def events_of(reply: Reply) -> list[Any]:
    assert isinstance(reply.content, Events)
    lines = [event.decode() async for event in reply.content]
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    assert lines.pop() == "data: [DONE]\n\n"
    return [json.loads(line[6:]) for line in lines]


def content_of(reply: Reply) -> Any:
    assert isinstance(reply.content, bytes)
    return json.loads(reply.content)


async def test_a_chat_is_answered_at_once_or_as_it_comes(model: Model):
    service = Service({"tiny": model})
    reply = await post(service, "/v1/chat/completions", {"messages": ASKED})
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert content_of(reply)["choices"][0]["message"]["content"] == "Because!"
    asked = {"messages": ASKED, "stream": True, "stream_options": {"include_usage": True}}
    reply = await post(service, "/v1/chat/completions", asked)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    chunks = await events_of(reply)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Because!"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_tool_calls_and_reasoning_are_told_in_openais_shape():
    said = ["Let me see.<think>Rome?</think>", "<tool_call>"]
    said += ['{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>']
    service = Service({"tiny": AsyncModel(ScriptedContext(said))})
    asked = {"messages": ASKED, "tools": [WEATHER]}
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "call_0", "type": "function", "function": function}
    choice = content_of(await post(service, "/v1/chat/completions", asked))["choices"][0]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Let me see.",
            "refusal": None,
            "reasoning_content": "Rome?",
            "tool_calls": [call],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }
    chunks = await events_of(await post(service, "/v1/chat/completions", {**asked, "stream": True}))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Let me see."},
        {"reasoning_content": "Rome?"},
        {"tool_calls": [{"index": 0, **call}]},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    await service.model().close()


async def test_several_answers_are_streamed_together(model: Model):
    asked = {"messages": ASKED, "stream": True, "n": 3}
    chunks = await events_of(await post(Service(model), "/v1/chat/completions", asked))
    texts, reasons = ["", "", ""], [None, None, None]
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert (texts, reasons) == (["Because!"] * 3, ["stop"] * 3)


async def test_a_completion_can_have_several_prompts_and_echo_them(model: Model):
    asked = {"prompt": ["Why? ", "How? "], "n": 2, "echo": True, "seed": 7}
    body = content_of(await post(Service(model), "/v1/completions", asked))
    texts = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert texts == [
        (0, "Why? Because!"),
        (1, "Why? Because!"),
        (2, "How? Because!"),
        (3, "How? Because!"),
    ]
    asked = {"prompt": "Why? ", "stream": True, "echo": True}
    chunks = await events_of(await post(Service(model), "/v1/completions", asked))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Why? ", "Be", "cause", "!", ""]


async def test_a_service_tells_what_a_conversation_makes_the_model_read(model: Model):
    service = Service(model)
    prompt = await service.prompt(ASKED, schema={"type": "object"})
    tokens = await service.tokenize(prompt)
    assert (prompt, await service.detokenize(tokens)) == ("user: Why?\nassistant: ", prompt)
    assert await service.count_tokens(ASKED) == len(tokens)


async def test_each_answer_has_a_seed_of_its_own_if_one_is_given():
    context = ScriptedContext(["x"])
    model = AsyncModel(context)
    asked = {"messages": ASKED, "n": 3, "seed": 7}
    await post(Service(model), "/v1/chat/completions", asked)
    await model.close()
    assert sorted(request.params["seed"] for request in context.submitted) == [7, 8, 9]


async def test_models_are_listed_and_found_by_name(model: Model):
    service = Service({"org/tiny": model, "other": model}, default="other")
    described: dict[str, Any] = {
        "id": "org/tiny",
        "object": "model",
        "created": service.created,
        "owned_by": "local",
        "context_window": 4096,
        "status": {
            "value": "loaded",
            "is_default": False,
            "keep_alive_s": -1,
            "needs_bytes": 0,
            "num_users": 0,
            "num_waiting": 0,
        },
    }
    body = content_of(await handle(service, "GET", "/v1/models"))
    status = {**described["status"], "is_default": True}
    other = {**described, "id": "other", "status": status}
    assert body == {"object": "list", "data": [described, other]}
    reply = await handle(service, "GET", "/v1/models/org%2Ftiny")
    assert content_of(reply) == described
    names = [service.resolve(name) for name in (None, "", "default", "org/tiny")]
    assert names == ["other", "other", "other", "org/tiny"]
    reply = await post(service, "/v1/chat/completions", {"messages": ASKED, "model": "gpt-5"})
    assert (reply.status, content_of(reply)) == (
        404,
        {
            "error": {
                "message": "there is no model `gpt-5`, there is `org/tiny`, `other`",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        },
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"messages": [],}',
        b"{} {}",
        b"\xff",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"temperature": NaN}',
        b"[" * 100_000,
        b'{"messages": []}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_a_bad_body_is_a_refusal(model: Model, body: bytes):
    reply = await post(Service(model), "/v1/chat/completions", body)
    assert (reply.status, content_of(reply)["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_format": "loud"}, "reasoning_format"),
        ({"enable_thinking": 5}, "enable_thinking"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ],
)
async def test_what_the_chat_refuses_is_named(model: Model, fields: dict[str, Any], param: str):
    asked = {"messages": ASKED, **fields}
    reply = await post(Service(model), "/v1/chat/completions", asked)
    assert (reply.status, content_of(reply)["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/missing", 404),
        ("GET", "/v1/models/..%2f..", 404),
        ("GET", "/v1/Models", 404),
        ("POST", "/", 404),
    ],
)
async def test_a_wrong_way_is_told_in_openais_form(
    model: Model, method: str, path: str, status: int
):
    reply = await handle(Service(model), method, path, b"{}")
    assert (reply.status, list(content_of(reply))) == (status, ["error"])


async def test_a_context_that_the_model_does_not_have_is_refused(model: Model):
    asked = {"messages": ASKED, "num_ctx": 8192}
    reply = await post(Service({"tiny": model}), "/v1/chat/completions", asked)
    message = "num_ctx must be at most 4096, the context of `tiny`, got 8192"
    assert (reply.status, content_of(reply)["error"]["message"]) == (400, message)


class SlowReader(ScriptedContext):
    """Whose slots tell of a prompt that is read in steps; its answer comes after them."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(["Be", "cause"])
        self._steps = iter(steps)
        self.pause()

    def slots(self) -> list[dict[str, int | None]]:
        if (held := next(self._steps, None)) is None:
            self.resume()
            return []
        told: dict[str, int | None] = {"held_tokens": held, "prompt_tokens": 9, "cached_tokens": 2}
        return [{"request_id": self.submitted[0].request_id, **told}]


@pytest.mark.parametrize(
    ("path", "asked", "empty"),
    [
        ("/v1/chat/completions", {"messages": ASKED}, {"delta": {}}),
        ("/v1/completions", {"prompt": "Why?"}, {"text": ""}),
    ],
)
async def test_a_prompt_that_is_being_read_says_how_far_it_is(path: str, asked: Any, empty: Any):
    service = Service({"tiny": AsyncModel(SlowReader([2, 5, 5, 9]))})
    body = {**asked, "stream": True, "return_progress": True}
    chunks = await events_of(await post(service, path, body))
    told = [chunk for chunk in chunks if "prompt_progress" in chunk]
    progress = [chunk["prompt_progress"] for chunk in told]
    assert [each["processed"] for each in progress] == [2, 5, 9]
    assert {(each["total"], each["cache"]) for each in progress} == {(9, 2)}
    nothing = {"index": 0, "logprobs": None, "finish_reason": None, **empty}
    assert [chunk["choices"] for chunk in told] == [[nothing]] * 3
    silent = await events_of(await post(service, path, {**asked, "stream": True}))
    assert not any("prompt_progress" in each for each in silent)
    await service.model().close()


async def test_leaving_while_a_prompt_is_read_ends_the_request():
    context = SlowReader([2] * 1000)
    service = Service({"tiny": AsyncModel(context)})
    body = {"messages": ASKED, "stream": True, "return_progress": True, "n": 2}
    reply = await post(service, "/v1/chat/completions", body)
    assert isinstance(reply.content, Events)
    for _ in range(3):
        await anext(reply.content)
    await reply.content.aclose()
    assert (context.metrics()["waiting"], len(set(context.aborted))) == (0, 2)
    await service.model().close()


async def test_the_header_of_urgency_counts_where_the_body_has_none():
    context = ScriptedContext(["x"])
    service = Service({"tiny": AsyncModel(context)})
    for body in ({"messages": ASKED}, {"messages": ASKED, "priority": "low"}):
        await handle(
            service,
            "POST",
            "/v1/chat/completions",
            json.dumps(body).encode(),
            {"x-priority": "high"},
        )
    assert [request.params["priority"] for request in context.submitted] == ["high", "low"]
    await service.model().close()


async def test_an_error_on_the_way_is_an_event_and_the_stream_ends_properly():
    context = ScriptedContext(["Be", GenerationTimeoutError("it took too long")])
    service = Service({"tiny": AsyncModel(context)})
    asked = {"messages": ASKED, "stream": True}
    chunks = await events_of(await post(service, "/v1/chat/completions", asked))
    assert chunks[-1] == {
        "error": {
            "message": "it took too long",
            "type": "timeout_error",
            "param": None,
            "code": "generation_timeout",
        }
    }
    await service.model().close()


async def test_what_the_engine_refuses_is_a_status_also_for_a_stream():
    context = ScriptedContext(["x"], n_ctx=8)
    service = Service({"tiny": AsyncModel(context)})
    asked = {"messages": [{"role": "user", "content": "word " * 50}], "stream": True}
    reply = await post(service, "/v1/chat/completions", asked)
    assert (reply.status, content_of(reply)["error"]["code"]) == (400, "context_limit_exceeded")
    await service.model().close()


async def test_closing_the_events_ends_all_answers():
    context = ScriptedContext(["word "] * 1000, delay=0.001)
    service = Service({"tiny": AsyncModel(context)})
    asked = {"messages": ASKED, "stream": True, "n": 3}
    reply = await post(service, "/v1/chat/completions", asked)
    assert isinstance(reply.content, Events)
    for _ in range(8):
        await anext(reply.content)
    await reply.content.aclose()
    assert context.metrics()["running"] == 0
    assert len(set(context.aborted)) == 3
    assert [event async for event in reply.content] == []
    await service.model().close()


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_ends_all_answers(n: int):
    context = ScriptedContext(["word "] * 1000, delay=0.001)
    service = Service({"tiny": AsyncModel(context)})
    asked = {"messages": ASKED, "n": n}
    task = asyncio.ensure_future(post(service, "/v1/chat/completions", asked))
    while context.metrics()["generated_tokens"] < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert context.metrics()["running"] == 0
    await service.model().close()


async def test_one_failing_answer_ends_the_others():
    def script(prompt: Any) -> Iterator[Any]:
        lines.append(prompt)
        return iter(["word "] * 1000 if len(lines) > 1 else [InternalError("broken")])

    lines: list[Any] = []
    context = ScriptedContext(script, delay=0.001)
    service = Service({"tiny": AsyncModel(context)})
    reply = await post(service, "/v1/chat/completions", {"messages": ASKED, "n": 2})
    assert (reply.status, content_of(reply)["error"]["message"]) == (500, "broken")
    assert context.metrics()["running"] == 0
    await service.model().close()


def test_a_face_does_not_close_the_model_of_another(model: Model):
    Service(model)
    assert model.generate("Why?").text == "Because!"


@pytest.mark.parametrize(
    "models", [{}, {"": None}, {"a": 5}, None, "tiny", {"a\nb": None}], ids=repr
)
def test_a_service_is_made_of_models_only(models: Any):
    with pytest.raises(InvalidRequestError) as refused:
        Service(models)
    assert refused.value.name == "models"
