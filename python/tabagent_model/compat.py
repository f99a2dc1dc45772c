"""`Llama` with the methods, keywords and dicts of llama-cpp-python, over this package's engine.

    from tabagent_model.compat import Llama     # instead of: from llama_cpp import Llama

Libraries that import `llama_cpp` by themselves find this module after `compat.install()`.

Keywords of an answer have llama-cpp-python's defaults. Those of the model have ours, which are
kinder: a context of 4,096 tokens and not 512, layers on a GPU if there is one, many threads at
once, and nothing is printed.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

from ._package import package
from ._prompt import token_ids
from .errors import InvalidRequestError, NotSupportedError, TokenizationError
from .model import Model, inspect
from .params import GenerationConfig
from .serve._request import Fields, response_schema
from .serve._shapes import ChatShape, CompletionShape

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._core import PyModel

log = logging.getLogger("tabagent_model")


def install() -> None:
    """Let `import llama_cpp` find this module, for libraries that do so; call it before them."""
    here = sys.modules[__name__]
    if sys.modules.setdefault("llama_cpp", here) is not here:
        message = "llama-cpp-python is imported already, and cannot be replaced any more"
        raise InvalidRequestError(message, hint="call `compat.install()` first", name="install")


class Llama:
    """A loaded model, as users of llama-cpp-python know it. Any thread may use it."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_gpu_layers: int | None = None,
        n_threads: int | None = None,
        n_batch: int | None = None,
        seed: int | None = None,
        main_gpu: int | None = None,
        split_mode: int | None = None,
        tensor_split: Sequence[float] | None = None,
        use_mmap: bool | None = None,
        use_mlock: bool | None = None,
        vocab_only: bool | None = None,
        flash_attn: bool | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        last_n_tokens_size: int = 64,
        chat_format: str | None = None,
        verbose: bool = False,
        **others: Any,
    ) -> None:
        """`others` are the rest of llama-cpp-python's. Those that change no answer are noted in
        the log; those that would, and do not exist here, are refused, and unknown ones, too."""
        _check_others(others)
        self.model_path = os.fspath(model_path)
        self.verbose = verbose
        self.chat_format = chat_format
        self._template, self._stop = _template_of(chat_format)
        self._seed = seed
        self._last_n = last_n_tokens_size
        self._model = Model.load(
            model_path,
            n_ctx=inspect(model_path).n_ctx_train if n_ctx == 0 else n_ctx,
            gpu_layers=n_gpu_layers,
            n_threads=n_threads,
            n_batch=n_batch,
            main_gpu=main_gpu,
            split_mode=_one_of("split_mode", split_mode, _SPLIT_MODES),
            tensor_split=tensor_split,
            use_mmap=use_mmap,
            use_mlock=use_mlock,
            vocab_only=vocab_only,
            flash_attn=_one_of("flash_attn", flash_attn, {True: "on", False: "off"}),
            kv_type=_kv_type(type_k, type_v),
        )

    @property
    def model(self) -> Model:
        """What does the work, with all that llama-cpp-python does not have."""
        return self._model

    def __call__(self, prompt: str | list[int], **fields: Any) -> Any:
        """As `create_completion`."""
        return self.create_completion(prompt, **fields)

    def create_completion(
        self, prompt: str | list[int], suffix: str | None = None, **fields: Any
    ) -> Any:
        """Go on with a prompt: a dict, or with `stream=True` an iterator of them.

        `fields` are llama-cpp-python's; `max_tokens` is 16 if nothing is said.
        """
        if suffix:
            raise NotSupportedError("`suffix` is not supported", hint="write it into the prompt")
        asked = {"max_tokens": 16, "temperature": 0.8, "echo": False, **fields}
        echo, is_streamed = asked.pop("echo"), asked.pop("stream", False)
        name = asked.pop("model", None) or self.model_path
        config = self._config(asked)
        said = self._model.detokenize(prompt) if echo and not isinstance(prompt, str) else prompt
        shape = CompletionShape(name, echoes=[str(said)] if echo else ())
        if is_streamed:
            return _chunks(self._model.stream(prompt, config), shape)
        return _theirs(shape.whole([self._model.generate(prompt, config)]))

    def create_chat_completion(self, messages: list[dict[str, Any]], **fields: Any) -> Any:
        """Answer a conversation: a dict, or with `stream=True` an iterator of them.

        `fields` are llama-cpp-python's; without `max_tokens` the answer ends where the model
        ends it.
        """
        asked = {"max_tokens": None, "temperature": 0.2, **fields}
        for name in ("functions", "function_call"):
            if asked.pop(name, None) is not None:
                raise NotSupportedError(f"`{name}` is not supported", hint="use `tools`")
        is_streamed = asked.pop("stream", False)
        name = asked.pop("model", None) or self.model_path
        chat = {name: asked.pop(name) for name in _CHAT if name in asked}
        schema = response_schema(
            Fields(asked.pop("response_format", None) or {}, "response_format")
        )
        top = asked.pop("top_logprobs", None)
        asked["logprobs"] = (top or 0) if asked.get("logprobs") else None
        config = self._config(asked)
        if schema is not None:
            chat["schema"] = schema
        if self._template is not None:
            chat["template"] = self._template
            config = config.with_stop(*config.stop, *self._stop)
        shape = ChatShape(name)
        if is_streamed:
            return _chunks(self._model.stream_chat(messages, config, **chat), shape)
        return _theirs(shape.whole([self._model.chat(messages, config, **chat)]))

    def create_embedding(self, input: str | list[str], model: str | None = None) -> Any:
        """Not yet: this package does not make embeddings."""
        raise NotSupportedError("embeddings are not supported yet")

    def embed(self, input: str | list[str], **fields: Any) -> Any:
        """Not yet: this package does not make embeddings."""
        return self.create_embedding(input)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        try:
            written = text.decode() if isinstance(text, (bytes, bytearray)) else text
        except UnicodeDecodeError as error:
            raise TokenizationError(f"the text is no UTF-8 at byte {error.start}") from None
        return self._model.tokenize(written, add_bos, special)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of tokens, which may end within a character; `prev_tokens` stand before."""
        ids = token_ids(tokens)
        text = b"".join(self._native.token_to_bytes(token, special) for token in ids)
        is_begin = not prev_tokens and bool(ids) and ids[0] == self.token_bos()
        return text[1:] if is_begin and text.startswith(b" ") else text

    def n_ctx(self) -> int:
        return self._model.n_ctx

    def n_embd(self) -> int:
        return self._native.embedding_dim()

    def n_vocab(self) -> int:
        return self._native.vocab_size()

    def token_bos(self) -> int:
        return self._native.token_bos()

    def token_eos(self) -> int:
        return self._native.token_eos()

    def token_nl(self) -> int:
        return self._native.token_nl()

    @property
    def metadata(self) -> dict[str, str]:
        """What the model file says about itself."""
        return self._native.metadata()

    @property
    def context_params(self) -> Any:
        """Has `n_ctx`, which is what others ask for."""
        return SimpleNamespace(n_ctx=self.n_ctx())

    def set_seed(self, seed: int) -> None:
        """The seed of the answers that name none."""
        self._seed = seed

    def set_cache(self, cache: Any) -> None:
        """Nothing to do: what is known is never computed again here, cache or not."""
        _note("set_cache")

    def reset(self) -> None:
        """Nothing to do: no answer depends on an earlier one."""

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Llama over {self._model!r}>"

    @property
    def _native(self) -> PyModel:
        assert self._model._native is not None
        return self._model._native

    def _config(self, asked: dict[str, Any]) -> GenerationConfig:
        """What llama-cpp-python calls otherwise, in our words."""
        given = {**_ANSWER, **{name: it for name, it in asked.items() if it is not None}}
        for name in _IGNORED:
            given.pop(name, None)
        if given.pop("stopping_criteria", None):
            message = "`stopping_criteria` is not supported"
            raise NotSupportedError(message, hint="leave the loop over a stream instead")
        for name, otherwise in _WITHOUT.items():
            number = given.get(name, 0)
            if isinstance(number, (int, float)) and number <= 0:
                given[name] = otherwise
        given["mirostat"] = given.pop("mirostat_mode")
        given.setdefault("penalty_last_n", self._last_n)
        if (seed := given.get("seed", self._seed)) is not None:
            given["seed"] = -1 if seed == _RANDOM_SEED else seed
        if (processors := given.pop("logits_processor", None)) is not None:
            given["logits_hook"] = _hook(processors)
        if (grammar := given.pop("grammar", None)) is not None:
            given |= LlamaGrammar.of(grammar).fields
        return GenerationConfig(**given)


class LlamaGrammar:
    """A form that an answer must have."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        """Those of GenerationConfig."""

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Self:
        return cls({"grammar": grammar})

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> Self:
        return cls.from_string(Path(file).read_text(encoding="utf-8"))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Self:
        return cls({"json_schema": json_schema})

    @classmethod
    def of(cls, grammar: object) -> LlamaGrammar:
        if isinstance(grammar, LlamaGrammar):
            return grammar
        if isinstance(grammar, str):
            return cls.from_string(grammar)
        message = f"`grammar` must be a LlamaGrammar, got a {type(grammar).__name__}"
        raise InvalidRequestError(message, name="grammar")


class LogitsProcessorList(list[Callable[[Any, Any], Any]]):
    """Functions of the ids so far and the logits, both numpy arrays, that give new logits."""


class LlamaRAMCache:
    """Accepted by `set_cache`."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        self.capacity_bytes = capacity_bytes


LlamaCache = LlamaRAMCache


def _chunks(stream: Any, shape: Any) -> Iterator[dict[str, Any]]:
    with stream:
        yield from map(_theirs, shape.first(0))
        for piece in stream:
            yield _theirs(shape.piece(0, piece, stream.logprobs))
        yield _theirs(shape.last(0, stream.result))


def _theirs(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what llama-cpp-python does not tell."""
    told = {name: it for name, it in answer.items() if name not in _OURS}
    if "usage" in told:
        told["usage"] = {name: told["usage"][name] for name in _USAGE}
    for choice in told["choices"]:
        choice.get("message", {}).pop("refusal", None)
    return told


def _check_others(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name in _HARMLESS:
            _note(name)
        elif name not in _MISSING:
            from difflib import get_close_matches

            known = [*(Llama.__init__.__kwdefaults__ or ()), *_HARMLESS, *_MISSING]
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean `{close[0]}`?" if close else None
            raise InvalidRequestError(f"Llama has no keyword `{name}`", hint=hint, name=name)
        elif value is not None and value not in _MISSING[name]:
            raise NotSupportedError(f"`{name}` is not supported, got {value!r:.60}")


def _note(name: str) -> None:
    if name not in _noted:
        _noted.add(name)
        log.info("`%s` of llama-cpp-python changes nothing here", name)


def _template_of(chat_format: str | None) -> tuple[str | None, tuple[str, ...]]:
    if chat_format == "chatml":
        return _CHATML, ("<|im_end|>",)
    if chat_format is not None:
        log.info("chat_format=%r: the model's own template is used instead", chat_format)
    return None, ()


def _one_of(name: str, given: Any, meanings: Mapping[Any, Any]) -> Any:
    if given is None:
        return None
    try:
        return meanings[given]
    except (KeyError, TypeError):
        allowed = ", ".join(map(str, meanings))
        message = f"`{name}` must be one of {allowed}, got {given!r:.60}"
        raise InvalidRequestError(message, name=name) from None


def _kv_type(type_k: int | None, type_v: int | None) -> Any:
    if type_k != type_v:
        message = f"`type_k` and `type_v` must be the same, got {type_k!r:.60} and {type_v!r:.60}"
        raise NotSupportedError(message)
    return _one_of("type_k", type_k, _GGML_TYPES)


def _hook(processors: Any) -> Callable[[list[int], memoryview[float]], None]:
    numpy = package("numpy", "numpy")
    many = processors if isinstance(processors, Sequence) else [processors]
    if not all(map(callable, many)):
        message = f"`logits_processor` must be functions of ids and logits, got {processors!r:.60}"
        raise InvalidRequestError(message, name="logits_processor")

    def hook(tokens: list[int], logits: memoryview[float]) -> None:
        ids, scores = numpy.asarray(tokens), numpy.array(logits)
        for processor in many:
            scores = processor(ids, scores)
        numpy.asarray(logits)[:] = scores

    return hook


# The keywords of an answer; None is as good as absent.
_ANSWER: dict[str, Any] = {
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "top_k": 40,
    "repeat_penalty": 1.0,
    "mirostat_mode": 0,
}
# What 0, and less, mean: no limit, every token, the likeliest token alone.
_WITHOUT = {"max_tokens": -1, "top_k": 0, "top_p": 1e-6}
_IGNORED = ("tfs_z", "penalize_nl")
_CHAT = ("tools", "tool_choice")
_RANDOM_SEED = 0xFFFFFFFF

# The keywords of a model that only change how something is computed, or whether it is printed.
_HARMLESS = {
    *("n_ubatch", "n_threads_batch", "logits_all", "embedding", "offload_kqv", "op_offload"),
    *("swa_full", "no_perf", "numa", "spm_infill", "n_parts", "f16_kv", "low_vram", "mul_mat_q"),
}
# Those that would change what a model says, with the values that mean nothing.
_MISSING: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("kv_overrides", "lora_base", "lora_path"), ()),
    **dict.fromkeys(("chat_handler", "draft_model", "tokenizer"), ()),
    **dict.fromkeys(("rope_scaling_type", "pooling_type", "yarn_ext_factor"), (-1,)),
    **dict.fromkeys(("lora_scale", "yarn_attn_factor", "yarn_beta_slow"), (1,)),
    # LangChain gives 10000 and 1 to every model, whatever is right for it.
    **{"rope_freq_base": (0, 10_000), "rope_freq_scale": (0, 1)},
    **{"yarn_beta_fast": (32,), "yarn_orig_ctx": (0,)},
}
_SPLIT_MODES = {0: "none", 1: "layer", 2: "row"}
_GGML_TYPES = {0: "f32", 1: "f16", 8: "q8_0", 30: "bf16"}

_OURS = ("system_fingerprint", "timings")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_noted: set[str] = set()
