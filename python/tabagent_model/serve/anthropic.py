"""Anthropic's shapes over the same service: a message is a chat in other words. No web framework.

/v1/messages ──▶ a chat completion's body ──▶ ChatRequest ──▶ Service
                 MessageEvents: blocks that begin, grow and end ◀──┘
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..results import ChatCompletion, ChatDelta, Usage
from . import openai
from ._request import ChatRequest, Fields
from ._shapes import new_id
from .openai import json_bytes

if TYPE_CHECKING:
    from .service import Answers, Service


async def create_message(service: Service, given: object) -> dict[str, Any] | AsyncIterator[bytes]:
    body = Fields(given)
    if body.whole("max_tokens", 1, 2**31 - 1) is None:
        body.bad("max_tokens", "a whole number", None)
    asked = ChatRequest.of(chat_body(body))
    name = service.resolve(asked.model)
    answers = service.chat(asked.messages, asked.config, **asked.wanted(name), **asked.fields)
    if asked.is_streamed:
        return _events(await answers.start(), name)
    return message_of((await answers.collect())[0], name)


async def count_tokens(service: Service, given: object) -> dict[str, Any]:
    asked = ChatRequest.of(chat_body(Fields(given)))
    number = await service.count_tokens(asked.messages, model=asked.model, **asked.fields)
    return {"input_tokens": number}


ROUTES: dict[str, tuple[str, Callable[[Service, Any], Awaitable[Any]]]] = {
    "/v1/messages": ("POST", create_message),
    "/v1/messages/count_tokens": ("POST", count_tokens),
}


# What is asked: each part of a message has its place in a chat completion's.


def chat_body(body: Fields) -> dict[str, Any]:
    """The same request as the body of a chat completion; what it says is checked there."""
    messages = body.raw("messages")
    if not isinstance(messages, list):
        body.bad("messages", "a list of messages", messages)
    system = body.raw("system")
    chat: dict[str, Any] = {
        name: body.raw(name)
        for name in (
            *("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "priority"),
            *("num_ctx", "keep_alive"),
        )
    }
    chat["messages"] = (
        [] if system is None else [{"role": "system", "content": _text(body, system)}]
    )
    for at, message in enumerate(messages):
        chat["messages"] += _messages(Fields(message, f"messages[{at}]"))
    chat["stop"] = body.raw("stop_sequences")
    if (tools := body.raw("tools")) is not None:
        if not isinstance(tools, list):
            body.bad("tools", "a list of tools", tools)
        chat["tools"] = [_tool(Fields(tool, f"tools[{at}]")) for at, tool in enumerate(tools)]
    chat |= _tool_choice(body.inner("tool_choice"))
    thinking = body.inner("thinking").choice("type", ("enabled", "disabled", "adaptive"))
    if thinking is not None:
        chat["enable_thinking"] = thinking != "disabled"
    return chat


def _messages(message: Fields) -> Iterator[dict[str, Any]]:
    """One message, and one more for each result of a tool in it."""
    role = message.choice("role", ("user", "assistant", "system"))
    content = message.raw("content")
    if role is None:
        message.bad("role", '"user" or "assistant"', None)
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        message.bad("content", "text or a list of blocks", content)
    said: dict[str, Any] = {"role": role, "content": ""}
    for at, given in enumerate(content):
        block = Fields(given, f"{message.name}.content[{at}]")
        kind = block.text("type")
        if kind == "text":
            said["content"] += block.text("text") or ""
        elif kind == "thinking":
            said["reasoning_content"] = said.get("reasoning_content", "") + (
                block.text("thinking") or ""
            )
        elif kind == "tool_use":
            said.setdefault("tool_calls", []).append(_call(block))
        elif kind == "tool_result":
            id = block.text("tool_use_id")
            text = _text(block, block.raw("content") or "")
            yield {"role": "tool", "tool_call_id": id, "content": text}
        elif kind != "redacted_thinking":
            block.bad("type", "text, thinking, tool_use or tool_result", kind)
    if said["content"] or "tool_calls" in said or "reasoning_content" in said:
        yield said


def _text(body: Fields, content: object) -> str:
    """Text, or the text of blocks that hold nothing else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        blocks = [Fields(block, "content") for block in content]
        if all(block.raw("type") == "text" for block in blocks):
            return "".join(block.text("text") or "" for block in blocks)
    return body.bad("content", "text or a list of text blocks", content)


def _call(block: Fields) -> dict[str, Any]:
    arguments = json.dumps(dict(block.inner("input")), ensure_ascii=False)
    function = {"name": block.text("name"), "arguments": arguments}
    return {"id": block.text("id"), "type": "function", "function": function}


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.raw("input_schema") is None:
        tool.bad("input_schema", "a JSON schema (tools of Anthropic's own are not here)", None)
    function = {
        "name": tool.raw("name"),
        "description": tool.raw("description") or "",
        "parameters": dict(tool.inner("input_schema")),
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: Fields) -> dict[str, Any]:
    kind = choice.choice("type", ("auto", "any", "tool", "none"))
    if kind is None:
        return {}
    named = {"type": "function", "function": {"name": choice.text("name")}}
    chosen = {"auto": "auto", "any": "required", "none": "none", "tool": named}[kind]
    is_parallel = not choice.flag("disable_parallel_tool_use")
    return {"tool_choice": chosen, "parallel_tool_calls": is_parallel}


# What is answered.


def message_of(answer: ChatCompletion, model: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        content.append({"type": "text", "text": answer.content})
    for call in answer.tool_calls:
        input = _parsed(call.arguments)
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": input})
    return {
        **_message(model),
        "content": content,
        **_end_of(answer),
        "usage": usage_of(answer.usage),
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def _events(answers: Answers[ChatDelta, ChatCompletion], model: str) -> AsyncIterator[bytes]:
    """A message as it grows. Closing it ends the request."""
    message, blocks = _message(model), _Blocks()
    try:
        yield _event({"type": "message_start", "message": message})
        async for _, item in answers:
            if isinstance(item, ChatCompletion):
                for event in blocks.end():
                    yield event
                delta, usage = _end_of(item), usage_of(item.usage)
                yield _event({"type": "message_delta", "delta": delta, "usage": usage})
                yield _event({"type": "message_stop"})
            else:
                for event in blocks.take(item):
                    yield event
    except Exception as error:
        yield _event(refusal_of(error)[1])
    finally:
        await answers.aclose()


class _Blocks:
    """A message's blocks, of which only the last is growing."""

    def __init__(self) -> None:
        self._number = -1
        self._open: object = None

    def take(self, delta: ChatDelta) -> Iterator[bytes]:
        if delta.reasoning:
            empty: dict[str, Any] = {"type": "thinking", "thinking": "", "signature": ""}
            grown = {"type": "thinking_delta", "thinking": delta.reasoning}
            yield from self._grow("thinking", empty, grown)
        if delta.content:
            grown = {"type": "text_delta", "text": delta.content}
            yield from self._grow("text", {"type": "text", "text": ""}, grown)
        if (call := delta.tool_call) is not None:
            empty = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            grown = {"type": "input_json_delta", "partial_json": call.arguments}
            yield from self._grow(call.index, empty, grown)

    def end(self) -> Iterator[bytes]:
        if self._open is not None:
            yield _event({"type": "content_block_stop", "index": self._number})
        self._open = None

    def _grow(self, what: object, empty: dict[str, Any], delta: dict[str, Any]) -> Iterator[bytes]:
        if what != self._open:
            yield from self.end()
            self._number, self._open = self._number + 1, what
            yield _event(
                {"type": "content_block_start", "index": self._number, "content_block": empty}
            )
        yield _event({"type": "content_block_delta", "index": self._number, "delta": delta})


def refusal_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell of an error."""
    status, content = openai.refusal_of(error)
    return status, error_body(status, content["error"]["message"])


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = _ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_event(content: dict[str, Any]) -> bytes:
    """The end of a stream that somebody else ends, with the body of a refusal in OpenAI's form."""
    kind, message = content["error"]["type"], content["error"]["message"]
    return _event({"type": "error", "error": {"type": kind, "message": message}})


_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _message(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{new_id()}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _end_of(answer: ChatCompletion) -> dict[str, Any]:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons.get(answer.finish_reason, "end_turn")
    if reason == "end_turn" and answer.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.stop}


def _parsed(arguments: str) -> object:
    try:
        return json.loads(arguments)
    except ValueError:  # an answer that was cut short; nothing of it gets lost
        return {"arguments": arguments}


def _event(content: dict[str, Any]) -> bytes:
    kind: str = content["type"]
    return b"event: " + kind.encode() + b"\ndata: " + json_bytes(content) + b"\n\n"
