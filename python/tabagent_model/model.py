"""A loaded model: `Model` for threads, `AsyncModel` for event loops.

Both share one base that turns what was typed into requests; they differ only in how they wait.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from . import _core, _courier, _loading, _log
from ._base import Base
from ._courier import LONG_TEXT
from ._loading import OnProgress, open_model, open_model_async
from ._prompt import (
    Messages,
    Prompt,
    Prompts,
    is_many,
    sound_text,
    token_ids,
)
from .chat import AsyncSession, Session
from .errors import InvalidRequestError
from .params import (
    ChatFields,
    GenerationConfig,
    GenerationFields,
    ModelConfig,
    ModelFields,
    PromptFields,
    ToolRunFields,
)
from .pin import Pin
from .results import ChatCompletion, Completion, ModelDescription
from .stream import AsyncChatStream, AsyncTextStream, ChatStream, TextStream, in_executor

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI
    from typing_extensions import Self, Unpack

    from ._core import UnloadReport
    from .tool_loop import OnEvent, ToolRun

OnToken = Callable[[str], Any]


class Model(Base):
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

    def generate_with_fallback(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion:
        """Answer a prompt, on the CPU if the memory of the GPU runs out or the GPU is lost.

        The model is loaded on the CPU then, with a warning in the log, and stays there. Others who
        use it hear ModelNotLoadedError until it is back, unless they ask in this way, too. Where
        it is on the CPU already, and of any other kind, an error is raised as it is.
        """
        tried = self._context
        try:
            request = self._request(prompt, config, fields)
            return TextStream(self._open_courier, request, self._source, self).collect()
        except Exception as error:
            if not self._fall_back(error, tried):
                raise
        request = self._request(prompt, config, fields)
        return TextStream(self._open_courier, request, self._source, self).collect()

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> TextStream:
        """The answer piece by piece. Use it in a `with`: leaving early cancels."""
        request = self._request(prompt, config, fields)
        return TextStream(self._open_courier, request, self._source, self).submit()

    @overload
    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion: ...
    @overload
    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: int,
        **fields: Unpack[ChatFields],
    ) -> list[ChatCompletion]: ...
    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: int | None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion | list[ChatCompletion]:
        """Answer a conversation: messages in OpenAI's shape, or the text of one user message.

        It is written out in the model's own chat template, or in `template`. The answer is read
        as the template means it: `content`, `reasoning`, `tool_calls`. With `n` there is a list of
        so many answers, as in `generate`.
        """
        if n is None:
            return self._chat(messages, config, fields).collect()
        answers = self._chat_crowd(messages, config, fields, n).collect()
        return cast("list[ChatCompletion]", answers)

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

    def load_session(self, path: str | os.PathLike[str], recompute: bool = False) -> Session:
        """A conversation that `Session.save` wrote, with what was computed for it.

        One of a context with another `kv_type` or `flash_attn` is refused, unless `recompute` says
        that it may be computed again.
        """
        return Session._load(self, path, recompute)

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
        [request] = self._chat_requests(messages, config, fields)
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
        self._load_again(changes, on_progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unload()


class AsyncModel(Base):
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

    async def generate_with_fallback(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion:
        """As `Model.generate_with_fallback`. A load that has begun is waited for by who is
        cancelled: others need it."""
        tried = self._context
        try:
            return await self.stream(prompt, config, **fields).collect()
        except Exception as error:
            wrong = error  # Python forgets `error` where the block ends
            if not await in_executor(lambda: self._fall_back(wrong, tried)):
                raise
        return await self.stream(prompt, config, **fields).collect()

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **fields: Unpack[GenerationFields],
    ) -> AsyncTextStream:
        """The answer piece by piece; nothing to await here. Use it in an `async with`."""
        request = self._request(prompt, config, fields)
        return AsyncTextStream(self._open_courier, request, self._source, self)

    @overload
    async def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: int,
        **fields: Unpack[ChatFields],
    ) -> list[ChatCompletion]: ...
    async def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        n: int | None = None,
        **fields: Unpack[ChatFields],
    ) -> ChatCompletion | list[ChatCompletion]:
        """As `Model.chat`."""
        if n is None:
            return await self.stream_chat(messages, config, **fields).collect()
        answers = await self._chat_crowd(messages, config, fields, n).collect_async()
        return cast("list[ChatCompletion]", answers)

    def stream_chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        **fields: Unpack[ChatFields],
    ) -> AsyncChatStream:
        """The answer to a conversation; nothing to await here. Use it in an `async with`."""
        [request] = self._chat_requests(messages, config, fields)
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

    async def load_session(
        self, path: str | os.PathLike[str], recompute: bool = False
    ) -> AsyncSession:
        """As `Model.load_session`."""
        return await in_executor(lambda: AsyncSession._load(self, path, recompute))

    async def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        **fields: Unpack[PromptFields],
    ) -> str:
        """As `Model.apply_chat_template`."""
        written = self._written
        prompt = await in_executor(lambda: written(messages, fields, add_generation_prompt))
        return prompt.text

    async def parse_chat(
        self, text: str, messages: Messages = "Hi", **fields: Unpack[PromptFields]
    ) -> ChatCompletion:
        """As `Model.parse_chat`."""
        return await in_executor(lambda: self._parse(text, messages, fields))

    async def count_tokens(self, messages_or_text: Messages, **fields: Unpack[PromptFields]) -> int:
        """As `Model.count_tokens`."""
        return await in_executor(lambda: self._count(messages_or_text, fields))

    async def pin(self, prompt: Prompt, **fields: Unpack[GenerationFields]) -> Pin:
        """As `Model.pin`."""
        context, request = self._open_context, self._pinning(prompt, fields)
        answer = await AsyncTextStream(self._open_courier, request, self._source, self).collect()
        return Pin(context, request.id, answer.usage.prompt_tokens)

    async def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        tokenize, text = self._tokenizer.tokenize, sound_text(text)
        if len(text) <= LONG_TEXT and not self._is_isolated:
            return tokenize(text, add_bos, special)
        return await in_executor(lambda: tokenize(text, add_bos, special))

    async def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        detokenize, ids = self._tokenizer.detokenize, token_ids(tokens)
        if len(ids) <= LONG_TEXT and not self._is_isolated:
            return detokenize(ids, special)
        return await in_executor(lambda: detokenize(ids, special))

    def openai_client(self, *, name: str | None = None, **options: Any) -> AsyncOpenAI:
        """As `Model.openai_client`, for event loops: an `openai.AsyncOpenAI`."""
        from .serve.transport import async_client_of

        return async_client_of(self, name, options)

    async def unload(self, timeout: float = 5.0) -> UnloadReport:
        """End what runs, then give the memory back. A second call does nothing."""
        return await in_executor(lambda: self._close(timeout))

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
