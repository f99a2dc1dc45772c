"""The service in OpenAI's shapes; no web framework.

    bytes ──▶ ChatRequest ──▶ Service ──▶ Answers ──┬──▶ ChatShape ──▶ bytes
             (_request.py)                          └──▶ Events, bytes as they come

A door needs `handle` only: it takes a method, a path and bytes, and what is wrong with them comes
back as a reply.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from json.encoder import encode_basestring
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

from ..errors import (
    GenerationTimeoutError,
    GrammarError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelNotLoadedError,
    NoRoomError,
    NotSupportedError,
    QueueFullError,
    TabAgentModelError,
    TemplateError,
)
from ..results import Completion
from ._request import ChatRequest, CompletionRequest
from ._shapes import ChatShape, CompletionShape, new_id
from .progress import PromptProgress, WithProgress

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..manager._keeper import ManagedModel
    from .service import Answers, Service

log = logging.getLogger("tabagent_model")


@dataclass(frozen=True)
class Reply:
    """What goes back: all of it, or events on their way."""

    status: int
    headers: Mapping[str, str]
    content: bytes | Events


async def handle(
    service: Service,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Answer one request; `headers` have names in lower case.

    Cancelling the task, or closing the events, ends what was begun.
    """
    about = {"x-request-id": f"req-{new_id()}", "content-type": "application/json"}
    try:
        act = _route(method, path)
        asked = read_json(body, headers or {}) if method == "POST" else None
        answer = await act(service, asked)
    except Exception as error:
        status, content = refusal_of(error)
        return Reply(status, {**about, **_extra_headers(error, status)}, json_bytes(content))
    if isinstance(answer, Events):
        about["content-type"] = "text/event-stream"
        return Reply(200, {**about, "cache-control": "no-cache"}, answer)
    return Reply(200, about, json_bytes(answer))


async def create_chat_completion(service: Service, body: object) -> dict[str, Any] | Events:
    asked = ChatRequest.of(body)
    name = service.resolve(asked.model)
    shape = ChatShape(name, asked.n, asked.includes_usage)
    log.debug("chat completion: %s", asked.summary())
    answers = service.chat(
        asked.messages, asked.config, n=asked.n, **asked.wanted(name), **asked.fields
    )
    if asked.is_streamed:
        return Events(await answers.start(), shape, asked.tells_progress)
    return shape.whole(await answers.collect())


async def create_completion(service: Service, body: object) -> dict[str, Any] | Events:
    asked = CompletionRequest.of(body)
    name, n = service.resolve(asked.model), asked.n
    log.debug("completion: %s", asked.summary())
    echoes: list[str] = []
    for prompt in asked.prompts if asked.echoes else ():
        if not isinstance(prompt, str):
            prompt = await service.detokenize(prompt, model=name)
        echoes += [prompt] * n
    shape = CompletionShape(name, n, asked.includes_usage, echoes)
    answers = service.complete(asked.prompts, asked.config, n=n, **asked.wanted(name))
    if asked.is_streamed:
        return Events(await answers.start(), shape, asked.tells_progress)
    return shape.whole(await answers.collect())


async def list_models(service: Service, _: object = None) -> dict[str, Any]:
    """All of them, loaded or not."""
    described = [_described(service, each) for each in service.models.described()]
    return {"object": "list", "data": described}


async def retrieve_model(service: Service, name: str) -> dict[str, Any]:
    name = service.resolve(name)
    found = next(each for each in service.models.described() if each.name == name)
    return _described(service, found)


class Events:
    """A streamed answer as server-sent events: each item is one, in bytes; the last is [DONE].

    What goes wrong on the way is an event as well. Closing it ends the request.
    """

    def __init__(
        self,
        answers: Answers[Any, Any],
        shape: ChatShape | CompletionShape,
        tells_progress: bool = False,
    ) -> None:
        self._answers = WithProgress(answers) if tells_progress else answers
        self._shape: Any = shape
        self._around: dict[int, tuple[bytes, bytes]] = {}
        numbers = range(len(answers.results))
        self._ready = deque(_event(chunk) for index in numbers for chunk in shape.first(index))
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._ready:
            return self._ready.popleft()
        if self._is_over:
            raise StopAsyncIteration
        try:
            index, item = await anext(self._answers)
        except StopAsyncIteration:
            if self._shape.includes_usage:
                self._ready.append(_event(self._shape.usage(self._answers.results)))
        except Exception as error:
            self._ready.append(_event(refusal_of(error)[1]))
        else:
            return self._told(index, item)
        self._is_over = True
        self._ready.append(_DONE)
        return self._ready.popleft()

    async def aclose(self) -> None:
        self._is_over = True
        self._ready.clear()
        await self._answers.aclose()

    def _told(self, index: int, item: Any) -> bytes:
        logprobs = self._answers.logprobs(index)
        if logprobs is None and (text := self._shape.text_of(item)):
            return self._text_event(index, item, text)
        return _event(self._chunk(index, item, logprobs))

    def _text_event(self, index: int, item: Any, text: str) -> bytes:
        """Nearly all events: what is around the text is the same each time."""
        if (around := self._around.get(index)) is None:
            event = _event(self._shape.piece(index, type(item)(_HERE)))
            before, _, after = event.partition(_encode(_HERE).encode())
            around = self._around[index] = before, after
        return around[0] + encode_basestring(text).encode() + around[1]

    def _chunk(self, index: int, item: Any, logprobs: Any) -> dict[str, Any]:
        if isinstance(item, Completion):
            told: dict[str, Any] = self._shape.last(index, item)
        elif isinstance(item, PromptProgress):
            told = self._shape.progress(index, item)
        else:
            told = self._shape.piece(index, item, logprobs)
        return told


def refusal_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell of an error."""
    if not isinstance(error, TabAgentModelError):
        log.error("a request failed", exc_info=error)
        error = InternalError("the request failed, and the log says why")
    elif isinstance(error, _RouteError):
        return error.status, error_body(error.message, error.status, error.code)
    kinds = type(error).__mro__
    status = next((_STATUS[kind] for kind in kinds if kind in _STATUS), 500)
    param = getattr(error, "name", None)
    return status, error_body(str(error), status, _code(error), param)


def error_body(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_event(content: dict[str, Any]) -> bytes:
    """The end of a stream that somebody else ends, with the body of a refusal."""
    return _event(content) + _DONE


# Whatever is not named here is the server's fault: 500.
_STATUS: dict[type, int] = {
    ModelNotFoundError: 404,
    InvalidRequestError: 400,
    TemplateError: 400,
    GrammarError: 400,
    NotSupportedError: 400,
    GenerationTimeoutError: 408,
    QueueFullError: 503,
    NoRoomError: 507,
}
_KINDS = {401: "authentication_error", 408: "timeout_error", 503: "overloaded_error"}


class _RouteError(TabAgentModelError):
    """There is nothing at that path, or not by that method."""

    status: int
    code: str
    allow: str | None


def _route(method: str, path: str) -> Callable[[Service, Any], Awaitable[dict[str, Any] | Events]]:
    wanted, act = ROUTES.get(path, ("GET", None))
    if act is None and path.startswith("/v1/models/"):
        name = unquote(path.removeprefix("/v1/models/"))

        async def act(service: Service, _: object) -> dict[str, Any]:
            return await retrieve_model(service, name)

    if act is None:
        message = f"there is nothing at {path!r:.200}"
        raise _RouteError(message, status=404, code="not_found", allow=None)
    if method != wanted:
        message = f"{path!r:.200} takes {wanted}, got {method!r:.20}"
        raise _RouteError(message, status=405, code="method_not_allowed", allow=wanted)
    return act


def _code(error: Exception) -> str:
    """`ModelNotFoundError` is model_not_found, `TemplateError` is template_error."""
    words = re.findall("[A-Z][a-z]+", type(error).__name__)
    return "_".join(words[:-1] if len(words) > 2 and words[-1] == "Error" else words).lower()


def read_json(body: bytes, headers: Mapping[str, str]) -> object:
    """What a body says; with the priority that a header gives, if it names none."""
    try:
        text = body.decode()
        asked = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:  # the only way to half a surrogate pair
            json.dumps(asked, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        message = f"the body must be JSON: {error!s:.200}"
        raise InvalidRequestError(message, name="body") from None
    if isinstance(asked, dict) and "x-priority" in headers:
        asked.setdefault("priority", headers["x-priority"])
    return asked


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _extra_headers(error: Exception, status: int) -> dict[str, str]:
    if isinstance(error, _RouteError) and error.allow:
        return {"allow": error.allow}
    return {"retry-after": "1"} if status == 503 else {}


def _described(service: Service, model: ManagedModel) -> dict[str, Any]:
    described = {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "local",
        "status": status_of(service, model),
    }
    with suppress(ModelNotLoadedError):
        described["context_window"] = service.model(model.name).n_ctx
    return described


def status_of(service: Service, model: ManagedModel) -> dict[str, Any]:
    """How a model is, in llama-server's form; and why it is not loaded, if that went wrong."""
    status: dict[str, Any] = {
        "value": model.state,
        "is_default": model.is_default,
        "keep_alive_s": -1 if model.keep_alive_s == inf else model.keep_alive_s,
        "needs_bytes": model.needs_bytes,
        "num_users": model.num_users,
        "num_waiting": model.num_waiting,
    }
    error = service.models.failures.get(model.name)
    if model.state == "unloaded" and error is not None:
        status |= {"failed": True, **refusal_of(error)[1]}
    return status


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"


def json_bytes(content: object) -> bytes:
    return _encode(content).encode()


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# In the place of a text; a name or an id is printable.
_HERE = "\0"
_DONE = b"data: [DONE]\n\n"

ROUTES: dict[str, tuple[str, Callable[[Service, Any], Awaitable[dict[str, Any] | Events]]]] = {
    "/v1/chat/completions": ("POST", create_chat_completion),
    "/v1/completions": ("POST", create_completion),
    "/v1/models": ("GET", list_models),
}
