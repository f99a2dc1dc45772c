"""What is asked in OpenAI's shape, read and checked: every field by its name, type and range.

Fields that nobody knows are accepted and ignored, as OpenAI does; a known one whose wish cannot be
granted is refused, because ignoring it would give a wrong answer. null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, cast

from .._prompt import Message, Prompt, checked, checked_messages, is_many
from ..errors import InvalidRequestError
from ..manager import Duration, seconds_of
from ..params import GenerationConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..params import ChatFields

MOST_TOKENS = 32_768
MOST_ANSWERS = 128


class Wanted(TypedDict):
    """What a service wants to know of the model that is to answer."""

    model: str
    num_ctx: int | None
    keep_alive: Duration | None


@dataclass(frozen=True)
class _Request:
    """What both kinds of requests have."""

    model: str | None
    config: GenerationConfig
    n: int
    is_streamed: bool
    includes_usage: bool
    tells_progress: bool
    num_ctx: int | None
    keep_alive: Duration | None

    def wanted(self, model: str) -> Wanted:
        """Which model is to answer, by the name that was found to be meant."""
        return {"model": model, "num_ctx": self.num_ctx, "keep_alive": self.keep_alive}

    def summary(self) -> str:
        """One line for a log, without a word of what was said."""
        config = self.config
        return (
            f"model={self.model!r:.100}, {self._size}, temp={config.temperature},"
            f" max_tokens={config.max_tokens}, stream={self.is_streamed}"
        )

    @property
    def _size(self) -> str:
        raise NotImplementedError

    @staticmethod
    def _common(body: Fields, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": body.text("model"),
            "config": GenerationConfig(**config),
            "n": body.whole("n", 1, MOST_ANSWERS) or 1,
            "is_streamed": body.flag("stream"),
            "includes_usage": body.inner("stream_options").flag("include_usage"),
            "tells_progress": body.flag("return_progress"),
            "num_ctx": body.whole("num_ctx", 1, 2**31 - 1),
            "keep_alive": body.duration("keep_alive"),
        }


@dataclass(frozen=True)
class ChatRequest(_Request):
    """A chat completion that is asked for."""

    messages: list[Message]
    fields: ChatFields

    @classmethod
    def of(cls, given: object) -> Self:
        body = Fields(given)
        for name in ("functions", "function_call"):
            body.refuse(name, "use `tools` and `tool_choice`")
        if body.raw("modalities") not in (None, ["text"]):
            body.refuse("modalities", "text is all there is")
        config = _sampling(body)
        top = body.whole("top_logprobs", 0, 20)
        if body.flag("logprobs"):
            config["logprobs"] = top or 0
        elif top is not None:
            body.refuse("top_logprobs", "set `logprobs` to true as well")
        messages = body.raw("messages")
        if not isinstance(messages, list):
            body.bad("messages", "a list of messages", messages)
        messages = checked_messages(messages)
        return cls(**cls._common(body, config), messages=messages, fields=_chat_fields(body))

    @property
    def _size(self) -> str:
        return f"messages={len(self.messages)}"


@dataclass(frozen=True)
class CompletionRequest(_Request):
    """A completion that is asked for."""

    prompts: list[Prompt]
    echoes: bool

    @classmethod
    def of(cls, given: object) -> Self:
        body = Fields(given)
        if body.raw("suffix") != "":
            body.refuse("suffix", "write what stands behind into the prompt, as the model knows it")
        if body.whole("best_of", 1, MOST_ANSWERS) not in (None, body.raw("n") or 1):
            body.refuse("best_of", "no answer is thrown away; use `n`")
        config = _sampling(body)
        config["logprobs"] = body.whole("logprobs", 0, 20)
        grammar, schema = _constraint(body)
        if grammar is not None:
            config["grammar"] = grammar
        if schema is not None:
            config["json_schema"] = schema
        common = cls._common(body, config)
        return cls(**common, prompts=_prompts(body, common["n"]), echoes=body.flag("echo"))

    @property
    def _size(self) -> str:
        return f"prompts={len(self.prompts)}"


def _sampling(body: Fields) -> dict[str, Any]:
    """The fields of GenerationConfig; it checks those that OpenAI does not have."""
    top_p = body.number("top_p", 0, 1)
    config: dict[str, Any] = {
        "temperature": body.number("temperature", 0, 2),
        "top_p": None if top_p is None else max(top_p, 1e-6),  # 0: the likeliest token alone
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "max_tokens": _max_tokens(body),
        "logit_bias": _logit_bias(body),
        "stop": body.raw("stop"),
        "seed": body.whole("seed", -1, 2**63 - 1),
    }
    body.flag("cache_prompt")  # what is known is never computed again, and that changes no word
    for name in _EXTENSIONS:
        config[name] = body.raw(name)
    for name, meant in _ALIASES.items():
        if body.raw(name) is not None:
            config[meant] = body.raw(name)
    return config


def _max_tokens(body: Fields) -> int:
    """Until the model ends or the context is full, if nothing is said."""
    old = body.whole("max_tokens", 1, MOST_TOKENS)
    new = body.whole("max_completion_tokens", 1, MOST_TOKENS)
    if old is not None and new is not None and old != new:
        body.bad("max_tokens", f"equal to `max_completion_tokens` ({new})", old)
    return new or old or -1


def _logit_bias(body: Fields) -> dict[str, Any]:
    biases = body.inner("logit_bias")
    return {token: biases.number(token, -100, 100) or 0 for token in biases}


def _prompts(body: Fields, n: int) -> list[Prompt]:
    given = body.raw("prompt")
    if not isinstance(given, (str, list)):
        body.bad("prompt", "text, token ids, or a list of either", given)
    prompts = list(given) if is_many(given) else [given]
    if len(prompts) * n > MOST_ANSWERS:
        allowed = f"at most {MOST_ANSWERS} prompts times `n`"
        body.bad("prompt", allowed, f"{len(prompts)} times {n}")
    return [checked(prompt) for prompt in prompts]


def _chat_fields(body: Fields) -> ChatFields:
    """Those of ChatFields; the chat itself checks them, and has the same names for them."""
    fields = {name: body.raw(name) for name in _CHAT_FIELDS}
    effort = body.choice("reasoning_effort", _EFFORTS)
    if effort is not None:
        kwargs = body.inner("chat_template_kwargs")
        fields["chat_template_kwargs"] = {"reasoning_effort": effort, **kwargs}
    if effort == "none":
        fields["enable_thinking"] = False
    grammar, schema = _constraint(body)
    fields["schema"] = schema if grammar is None else {"grammar": grammar}
    if fields["schema"] is not None and fields["tools"] and fields["tool_choice"] != "none":
        for name in ("grammar", "json_schema", "response_format"):
            body.refuse(name, "`tools` say already how an answer looks")
    return cast("ChatFields", {name: it for name, it in fields.items() if it is not None})


def _constraint(body: Fields) -> tuple[str | None, dict[str, Any] | None]:
    """A grammar or a schema that the answer must fit, in any of the ways to ask for it."""
    grammar = body.text("grammar")
    schema = None if body.raw("json_schema") is None else dict(body.inner("json_schema"))
    form = response_schema(body.inner("response_format"))
    wishes = {"grammar": grammar, "json_schema": schema, "response_format": form}
    first, *others = [name for name, wish in wishes.items() if wish is not None] or [""]
    if others:
        body.refuse(others[0], f"`{first}` is given as well, and there can be one of them")
    return grammar, form if schema is None else schema


def response_schema(given: Fields) -> dict[str, Any] | None:
    """The JSON schema that a `response_format` stands for."""
    kind = given.choice("type", ("text", "json_object", "json_schema"))
    if kind is None and given:
        given.bad("type", '"text", "json_object" or "json_schema"', None)
    if kind == "json_object":
        return dict(given.inner("schema")) or {"type": "object"}
    if kind == "json_schema":
        named = given.inner("json_schema") or given  # llama-server takes it without the name, too
        if named.raw("schema") is None:
            named.bad("schema", "a JSON schema", None)
        return dict(named.inner("schema"))
    return None


class Fields(Mapping[str, Any]):
    """A JSON object whose fields are checked as they are taken; null is as good as absent."""

    def __init__(self, given: object, name: str = "") -> None:
        if not isinstance(given, dict):
            raise _refusal(name or "body", "a JSON object", given)
        self._given = given
        self.name = name

    def raw(self, name: str) -> Any:
        return self._given.get(name)

    def number(self, name: str, low: float, high: float) -> float | None:
        number = self.raw(name)
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            self.bad(name, "a number", number)
        if not low <= number <= high:
            self.bad(name, f"between {low} and {high}", number)
        return number

    def whole(self, name: str, low: int, high: int) -> int | None:
        number = self.raw(name)
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int):
            self.bad(name, "a whole number", number)
        if not low <= number <= high:
            self.bad(name, f"between {low} and {high}", number)
        return number

    def flag(self, name: str) -> bool:
        return self.optional_flag(name) or False

    def optional_flag(self, name: str) -> bool | None:
        flag = self.raw(name)
        if flag is not None and not isinstance(flag, bool):
            self.bad(name, "true or false", flag)
        return flag

    def text(self, name: str) -> str | None:
        text = self.raw(name)
        if text is not None and not isinstance(text, str):
            self.bad(name, "a string", text)
        return text

    def duration(self, name: str) -> Duration | None:
        """Seconds, or text like "5m"; -1 is for ever."""
        given = self.raw(name)
        if given is not None:
            seconds_of(self._path(name), given)
        return cast("Duration | None", given)

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        text = self.text(name)
        if text is not None and text not in choices:
            self.bad(name, "one of " + ", ".join(f'"{choice}"' for choice in choices), text)
        return text

    def inner(self, name: str) -> Fields:
        """An object in this one; an empty one if it is absent."""
        inner = self.raw(name)
        return Fields({} if inner is None else inner, self._path(name))

    def bad(self, name: str, allowed: str, got: object) -> NoReturn:
        raise _refusal(self._path(name), allowed, got)

    def refuse(self, name: str, why: str) -> None:
        """Say that a field cannot be granted, if it is there."""
        if self.raw(name) is not None:
            path = self._path(name)
            raise InvalidRequestError(f"{path} cannot be granted: {why}", name=path)

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def __iter__(self) -> Any:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def _path(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def _refusal(path: str, allowed: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(f"{path} must be {allowed}, got {got!r:.60}", name=path)


# What OpenAI does not have is named as in GenerationConfig; some have other names elsewhere, too.
_EXTENSIONS = (
    *("top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("repeat_penalty", "penalty_last_n", "dry_multiplier", "dry_base", "dry_allowed_length"),
    *("dry_penalty_last_n", "dry_sequence_breakers", "mirostat", "mirostat_tau", "mirostat_eta"),
    *("dynatemp_range", "dynatemp_exponent", "ignore_eos", "min_tokens", "stop_tokens"),
    *("banned_tokens", "timeout_s", "max_queue_wait_s", "priority", "overflow", "n_keep"),
)
_ALIASES = {
    "repeat_last_n": "penalty_last_n",
    "repetition_penalty": "repeat_penalty",
    "stop_token_ids": "stop_tokens",
}
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_CHAT_FIELDS = (
    *("tools", "tool_choice", "parallel_tool_calls", "enable_thinking", "reasoning_format"),
    *("chat_template_kwargs", "continue_final_message"),
)
