"""What the routes take, as an OpenAPI description. What is not named here may be said as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .. import _core


def description(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Of these methods and paths."""
    paths: dict[str, Any] = {}
    for method, route in routes:
        path, asked = route.replace(":path}", "}"), _BODIES.get(route)
        paths.setdefault(path, {})[method.lower()] = {
            "operationId": re.sub(r"\W+", "_", path.strip("/")).strip("_"),
            "parameters": _parameters(path),
            "responses": {"200": _answer(path), "default": _REFUSAL},
            **({} if asked is None else {"requestBody": _body(*asked)}),
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "tabagent_model", "version": _core.__version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    if "{model}" in path:
        return [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]
    if path in ("/props", "/slots"):
        return [{"name": "model", "in": "query", "schema": _TEXT}]
    return []


def _answer(path: str) -> dict[str, Any]:
    kinds = _KINDS.get(path, ["application/json"])
    return {"description": "the answer", "content": {kind: {} for kind in kinds}}


def _body(required: str, fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": required.split(), "properties": fields}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


_REFUSAL = {
    "description": "a refusal: `error` has `message`, `type`, `param` and `code`",
    "content": {"application/json": {}},
}
_JSON_OR_EVENTS = ["application/json", "text/event-stream"]
_KINDS = {
    "/v1/chat/completions": _JSON_OR_EVENTS,
    "/v1/completions": _JSON_OR_EVENTS,
    "/v1/responses": _JSON_OR_EVENTS,
    "/v1/messages": _JSON_OR_EVENTS,
    "/models/sse": ["text/event-stream"],
    "/metrics": ["text/plain"],
}
_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": _TEXT},
    },
}
_DURATION = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1e9}, {"const": -1}, _TEXT]}
_SAMPLING: dict[str, Any] = {
    "model": {"type": ["string", "null"]},
    "num_ctx": {"type": "integer"},
    "keep_alive": _DURATION,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(0, 2**31 - 1),
    "stream": _FLAG,
}
_OPENAI: dict[str, Any] = {
    **_SAMPLING,
    "max_tokens": _whole(1, 32_768),
    "n": _whole(1, 128),
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 64}]},
    "seed": _whole(-1, 2**63 - 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repeat_penalty": _number(0.01, 10),
    "min_p": _number(0, 0.99),
    "priority": {"enum": ["high", "normal", "low"]},
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "response_format": {"type": "object"},
    "chat_template_kwargs": {"type": "object"},
    "return_progress": _FLAG,
}
_CONTROL: dict[str, Any] = {"model": _TEXT, "wait": _FLAG}
_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("messages", {**_OPENAI, "messages": _MESSAGES}),
    "/v1/completions": ("prompt", {**_OPENAI, "prompt": _TEXT, "echo": _FLAG}),
    "/v1/responses": (
        "input",
        {
            **_SAMPLING,
            "input": _TEXT,
            "instructions": _TEXT,
            "max_output_tokens": _whole(1, 32_768),
        },
    ),
    "/v1/messages": (
        "messages max_tokens",
        {**_SAMPLING, "messages": _MESSAGES, "max_tokens": _whole(1, 32_768), "system": _TEXT},
    ),
    "/v1/messages/count_tokens": ("messages", {"messages": _MESSAGES, "system": _TEXT}),
    "/tokenize": ("content", {"content": _TEXT, "add_special": _FLAG, "with_pieces": _FLAG}),
    "/detokenize": ("tokens", {"tokens": {"type": "array", "items": _whole(0, 2**31 - 1)}}),
    "/apply-template": ("messages", {"messages": _MESSAGES}),
    "/models/load": ("model", {**_CONTROL, "keep_alive": _DURATION}),
    "/models/unload": ("model", {**_CONTROL, "grace": _DURATION}),
    "/models/swap": ("model", {**_CONTROL, "grace": _DURATION}),
}
