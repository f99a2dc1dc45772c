"""What `Model` and `AsyncModel` have in common: everything that needs no waiting."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast
from weakref import WeakSet

from . import _core
from ._courier import ChatPrompt, Context, Courier, Request, request_ids
from ._crowd import Crowd
from ._loading import OnProgress, open_model, placement_of
from ._options import ChatOptions
from ._prompt import (
    Message,
    Messages,
    Prompt,
    Prompts,
    checked,
    checked_messages,
    is_many,
    json_text,
    sound_text,
)
from .chat import Chat
from .errors import InvalidRequestError, ModelNotLoadedError, TemplateError
from .metrics import prometheus
from .params import (
    ChatFields,
    GenerationConfig,
    GenerationFields,
    ModelConfig,
    ModelFields,
    PromptFields,
    checked_whole,
)
from .recovery import FallbackToCpu, ReinitializeGpu, is_resource_exhaustion, strategy_for
from .results import ChatCompletion, Completion, Source

if TYPE_CHECKING:
    from ._core import PyModel, UnloadReport
    from .chat import _Session
    from .isolation.remote import RemoteModel


class Base:
    """Everything that needs no waiting."""

    def __init__(
        self,
        context: Context | None,
        native_model: PyModel | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self._config = config or ModelConfig()
        self._sessions: WeakSet[_Session] = WeakSet()
        self._falling_back = threading.Lock()
        self._adopt(context, native_model)

    @property
    def config(self) -> ModelConfig:
        """What was asked for; `info()` tells what came of it."""
        return self._config

    @property
    def is_loaded(self) -> bool:
        if self._context is None:
            return self._native is not None and self._native.is_loaded
        return not self._context.is_closed

    @property
    def n_ctx(self) -> int:
        """How many tokens one request can hold."""
        return self._open_context.n_ctx

    @property
    def context_length(self) -> int:
        return self.n_ctx

    @property
    def load_time_ms(self) -> float:
        return self._source.load_time_ms

    def info(self) -> dict[str, Any]:
        """What was loaded, and how."""
        facts: dict[str, Any] = {"model": self._source.model, "is_loaded": self.is_loaded}
        if (context := self._context) is not None:
            facts |= {
                "n_ctx": context.n_ctx,
                "n_batch": context.n_batch,
                "n_threads": context.n_threads,
                "max_parallel": context.n_seq_max,
                "flash_attn": context.flash_attn,
                "kv_type": context.kv_type,
            }
        if self.is_loaded and (native := self._native) is not None:
            facts |= {
                "path": native.path,
                "size_bytes": native.size_bytes,
                "n_params": native.n_params,
                "n_ctx_train": native.context_train_size(),
                "n_embd": native.embedding_dim(),
                "n_layers": native.layer_count(),
                "vocab_size": native.vocab_size(),
                "gpu_layers": native.gpu_layers,
                "is_repacked": native.is_repacked,
                "load_time_ms": native.load_time_ms,
            }
            facts |= placement_of(native)
            if self._is_isolated:
                facts |= cast("RemoteModel", native).worker()
        return facts

    def metrics(self) -> dict[str, Any]:
        """The engine's counters since it was made, and how long things took.

        A `…_s` is a distribution: `count`, `sum`, and `buckets` from a number of seconds to how
        many took at most that long.
        """
        context = self._open_context
        counted = context.metrics()
        usage = counted.get("held_tokens", 0) / (context.n_ctx * context.n_seq_max)
        return {**counted, "kv_cache_usage": usage}

    def prometheus(self) -> str:
        """The metrics in Prometheus' text format, under the names of llama.cpp and vLLM."""
        return prometheus(self.metrics(), self._source.model)

    def slots(self) -> list[dict[str, int | None]]:
        """The places for requests that run together: who is there, and with how many tokens."""
        return self._open_context.slots()

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"a {name} cannot be pickled; send its `config` and load it there")

    def __repr__(self) -> str:
        state = "" if self.is_loaded else " (not loaded)"
        return f"<{type(self).__name__} {self._source.model or 'scripted'}{state}>"

    def __del__(self) -> None:
        try:
            if self._courier is not None:
                self._courier.close()
        except Exception:  # at exit anything may be gone already
            return

    def _adopt(self, context: Context | None, native_model: PyModel | None) -> None:
        self._context = context
        self._native = native_model
        self._courier = None if context is None else Courier(context)
        self._source = Source()
        if native_model is not None:
            rss_mb = getattr(native_model, "rss_mb", _core.process_rss_mb)
            self._source = Source(
                model=Path(native_model.path).stem,
                load_time_ms=native_model.load_time_ms,
                gpu_utilized=native_model.gpu_layers > 0,
                memory_used_mb=lambda: rss_mb() or 0.0,
            )

    def _close(self, timeout: float = 5.0) -> UnloadReport:
        was_loaded = self._context is not None and not self._context.is_closed
        if self._courier is not None:
            self._courier.close()
            self._courier.check_owner()
        if self._native is not None:
            return self._native.unload(timeout)
        return {"was_loaded": was_loaded, "rss_before_mb": 0, "rss_after_mb": 0, "freed_mb": 0}

    @property
    def _open_context(self) -> Context:
        assert self._open_courier is not None and self._context is not None
        return self._context

    @property
    def _open_courier(self) -> Courier:
        if self._courier is None:
            message = f"`{self._source.model}` was opened with `vocab_only`, it can only tokenize"
            raise ModelNotLoadedError(message, hint="load it with `vocab_only=False`")
        self._courier.check()
        return self._courier

    @property
    def _open_native(self) -> PyModel | None:
        if self._courier is not None:
            self._courier.check()
        return self._native

    @property
    def _is_isolated(self) -> bool:
        return self._config.isolation == "process"

    @property
    def _tokenizer(self) -> PyModel | Context:
        return self._open_native or self._open_context

    def _request(
        self, prompt: Prompt, config: GenerationConfig | None, given: GenerationFields
    ) -> Request:
        params = self._params(config, given)
        return Request(next(request_ids), checked(prompt), params, is_far=self._is_isolated)

    def _params(self, config: GenerationConfig | None, given: GenerationFields) -> dict[str, Any]:
        params = _params_of(config, given)
        if params["overflow"] == "drop_oldest":
            message = "`overflow` can be 'drop_oldest' for chats only, a prompt has no turns"
            raise InvalidRequestError(message, name="overflow")
        return params

    def _chat_requests(
        self, messages: Messages, config: GenerationConfig | None, given: ChatFields, n: int = 1
    ) -> list[Request]:
        fields = cast("dict[str, Any]", given)
        options = ChatOptions.taken_from(fields)
        params = _params_of(config, cast("GenerationFields", fields))
        said = checked_messages(messages)
        chats = [Chat(self, said, options, dict(each)) for each in _with_seeds(params, n)]
        return [
            Request(
                next(request_ids), chat.tokens, chat.params, chat.end, chat.prompt, options.schema
            )
            for chat in chats
        ]

    def _written(
        self, messages: Messages, given: PromptFields, add_generation_prompt: bool = True
    ) -> ChatPrompt:
        fields = cast("dict[str, Any]", given)
        options = ChatOptions.taken_from(fields)
        _params_of(None, cast("GenerationFields", fields))  # refuses what else was typed
        return self._render(checked_messages(messages), options, add_generation_prompt)

    def _render(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        if options.continue_final_message and messages[-1]["role"] != "assistant":
            name = "continue_final_message"
            message = f"`{name}` goes on with a message of the assistant, and the last one is none"
            raise InvalidRequestError(message, name=name)
        said = json_text(messages, "messages")
        asked = options.to_json()
        render = self._renderer.render_chat
        return render(said, add_generation_prompt, options.template, asked)

    def _count(self, asked: Messages, given: PromptFields) -> int:
        if isinstance(asked, str) and not given:
            return len(self._tokenizer.tokenize(sound_text(asked)))
        return len(self._written(asked, given).tokens() or [])

    def _parse(self, text: str, messages: Messages, given: PromptFields) -> ChatCompletion:
        parser = self._written(messages, given).parser()
        raw = Completion(sound_text(text), (), "stop", model=self._source.model)
        parser.feed(text)
        _, message = parser.finish()
        return ChatCompletion.read(raw, message, "tool_calls" if message["tool_calls"] else "stop")

    @property
    def _renderer(self) -> PyModel:
        renderer = self._open_native or self._open_context
        if not hasattr(renderer, "render_chat"):
            raise TemplateError("a context alone has no chat template; load the model with `load`")
        return cast("PyModel", renderer)

    def _pinning(self, prompt: Prompt, given: GenerationFields) -> Request:
        request = self._request(prompt, None, given)
        return replace(request, params={**request.params, "pin": True})

    def _crowd(
        self,
        prompt: Prompt | Prompts,
        config: GenerationConfig | None,
        given: GenerationFields,
        n: int | None,
        for_one: object,
    ) -> Crowd:
        if for_one:
            message = "`stream` and `on_token` are for a single prompt and one answer to it"
            raise InvalidRequestError(message, hint="make one stream for each", name="prompt")
        params = self._params(config, given)
        all_params = _with_seeds(params, 1 if n is None else n)
        prompts = prompt if is_many(prompt) else [cast("Prompt", prompt)]
        requests = [
            Request(next(request_ids), text, params, is_far=self._is_isolated)
            for text in map(checked, prompts)
            for params in all_params
        ]
        return Crowd(self._open_courier, requests, self._source)

    def _chat_crowd(
        self, messages: Messages, config: GenerationConfig | None, given: ChatFields, n: int
    ) -> Crowd:
        requests = self._chat_requests(messages, config, given, n)
        return Crowd(self._open_courier, requests, self._source)

    def _load_again(self, changes: ModelFields, on_progress: OnProgress | None = None) -> None:
        config = self._changed(changes)
        self._close()
        try:
            self._adopt(*open_model(config, on_progress))
            self._config = config
        except Exception:
            self._adopt(*open_model(self._config, None))
            raise

    def _fall_back(self, error: Exception, tried: Context | None) -> bool:
        """Load on the CPU what failed on a GPU; whether to ask again. `tried` has failed.

        Of those who fail together one loads. The others wait for it, and were perhaps in the middle
        of an answer that the load has ended.
        """
        is_of_gpu = isinstance(strategy_for(error), (FallbackToCpu, ReinitializeGpu))
        if not (is_of_gpu or isinstance(error, ModelNotLoadedError)):
            return False
        with self._falling_back:
            if self._context is not tried:
                return True
            if not (is_of_gpu and self._source.gpu_utilized):
                return False
            import logging  # not needed by most

            what = "GPU OOM" if is_resource_exhaustion(error) else "GPU error"
            log = logging.getLogger("tabagent_model")
            log.warning("%s, falling back to CPU: %s", what, error)
            self._load_again({"device": "cpu", "gpu_layers": 0})
            return True

    def _changed(self, changes: ModelFields) -> ModelConfig:
        """The config for a reload; a bad file is refused while the old model still serves."""
        config = self._config.with_fields(**changes)
        _core.inspect_gguf(config.path)
        return config


def _params_of(config: GenerationConfig | None, given: GenerationFields) -> dict[str, Any]:
    if "n" in given:
        message = "a stream is one answer, and `n` asks for several"
        hint = "make one stream for each, or call `generate` or `chat` without `stream`"
        raise InvalidRequestError(message, hint=hint, name="n")
    if config is None:
        config = _DEFAULTS
    elif not isinstance(config, GenerationConfig):
        message = f"`config` must be a GenerationConfig, got a {type(config).__name__}"
        raise InvalidRequestError(message, name="config")
    chosen = vars(config.with_fields(**given))
    return {name: value for name, value in chosen.items() if value is not None}


_DEFAULTS = GenerationConfig()


def _with_seeds(params: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """A seed of its own for each, if there is one; a random one is chosen for each anyway."""
    checked_whole("n", n, 1, 128)
    seed = params["seed"]
    if seed < 0:
        return [params] * n
    return [{**params, "seed": (seed + number) % 2**63} for number in range(n)]
