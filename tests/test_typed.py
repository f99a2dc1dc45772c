"""Chats whose answers are objects, over an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from conftest import Face
from tabagent_model import AsyncChatStream, ChatStream, InvalidRequestError
from tabagent_model.testing import ScriptedContext, ScriptedPrompt

MakeFace = Callable[[ScriptedContext], Face]


@dataclass
class City:
    name: str
    population: int


ROME = ['{"name": ', '"Ro', 'me", "popu', 'lation": 28', "00", "}"]


async def objects(stream: ChatStream | AsyncChatStream) -> AsyncIterator[Any]:
    grown = stream.partial()
    if isinstance(grown, AsyncIterator):
        async for each in grown:
            yield each
    else:
        while (each := await asyncio.to_thread(next, grown, None)) is not None:
            yield each


async def test_an_answer_is_an_object(face: MakeFace):
    answer = await face(ScriptedContext(ROME)).call("chat", "Rome?", schema=City)
    assert (answer.parsed, answer.parse_error) == (City("Rome", 2800), None)
    assert answer.text == answer.content == "".join(ROME)


async def test_what_was_thought_is_no_part_of_the_object(face: MakeFace):
    script = ["<think>Hm, {</think>", "yes"]
    answer = await face(ScriptedContext(script)).call("chat", "Rome?", schema=["yes", "no"])
    assert (answer.parsed, answer.reasoning) == ("yes", "Hm, {")


async def test_an_answer_that_is_none_says_why_and_is_delivered(
    face: MakeFace, caplog: pytest.LogCaptureFixture
):
    context = ScriptedContext(['{"name": "Rome", "population": "many"}'])
    answer = await face(context).call("chat", "Rome?", schema=City)
    assert (answer.parsed, answer.parse_error) == (
        None,
        '`population` must be a whole number, got "many"',
    )
    assert answer.text == '{"name": "Rome", "population": "many"}'
    assert caplog.messages == [f"request {answer.metrics.request_id}: its answer could not be read"]


async def test_an_answer_that_was_cut_short_is_no_object(face: MakeFace):
    context = ScriptedContext(ROME)
    answer = await face(context).call("chat", "Rome?", schema=City, max_tokens=3)
    assert (answer.finish_reason, answer.parsed) == ("length", None)
    assert answer.parse_error == "the answer was cut short"
    exact = await face(ScriptedContext(ROME)).call("chat", "Rome?", schema=City, max_tokens=6)
    assert (exact.finish_reason, exact.parsed) == ("length", City("Rome", 2800))


async def test_an_object_grows(face: MakeFace):
    stream = face(ScriptedContext(ROME)).model.stream_chat("Rome?", schema=City)
    assert [(city.name, city.population) async for city in objects(stream)] == [
        (None, None),
        ("Ro", None),
        ("Rome", None),
        ("Rome", 2800),
    ]
    assert stream.result.parsed == City("Rome", 2800)


async def test_a_choice_is_there_at_the_end(face: MakeFace):
    stream = face(ScriptedContext(["y", "es"])).model.stream_chat("Rome?", schema=["yes", "no"])
    assert [choice async for choice in objects(stream)] == ["yes"]


async def test_what_became_no_object_only_grew(face: MakeFace):
    stream = face(ScriptedContext(ROME)).model.stream_chat("Rome?", schema=City, max_tokens=2)
    assert [city.name async for city in objects(stream)] == [None, "Ro"]
    assert stream.result.parsed is None


async def test_leaving_a_growing_object_ends_the_answer(face: MakeFace):
    context = ScriptedContext(itertools.chain(ROME[:2], itertools.repeat("o")), delay=0.001)
    spoken = face(context)
    stream = spoken.model.stream_chat("Rome?", schema=City, max_tokens=-1)
    grown = stream.partial()
    if isinstance(grown, AsyncIterator):
        async for _ in grown:
            break
        await grown.aclose()
    else:
        await asyncio.to_thread(lambda: next(grown))
        await asyncio.to_thread(grown.close)
    assert stream.result.finish_reason == "cancelled"
    assert context.aborted == [stream.request_id]


async def test_without_a_schema_nothing_grows(face: MakeFace):
    stream = face(ScriptedContext()).model.stream_chat("Rome?")
    with pytest.raises(InvalidRequestError, match="without a `schema`"):
        [_ async for _ in objects(stream)]
    await face(ScriptedContext()).close(stream)


class Thinking(ScriptedContext):
    """Its prompts end where the model begins to think."""

    is_thinking = True

    def render_chat(self, *args: Any, **kwargs: Any) -> ScriptedPrompt:
        text = super().render_chat(*args, **kwargs).text
        thinking = ("<think>", "</think>")
        return ScriptedPrompt(text, self, thinking=thinking, is_thinking=self.is_thinking)


class MayThink(Thinking):
    """The model begins to think by itself, if it does."""

    is_thinking = False


BEHIND = r"""start: (thought /\n{0,2}/)? answer
thought[suffix="</think>"]: /<think>(.|\n)*/
answer: """


@pytest.mark.parametrize(
    ("context", "schema", "constraint"),
    [
        (ScriptedContext, Literal["yes", "no"], {"syntax": "regex", "text": "yes|no"}),
        (ScriptedContext, {"grammar": "root ::= "}, {"syntax": "gbnf", "text": "root ::= "}),
        (ScriptedContext, dict, {"syntax": "json_schema", "text": '{"type": "object"}'}),
        (
            Thinking,
            {"lark": "start: A"},
            {"syntax": "lark", "text": "start: A", "after": "</think>"},
        ),
        (MayThink, ["yes", "no"], {"syntax": "lark", "text": f"{BEHIND}/yes|no/"}),
        (MayThink, {"regex": "a/b"}, {"syntax": "lark", "text": rf"{BEHIND}/a\/b/"}),
        (MayThink, {"regex": "a\nb"}, {"syntax": "regex", "text": "a\nb"}),
        (MayThink, {"lark": "start: A"}, {"syntax": "lark", "text": "start: A"}),
    ],
)
async def test_the_engine_is_told_what_to_keep_to(
    face: MakeFace, context: Any, schema: Any, constraint: dict[str, Any]
):
    made = context()
    await face(made).call("chat", "Rome?", schema=schema)
    told = made.submitted[0].params["constraint"]
    assert {name: value for name, value in told.items() if value is not None} == constraint


@pytest.mark.parametrize("schema", [complex, [1], 7, "City", {"regex": 5}])
async def test_what_is_no_schema_is_refused(face: MakeFace, schema: Any):
    context = ScriptedContext()
    with pytest.raises(InvalidRequestError) as caught:
        await face(context).call("chat", "Rome?", schema=schema)
    assert (caught.value.name, context.submitted) == ("schema", [])
