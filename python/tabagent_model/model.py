"""A loaded model: `Model` for threads, `AsyncModel` for event loops.

Both share one base that turns what was typed into requests; they differ only in how they wait.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, overload
from weakref import WeakSet

from . import _core, _courier, _loading, _log
from ._courier import Context, Courier, Request, request_ids
from ._crowd import Crowd
from ._loading import OnProgress, open_model, open_model_async, placement_of
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
    token_ids,
)
from .chat import AsyncSession, Chat, Session
from .errors import InvalidRequestError, ModelNotLoadedError, TemplateError
from .metrics import prometheus
from .params import (
    ChatFields,
    GenerationConfig,
    GenerationFields,
    ModelConfig,
    ModelFields,
    PromptFields,
    ToolRunFields,
    checked_whole,
)
from .pin import Pin
from .results import ChatCompletion, Completion, ModelDescription, Source
from .stream import (
    LONG_TEXT,
    AsyncChatStream,
    AsyncTextStream,
    ChatStream,
    TextStream,
    settle,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI
    from typing_extensions import Self, Unpack

    from ._core import PyModel, UnloadReport
    from .chat import ChatPrompt, _Session
    from .isolation.remote import RemoteModel
    from .tool_loop import OnEvent, ToolRun

T = TypeVar("T")
OnToken = Callable[[str], Any]


class _Base:
    """Everything that needs no waiting."""

    def __init__(
        self,
        context: Context | None,
        native_model: PyModel | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self._config = config or ModelConfig()
        self._sessions: WeakSet[_Session] = WeakSet()
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
        return Request(next(request_ids), checked(prompt), params)

    def _params(self, config: GenerationConfig | None, given: GenerationFields) -> dict[str, Any]:
        params = _params_of(config, given)
        if params["overflow"] == "drop_oldest":
            message = "`overflow` can be 'drop_oldest' for chats only, a prompt has no turns"
            raise InvalidRequestError(message, name="overflow")
        return params

    def _chat_request(
        self, messages: Messages, config: GenerationConfig | None, given: ChatFields
    ) -> Request:
        fields = cast("dict[str, Any]", given)
        options = ChatOptions.taken_from(fields)
        params = _params_of(config, cast("GenerationFields", fields))
        asked = Chat(self, checked_messages(messages), options, params)
        end, parser = asked.end, asked.parser
        return Request(next(request_ids), asked.tokens, asked.params, end, parser, options.schema)

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
        all_params = [params] if n is None else _with_seeds(params, checked_whole("n", n, 1, 128))
        prompts = prompt if is_many(prompt) else [cast("Prompt", prompt)]
        requests = [
            Request(next(request_ids), text, params)
            for text in map(checked, prompts)
            for params in all_params
        ]
        return Crowd(self._open_courier, requests, self._source)

    def _changed(self, changes: ModelFields) -> ModelConfig:
        """The config for a reload; a bad file is refused while the old model still serves."""
        config = self._config.with_fields(**changes)
        _core.inspect_gguf(config.path)
        return config


def _params_of(config: GenerationConfig | None, given: GenerationFields) -> dict[str, Any]:
    if "n" in given:
        message = "a stream is one answer, and `n` asks for several"
        hint = "make one stream for each, or call `generate` without `stream`"
        raise InvalidRequestError(message, hint=hint, name="n")
    if config is None:
        config = GenerationConfig()
    elif not isinstance(config, GenerationConfig):
        message = f"`config` must be a GenerationConfig, got a {type(config).__name__}"
        raise InvalidRequestError(message, name="config")
    chosen = vars(config.with_fields(**given))
    return {name: value for name, value in chosen.items() if value is not None}


class Model(_Base):
    """A loaded model. Any thread may use it, many at once."""

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | ModelConfig | None = None,
        /,
        *,
        on_progress: OnProgress | None = None,
        probe: bool | None = None,
        **fields: Unpack[ModelFields],
    ) -> Self:
        """Open a model file, or the bundled tiny chat model.

        `fields` are those of ModelConfig and change the config, if one is given. `on_progress`
        gets 0.0 to 1.0, in a thread of its own; returning False or raising ends the load.

        `probe=True` first loads and uses the file in a process that is thrown away, and lifts its
        quarantine if that goes well. None does so for a file of yours that was never seen before,
        if it is loaded with `isolation="process"`.
        """
        config = _config_of(model, fields)
        return cls(*open_model(config, on_progress, probe), config)

    @overload
    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: Prompt | Prompts,
        config: GenerationConfig | None = None,
        *,
        n: int,
        **fields: Unpack[GenerationFields],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[True],
        **fields: Unpack[GenerationFields],
    ) -> TextStream: ...
    @overload
    def generate(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        config: GenerationConfig | None = None,
        *,
        n: int | None = None,
        stream: bool = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion | TextStream | list[Completion]:
        """Answer a prompt (text or token ids), or a list of prompts together.

        `fields` are those of GenerationConfig. `on_token` gets each piece of text in this thread;
        if it returns False the answer ends there. With `n` there is a list of so many answers to
        each prompt, one after the other; if a seed is given, they take that one, the next, ….
        """
        if is_many(prompt) or n is not None:
            return self._crowd(prompt, config, fields, n, stream or on_token).collect()
        request = self._request(cast("Prompt", prompt), config, fields)
        answer = TextStream(self._open_courier, request, self._source, self)
        return answer.submit() if stream else answer.collect(on_token)

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> TextStream:
        """The answer piece by piece. Use it in a `with`: leaving early cancels."""
        request = self._request(prompt, config, fields)
        return TextStream(self._open_courier, request, self._source, self).submit()

    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion:
        """Answer a conversation: messages in OpenAI's shape, or the text of one user message.

        It is written out in the model's own chat template, or in `template`. The answer is read
        as the template means it: `content`, `reasoning`, `tool_calls`.
        """
        return self._chat(messages, config, fields).collect()

    def stream_chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatStream:
        """The answer to a conversation, piece by piece. Use it in a `with`."""
        return self._chat(messages, config, fields).submit()

    def run_tools(
        self,
        messages: Messages,
        tools: Sequence[Any],
        config: GenerationConfig | None = None,
        *,
        max_rounds: int = 8,
        tool_timeout_s: float | None = None,
        on_event: OnEvent | None = None,
        **fields: Unpack[ToolRunFields],
    ) -> ToolRun:
        """Ask, run what the model calls, tell it what came of that, until it has said what it
        wanted; at most `max_rounds` times.

        Calls of one answer run together: async functions in an event loop, others in threads. What
        a tool raises, or takes longer for than `tool_timeout_s`, the model hears as an error.
        `on_event` gets each step as a ToolEvent; if it returns False, that was the last.
        `tool_choice` holds for the first answer.
        """
        from .tool_loop import run_tools

        return run_tools(
            self,
            messages,
            tools,
            max_rounds=max_rounds,
            tool_timeout_s=tool_timeout_s,
            on_event=on_event,
            config=config,
            **fields,
        )

    def session(
        self,
        system: str | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Session:
        """A conversation that remembers what was said; `fields` are the defaults of its answers.

        With `overflow="drop_oldest"`, here as in `chat`, the oldest turns are left out of the
        prompt when it leaves no room for `max_tokens` or half of the context; each answer's
        `usage` tells how much that was. The system message stays.
        """
        return Session(self, system, fields)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A conversation that `Session.save` wrote, with what was computed for it."""
        return Session._load(self, path)

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        **fields: Unpack[PromptFields],
    ) -> str:
        """A conversation as the text that the model would read."""
        return self._written(messages, fields, add_generation_prompt).text

    def parse_chat(
        self, text: str, messages: Messages = "Hi", **fields: Unpack[PromptFields]
    ) -> ChatCompletion:
        """What a raw answer to these messages means: content, reasoning and tool calls."""
        return self._parse(text, messages, fields)

    def count_tokens(self, messages_or_text: Messages, **fields: Unpack[PromptFields]) -> int:
        """The tokens of a text, or of the prompt that messages make."""
        return self._count(messages_or_text, fields)

    def pin(self, prompt: Prompt, **fields: Unpack[GenerationFields]) -> Pin:
        """Compute a beginning that many prompts share, and keep it in the prompt cache."""
        context, request = self._open_context, self._pinning(prompt, fields)
        answer = TextStream(self._open_courier, request, self._source, self).collect()
        return Pin(context, request.id, answer.usage.prompt_tokens)

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        return self._tokenizer.tokenize(sound_text(text), add_bos, special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        return self._tokenizer.detokenize(token_ids(tokens), special)

    def openai_client(self, *, name: str | None = None, **options: Any) -> OpenAI:
        """An `openai.OpenAI` client whose server is this model: no port, no key, no network.

        The model is called `name` there, or as its file. `options` are the client's. It needs the
        extra `openai`.
        """
        from .serve.transport import client_of

        return client_of(self, name, options)

    def _chat(
        self, messages: Messages, config: GenerationConfig | None, fields: ChatFields
    ) -> ChatStream:
        request = self._chat_request(messages, config, fields)
        return ChatStream(self._open_courier, request, self._source, self)

    def unload(self, timeout: float = 5.0) -> UnloadReport:
        """End what runs, then give the memory back. A second call does nothing."""
        return self._close(timeout)

    def close(self) -> None:
        self.unload()

    def reload(
        self, *, on_progress: OnProgress | None = None, **changes: Unpack[ModelFields]
    ) -> None:
        """Load again with a changed config; if that fails, the old one is loaded again."""
        config = self._changed(changes)
        self.unload()
        try:
            self._adopt(*open_model(config, on_progress))
            self._config = config
        except Exception:
            self._adopt(*open_model(self._config, None))
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unload()


class AsyncModel(_Base):
    """A loaded model. Tasks of any event loop may use it, many at once.

    Leaving is safe: when a cancelled `await` comes back, the request's place is free.
    """

    @classmethod
    async def load(
        cls,
        model: str | os.PathLike[str] | ModelConfig | None = None,
        /,
        *,
        on_progress: OnProgress | None = None,
        probe: bool | None = None,
        **fields: Unpack[ModelFields],
    ) -> Self:
        """As `Model.load`. Cancelling it ends the load and gives the memory back."""
        config = _config_of(model, fields)
        return cls(*await open_model_async(config, on_progress, probe), config)

    @overload
    async def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion: ...
    @overload
    async def generate(
        self,
        prompt: Prompt | Prompts,
        config: GenerationConfig | None = None,
        *,
        n: int,
        **fields: Unpack[GenerationFields],
    ) -> list[Completion]: ...
    @overload
    async def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[True],
        **fields: Unpack[GenerationFields],
    ) -> AsyncTextStream: ...
    @overload
    async def generate(
        self,
        prompt: Prompts,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> list[Completion]: ...
    async def generate(
        self,
        prompt: Prompt | Prompts,
        config: GenerationConfig | None = None,
        *,
        n: int | None = None,
        stream: bool = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion | AsyncTextStream | list[Completion]:
        """As `Model.generate`. `on_token` is called in the event loop, and may be `async`."""
        if is_many(prompt) or n is not None:
            crowd = self._crowd(prompt, config, fields, n, stream or on_token)
            return await crowd.collect_async()
        answer = self.stream(cast("Prompt", prompt), config, **fields)
        return answer if stream else await answer.collect(on_token)

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncTextStream:
        """The answer piece by piece; nothing to await here. Use it in an `async with`."""
        request = self._request(prompt, config, fields)
        return AsyncTextStream(self._open_courier, request, self._source, self)

    async def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion:
        """As `Model.chat`."""
        return await self.stream_chat(messages, config, **fields).collect()

    def stream_chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        **fields: Unpack[ChatFields],
    ) -> AsyncChatStream:
        """The answer to a conversation; nothing to await here. Use it in an `async with`."""
        request = self._chat_request(messages, config, fields)
        return AsyncChatStream(self._open_courier, request, self._source, self)

    async def run_tools(
        self,
        messages: Messages,
        tools: Sequence[Any],
        config: GenerationConfig | None = None,
        *,
        max_rounds: int = 8,
        tool_timeout_s: float | None = None,
        on_event: OnEvent | None = None,
        **fields: Unpack[ToolRunFields],
    ) -> ToolRun:
        """As `Model.run_tools`. `on_event` may be `async`; cancelling the task ends the calls."""
        from .tool_loop import arun_tools

        return await arun_tools(
            self,
            messages,
            tools,
            max_rounds=max_rounds,
            tool_timeout_s=tool_timeout_s,
            on_event=on_event,
            config=config,
            **fields,
        )

    def session(
        self,
        system: str | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncSession:
        """As `Model.session`; nothing to await here."""
        return AsyncSession(self, system, fields)

    async def load_session(self, path: str | os.PathLike[str]) -> AsyncSession:
        """As `Model.load_session`."""
        return await _in_executor(lambda: AsyncSession._load(self, path))

    async def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        **fields: Unpack[PromptFields],
    ) -> str:
        """As `Model.apply_chat_template`."""
        written = self._written
        prompt = await _in_executor(lambda: written(messages, fields, add_generation_prompt))
        return prompt.text

    async def parse_chat(
        self, text: str, messages: Messages = "Hi", **fields: Unpack[PromptFields]
    ) -> ChatCompletion:
        """As `Model.parse_chat`."""
        return await _in_executor(lambda: self._parse(text, messages, fields))

    async def count_tokens(self, messages_or_text: Messages, **fields: Unpack[PromptFields]) -> int:
        """As `Model.count_tokens`."""
        return await _in_executor(lambda: self._count(messages_or_text, fields))

    async def pin(self, prompt: Prompt, **fields: Unpack[GenerationFields]) -> Pin:
        """As `Model.pin`."""
        context, request = self._open_context, self._pinning(prompt, fields)
        answer = await AsyncTextStream(self._open_courier, request, self._source, self).collect()
        return Pin(context, request.id, answer.usage.prompt_tokens)

    async def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        tokenize, text = self._tokenizer.tokenize, sound_text(text)
        if len(text) <= LONG_TEXT and not self._is_isolated:
            return tokenize(text, add_bos, special)
        return await _in_executor(lambda: tokenize(text, add_bos, special))

    async def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        detokenize, ids = self._tokenizer.detokenize, token_ids(tokens)
        if len(ids) <= LONG_TEXT and not self._is_isolated:
            return detokenize(ids, special)
        return await _in_executor(lambda: detokenize(ids, special))

    def openai_client(self, *, name: str | None = None, **options: Any) -> AsyncOpenAI:
        """As `Model.openai_client`, for event loops: an `openai.AsyncOpenAI`."""
        from .serve.transport import async_client_of

        return async_client_of(self, name, options)

    async def unload(self, timeout: float = 5.0) -> UnloadReport:
        """End what runs, then give the memory back. A second call does nothing."""
        return await _in_executor(lambda: self._close(timeout))

    async def close(self) -> None:
        await self.unload()

    async def reload(
        self, *, on_progress: OnProgress | None = None, **changes: Unpack[ModelFields]
    ) -> None:
        """Load again with a changed config; if that fails, the old one is loaded again."""
        config = self._changed(changes)
        await self.unload()
        try:
            self._adopt(*await open_model_async(config, on_progress))
            self._config = config
        except Exception:
            self._adopt(*await open_model_async(self._config, None))
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.unload()


def inspect(path: str | os.PathLike[str]) -> ModelDescription:
    """Check a model file without loading it, and say what it is."""
    return ModelDescription.from_dict(_core.inspect_gguf(ModelConfig(path).path))


def _config_of(
    model: str | os.PathLike[str] | ModelConfig | None, fields: ModelFields
) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model.with_fields(**fields)
    if model is not None and fields.setdefault("model_path", model) is not model:
        message = "the model was given twice, as first argument and as `model_path`"
        raise InvalidRequestError(message, name="model_path")
    return ModelConfig(**cast("Any", fields))


def _with_seeds(params: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """A seed of its own for each, if there is one; a random one is chosen for each anyway."""
    seed = params["seed"]
    if seed < 0:
        return [params] * n
    return [{**params, "seed": (seed + number) % 2**63} for number in range(n)]


async def _in_executor(function: Callable[[], T]) -> T:
    import asyncio

    return await settle(asyncio.get_running_loop().run_in_executor(None, function))


@atexit.register
def _at_exit() -> None:
    _loading.give_up_all()
    _courier.close_all()
    _log.stop()


def _in_child() -> None:
    _courier.disown_all()
    _log.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
