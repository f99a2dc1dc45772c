"""Answers in OpenAI's shape, as plain dicts: whole, or chunk by chunk."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from random import Random
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import _core
from ..results import ChatCompletion, ChatDelta, Completion

if TYPE_CHECKING:
    from ..results import TokenLogprob
    from .progress import PromptProgress

Logprobs = Sequence["TokenLogprob"] | None
D = TypeVar("D")
R = TypeVar("R", bound=Completion)


class _Shape(Generic[D, R]):
    """The dicts of one reply; its id, time and model stand in all of them."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, n: int = 1, includes_usage: bool = False) -> None:
        self._n = n
        self._tail: dict[str, Any] = {"usage": None} if includes_usage else {}
        self.includes_usage = includes_usage
        self._num_told: dict[int, int] = {}
        """How many logprobs of each answer were told."""
        self._head = {
            "id": f"{self.prefix}-{new_id()}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"tabagent-{_core.__version__}",
        }

    def whole(self, results: Sequence[R]) -> dict[str, Any]:
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        timings = {"timings": timings_of(results[0])} if len(results) == 1 else {}
        usage = usage_of(results, self._n)
        return {
            "object": self.whole_object,
            **self._head,
            "choices": choices,
            "usage": usage,
            **timings,
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        """What is told before there is a word of the answer."""
        raise NotImplementedError

    def piece(self, index: int, delta: D, logprobs: Logprobs = None) -> dict[str, Any]:
        """`logprobs` are those of all that was read so far; what is new of them is told."""
        raise NotImplementedError

    def progress(self, index: int, progress: PromptProgress) -> dict[str, Any]:
        """How far the prompt is read, with a piece that says nothing."""
        return {**self._nothing(index), "prompt_progress": asdict(progress)}

    def last(self, index: int, result: R) -> dict[str, Any]:
        """Why the answer ended."""
        raise NotImplementedError

    def usage(self, results: Sequence[R]) -> dict[str, Any]:
        """What all answers have cost, after the last of them."""
        usage = usage_of(results, self._n)
        return {"object": self.chunk_object, **self._head, "choices": [], "usage": usage}

    def _untold(self, index: int, logprobs: Logprobs) -> Logprobs:
        if logprobs is None:
            return None
        begin, self._num_told[index] = self._num_told.get(index, 0), len(logprobs)
        return logprobs[begin:] or None

    def _choice(self, index: int, result: R) -> dict[str, Any]:
        raise NotImplementedError

    def _nothing(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "object": self.chunk_object,
            **self._head,
            "choices": [choice],
            **self._tail,
            **more,
        }


class ChatShape(_Shape[ChatDelta, ChatCompletion]):
    """Of a chat completion."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def piece(self, index: int, delta: ChatDelta, logprobs: Logprobs = None) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if delta.content:
            told["content"] = delta.content
        if delta.reasoning:
            told["reasoning_content"] = delta.reasoning
        if (call := delta.tool_call) is not None:
            begin = {} if call.id is None else {"id": call.id, "type": "function"}
            name = {} if call.name is None else {"name": call.name}
            function = {**name, "arguments": call.arguments}
            told["tool_calls"] = [{"index": call.index, **begin, "function": function}]
        return self._delta(index, told, chat_logprobs(self._untold(index, logprobs)))

    def text_of(self, item: ChatDelta | ChatCompletion | PromptProgress) -> str | None:
        """What is told, if it is a piece of text and nothing else."""
        if isinstance(item, ChatDelta) and not item.reasoning and item.tool_call is None:
            return item.content
        return None

    def last(self, index: int, result: ChatCompletion) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": {},
            "logprobs": chat_logprobs(self._untold(index, result.logprobs)),
            "finish_reason": result.finish_reason,
        }
        return self._chunk(choice, timings=timings_of(result))

    def _nothing(self, index: int) -> dict[str, Any]:
        return self._delta(index, {})

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        )

    def _choice(self, index: int, result: ChatCompletion) -> dict[str, Any]:
        return {
            "index": index,
            "message": {**result.message, "refusal": None},
            "logprobs": chat_logprobs(result.logprobs),
            "finish_reason": result.finish_reason,
        }


class CompletionShape(_Shape[str, Completion]):
    """Of a completion; `echoes` are put before the answers."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        model: str,
        n: int = 1,
        includes_usage: bool = False,
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(model, n, includes_usage)
        self._echoes = echoes
        self._offsets = {index: len(echo) for index, echo in enumerate(echoes)}
        """Where in the text of each answer the logprobs go on that were not told."""

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self.piece(index, self._echoes[index])] if self._echoes else []

    def piece(self, index: int, delta: str, logprobs: Logprobs = None) -> dict[str, Any]:
        told = self._told(index, logprobs)
        return self._chunk({"text": delta, "index": index, "logprobs": told, "finish_reason": None})

    def text_of(self, item: str | Completion | PromptProgress) -> str | None:
        """As `ChatShape.text_of`."""
        return item if isinstance(item, str) else None

    def last(self, index: int, result: Completion) -> dict[str, Any]:
        told = self._told(index, result.logprobs)
        choice = {**self._choice(index, result), "text": "", "logprobs": told}
        return self._chunk(choice, timings=timings_of(result))

    def _told(self, index: int, logprobs: Logprobs) -> dict[str, Any] | None:
        untold = self._untold(index, logprobs)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(each.text) for each in untold or ())
        return completion_logprobs(untold, offset)

    def _nothing(self, index: int) -> dict[str, Any]:
        return self.piece(index, "")

    def _choice(self, index: int, result: Completion) -> dict[str, Any]:
        echo = self._echoes[index] if self._echoes else ""
        return {
            "text": echo + result.text,
            "index": index,
            "logprobs": completion_logprobs(result.logprobs, len(echo)),
            "finish_reason": result.finish_reason,
        }


def usage_of(results: Sequence[Completion], n: int) -> dict[str, Any]:
    """What was counted; a prompt with several answers counts once."""
    prompts = [result.usage for result in results[::n]]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(result.usage.completion_tokens for result in results)
    reasoning_tokens = sum(result.usage.reasoning_tokens for result in results)
    dropped = {
        name: sum(getattr(result.usage, name) for result in results)
        for name in ("dropped_tokens", "dropped_messages")
    }
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "n_ctx": prompts[0].n_ctx,
        **{name: number for name, number in dropped.items() if number},
    }


def timings_of(result: Completion) -> dict[str, float]:
    """Times under llama-server's names, how long the request waited for its turn, and what it could
    hold, which may be more than was asked for."""
    metrics = result.metrics
    read = metrics.prompt_tokens - metrics.cached_tokens
    rate = metrics.tokens_per_second
    decoded = max(metrics.generated_tokens - 1, 0)  # the first token comes with the prompt
    return {
        "cache_n": metrics.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round(metrics.prompt_eval_ms, 3),
        "prompt_per_second": _rate(read, metrics.prompt_eval_ms),
        "predicted_n": metrics.generated_tokens,
        "predicted_ms": round(decoded / rate * 1000, 3) if rate else 0.0,
        "predicted_per_second": round(rate, 3),
        "queue_ms": round(metrics.queue_ms, 3),
        "first_token_ms": round(metrics.time_to_first_token_ms, 3),
        "n_ctx": result.usage.n_ctx,
    }


def _rate(number: int, ms: float) -> float:
    return round(number / ms * 1000, 3) if ms > 0 else 0.0


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [{**_token(each), "top_logprobs": [*map(_token, each.top)]} for each in logprobs]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logprobs: Sequence[TokenLogprob] | None, offset: int
) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{top.text: top.logprob for top in each.top} for each in logprobs],
        "text_offset": offsets,
    }


def new_id() -> str:
    """32 digits that nobody else has; they are no secret, so the system need not be asked."""
    return f"{_DICE.getrandbits(128):032x}"


_DICE = Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_DICE.seed)


def _token(token: TokenLogprob) -> dict[str, Any]:
    """`bytes` are unknown of half a character."""
    known = None if "\ufffd" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": known}
