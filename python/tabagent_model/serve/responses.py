"""OpenAI's responses, without a memory: each request brings the whole conversation.

/v1/responses ──▶ a chat completion's body ──▶ ChatRequest ──▶ Service
                  items that begin, grow and end ◀──────────────┘
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..results import ChatCompletion, ChatDelta, Usage
from ._request import ChatRequest, Fields
from ._shapes import new_id
from .openai import json_bytes, refusal_of

if TYPE_CHECKING:
    from .service import Answers, Service


async def create_response(service: Service, given: object) -> dict[str, Any] | AsyncIterator[bytes]:
    body = Fields(given)
    asked = ChatRequest.of(chat_body(body))
    name = service.resolve(asked.model)
    answers = service.chat(asked.messages, asked.config, **asked.wanted(name), **asked.fields)
    response = _response(body, name)
    if asked.is_streamed:
        return _events(await answers.start(), response)
    answer = (await answers.collect())[0]
    return _ended(response, answer, items_of(answer))


ROUTES: dict[str, tuple[str, Callable[[Service, Any], Awaitable[Any]]]] = {
    "/v1/responses": ("POST", create_response),
}


# What is asked.


def chat_body(body: Fields) -> dict[str, Any]:
    """The same request as the body of a chat completion; what it says is checked there."""
    for name in ("previous_response_id", "conversation", "prompt"):
        body.refuse(name, "nothing is kept here; send the whole conversation as `input`")
    if body.flag("background"):
        body.refuse("background", "nothing is kept here that could be asked for later")
    chat: dict[str, Any] = {
        name: body.raw(name)
        for name in (
            *("model", "temperature", "top_p", "stream", "parallel_tool_calls", "top_k", "min_p"),
            *("seed", "priority", "chat_template_kwargs", "enable_thinking"),
            *("num_ctx", "keep_alive"),
        )
    }
    chat["max_tokens"] = body.raw("max_output_tokens")
    chat["reasoning_effort"] = body.inner("reasoning").raw("effort")
    chat["messages"] = list(_messages(body))
    if (tools := body.raw("tools")) is not None:
        if not isinstance(tools, list):
            body.bad("tools", "a list of tools", tools)
        chat["tools"] = [_tool(Fields(tool, f"tools[{at}]")) for at, tool in enumerate(tools)]
    choice = body.raw("tool_choice")
    if isinstance(choice, dict) and "name" in choice:
        choice = {"type": choice.get("type"), "function": {"name": choice["name"]}}
    chat["tool_choice"] = choice
    form = body.inner("text").inner("format")
    if form.raw("type") == "json_schema":
        chat["response_format"] = {"type": "json_schema", "json_schema": dict(form)}
    elif form:
        chat["response_format"] = dict(form)
    return {name: value for name, value in chat.items() if value is not None}


def _messages(body: Fields) -> Iterator[dict[str, Any]]:
    if (instructions := body.text("instructions")) is not None:
        yield {"role": "system", "content": instructions}
    given = body.raw("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    if not isinstance(given, list):
        body.bad("input", "text or a list of items", given)
    said: dict[str, Any] | None = None
    for at, one in enumerate(given):
        item = Fields(one, f"input[{at}]")
        kind = item.text("type") or "message"
        if kind in ("reasoning", "function_call"):  # parts of what the assistant says next
            said = said or {"role": "assistant", "content": ""}
            if kind == "reasoning":
                said["reasoning_content"] = _reasoning(item)
            else:
                said.setdefault("tool_calls", []).append(_call(item))
            continue
        is_same = kind == "message" and item.raw("role") == "assistant"
        if said is not None and not (is_same and "tool_calls" not in said):
            yield said
            said = None
        if kind == "message":
            message = {"role": _role(item), "content": _text(item, "content")}
            yield {**(said or {}), **message}
            said = None
        elif kind == "function_call_output":
            id, text = item.text("call_id"), _text(item, "output")
            yield {"role": "tool", "tool_call_id": id, "content": text}
        else:
            item.bad("type", "message, reasoning, function_call or function_call_output", kind)
    if said is not None:
        yield said


def _role(item: Fields) -> str:
    role = item.choice("role", ("user", "assistant", "system", "developer"))
    return item.bad("role", "a role", None) if role is None else role


def _text(item: Fields, name: str) -> str:
    given = item.raw(name)
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        item.bad(name, "text or a list of parts", given)
    parts = [Fields(part, f"{item.name}.{name}[{at}]") for at, part in enumerate(given)]
    for part in parts:
        if part.raw("type") not in ("input_text", "output_text", "refusal", "text"):
            part.bad("type", "input_text or output_text", part.raw("type"))
    return "".join(part.text("text") or part.text("refusal") or "" for part in parts)


def _reasoning(item: Fields) -> str:
    parts = item.raw("content") or item.raw("summary") or []
    if not isinstance(parts, list):
        item.bad("content", "a list of parts", parts)
    return "".join(Fields(part, item.name).text("text") or "" for part in parts)


def _call(item: Fields) -> dict[str, Any]:
    function = {"name": item.text("name"), "arguments": item.text("arguments") or "{}"}
    return {"id": item.text("call_id"), "type": "function", "function": function}


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.choice("type", ("function",)) is None:
        tool.bad("type", '"function"', None)
    named = {name: tool.raw(name) for name in ("name", "description", "parameters")}
    return {"type": "function", "function": {k: v for k, v in named.items() if v is not None}}


# What is answered.


def items_of(answer: ChatCompletion) -> list[dict[str, Any]]:
    items = []
    if answer.reasoning:
        items.append(_with_text(_item("reasoning", summary=[]), answer.reasoning, "reasoning_text"))
    if answer.content or not answer.tool_calls:
        message = _item("message", role="assistant", status="completed")
        items.append(_with_text(message, answer.content, "output_text"))
    for call in answer.tool_calls:
        named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append(_item("function_call", status="completed", **named))
    return items


async def _events(
    answers: Answers[ChatDelta, ChatCompletion], response: dict[str, Any]
) -> AsyncIterator[bytes]:
    """A response as it grows. Closing it ends the request."""
    story = _Story()
    try:
        yield story.event("response.created", response=response)
        yield story.event("response.in_progress", response=response)
        async for _, item in answers:
            if not isinstance(item, ChatCompletion):
                for event in story.take(item):
                    yield event
                continue
            for event in story.end():
                yield event
            ended = _ended(response, item, story.items)
            yield story.event(f"response.{ended['status']}", response=ended)
    except Exception as error:
        failed = {**response, "status": "failed", "error": refusal_of(error)[1]["error"]}
        yield story.event("response.failed", response=failed)
    finally:
        await answers.aclose()


class _Story:
    """Numbered events about items, of which only the last is growing."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._number = 0
        self._open: object = None
        self._pieces: list[str] = []

    def event(self, kind: str, **facts: Any) -> bytes:
        self._number += 1
        content = {"type": kind, "sequence_number": self._number - 1, **facts}
        return b"event: " + kind.encode() + b"\ndata: " + json_bytes(content) + b"\n\n"

    def take(self, delta: ChatDelta) -> Iterator[bytes]:
        if delta.reasoning:
            yield from self._grow(
                "reasoning", delta.reasoning, lambda: _item("reasoning", summary=[])
            )
        if delta.content:
            yield from self._grow("message", delta.content, _growing_message)
        if (call := delta.tool_call) is not None:
            yield from self._grow(
                call.index,
                call.arguments,
                lambda: _item(
                    "function_call",
                    status="in_progress",
                    call_id=call.id,
                    name=call.name,
                    arguments="",
                ),
            )

    def end(self) -> Iterator[bytes]:
        """The end of the item that grows, if one does."""
        if self._open is None:
            return
        item, text, place = self.items[-1], "".join(self._pieces), self._place()
        if item["type"] == "function_call":
            item |= {"arguments": text, "status": "completed"}
            done = "response.function_call_arguments.done"
            yield self.event(done, **place, name=item["name"], arguments=text)
        else:
            kind = _PARTS[item["type"]]
            _with_text(item, text, kind)
            if "status" in item:
                item["status"] = "completed"
            place["content_index"] = 0
            yield self.event(f"response.{kind}.done", **place, text=text, **_logprobs(kind))
            yield self.event("response.content_part.done", **place, part=item["content"][0])
        at = len(self.items) - 1
        yield self.event("response.output_item.done", output_index=at, item=item)
        self._open = None

    def _grow(self, what: object, text: str, new: Callable[[], dict[str, Any]]) -> Iterator[bytes]:
        if what != self._open:
            yield from self.end()
            self._open, self._pieces = what, []
            self.items.append(new())
            yield from self._begin()
        self._pieces.append(text)
        kind, place = self.items[-1]["type"], self._place()
        if kind == "function_call":
            yield self.event("response.function_call_arguments.delta", **place, delta=text)
        else:
            part = _PARTS[kind]
            facts = {**place, "content_index": 0, "delta": text, **_logprobs(part)}
            yield self.event(f"response.{part}.delta", **facts)

    def _begin(self) -> Iterator[bytes]:
        item, at = self.items[-1], len(self.items) - 1
        yield self.event("response.output_item.added", output_index=at, item=item)
        if item["type"] != "function_call":
            part = _part("", _PARTS[item["type"]])
            yield self.event(
                "response.content_part.added", **self._place(), content_index=0, part=part
            )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _item(kind: str, **facts: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {} if kind == "function_call" else {"content": []}
    return {"type": kind, "id": f"{_PREFIXES[kind]}_{new_id()}", **parts, **facts}


def _growing_message() -> dict[str, Any]:
    return _item("message", role="assistant", status="in_progress")


def _with_text(item: dict[str, Any], text: str, kind: str) -> dict[str, Any]:
    item["content"] = [_part(text, kind)]
    return item


def _part(text: str, kind: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})}


def _logprobs(kind: str) -> dict[str, Any]:
    """The client's types want them where there is text for people."""
    return {"logprobs": []} if kind == "output_text" else {}


def _response(body: Fields, model: str) -> dict[str, Any]:
    """What is known before the answer; the wishes come back as they were sent."""
    wishes = {
        name: body.raw(name)
        for name in (
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_p",
            "reasoning",
            "text",
        )
    }
    return {
        "id": f"resp_{new_id()}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "parallel_tool_calls": body.optional_flag("parallel_tool_calls") is not False,
        "tool_choice": body.raw("tool_choice") or "auto",
        "tools": body.raw("tools") or [],
        "metadata": body.raw("metadata") or {},
        "store": False,
        "usage": None,
        **wishes,
    }


def _ended(
    response: dict[str, Any], answer: ChatCompletion, items: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    is_cut = answer.finish_reason == "length"
    return {
        **response,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": list(items),
        "usage": usage_of(answer.usage),
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def error_event(content: dict[str, Any]) -> bytes:
    """The end of a stream that somebody else ends, with the body of a refusal."""
    error = {name: content["error"][name] for name in ("code", "message", "param")}
    return b"event: error\ndata: " + json_bytes({"type": "error", **error}) + b"\n\n"


__all__ = ["ROUTES", "create_response", "error_event", "refusal_of"]
