"""A loaded model: `Model` for threads, `AsyncModel` for event loops.

Both share one base that turns what was typed into requests; they differ only in how they wait.
"""

from __future__ import annotations

import atexit
import operator
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, overload

from . import _core, _courier, _log, _native
from ._courier import Context, Courier, Request
from .errors import InvalidRequestError, LoadCancelledError, ModelNotLoadedError, TokenizationError
from .params import GenerationConfig, GenerationFields, ModelConfig, ModelFields
from .results import Completion, ModelDescription, Source
from .stream import AsyncTextStream, Crowd, TextStream, settle

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import TypeGuard

    from typing_extensions import Self, Unpack

    from ._core import PyModel, UnloadReport

T = TypeVar("T")
Prompt = str | Sequence[int]
Prompts = list[str] | list[list[int]] | list[str | list[int]] | tuple[str, ...]
OnToken = Callable[[str], Any]
OnProgress = Callable[[float], Any]

# Tokenizing a longer text would hold up the event loop, so a thread does it.
_LONG_TEXT = 8192
_request_ids = count(1)


class _Base:
    """Everything that needs no waiting."""

    def __init__(
        self,
        context: Context | None,
        native_model: PyModel | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self._config = config or ModelConfig()
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
                "load_time_ms": native.load_time_ms,
            }
        return facts

    def metrics(self) -> dict[str, int]:
        """The engine's counters: running, waiting, requests, tokens, steps."""
        return self._open_context.metrics()

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
            self._source = Source(
                model=Path(native_model.path).stem,
                load_time_ms=native_model.load_time_ms,
                gpu_utilized=native_model.gpu_layers > 0,
                memory_used_mb=lambda: _core.process_rss_mb() or 0.0,
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
    def _tokenizer(self) -> PyModel | Context:
        return self._open_context if self._native is None else self._native

    def _request(
        self, prompt: Prompt, config: GenerationConfig | None, given: GenerationFields
    ) -> Request:
        return self._requests([prompt], config, given)[0]

    def _requests(
        self, prompts: Iterable[Prompt], config: GenerationConfig | None, given: GenerationFields
    ) -> list[Request]:
        if config is None:
            config = GenerationConfig()
        elif not isinstance(config, GenerationConfig):
            message = f"`config` must be a GenerationConfig, got a {type(config).__name__}"
            raise InvalidRequestError(message, name="config")
        chosen = vars(config.with_fields(**given))
        params = {name: value for name, value in chosen.items() if value is not None}
        return [Request(next(_request_ids), _checked(prompt), params) for prompt in prompts]

    def _crowd(
        self,
        prompts: Iterable[Prompt],
        config: GenerationConfig | None,
        given: GenerationFields,
        for_one: object,
    ) -> Crowd:
        if for_one:
            message = "`stream` and `on_token` are for a single prompt, not for a list of prompts"
            raise InvalidRequestError(message, hint="make one stream for each", name="prompt")
        requests = self._requests(prompts, config, given)
        return Crowd(self._open_courier, requests, self._source)

    def _changed(self, changes: ModelFields) -> ModelConfig:
        """The config for a reload; a bad file is refused while the old model still serves."""
        config = self._config.with_fields(**changes)
        _core.inspect_gguf(config.path)
        return config


class Model(_Base):
    """A loaded model. Any thread may use it, many at once."""

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | ModelConfig | None = None,
        /,
        *,
        on_progress: OnProgress | None = None,
        **fields: Unpack[ModelFields],
    ) -> Self:
        """Open a model file, or the bundled tiny chat model.

        `fields` are those of ModelConfig and change the config, if one is given. `on_progress`
        gets 0.0 to 1.0, in a thread of its own; returning False or raising ends the load.
        """
        config = _config_of(model, fields)
        return cls(*_load(config, on_progress), config)

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
        stream: bool = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion | TextStream | list[Completion]:
        """Answer a prompt (text or token ids), or a list of prompts together.

        `fields` are those of GenerationConfig. `on_token` gets each piece of text in this thread;
        if it returns False the answer ends there.
        """
        if _is_many(prompt):
            return self._crowd(prompt, config, fields, stream or on_token).collect()
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

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        return self._tokenizer.tokenize(_sound(text), add_bos, special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        return self._tokenizer.detokenize(_token_ids(tokens), special)

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
            self._adopt(*_load(config, on_progress))
            self._config = config
        except Exception:
            self._adopt(*_load(self._config, None))
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
        **fields: Unpack[ModelFields],
    ) -> Self:
        """As `Model.load`. Cancelling it ends the load and gives the memory back."""
        config = _config_of(model, fields)
        return cls(*await _load_async(config, on_progress), config)

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
        stream: bool = False,
        on_token: OnToken | None = None,
        **fields: Unpack[GenerationFields],
    ) -> Completion | AsyncTextStream | list[Completion]:
        """As `Model.generate`. `on_token` is a plain function, called in the event loop."""
        if _is_many(prompt):
            crowd = self._crowd(prompt, config, fields, stream or on_token)
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

    async def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        tokenize, text = self._tokenizer.tokenize, _sound(text)
        if len(text) <= _LONG_TEXT:
            return tokenize(text, add_bos, special)
        return await _in_executor(lambda: tokenize(text, add_bos, special))

    async def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        detokenize, ids = self._tokenizer.detokenize, _token_ids(tokens)
        if len(ids) <= _LONG_TEXT:
            return detokenize(ids, special)
        return await _in_executor(lambda: detokenize(ids, special))

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
            self._adopt(*await _load_async(config, on_progress))
            self._config = config
        except Exception:
            self._adopt(*await _load_async(self._config, None))
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


class _Loading:
    """One load, made to run in a thread of its own while its waiter stays interruptible."""

    def __init__(self, config: ModelConfig, on_progress: OnProgress | None) -> None:
        self._config = config
        self._on_progress = on_progress
        self._is_wanted = True

    def __call__(self) -> tuple[Context | None, PyModel]:
        _native.start()
        config, model = self._config, _core.PyModel()
        model.load(
            config.path,
            gpu_layers=-1 if isinstance(config.gpu_layers, str) else config.gpu_layers,
            mlock=config.use_mlock,
            mmap=config.use_mmap,
            main_gpu=config.main_gpu,
            vocab_only=config.vocab_only,
            split_mode=config.split_mode,
            progress=self._progress,
        )
        try:
            context = None if config.vocab_only else self._context_of(model)
            if not self._is_wanted:
                raise LoadCancelledError(f"loading `{config.path}` was cancelled")
        except BaseException:
            model.unload()
            raise
        return context, model

    def give_up(self) -> None:
        self._is_wanted = False

    def _context_of(self, model: PyModel) -> Context:
        config = self._config
        return model.create_context(
            config.n_ctx,
            config.n_batch,
            config.n_threads,
            n_seq_max=config.max_parallel,
            queue_size=config.queue_size,
            flash_attn=config.flash_attn,
            kv_type=config.kv_type,
        )

    def _progress(self, fraction: float) -> bool:
        wanted = self._on_progress is None or self._on_progress(fraction) is not False
        return wanted and self._is_wanted


def _load(config: ModelConfig, on_progress: OnProgress | None) -> tuple[Context | None, PyModel]:
    loading = _Loading(config, on_progress)
    future = _in_thread(loading)
    try:
        return future.result()
    except BaseException:
        if not future.done():  # Ctrl-C, before the load has ended
            loading.give_up()
            future.add_done_callback(_discard)
            _wait(future, 0.8)
        raise


async def _load_async(
    config: ModelConfig, on_progress: OnProgress | None
) -> tuple[Context | None, PyModel]:
    import asyncio

    loading = _Loading(config, on_progress)
    future = _in_thread(loading)
    try:
        return await settle(asyncio.wrap_future(future), loading.give_up)
    except asyncio.CancelledError:
        _discard(future)
        raise


def _discard(future: Future[tuple[Context | None, PyModel]]) -> None:
    """Close what was loaded for nobody."""
    if future.exception() is None:
        context, model = future.result()
        if context is not None:
            context.close()
        model.unload()


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """A thread that does not keep the program from ending, unlike those of an executor."""
    from concurrent.futures import Future

    future: Future[T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    _log.start()
    threading.Thread(target=run, name="tabagent-load", daemon=True).start()
    return future


def _wait(future: Future[Any], seconds: float) -> None:
    from concurrent.futures import wait

    wait([future], timeout=seconds)


async def _in_executor(function: Callable[[], T]) -> T:
    import asyncio

    return await settle(asyncio.get_running_loop().run_in_executor(None, function))


def _config_of(
    model: str | os.PathLike[str] | ModelConfig | None, fields: ModelFields
) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model.with_fields(**fields)
    if model is not None and fields.setdefault("model_path", model) is not model:
        message = "the model was given twice, as first argument and as `model_path`"
        raise InvalidRequestError(message, name="model_path")
    return ModelConfig(**cast("Any", fields))


def _is_many(prompt: object) -> TypeGuard[Sequence[Prompt]]:
    """A list of ids is one prompt; a list of texts, or of lists of ids, is many."""
    if isinstance(prompt, (str, bytes)):
        return False
    try:
        first = prompt[0]  # type: ignore[index]
    except (TypeError, LookupError):
        return False
    return isinstance(first, str) or hasattr(first, "__len__")


def _checked(prompt: Prompt) -> str | list[int]:
    return _sound(prompt) if isinstance(prompt, str) else _token_ids(prompt, "prompt")


def _sound(text: str) -> str:
    """Refuse what is no text in any encoding; Rust could not take it."""
    if not isinstance(text, str):
        message = f"`text` must be a string, got a {type(text).__name__}"
        raise InvalidRequestError(message, name="text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text holds half a surrogate pair at index {error.start}"
        raise TokenizationError(message) from None
    return text


def _token_ids(tokens: Sequence[int], name: str = "tokens") -> list[int]:
    if isinstance(tokens, (str, bytes, dict)) or not hasattr(tokens, "__getitem__"):
        message = f"`{name}` must be text or a list of token ids, got a {type(tokens).__name__}"
        raise InvalidRequestError(message, name=name)
    ids = list(tokens)
    if name == "prompt" and not ids:
        message = "`prompt` must hold at least one token id, got an empty list"
        raise InvalidRequestError(message, name=name)
    if not set(map(type, ids)) <= {int}:
        ids = [_token_id(token, index, name) for index, token in enumerate(ids)]
    if ids and not (min(ids) >= 0 and max(ids) < 2**31):
        index, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < 2**31)
        raise _bad_token(token, index, name)
    return ids


def _token_id(token: Any, index: int, name: str) -> int:
    try:
        if not isinstance(token, bool):
            return operator.index(token)  # numpy's integers, too
    except TypeError:
        pass
    raise _bad_token(token, index, name)


def _bad_token(token: object, index: int, name: str) -> InvalidRequestError:
    message = f"`{name}[{index}]` must be a token id, got {token!r:.40}"
    return InvalidRequestError(message, name=name)


@atexit.register
def _at_exit() -> None:
    _courier.close_all()
    _log.stop()


def _in_child() -> None:
    _courier.disown_all()
    _log.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
