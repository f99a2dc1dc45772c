"""The official OpenAI client, whose server is a model in the same process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tabagent_model import AsyncModel, MissingPackageError, Model

if TYPE_CHECKING:
    import httpx
    import openai
    import pydantic
else:
    httpx = pytest.importorskip("httpx", reason="the extra `openai` is not installed")
    openai = pytest.importorskip("openai", reason="the extra `openai` is not installed")
    pydantic = pytest.importorskip("pydantic", reason="the extra `openai` is not installed")

from tabagent_model.serve.openai import handle
from tabagent_model.serve.service import Service
from tabagent_model.serve.transport import AsyncTransport, Transport

pytestmark = pytest.mark.model

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
STORY: Any = [{"role": "user", "content": "Tell me a story."}]
GREEDY: Any = {"model": "tiny-chat", "temperature": 0}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture
def client(tiny_model: Model) -> Iterator[openai.OpenAI]:
    with tiny_model.openai_client() as client:
        yield client


@pytest.fixture
async def async_client() -> AsyncIterator[openai.AsyncOpenAI]:
    model = await AsyncModel.load(n_ctx=512, max_parallel=4)
    async with model, model.openai_client() as client:
        yield client


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_chat_is_answered_and_counted(client: openai.OpenAI, tiny_model: Model):
    answer = client.chat.completions.create(messages=FRANCE, **GREEDY)
    expected = tiny_model.chat(FRANCE, temperature=0)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        expected.content,
        "stop",
    )
    assert "Paris" in expected.content
    assert answer.model == "tiny-chat"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        expected.usage.prompt_tokens,
        expected.usage.completion_tokens,
    )


def test_the_streamed_answer_is_the_whole_one(client: openai.OpenAI):
    whole = client.chat.completions.create(messages=STORY, max_tokens=60, **GREEDY)
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        messages=STORY, max_tokens=60, stream=True, stream_options=options, **GREEDY
    ) as stream:
        chunks = list(stream)
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 10  # they came one by one


async def test_many_tasks_stream_at_once(async_client: openai.AsyncOpenAI):
    async def tell(name: str) -> str:
        messages: Any = [{"role": "user", "content": f"Say hello to {name}."}]
        stream = await async_client.chat.completions.create(
            messages=messages, stream=True, max_tokens=24, seed=3, model=""
        )
        return text_of([chunk async for chunk in stream])

    names = ["Anna", "Ben", "Carla", "David"]
    assert all(await asyncio.gather(*map(tell, names)))


async def test_a_chat_is_answered_in_an_event_loop(async_client: openai.AsyncOpenAI):
    answer = await async_client.chat.completions.create(messages=FRANCE, **GREEDY)
    assert "Paris" in (answer.choices[0].message.content or "")


async def test_the_sync_client_works_where_an_event_loop_runs(client: openai.OpenAI):
    answer = client.chat.completions.create(messages=FRANCE, **GREEDY)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI):
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            messages=STORY, n=3, seed=5, max_tokens=16, temperature=1.5, model="tiny-chat"
        )
        return [choice.message.content for choice in answer.choices]

    once = ask()
    assert len(set(once)) > 1


def test_a_completion_goes_on_with_a_prompt(client: openai.OpenAI, tiny_model: Model):
    expected = tiny_model.generate("Once upon a time", temperature=0, max_tokens=12)
    answer = client.completions.create(
        prompt="Once upon a time", echo=True, logprobs=2, max_tokens=12, **GREEDY
    )
    assert answer.choices[0].text == "Once upon a time" + expected.text
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens) == expected.text
    stream = client.completions.create(
        prompt="Once upon a time", stream=True, echo=True, logprobs=2, max_tokens=12, **GREEDY
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "Once upon a time" + expected.text
    told = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    for name in ("tokens", "token_logprobs", "text_offset"):
        pieces = [piece for each in told for piece in getattr(each, name)]
        assert pieces == getattr(answer.choices[0].logprobs, name)


def test_logprobs_are_told_for_each_token(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=FRANCE, logprobs=True, top_logprobs=3, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * len(logprobs.content)
    chunks = client.chat.completions.create(
        messages=FRANCE, stream=True, logprobs=True, top_logprobs=3, **GREEDY
    )
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    told = [found.content for found in streamed if found is not None and found.content]
    assert len(told) > 1
    assert [token for content in told for token in content] == logprobs.content


def test_a_tool_is_called_and_its_answer_is_read(client: openai.OpenAI):
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(messages=messages, tools=[WEATHER], **GREEDY)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20 degrees"}
    messages += [answer.choices[0].message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(messages=messages, tools=[WEATHER], **GREEDY)
    assert answer.choices[0].message.content == "It is 20 degrees and sunny in Paris."


def test_a_tool_call_is_streamed_in_pieces(client: openai.OpenAI):
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with client.chat.completions.stream(messages=messages, tools=[WEATHER], **GREEDY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_one_function_can_be_demanded(client: openai.OpenAI):
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        messages=FRANCE, tools=[WEATHER], tool_choice=choice, max_tokens=100, **GREEDY
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"


def test_a_class_comes_back_as_an_object(client: openai.OpenAI):
    question = "Anna is 31 years old. Give me name and age as JSON."
    answer = client.chat.completions.parse(
        messages=[{"role": "user", "content": question}], response_format=Person, **GREEDY
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Person)
    assert parsed.name == "Anna"


def test_json_mode_gives_json(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=FRANCE, response_format={"type": "json_object"}, max_tokens=200, seed=1, model=""
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_grammar_of_ones_own_is_kept(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=FRANCE, extra_body={"grammar": 'root ::= "yes" | "no"'}, **GREEDY
    )
    assert answer.choices[0].message.content in ("yes", "no")


def test_errors_are_those_of_the_client(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(messages=FRANCE, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(messages=FRANCE, model="tiny-chat", temperature=3)
    assert (hot.value.param, hot.value.code) == ("temperature", "invalid_request")
    assert "temperature must be between 0 and 2, got 3" in hot.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(prompt="word " * 1000, **GREEDY)
    assert long.value.code == "context_limit_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(input="x", model="tiny-chat")
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"
    assert [model.id for model in client.models.list()] == ["tiny-chat"]


def test_leaving_a_stream_early_frees_its_place(client: openai.OpenAI, tiny_model: Model):
    fields: Any = {"messages": STORY, "stream": True, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**fields, **GREEDY) as stream:
        for _ in zip(range(3), stream, strict=False):
            pass
    assert tiny_model.metrics()["running"] == 0


async def test_cancelling_a_task_frees_its_place():
    async with await AsyncModel.load(n_ctx=512) as model:
        client = model.openai_client()
        extra = {"ignore_eos": True}
        task = asyncio.ensure_future(
            client.chat.completions.create(messages=STORY, extra_body=extra, **GREEDY)
        )
        while model.metrics()["generated_tokens"] < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert model.metrics()["running"] == 0
        await client.close()


def test_the_clients_time_out_ends_the_request(tiny_model: Model):
    extra = {"ignore_eos": True}
    with tiny_model.openai_client(timeout=0.05) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(messages=STORY, extra_body=extra, n=4, **GREEDY)
    assert tiny_model.metrics()["running"] == 0


def test_closing_the_client_ends_its_streams_and_its_thread(tiny_model: Model):
    client = tiny_model.openai_client()
    fields: Any = {"messages": STORY, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**fields, **GREEDY)
    next(iter(stream))
    client.close()
    assert tiny_model.metrics()["running"] == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "tabagent-openai"]
    stream.close()


def test_threads_share_a_client(client: openai.OpenAI):
    answers: list[str | None] = []

    def ask() -> None:
        answer = client.chat.completions.create(messages=FRANCE, **GREEDY)
        answers.append(answer.choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [answers[0]] * 4 and "Paris" in (answers[0] or "")


def test_httpx_sees_the_bytes_of_the_wire(tiny_model: Model):
    transport = Transport(Service({"tiny": tiny_model}))
    with httpx.Client(transport=transport, base_url="http://model", timeout=None) as http:
        body = {"messages": FRANCE, "temperature": 0, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream"
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2][6:])
        assert (last["object"], last["choices"][0]["finish_reason"]) == (
            "chat.completion.chunk",
            "stop",
        )
        assert last["timings"]["predicted_n"] > 3
        assert http.get("/v1/nothing").status_code == 404


async def test_httpx_in_an_event_loop_sees_the_same(tiny_model: Model):
    transport = AsyncTransport(Service({"tiny": tiny_model}))
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as http:
        body = {"messages": FRANCE, "temperature": 0}
        answer = (await http.post("/v1/chat/completions", json=body)).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]


KNOWN = """messages prompt model temperature top_p presence_penalty frequency_penalty max_tokens
max_completion_tokens n seed stop logit_bias logprobs top_logprobs stream stream_options tools
tool_choice parallel_tool_calls response_format reasoning_effort functions modalities suffix echo
best_of top_k min_p typical_p top_n_sigma xtc_probability repeat_penalty repeat_last_n mirostat
dry_multiplier dry_sequence_breakers ignore_eos min_tokens stop_token_ids banned_tokens timeout_s
priority overflow n_keep num_ctx keep_alive return_progress cache_prompt chat_template_kwargs
reasoning_format enable_thinking continue_final_message grammar json_schema"""
ODD: list[Any] = [[], {}, "x", -1e9, 1e308, [None], {"a": {}}, 2**70, False, [[]], 0.5, "\x00"]


async def test_no_value_of_any_field_is_worse_than_refused(tiny_model: Model):
    service = Service(tiny_model)
    asked: dict[str, Any] = {"messages": FRANCE, "prompt": "x", "max_tokens": 1}
    for name in KNOWN.split():
        for value in ODD:
            body = json.dumps({**asked, name: value}).encode()
            for path in ("/v1/chat/completions", "/v1/completions"):
                reply = await handle(service, "POST", path, body)
                if reply.status != 200:
                    assert isinstance(reply.content, bytes)
                    error = json.loads(reply.content)["error"]
                    told = (reply.status, error["type"])
                    assert told in (
                        (400, "invalid_request_error"),
                        (404, "invalid_request_error"),
                    ), (name, value)
                    assert error["message"] and error["param"], (name, value)


ENDINGS = {
    "with an open stream": """
        stream = client.chat.completions.create(stream=True, **endless)
        next(iter(stream))
    """,
    "with a thread that waits": """
        ask = lambda: client.chat.completions.create(**endless)
        threading.Thread(target=ask, daemon=True).start()
        while model.metrics()["running"] == 0:
            time.sleep(0.001)
    """,
    "after a forked child": """
        client.chat.completions.create(model="", messages=said, max_tokens=1)
        if os.fork() == 0:
            try:
                client.chat.completions.create(**endless)
            except openai.InternalServerError as error:
                assert "forked" in error.message
            sys.exit()
        assert os.wait()[1] == 0
        client.chat.completions.create(model="", messages=said, max_tokens=1)
    """,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends(ending: str):
    program = f"""
import os, openai, sys, threading, time
from tabagent_model import Model

said = [{{"role": "user", "content": "Tell me a story."}}]
endless = {{"model": "", "messages": said, "extra_body": {{"ignore_eos": True}}}}
model = Model.load(n_ctx=512)
client = model.openai_client()
{textwrap.dedent(ENDINGS[ending])}
"""
    ran = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert ran.returncode == 0


def test_a_missing_package_is_named_with_what_installs_it(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError) as missing:
        tiny_model.openai_client()
    assert missing.value.hint == "pip install 'tabagent-model[openai]'"
