"""What the routes take, as an OpenAPI description. What is not named here may be said as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _core


def description(routes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Of these methods and paths."""
    paths: dict[str, Any] = {}
    for method, path in routes:
        asked = _BODIES.get(path)
        paths.setdefault(path, {})[method.lower()] = {
            "operationId": path.strip("/").replace("/", "_").replace("-", "_") or "page",
            "responses": {"200": {"description": "the answer"}, "default": _REFUSAL},
            **({} if asked is None else {"requestBody": _body(*asked)}),
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "tabagent_model", "version": _core.__version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _body(required: str, fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": required.split(), "properties": fields}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


_REFUSAL = {"description": "a refusal: `error` has `message`, `type`, `param` and `code`"}
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
_SAMPLING: dict[str, Any] = {
    "model": {"type": ["string", "null"]},
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
}
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
}
