"""Chats with tools over a scripted engine: what may be asked, and the pieces of an answer."""

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Face
from tabagent_model import (
    ChatCompletion,
    ChatDelta,
    InvalidRequestError,
    TokenizationError,
    ToolCall,
    ToolCallDelta,
)
from tabagent_model.testing import ScriptedContext

MakeFace = Callable[[ScriptedContext], Face]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object"}},
}
CALLING = ["Let me ", "see.<think>Rome?</think>", "<tool_call>"]
CALLING += ['{"name": "get_weather", "arguments": ', '{"city": "Rome"}}</tool_call>']
ROME = ToolCall("call_0", "get_weather", '{"city": "Rome"}')


async def test_an_answer_has_content_reasoning_and_tool_calls(face: MakeFace):
    answer = await face(ScriptedContext(CALLING)).call("chat", "How is it?", tools=[WEATHER])
    assert isinstance(answer, ChatCompletion)
    assert (answer.content, answer.reasoning, answer.tool_calls) == (
        "Let me see.",
        "Rome?",
        (ROME,),
    )
    assert (answer.finish_reason, answer.parse_error, str(answer)) == (
        "tool_calls",
        None,
        "Let me see.",
    )
    assert answer.text == "".join(CALLING)
    assert answer.message == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Rome?",
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    }


async def test_an_answer_comes_in_pieces_of_each_kind(face: MakeFace):
    spoken = face(ScriptedContext(CALLING))
    stream = spoken.model.stream_chat("How is it?", tools=[WEATHER])
    assert [delta async for delta in spoken.pieces(stream)] == [
        ChatDelta("Let me "),
        ChatDelta("see."),
        ChatDelta(reasoning="Rome?"),
        ChatDelta(tool_call=ToolCallDelta(0, "call_0", "get_weather", '{"city": "Rome"}')),
    ]
    assert stream.result == await face(ScriptedContext(CALLING)).call("chat", "How is it?")


async def test_the_tokens_of_thoughts_are_counted(face: MakeFace):
    spoken = ["<think>", "Ro", "me", " it", " is.", "</think>", "Rome."]
    answer = await face(ScriptedContext(spoken)).call("chat", "Where?")
    assert (answer.reasoning, answer.usage.reasoning_tokens) == ("Rome it is.", 4)
    twice = ["<think>", "one", "</think>", "A", "<think>", "two", "</think>", "B"]
    answer = await face(ScriptedContext(twice)).call("chat", "Where?")  # known by its length only
    assert (answer.reasoning, answer.usage.reasoning_tokens) == ("onetwo", 1)
    plain = await face(ScriptedContext(["Rome."])).call("chat", "Where?")
    assert plain.usage.reasoning_tokens == 0


async def test_pieces_can_be_watched_while_they_are_collected(face: MakeFace):
    heard: list[str] = []
    stream = face(ScriptedContext(["Be", "cause"])).model.stream_chat("Why?")
    answer = stream.collect(lambda delta: heard.append(str(delta)))
    answer = await answer if hasattr(answer, "__await__") else answer
    assert (heard, answer.content) == (["Be", "cause"], "Because")


async def test_an_answer_that_is_left_early_is_read_as_far_as_it_came(face: MakeFace):
    spoken = face(ScriptedContext(["Be", "cause", "<", "tool"]))
    stream = spoken.model.stream_chat("Why?")
    pieces = spoken.pieces(stream)
    assert await anext(pieces) == ChatDelta("Be")
    await spoken.close(stream)
    assert "Because<tool".startswith(stream.result.content)
    assert stream.result.finish_reason in ("cancelled", "stop")


async def test_an_answer_that_cannot_be_read_is_delivered_and_says_why(
    face: MakeFace, caplog: pytest.LogCaptureFixture
):
    answer = await face(ScriptedContext(["<tool_call>{</tool_call>"])).call("chat", "How is it?")
    assert (answer.content, answer.tool_calls) == ("<tool_call>{</tool_call>", ())
    assert answer.parse_error.startswith("a tool call cannot be read")
    assert answer.finish_reason == "stop"
    (line,) = caplog.messages
    assert line == f"request {answer.metrics.request_id}: its answer could not be read"


async def test_a_raw_answer_can_be_read_later(face: MakeFace):
    answer = await face(ScriptedContext()).call("parse_chat", "".join(CALLING))
    assert (answer.content, answer.tool_calls) == ("Let me see.", (ROME,))


async def test_a_conversation_with_calls_is_sent_as_it_is(face: MakeFace):
    context = ScriptedContext(CALLING)
    spoken = face(context)
    answer = await spoken.call("chat", "How is it?", tools=[WEATHER])
    told = {"role": "tool", "tool_call_id": "call_0", "content": "sunny", "refusal": None}
    asked = {"role": "user", "content": "How is it?"}
    await spoken.call("chat", [asked, answer.message, told], tools=[WEATHER])
    assert context.detokenize(context.submitted[1].prompt) == (  # type: ignore[arg-type]
        "user: How is it?\nassistant: Let me see.\ntool: sunny\nassistant: "
    )


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "x", **fields}]


def calling(**fields: Any) -> list[dict[str, Any]]:
    return message(tool_calls=[{"type": "function", "function": fields}])


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"role": "tool", "content": "x"}], r"`messages\[0\].tool_call_id` must be the `id`"),
        (message(tool_calls="x"), r"`messages\[0\].tool_calls` must be a list of tool calls"),
        (message(tool_calls=["x"]), r"`messages\[0\].tool_calls\[0\]` must be a tool call"),
        (message(tool_calls=[{"type": "code"}]), r"tool_calls\[0\]` must be a tool call"),
        (calling(arguments="{}"), r"tool_calls\[0\].function.name` must be text, got None"),
        (calling(name="f"), r"tool_calls\[0\].function.arguments` must be text, got None"),
        (calling(name="f", arguments={"x": object()}), "must hold what JSON can hold"),
        (message(reasoning_content=7), r"`messages\[0\].reasoning_content` must be text, got 7"),
        (message(name=7), r"`messages\[0\].name` must be text, got 7"),
        (message(content=None), r"`messages\[0\].content` must be text, or a list"),
    ],
)
async def test_odd_messages_are_refused_by_name(face: MakeFace, messages: Any, named: str):
    with pytest.raises(InvalidRequestError, match=named):
        await face(ScriptedContext()).call("chat", messages)


def tool(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": "x"}, "`tools` must be a list of tools, got 'x'"),
        ({"tools": [7]}, r"`tools\[0\]` must be a function, or a mapping with a"),
        ({"tools": tool(name="a b")}, r"`tools\[0\].function.name` must be 1 to 128 letters"),
        ({"tools": tool(description=7)}, r"`tools\[0\].function.description` must be text"),
        ({"tools": tool(parameters=[1])}, r"`tools\[0\].function.parameters` must be a JSON"),
        ({"tools": tool() * 2}, "`tools` must be tools of different names, got \"'f' twice"),
        ({"tools": tool() * 200}, "`tools` must be at most 128 tools"),
        ({"tools": tool(parameters={"x": object()})}, "must hold what JSON can hold"),
        ({"tool_choice": "x"}, "`tool_choice` must be 'auto', 'none', 'required', or"),
        ({"tool_choice": "required"}, "where there are no tools"),
        (
            {"tools": tool(), "tool_choice": {"function": {"name": "g"}}},
            r"`tool_choice` must be .* or the name of one of the tools \('f'\)",
        ),
        ({"enable_thinking": "x"}, "`enable_thinking` must be True or False, got 'x'"),
        ({"reasoning_format": "x"}, "`reasoning_format` must be one of 'auto', 'none'"),
        ({"chat_template_kwargs": 7}, "`chat_template_kwargs` must be a mapping"),
        ({"chat_template_kwargs": {"tools": 7}}, "`chat_template_kwargs` must be without"),
        ({"continue_final_message": True}, "and the last one is none"),
        ({"template": 7}, "`template` must be the text of a template"),
        ({"schema": 7}, "`schema` must be"),
        ({"tool_choise": "auto"}, "has no field `tool_choise`"),
    ],
)
async def test_odd_options_are_refused_by_name(face: MakeFace, fields: dict[str, Any], named: str):
    with pytest.raises(InvalidRequestError, match=named):
        await face(ScriptedContext()).call("chat", "Why?", **fields)


async def test_text_that_is_no_unicode_is_refused(face: MakeFace):
    with pytest.raises(TokenizationError, match="surrogate"):
        await face(ScriptedContext()).call("chat", "Why?", tools=tool(description="\ud800"))


async def test_one_function_that_is_named_is_the_only_one(face: MakeFace):
    class Listening(ScriptedContext):
        def render_chat(self, *given: Any) -> Any:
            heard.append(given[3])
            return super().render_chat(*given)

    heard: list[str] = []
    two = [*tool(), WEATHER]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    await face(Listening()).call("chat", "Why?", tools=two, tool_choice=choice)
    (said,) = heard
    assert '"tool_choice": "required"' in said
    assert said.count('"type": "function"') == 1


async def test_none_is_the_default_of_every_option(face: MakeFace):
    names = ("tools", "tool_choice", "parallel_tool_calls", "template", "enable_thinking")
    names += ("reasoning_format", "chat_template_kwargs", "continue_final_message", "schema")
    fields: dict[str, Any] = dict.fromkeys(names)
    assert (await face(ScriptedContext()).call("chat", "Why?", **fields)).text == "Hello!"
