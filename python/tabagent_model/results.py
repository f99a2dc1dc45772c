"""What comes back: the answer, what it cost, and the description of a model file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
Logprob = tuple[int, str, float]
Logprobs = Sequence[tuple[Logprob, Sequence[Logprob]]]


@dataclass(frozen=True)
class Usage:
    """Counted tokens.

    `cached_tokens` of the prompt were known from an earlier request; `dropped_tokens` of the prompt
    and the answer had to go because the context was full.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """How many of the answer's tokens were thoughts."""
    dropped_tokens: int = 0
    """What the model no longer saw, because it did not fit the context."""
    dropped_messages: int = 0
    """How many of a conversation's messages that were."""
    n_ctx: int = 0
    """How many tokens the request could hold."""


@dataclass(frozen=True)
class InferenceMetrics:
    """Times and rates of one answer."""

    model_load_time_ms: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    inference_time_ms: float = 0.0
    """From the call to the end, with the time spent waiting for a turn."""
    tokens_per_second: float = 0.0
    """Of decoding, without the prompt; 0 if there was no more than one token."""
    memory_used_mb: float = 0.0
    """What the whole process held in memory at the end."""
    gpu_utilized: bool = False
    time_to_first_token_ms: float = 0.0
    """From the call to the first token; 0 if there was none."""
    prompt_eval_ms: float = 0.0
    queue_ms: float = 0.0
    cached_tokens: int = 0
    inter_token_p50_ms: float = 0.0
    """The usual time from one token to the next, and the one that 1 in 100 exceeds."""
    inter_token_p99_ms: float = 0.0
    request_id: int = 0

    def summary(self) -> str:
        """One line for a log."""
        return (
            f"request {self.request_id}: {self.prompt_tokens} prompt tokens"
            f" ({self.cached_tokens} cached) in {self.prompt_eval_ms:.0f} ms,"
            f" first token after {self.time_to_first_token_ms:.0f} ms,"
            f" {self.generated_tokens} tokens at {self.tokens_per_second:.1f}/s,"
            f" {self.inference_time_ms:.0f} ms in all"
        )


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, as a natural logarithm, before any sampler."""

    token: int
    text: str
    """Of half a character it is U+FFFD; control tokens are written out."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens in its place, the likeliest first."""


@dataclass(frozen=True)
class Completion:
    """An answer. Two are equal when they say the same, whatever they cost."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    """`stop`: the model or a stop string ended it; `length`: no more tokens were allowed or fit."""
    usage: Usage = field(default_factory=Usage, compare=False)
    metrics: InferenceMetrics = field(default_factory=InferenceMetrics, compare=False)
    model: str = field(default="", compare=False)
    seed: int = field(default=-1, compare=False)
    """The one that was used, also when it was chosen at random."""
    stop: str | None = field(default=None, compare=False)
    """The stop string that ended the text."""
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)
    """For each of `tokens`, if they were asked for."""

    def __str__(self) -> str:
        return self.text

    @property
    def content(self) -> str:
        return self.text

    @property
    def tokens_generated(self) -> int:
        return self.usage.completion_tokens

    @property
    def tokens_prompt(self) -> int:
        return self.usage.prompt_tokens

    @property
    def time_to_first_token_ms(self) -> float:
        return self.metrics.time_to_first_token_ms

    @property
    def total_time_ms(self) -> float:
        return self.metrics.inference_time_ms

    @property
    def tokens_per_second(self) -> float:
        return self.metrics.tokens_per_second


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called."""

    id: str
    name: str
    arguments: str
    """JSON text, as the model wrote it."""

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatCompletion(Completion):
    """An answer in a conversation, read as the model's template means it; `text` is the raw one."""

    content: str = field(default="", compare=False)
    """What is said to the user."""
    reasoning: str | None = field(default=None, compare=False)
    """What the model thought before."""
    tool_calls: tuple[ToolCall, ...] = field(default=(), compare=False)
    parsed: Any = field(default=None, compare=False)
    """The content as what `schema` asked for."""
    parse_error: str | None = field(default=None, compare=False)
    """Why the fields above are not what the model meant, if they are not."""

    def __str__(self) -> str:
        return self.content

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI's shape, to be appended to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.content or None
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message

    @classmethod
    def read(
        cls, raw: Completion, message: Mapping[str, Any], finish_reason: FinishReason
    ) -> ChatCompletion:
        """From a raw answer and what a parser found in it."""
        calls = tuple(ToolCall(**call) for call in message["tool_calls"])
        return cls(
            **{**vars(raw), "finish_reason": finish_reason},
            content=message["content"],
            reasoning=message["reasoning"] or None,
            tool_calls=calls,
            parse_error=message["error"],
        )


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call. The first one of each `index` brings `id` and `name`."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class ChatDelta:
    """A piece of an answer: one of these."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None

    def __str__(self) -> str:
        return self.content

    @classmethod
    def read(cls, found: Sequence[Any]) -> ChatDelta:
        """From what a parser found."""
        kind, *rest = found
        if kind == "tool_call":
            return cls(tool_call=ToolCallDelta(*rest))
        return cls(content=rest[0]) if kind == "content" else cls(reasoning=rest[0])


@dataclass(frozen=True)
class Source:
    """What a model writes under each of its answers."""

    model: str = ""
    load_time_ms: float = 0.0
    gpu_utilized: bool = False
    memory_used_mb: Callable[[], float] = lambda: 0.0


def logprobs_of(found: Logprobs) -> list[TokenLogprob]:
    """From what the core tells with an event."""
    return [
        TokenLogprob(*chosen, top=tuple(TokenLogprob(*one) for one in top)) for chosen, top in found
    ]


def metrics_of(request_id: int, stats: Mapping[str, float], source: Source) -> InferenceMetrics:
    """The engine's figures of one request under their public names."""
    generated, decode_ms = int(stats.get("generated_tokens", 0)), stats.get("decode_ms", 0.0)
    decoded = max(generated - 1, 0)  # the first token comes with the prompt
    return InferenceMetrics(
        model_load_time_ms=source.load_time_ms,
        prompt_tokens=int(stats.get("prompt_tokens", 0)),
        generated_tokens=generated,
        inference_time_ms=stats.get("total_ms", 0.0),
        tokens_per_second=decoded / decode_ms * 1000 if decode_ms > 0 else 0.0,
        memory_used_mb=source.memory_used_mb(),
        gpu_utilized=source.gpu_utilized,
        time_to_first_token_ms=stats.get("first_token_ms", 0.0),
        prompt_eval_ms=stats.get("prompt_ms", 0.0),
        queue_ms=stats.get("queue_ms", 0.0),
        cached_tokens=int(stats.get("cached_tokens", 0)),
        inter_token_p50_ms=stats.get("gap_p50_ms", 0.0),
        inter_token_p99_ms=stats.get("gap_p99_ms", 0.0),
        request_id=request_id,
    )


@dataclass(frozen=True)
class ModelDescription:
    """What the header of a model file says."""

    path: str
    shards: tuple[str, ...]
    """All files of the model, the first one first."""
    size_bytes: int
    architecture: str
    name: str | None
    n_params: int
    quantization: str
    n_ctx_train: int
    n_layers: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    tokenizer: str
    pre_tokenizer: str | None
    has_chat_template: bool
    is_embedding: bool
    kv_bytes_per_token: int
    """What one token takes in the context, with `kv_type="f16"`."""

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> ModelDescription:
        """From what the core found; facts that have no field here yet are left out."""
        known = {name: facts[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "shards": tuple(known["shards"])})
