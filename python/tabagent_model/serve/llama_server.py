"""llama-server's own routes: tokens, templates, and what the engine is doing. No web framework."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ._request import ChatRequest, Fields
from .openai import error_event, refusal_of
from .service import Service


async def tokenize(service: Service, given: object) -> dict[str, Any]:
    """Ids of a text, and with `with_pieces` what each stands for: text, or bytes of a character."""
    body = Fields(given)
    text = body.text("content")
    if text is None:
        body.bad("content", "a string", None)
    special = body.optional_flag("parse_special") is not False
    name = body.text("model")
    tokens = await service.tokenize(
        text, model=name, add_bos=body.flag("add_special"), special=special
    )
    if not body.flag("with_pieces"):
        return {"tokens": tokens}
    async with service.use(name) as model:
        pieces = [await model.detokenize([token], special=True) for token in tokens]
    return {
        "tokens": [
            {"id": token, "piece": piece} for token, piece in zip(tokens, pieces, strict=True)
        ]
    }


async def detokenize(service: Service, given: object) -> dict[str, Any]:
    body = Fields(given)
    tokens = body.raw("tokens")
    if not isinstance(tokens, list):
        body.bad("tokens", "a list of token ids", tokens)
    text = await service.detokenize(tokens, model=body.text("model"), special=True)
    return {"content": text}


async def apply_template(service: Service, given: object) -> dict[str, Any]:
    """The prompt that a conversation makes; nothing is generated."""
    asked = ChatRequest.of(given)
    return {"prompt": await service.prompt(asked.messages, model=asked.model, **asked.fields)}


async def props(service: Service, query: Mapping[str, str]) -> dict[str, Any]:
    """What a model is and how it was opened; of its file only the name."""
    name = service.resolve(query.get("model"))
    facts = await service.info(name)
    path = facts.pop("path", "")
    return {
        "model_alias": name,
        "model_path": path.replace("\\", "/").rpartition("/")[2],
        "total_slots": facts.get("max_parallel", 0),
        "default_generation_settings": {"n_ctx": facts.get("n_ctx", 0)},
        "modalities": {"vision": False, "audio": False},
        **{key: facts[key] for key in facts if key != "model"},
    }


async def slots(service: Service, query: Mapping[str, str]) -> list[dict[str, Any]]:
    """The places for requests that run together, and who has them; none, if it is not loaded."""
    if (model := service.loaded(query.get("model"))) is None:
        return []
    n_ctx = model.n_ctx
    return [
        {
            "id": number,
            "n_ctx": n_ctx,
            "is_processing": slot["request_id"] is not None,
            **slot,
        }
        for number, slot in enumerate(await service.slots(query.get("model")))
    ]


ROUTES: dict[str, tuple[str, Callable[[Service, Any], Awaitable[Any]]]] = {
    "/tokenize": ("POST", tokenize),
    "/detokenize": ("POST", detokenize),
    "/apply-template": ("POST", apply_template),
    "/props": ("GET", props),
    "/slots": ("GET", slots),
}

__all__ = ["ROUTES", "error_event", "refusal_of"]
