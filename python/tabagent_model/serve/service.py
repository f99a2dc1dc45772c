"""What can be asked of models, whoever asks: no shapes, no web.

Every door asks here: the OpenAI client in this process, and whatever comes over a wire. All of it
is asynchronous; a `Model` is asked through an asynchronous face of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .._prompt import Messages, Prompt
from ..errors import InvalidRequestError, ModelNotFoundError
from ..model import AsyncModel, Model
from ..params import GenerationConfig, checked_whole
from ..results import Completion

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ..params import ChatFields, PromptFields
    from ..results import ChatCompletion, ChatDelta
    from ..stream import AsyncChatStream, AsyncTextStream

D = TypeVar("D")
R = TypeVar("R", bound=Completion)


class Service:
    """Models by name. The first one, or `default`, answers those who name none."""

    def __init__(
        self,
        models: Model | AsyncModel | Mapping[str, Model | AsyncModel],
        default: str | None = None,
    ) -> None:
        if isinstance(models, (Model, AsyncModel)):
            models = {models.info()["model"] or "model": models}
        if not isinstance(models, Mapping) or not models:
            message = (
                f"`models` must be a model or a mapping of names to models, got {models!r:.60}"
            )
            raise InvalidRequestError(message, name="models")
        self._models = {_name(name): _async_face(name, model) for name, model in models.items()}
        self._default = next(iter(self._models)) if default is None else _name(default)
        self.model(self._default)
        self.created = int(time.time())

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def default(self) -> str:
        return self._default

    def resolve(self, name: str | None = None) -> str:
        """The name of the model that is meant; none, or "default", is the default."""
        if isinstance(name, str) and name in self._models:
            return name
        if name is None or name in ("", "default"):
            return self._default
        known = ", ".join(f"`{known}`" for known in self._models)
        raise ModelNotFoundError(
            f"there is no model `{name!s:.100}`, there is {known}", name="model"
        )

    def model(self, name: str | None = None) -> AsyncModel:
        return self._models[self.resolve(name)]

    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        model: str | None = None,
        n: int = 1,
        **fields: Unpack[ChatFields],
    ) -> Answers[ChatDelta, ChatCompletion]:
        """`n` answers to a conversation, on their way when the first delta is awaited."""
        chat = self.model(model).stream_chat
        configs = _with_seeds(config, n)
        return Answers([chat(messages, each, **fields) for each in configs])

    def complete(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        model: str | None = None,
        n: int = 1,
    ) -> Answers[str, Completion]:
        """`n` answers to each prompt, one prompt's after the other's."""
        stream = self.model(model).stream
        configs = _with_seeds(config, n)
        return Answers([stream(prompt, each) for prompt in prompts for each in configs])

    async def prompt(
        self, messages: Messages, *, model: str | None = None, **fields: Unpack[ChatFields]
    ) -> str:
        """What a conversation makes the model read."""
        return await self.model(model).apply_chat_template(messages, **_prompt_fields(fields))

    async def count_tokens(
        self, messages: Messages, *, model: str | None = None, **fields: Unpack[ChatFields]
    ) -> int:
        """How many tokens that is."""
        return await self.model(model).count_tokens(messages, **_prompt_fields(fields))

    async def tokenize(
        self, text: str, *, model: str | None = None, add_bos: bool = True, special: bool = False
    ) -> list[int]:
        return await self.model(model).tokenize(text, add_bos, special)

    async def metrics(self, model: str | None = None) -> dict[str, Any]:
        """In a thread, for a model in a process of its own may take its time to answer."""
        return await asyncio.to_thread(self.model(model).metrics)

    async def slots(self, model: str | None = None) -> list[dict[str, int | None]]:
        return await asyncio.to_thread(self.model(model).slots)

    async def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, special: bool = False
    ) -> str:
        return await self.model(model).detokenize(tokens, special)


class Answers(Generic[D, R]):
    """Several answers on their way at once.

    Iterating gives the number of an answer and a piece of it, and as the last of each its result.
    Use it in an `async with`: leaving early cancels all of them.
    """

    def __init__(self, streams: Sequence[AsyncChatStream | AsyncTextStream]) -> None:
        self.results: list[R | None] = [None] * len(streams)
        self._streams = streams
        self._tasks: dict[asyncio.Task[tuple[int, D | R]], int] = {}
        self._idle = list(range(len(streams)))
        """The numbers of those from which nothing is awaited."""

    async def start(self) -> Self:
        """Submit all of them; what is wrong with the request is raised here."""
        try:
            for stream in self._streams:
                await stream.__aenter__()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def collect(self) -> list[R]:
        """Read all of them to their ends."""
        async with self:
            return [cast("R", await stream.collect()) for stream in self._streams]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, D | R]:
        if not self._idle and not self._tasks:
            raise StopAsyncIteration
        try:
            index, item = await self._next()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(item, Completion):
            self.results[index] = cast("R", item)
        else:
            self._idle.append(index)
        return index, item

    async def aclose(self) -> None:
        """End what has not ended, and wait until the places are free."""
        for stream in self._streams:
            stream.cancel()
        tasks, self._tasks, self._idle = self._tasks, {}, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _next(self) -> tuple[int, D | R]:
        if len(self._streams) == 1:
            return await self._item(self._idle.pop())
        while self._idle:
            index = self._idle.pop(0)
            self._tasks[asyncio.ensure_future(self._item(index))] = index
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        task = next(task for task in self._tasks if task.done())
        del self._tasks[task]
        return task.result()

    async def _item(self, index: int) -> tuple[int, D | R]:
        stream: Any = self._streams[index]
        async for piece in stream:
            return index, piece
        return index, stream.result


class _Face(AsyncModel):
    """The asynchronous face of a `Model`, which stays its owner's: what they hold is one dict."""

    __slots__ = ("_model",)

    def __init__(self, model: Model) -> None:
        self._model = model  # lives as long as this face
        self.__dict__ = model.__dict__

    def __del__(self) -> None:
        """The model is closed by its owner."""


def _async_face(name: object, model: object) -> AsyncModel:
    if isinstance(model, AsyncModel):
        return model
    if isinstance(model, Model):
        return _Face(model)
    message = f"`models[{name!r:.60}]` must be a Model or AsyncModel, got a {type(model).__name__}"
    raise InvalidRequestError(message, name="models")


def _name(name: object) -> str:
    if isinstance(name, str) and 1 <= len(name) <= 200 and name.isprintable():
        return name
    message = f"a model's name must be 1 to 200 printable characters, got {name!r:.60}"
    raise InvalidRequestError(message, name="models")


def _prompt_fields(fields: ChatFields) -> PromptFields:
    """Without what is about the answer."""
    return cast("PromptFields", {k: v for k, v in fields.items() if k in _PROMPT_FIELDS})


_PROMPT_FIELDS = {
    *("tools", "tool_choice", "parallel_tool_calls", "template", "enable_thinking"),
    *("reasoning_format", "chat_template_kwargs", "continue_final_message"),
}


def _with_seeds(config: GenerationConfig | None, n: int) -> list[GenerationConfig]:
    """A seed of its own for each, if there is one; a random one is chosen for each anyway."""
    config = config or GenerationConfig()
    numbers = range(checked_whole("n", n, 1, 128))
    if config.seed < 0:
        return [config for _ in numbers]
    return [config.with_seed((config.seed + number) % 2**63) for number in numbers]
