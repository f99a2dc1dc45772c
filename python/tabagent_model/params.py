"""What can be chosen about a model and about an answer, with every default in sight.

Values are checked once, when a config is made, and trusted afterwards. A config is frozen:
`with_*` gives a changed copy. None stands for the default everywhere.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, TypeVar

from .errors import InvalidRequestError

if TYPE_CHECKING:
    from typing_extensions import Self

C = TypeVar("C", bound="_Config")
SplitMode = Literal["none", "layer", "row"]
Isolation = Literal["none", "process"]
FlashAttention = Literal["auto", "on", "off"]
Fallback = Literal["auto", "partial", "cpu", "error"]
KvType = Literal["auto", "f16", "bf16", "f32", "q8_0"]
Priority = Literal["high", "normal", "low"]
Overflow = Literal["error", "shift", "drop_oldest"]
LogitBias = Mapping[int, float] | Mapping[str, float] | Iterable[tuple[int, float]]
NoneType = type(None)
LogitsHook = Callable[[list[int], "memoryview[float]"], None]

CONSTRAINTS = ("json_schema", "regex", "lark", "grammar")
"""The fields that say what an answer has to be."""

DEVICES = ("auto", "cpu", "gpu", "cuda", "rocm", "vulkan", "metal")
BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny-chat.gguf"


class _Config:
    """What both configs share: changed copies, and the way to dicts and JSON and back."""

    _defaults: ClassVar[dict[str, Any]]
    """By the names of all fields."""

    def validate(self) -> Self:
        """Check every field again; an error names the field, its value and its range."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for name, default in self._defaults.items():
            if getattr(self, name) is None:
                _put(self, name, default)
        self.validate()

    def with_fields(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        if not changes:
            return self
        changed = object.__new__(type(self))
        vars(changed).update(vars(self), **_known(type(self), changes))
        changed.__post_init__()
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        values = vars(self)
        return {name: _copied(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if not isinstance(values, Mapping):
            raise _refusal(cls.__name__, "a mapping of its fields", values)
        return cls(**values)

    def to_json(self) -> str:
        import json

        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        import json

        try:
            values = json.loads(text)
        except ValueError as error:
            message = f"{cls.__name__} cannot be read from this JSON: {error}"
            raise InvalidRequestError(message, name=cls.__name__) from None
        return cls.from_dict(values)


def _refuses_unknown(config: type[C]) -> type[C]:
    """Let the generated constructor answer a wrong keyword with the right one."""
    config._defaults = {each.name: each.default for each in fields(config)}  # type: ignore[arg-type]
    plain: Callable[..., None] = config.__init__

    @wraps(plain)
    def __init__(self: C, *args: Any, **given: Any) -> None:  # noqa: N807
        plain(self, *args, **_known(config, given))

    config.__init__ = __init__  # type: ignore[assignment, method-assign]
    return config


@_refuses_unknown
@dataclass(frozen=True)
class ModelConfig(_Config):
    """Which model, and how it is opened. `n_gpu_layers=` is read as `gpu_layers=`."""

    model_path: str | os.PathLike[str] | None = None
    """A `.gguf` file; None is the tiny chat model that comes with the package."""
    n_ctx: int = 4096
    """Tokens that one request can hold, at most what the model was trained with."""
    n_batch: int = 512
    """Tokens that are decoded in one step, all requests together."""
    n_threads: int = 0
    """0: the physical cores this process may use, at most 8."""
    max_parallel: int = 0
    """Requests that run together; 0: as many as the memory suggests, at most 8."""
    queue_size: int = 1024
    """Requests that may wait for their turn."""
    prompt_cache_mb: int = -1
    """Main memory for beginnings that lost their place to others; -1: as much as the places take,
    at most a sixteenth of the free memory; 0: none."""
    gpu_layers: int | Literal["auto", "all"] = "auto"
    """How many layers go to a GPU; -1 and "all": all of them; "auto": as many as fit. The output
    counts as one more layer, and goes first."""
    device: str = "auto"
    """"cpu", "gpu", or "cuda" and the like, with a number for one of several: "cuda:1". A GPU that
    is asked for and not there is an error; "auto" takes what there is."""
    fallback: Fallback = "auto"
    """When not all of what was asked for fits. "partial": fewer layers on the GPU, then keys and
    values of 8 bits, then a smaller context, as far as those were left open; "cpu": the CPU at
    once; "error": nothing else; "auto": "partial", and then the CPU unless `device` names another.
    What came of it stands in `info()` and in the log."""
    n_ctx_min: int = 0
    """How far a fallback may halve `n_ctx`; 0: not at all."""
    main_gpu: int = 0
    """The GPU for small results and, with `split_mode="none"`, for everything."""
    split_mode: SplitMode = "layer"
    tensor_split: Iterable[float] = ()
    """How much of the model each GPU gets, in any unit; empty: by their free memory."""
    use_mmap: bool = True
    use_mlock: bool = False
    repack: bool | Literal["auto"] = "auto"
    """Lay weights out anew for the CPU, in memory of our own; "auto": where that was measured to be
    faster. Without, loading copies nothing, and processes share the file's memory."""
    flash_attn: FlashAttention = "auto"
    """"auto": what was measured to be the fastest on this CPU; on a GPU llama.cpp decides."""
    kv_type: KvType = "auto"
    """Of the keys and values in the cache. "auto": the fastest here, and never below 16 bits."""
    vocab_only: bool = False
    """Open the tokenizer only; nothing can be generated."""
    warmup: bool = True
    """Decode a token while loading, so that the first request need not wait for what it sets up."""
    isolation: Isolation = "none"
    """"process": in a process of its own, whose death is an error here and not the end."""
    watchdog_s: float = 60.0
    """Isolated: a worker without a sign of life for so many seconds is killed."""

    def validate(self) -> Self:
        _path(self, "model_path")
        _whole(self, "n_ctx", 8, 2**24)
        _whole(self, "n_batch", 1, 65_536)
        _whole(self, "n_threads", 0, 512)
        _whole(self, "max_parallel", 0, 256)
        if self.max_parallel > self.n_batch:
            allowed = f"at most `n_batch` ({self.n_batch})"
            raise _refusal("max_parallel", allowed, self.max_parallel)
        _whole(self, "queue_size", 1, 1_000_000)
        _whole(self, "prompt_cache_mb", -1, 2**24)
        if self.gpu_layers not in ("auto", "all"):
            _whole(self, "gpu_layers", -1, 2**31 - 1, also='"auto" or "all", or ')
        _device(self, "device")
        _choice(self, "fallback", ("auto", "partial", "cpu", "error"))
        _whole(self, "n_ctx_min", 0, 2**24)
        _whole(self, "main_gpu", 0, 255)
        _choice(self, "split_mode", ("none", "layer", "row"))
        _shares(self, "tensor_split", at_most=16)
        _switch(self, "use_mmap")
        _switch(self, "use_mlock")
        if self.repack != "auto":
            _switch(self, "repack", also='"auto", ')
        _choice(self, "flash_attn", ("auto", "on", "off"))
        _choice(self, "kv_type", ("auto", "f16", "bf16", "f32", "q8_0"))
        _switch(self, "vocab_only")
        _switch(self, "warmup")
        _choice(self, "isolation", ("none", "process"))
        _number(self, "watchdog_s", 0.1, 86_400)
        return self

    @property
    def path(self) -> str:
        """The file that is meant: `~` is resolved, and None is the bundled model."""
        if self.model_path is None:
            return str(BUNDLED_MODEL)
        # Path's would raise for an unknown user, and make "." of "".
        return os.path.expanduser(self.model_path)  # noqa: PTH111

    def with_model_path(self, model_path: str | os.PathLike[str] | None) -> Self:
        return self.with_fields(model_path=model_path)

    def with_context_size(self, n_ctx: int) -> Self:
        return self.with_fields(n_ctx=n_ctx)

    def with_batch(self, n_batch: int) -> Self:
        return self.with_fields(n_batch=n_batch)

    def with_threads(self, n_threads: int) -> Self:
        return self.with_fields(n_threads=n_threads)

    def with_parallel(self, max_parallel: int) -> Self:
        return self.with_fields(max_parallel=max_parallel)

    def with_queue_size(self, queue_size: int) -> Self:
        return self.with_fields(queue_size=queue_size)

    def with_gpu_layers(self, gpu_layers: int | Literal["auto", "all"]) -> Self:
        return self.with_fields(gpu_layers=gpu_layers)

    def with_device(self, device: str) -> Self:
        return self.with_fields(device=device)

    def with_fallback(self, fallback: Fallback, n_ctx_min: int | None = None) -> Self:
        n_ctx_min = self.n_ctx_min if n_ctx_min is None else n_ctx_min
        return self.with_fields(fallback=fallback, n_ctx_min=n_ctx_min)

    def with_main_gpu(self, main_gpu: int) -> Self:
        return self.with_fields(main_gpu=main_gpu)

    def with_mmap(self, use_mmap: bool = True) -> Self:
        return self.with_fields(use_mmap=use_mmap)

    def with_mlock(self, use_mlock: bool = True) -> Self:
        return self.with_fields(use_mlock=use_mlock)

    def with_isolation(self, isolation: Isolation = "process") -> Self:
        return self.with_fields(isolation=isolation)

    def cpu_only(self) -> Self:
        return self.with_fields(gpu_layers=0)


@_refuses_unknown
@dataclass(frozen=True)
class GenerationConfig(_Config):
    """How an answer is made.

    The samplers work in llama.cpp's order: `logits_hook`, `logit_bias`, penalties, DRY,
    `top_n_sigma`, `top_k`, `typical_p`, `top_p`, `min_p`, XTC, temperature. With `mirostat` it is
    `logits_hook`, `logit_bias`, temperature, mirostat, and the others are not asked.
    """

    max_tokens: int = 512
    """0 gives an empty answer, -1 goes on until the context is full."""
    temperature: float = 0.7
    """0 always takes the likeliest token that the other samplers leave."""
    dynatemp_range: float = 0.0
    """The temperature goes up or down by this, up where the model is uncertain; 0 is off."""
    dynatemp_exponent: float = 1.0
    top_p: float = 0.9
    top_k: int = 40
    """0 is off."""
    min_p: float = 0.0
    typical_p: float = 1.0
    """1 is off."""
    top_n_sigma: float = 0.0
    """Keep what is within so many standard deviations of the best logit; 0 or less is off."""
    xtc_probability: float = 0.0
    """How often the likeliest tokens are left out, but for the last above `xtc_threshold`."""
    xtc_threshold: float = 0.1
    """More than 0.5 is off."""
    repeat_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    """How many of the last tokens the penalties look at; -1 is the whole context."""
    dry_multiplier: float = 0.0
    """How much repeating a passage costs: this times `dry_base` to the power of what it is longer
    than `dry_allowed_length` tokens; 0 is off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    """How many of the last tokens DRY looks at; -1 is the whole context."""
    dry_sequence_breakers: str | Iterable[str] = ("\n", ":", '"', "*")
    """A passage ends at each of these strings. As in llama.cpp, their first 40 bytes count."""
    mirostat: int = 0
    """1 or 2 keep the surprise near `mirostat_tau` bits; 0 is off."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: LogitBias = field(default=(), hash=False)
    """What is added to the logits of tokens, by id. Ids may be strings, as they are in JSON."""
    banned_tokens: Iterable[int] = ()
    """Ids that never come."""
    logits_hook: LogitsHook | None = None
    """Called for each token with the ids so far and the logits: a writable memoryview of floats,
    which `numpy.asarray` takes, and which is dead after the call. It is slow: the hook holds
    Python's lock, and every request of the model waits for it. What it raises ends its request. It
    is left out of dicts and JSON."""
    logprobs: int | None = None
    """0 to 20: tell for each token, and so many of the likeliest, how likely the model found it
    before any sampler; None tells nothing."""
    stop: str | Iterable[str] = ()
    """Strings that end the answer; they are not part of it. A single one may be given as it is."""
    stop_tokens: Iterable[int] = ()
    """Ids that end the answer; they are not part of it."""
    json_schema: str | Mapping[str, Any] | bool | None = None
    """The answer is JSON that this schema allows, a mapping or its JSON text; `{}` allows any JSON.
    Of this and the next three at most one. An answer that ends because of `max_tokens` or a stop
    string may be only the beginning of what was asked for."""
    regex: str | None = None
    """The whole answer matches this regular expression, in the syntax of Rust's crate `regex`."""
    lark: str | None = None
    """The answer is of this grammar, in llguidance's dialect of Lark, from its rule `start` on."""
    grammar: str | None = None
    """The answer is of this grammar, in llama.cpp's GBNF, from its rule `root` on."""
    seed: int = -1
    """-1 takes a random one; the answer tells which."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """Before so many tokens neither the model nor a stop token can end the answer."""
    timeout_s: float | None = None
    """Seconds from the call to the end of the answer."""
    deadline: float | None = None
    """The same as a moment: seconds since 1970, like `time.time()`."""
    max_queue_wait_s: float | None = None
    """Seconds until the answer must have begun."""
    priority: Priority = "normal"
    """Who waits goes in this order. `low` also gives its place to whoever is more urgent, and goes
    on later where it was."""
    overflow: Overflow = "error"
    """When the context is full: `error` refuses a prompt that does not fit, and ends an answer
    there; `shift` drops the older half of what follows the first `n_keep` tokens and goes on;
    `drop_oldest`, for chats, leaves the oldest turns out of the prompt."""
    n_keep: int = -1
    """-1 is the prompt, at most half of the context."""
    add_bos: bool = True
    special: bool = False
    """Read control tokens that are written in a text prompt as control tokens."""

    def validate(self) -> Self:
        _whole(self, "max_tokens", -1, 2**31 - 1)
        _number(self, "temperature", 0, 100)
        _number(self, "dynatemp_range", 0, 100)
        _number(self, "dynatemp_exponent", 0, 100)
        _number(self, "top_p", 0, 1, without_low=True)
        _whole(self, "top_k", 0, 2**31 - 1)
        _number(self, "min_p", 0, 1, without_high=True)
        _number(self, "typical_p", 0, 1, without_low=True)
        _number(self, "top_n_sigma", -1, 100)
        _number(self, "xtc_probability", 0, 1)
        _number(self, "xtc_threshold", 0, 1)
        _number(self, "repeat_penalty", 0, 10, without_low=True)
        _number(self, "presence_penalty", -2, 2)
        _number(self, "frequency_penalty", -2, 2)
        _whole(self, "penalty_last_n", -1, 2**24)
        _number(self, "dry_multiplier", 0, 100)
        _number(self, "dry_base", 1, 100)
        _whole(self, "dry_allowed_length", 0, 2**24)
        _whole(self, "dry_penalty_last_n", -1, 2**24)
        _strings(self, "dry_sequence_breakers", at_most=64, long=64, unit="bytes")
        _whole(self, "mirostat", 0, 2)
        _number(self, "mirostat_tau", 0, 100)
        _number(self, "mirostat_eta", 0, 10)
        _biases(self, "logit_bias", at_most=2**20)
        _ids(self, "banned_tokens", at_most=2**20)
        if self.logits_hook is not None and not callable(self.logits_hook):
            raise _refusal("logits_hook", "a function of tokens and logits", self.logits_hook)
        if self.logprobs is not None:
            _whole(self, "logprobs", 0, 20)
        _strings(self, "stop", at_most=64, long=1024)
        _ids(self, "stop_tokens", at_most=1024)
        _schema(self, "json_schema")
        for name in ("regex", "lark", "grammar"):
            if not isinstance(getattr(self, name), (str, NoneType)):
                raise _refusal(name, "a string or None", getattr(self, name))
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            others = " and ".join(f"`{name}`" for name in given[1:])
            message = f"`{given[0]}` cannot be kept together with {others}"
            raise InvalidRequestError(message, hint="give one of them", name=given[0])
        _whole(self, "seed", -1, 2**63 - 1)
        _switch(self, "ignore_eos")
        _whole(self, "min_tokens", 0, 2**31 - 1)
        if self.timeout_s is not None:
            _number(self, "timeout_s", 0, 1e9, without_low=True)
        if self.deadline is not None:
            _number(self, "deadline", 0, 1e12)
        if self.max_queue_wait_s is not None:
            _number(self, "max_queue_wait_s", 0, 1e9, without_low=True)
        _choice(self, "priority", ("high", "normal", "low"))
        _choice(self, "overflow", ("error", "shift", "drop_oldest"))
        _whole(self, "n_keep", -1, 2**24)
        _switch(self, "add_bos")
        _switch(self, "special")
        return self

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["logits_hook"]  # no plain value can stand for a function
        return values

    def with_max_tokens(self, max_tokens: int) -> Self:
        return self.with_fields(max_tokens=max_tokens)

    def with_temperature(self, temperature: float) -> Self:
        return self.with_fields(temperature=temperature)

    def with_top_p(self, top_p: float) -> Self:
        return self.with_fields(top_p=top_p)

    def with_top_k(self, top_k: int) -> Self:
        return self.with_fields(top_k=top_k)

    def with_min_p(self, min_p: float) -> Self:
        return self.with_fields(min_p=min_p)

    def with_repeat_penalty(self, repeat_penalty: float, last_n: int | None = None) -> Self:
        last_n = self.penalty_last_n if last_n is None else last_n
        return self.with_fields(repeat_penalty=repeat_penalty, penalty_last_n=last_n)

    def with_stop(self, *stop: str) -> Self:
        return self.with_fields(stop=stop)

    def with_seed(self, seed: int) -> Self:
        return self.with_fields(seed=seed)

    def with_timeout(self, timeout_s: float | None) -> Self:
        return self.with_fields(timeout_s=timeout_s)

    def with_deadline(self, deadline: float | None) -> Self:
        return self.with_fields(deadline=deadline)

    def with_overflow(self, overflow: Overflow, n_keep: int | None = None) -> Self:
        n_keep = self.n_keep if n_keep is None else n_keep
        return self.with_fields(overflow=overflow, n_keep=n_keep)

    def with_priority(self, priority: Priority) -> Self:
        return self.with_fields(priority=priority)

    def greedy(self) -> Self:
        """Always the likeliest token, without penalties: the same answer every time."""
        return self.with_fields(temperature=0.0, repeat_penalty=1.0)


class ModelFields(TypedDict, total=False):
    """The keywords of `load`: the fields of ModelConfig, and the old name of one."""

    model_path: str | os.PathLike[str] | None
    n_ctx: int | None
    n_batch: int | None
    n_threads: int | None
    max_parallel: int | None
    queue_size: int | None
    prompt_cache_mb: int | None
    gpu_layers: int | Literal["auto", "all"] | None
    n_gpu_layers: int | Literal["auto", "all"] | None
    device: str | None
    fallback: Fallback | None
    n_ctx_min: int | None
    main_gpu: int | None
    split_mode: SplitMode | None
    tensor_split: Iterable[float] | None
    use_mmap: bool | None
    use_mlock: bool | None
    repack: bool | Literal["auto"] | None
    flash_attn: FlashAttention | None
    kv_type: KvType | None
    vocab_only: bool | None
    warmup: bool | None
    isolation: Isolation | None
    watchdog_s: float | None


class GenerationFields(TypedDict, total=False):
    """The keywords of `generate` and `stream`: the fields of GenerationConfig."""

    max_tokens: int | None
    temperature: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_last_n: int | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: str | Iterable[str] | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    logit_bias: LogitBias | None
    banned_tokens: Iterable[int] | None
    logits_hook: LogitsHook | None
    logprobs: int | None
    stop: str | Iterable[str] | None
    stop_tokens: Iterable[int] | None
    json_schema: str | Mapping[str, Any] | bool | None
    regex: str | None
    lark: str | None
    grammar: str | None
    seed: int | None
    ignore_eos: bool | None
    min_tokens: int | None
    timeout_s: float | None
    deadline: float | None
    max_queue_wait_s: float | None
    priority: Priority | None
    overflow: Overflow | None
    n_keep: int | None
    add_bos: bool | None
    special: bool | None


class TemplateFields(TypedDict, total=False):
    """What says how a conversation is written out, but for the tools."""

    tool_choice: Literal["auto", "none", "required"] | str | Mapping[str, Any] | None
    """`required`: the answer is a tool call; a name, alone or as OpenAI writes it: of that tool."""
    parallel_tool_calls: bool | None
    """Whether an answer may hold several calls; None: if the template can."""
    template: str | os.PathLike[str] | None
    """Another template than the model's: its text, a file, or the name of one of the model's."""
    enable_thinking: bool | None
    """False asks a model that thinks first not to, if its template can say so."""
    reasoning_format: Literal["auto", "none", "deepseek", "deepseek-legacy"] | None
    """`none` leaves what the model thought in the content."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Further variables of the template."""
    continue_final_message: bool | None
    """The last message is the assistant's, and the answer goes on with it."""


class PromptFields(TemplateFields, total=False):
    """What says how a conversation is written out."""

    tools: Sequence[Any] | None
    """What the model may call: functions, models, dicts in OpenAI's shape; see `Tool.of`."""


class ChatFields(GenerationFields, PromptFields, total=False):
    """The keywords of `chat` and `stream_chat`: those of `generate`, and these."""

    schema: Any
    """What the answer has to be: a type, choices, a JSON schema; see `Schema.of`. `parsed` is the
    object that it was."""


class ToolRunFields(GenerationFields, TemplateFields, total=False):
    """The keywords of `run_tools`."""


def _known(config: type[_Config], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields under their own names; a name that is none gets the closest one as hint."""
    names = config._defaults
    known = dict(given)
    if "n_gpu_layers" in known and "gpu_layers" in names:
        layers = known.pop("n_gpu_layers")
        if known.setdefault("gpu_layers", layers) != layers:
            message = "`gpu_layers` and `n_gpu_layers` are the same thing, and were given twice"
            raise InvalidRequestError(message, name="gpu_layers")
    for name in known:
        if name not in names:
            from difflib import get_close_matches

            close = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else "there are " + ", ".join(names)
            message = f"{config.__name__} has no field `{name}`"
            raise InvalidRequestError(message, hint=hint, name=str(name))
    return known


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value


def _put(config: _Config, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the one way into a frozen dataclass


def _whole(config: _Config, name: str, low: int, high: int, *, also: str = "") -> None:
    _put(config, name, checked_whole(name, getattr(config, name), low, high, also))


def checked_whole(name: str, value: Any, low: int, high: int, also: str = "") -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise _refusal(name, f"{also}a whole number between {low} and {high}", value)
    return number


def _number(
    config: _Config,
    name: str,
    low: float,
    high: float,
    *,
    without_low: bool = False,
    without_high: bool = False,
) -> None:
    value = getattr(config, name)
    number = _float(name, value, low, high, without_low=without_low, without_high=without_high)
    _put(config, name, number)


def _float(
    name: str,
    value: Any,
    low: float,
    high: float,
    *,
    without_low: bool = False,
    without_high: bool = False,
) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    edge = (without_low and number == low) or (without_high and number == high)
    if edge or not low <= number <= high:
        lowest = f"{low} (excluded)" if without_low else str(low)
        highest = f"{high} (excluded)" if without_high else str(high)
        raise _refusal(name, f"a number between {lowest} and {highest}", value)
    return number


def _switch(config: _Config, name: str, *, also: str = "") -> None:
    value = getattr(config, name)
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's, too
        raise _refusal(name, f"{also}True or False", value)
    _put(config, name, bool(value))


def _choice(config: _Config, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, "one of " + ", ".join(map(repr, choices)), value)


def _strings(
    config: _Config, name: str, *, at_most: int, long: int, unit: str = "characters"
) -> None:
    value = getattr(config, name)
    allowed = f"at most {at_most} strings of 1 to {long} {unit}"
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refusal(name, allowed, value)
    strings = (value,) if isinstance(value, str) else tuple(islice(value, at_most + 1))
    if len(strings) > at_most:
        raise _refusal(name, allowed, value)
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= long:
            raise _refusal(name, allowed, string)
        if unit == "bytes" and len(string.encode(errors="replace")) > long:
            raise _refusal(name, allowed, string)
    _put(config, name, strings)


def _ids(config: _Config, name: str, *, at_most: int) -> None:
    value = getattr(config, name)
    allowed = f"at most {at_most} token ids"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refusal(name, allowed, value)
    ids = tuple(islice(value, at_most + 1))
    if len(ids) > at_most:
        raise _refusal(name, allowed, value)
    _put(config, name, tuple(_id(f"{name}[{at}]", token) for at, token in enumerate(ids)))


def _device(config: _Config, name: str) -> None:
    value = getattr(config, name)
    allowed = ", ".join(map(repr, DEVICES)) + ", or one of the latter with a number: 'cuda:1'"
    if not isinstance(value, str):
        raise _refusal(name, allowed, value)
    kind, separator, number = value.partition(":")
    may_have_number = kind not in ("auto", "cpu")
    is_number = number.isascii() and number.isdigit() and len(number) <= 2
    if kind not in DEVICES or (separator and not (may_have_number and is_number)):
        raise _refusal(name, allowed, value)


def _shares(config: _Config, name: str, *, at_most: int) -> None:
    value = getattr(config, name)
    allowed = f"at most {at_most} numbers from 0, not all of them 0"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refusal(name, allowed, value)
    given = tuple(islice(value, at_most + 1))
    if len(given) > at_most:
        raise _refusal(name, allowed, value)
    shares = tuple(_float(f"{name}[{at}]", each, 0, _LARGEST) for at, each in enumerate(given))
    if shares and not any(shares):
        raise _refusal(name, allowed, value)
    _put(config, name, shares)


def _biases(config: _Config, name: str, *, at_most: int) -> None:
    value = getattr(config, name)
    allowed = f"a mapping of at most {at_most} token ids to finite numbers"
    try:
        given = dict(value)
    except (TypeError, ValueError):
        raise _refusal(name, allowed, value) from None
    if len(given) > at_most:
        raise _refusal(name, allowed, value)
    biases = {}
    for key, bias in given.items():
        is_written = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = _id(name, int(key) if is_written else key)
        biases[token] = _float(f"{name}[{token}]", bias, -_LARGEST, _LARGEST)
    _put(config, name, biases)


def _schema(config: _Config, name: str) -> None:
    """What was given as values becomes JSON text, so that a config stays frozen and hashable."""
    value = getattr(config, name)
    if value is None or isinstance(value, str):
        return
    import json

    if not isinstance(value, (Mapping, bool)):
        raise _refusal(name, "a mapping, True, or JSON text", value)
    try:
        _put(config, name, json.dumps(value, allow_nan=False, default=dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(name, f"a mapping that JSON can hold ({error})", value) from None


# What fits into the 32 bits of a logit.
_LARGEST = 3.4e38


def _id(name: str, value: Any) -> int:
    return checked_whole(name, value, 0, 2**31 - 1, "a token id: ")


def _path(config: _Config, name: str) -> None:
    value = getattr(config, name)
    if value is not None:
        try:
            _put(config, name, os.fsdecode(value))
        except (TypeError, UnicodeError):
            raise _refusal(name, "a path or None", value) from None


def _refusal(name: str, allowed: str, value: object) -> InvalidRequestError:
    try:
        shown = repr(value)
    except Exception:  # of a user's class, or an int with more digits than Python prints
        shown = f"a {type(value).__name__} that cannot be shown"
    if len(shown) > 60:
        shown = f"{shown[:60]}…"
    return InvalidRequestError(f"`{name}` must be {allowed}, got {shown}", name=name)
