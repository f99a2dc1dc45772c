"""What can be asked of models, whoever asks: no shapes, no web.

Every door asks here: the OpenAI client in this process, and whatever comes over a wire. All of it
is asynchronous; a `Model` is asked through an asynchronous face of its own. Who has the models is
in `models.py`; a request holds its model until it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .._prompt import Messages, Prompt
from ..errors import InvalidRequestError, ModelNotFoundError, ModelNotLoadedError
from ..model import AsyncModel
from ..params import GenerationConfig, checked_whole
from ..results import Completion
from .models import Source, models_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ..manager import Duration
    from ..params import ChatFields, PromptFields
    from ..results import ChatCompletion, ChatDelta, TokenLogprob
    from ..stream import AsyncChatStream, AsyncTextStream
    from .control import Watch

    Stream = AsyncChatStream | AsyncTextStream

D = TypeVar("D")
R = TypeVar("R", bound=Completion)


class Service:
    """Models by name. The first one, or `default`, answers those who name none."""

    def __init__(self, models: Source, default: str | None = None) -> None:
        self.models = models_of(models, default)
        self.created = int(time.time())
        self.watches: set[Watch] = set()
        """Those who are told what happens to the models."""
        self._left_alone: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        return self.models.names

    @property
    def default(self) -> str:
        return self.models.default

    def resolve(self, name: str | None = None) -> str:
        """The name of the model that is meant; none, or "default", is the default."""
        names = self.names
        if isinstance(name, str) and name in names:
            return name
        if name is None or name in ("", "default"):
            return self.default
        known = ", ".join(f"`{known}`" for known in names)
        raise ModelNotFoundError(
            f"there is no model `{name!s:.100}`, there is {known}", name="model"
        )

    def model(self, name: str | None = None) -> AsyncModel:
        """One that is loaded. It may be unloaded at any time; `use` prevents that."""
        return self.models.model(self.resolve(name))

    def loaded(self, name: str | None = None) -> AsyncModel | None:
        """As `model`; None if it is not loaded."""
        try:
            return self.model(name)
        except ModelNotLoadedError:
            return None

    @asynccontextmanager
    async def use(
        self,
        name: str | None = None,
        *,
        keep_alive: Duration | None = None,
        num_ctx: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AsyncModel]:
        """A model that is loaded, and stays so meanwhile.

        A context that it does not have is refused; that it may have to be loaded for that to be
        known is the price of asking.
        """
        name = self.resolve(name)
        async with self.models.use(name, keep_alive, timeout_s) as model:
            if num_ctx is not None and num_ctx > model.n_ctx:
                most = f"at most {model.n_ctx}, the context of `{name}`"
                message = f"num_ctx must be {most}, got {num_ctx}"
                raise InvalidRequestError(message, name="num_ctx")
            yield model

    def chat(
        self,
        messages: Messages,
        config: GenerationConfig | None = None,
        *,
        model: str | None = None,
        n: int = 1,
        keep_alive: Duration | None = None,
        num_ctx: int | None = None,
        **fields: Unpack[ChatFields],
    ) -> Answers[ChatDelta, ChatCompletion]:
        """`n` answers to a conversation, on their way when the first delta is awaited."""
        configs = _with_seeds(config, n)
        held = self.use(
            model, keep_alive=keep_alive, num_ctx=num_ctx, timeout_s=configs[0].max_queue_wait_s
        )
        return Answers(
            held, lambda model: [model.stream_chat(messages, each, **fields) for each in configs]
        )

    def complete(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | None = None,
        *,
        model: str | None = None,
        n: int = 1,
        keep_alive: Duration | None = None,
        num_ctx: int | None = None,
    ) -> Answers[str, Completion]:
        """`n` answers to each prompt, one prompt's after the other's."""
        configs = _with_seeds(config, n)
        held = self.use(
            model, keep_alive=keep_alive, num_ctx=num_ctx, timeout_s=configs[0].max_queue_wait_s
        )
        return Answers(
            held,
            lambda model: [model.stream(prompt, each) for prompt in prompts for each in configs],
        )

    async def prompt(
        self, messages: Messages, *, model: str | None = None, **fields: Unpack[ChatFields]
    ) -> str:
        """What a conversation makes the model read."""
        async with self.use(model) as held:
            return await held.apply_chat_template(messages, **_prompt_fields(fields))

    async def count_tokens(
        self, messages: Messages, *, model: str | None = None, **fields: Unpack[ChatFields]
    ) -> int:
        """How many tokens that is."""
        async with self.use(model) as held:
            return await held.count_tokens(messages, **_prompt_fields(fields))

    async def tokenize(
        self, text: str, *, model: str | None = None, add_bos: bool = True, special: bool = False
    ) -> list[int]:
        async with self.use(model) as held:
            return await held.tokenize(text, add_bos, special)

    async def detokenize(
        self, tokens: Sequence[int], *, model: str | None = None, special: bool = False
    ) -> str:
        async with self.use(model) as held:
            return await held.detokenize(tokens, special)

    async def metrics(self, model: str | None = None) -> dict[str, Any]:
        """Of one that is loaded; in a thread, for a worker may take its time to answer."""
        return await asyncio.to_thread(self.model(model).metrics)

    async def slots(self, model: str | None = None) -> list[dict[str, int | None]]:
        return await asyncio.to_thread(self.model(model).slots)

    def remember(self, task: asyncio.Task[None]) -> None:
        """Keep a task alive that nobody waits for."""
        self._left_alone.add(task)
        task.add_done_callback(self._left_alone.discard)

    def end_watches(self) -> None:
        """Nothing else would end those who watch."""
        for watch in list(self.watches):
            watch.end()

    async def info(self, model: str | None = None) -> dict[str, Any]:
        """What a model is and how it was opened; little, if it is not loaded."""
        loaded = self.loaded(model)
        if loaded is None:
            return {"model": self.resolve(model), "is_loaded": False}
        return await asyncio.to_thread(loaded.info)


class Answers(Generic[D, R]):
    """Several answers on their way at once.

    Iterating gives the number of an answer and a piece of it, and as the last of each its result.
    Use it in an `async with`: leaving early cancels all of them.
    """

    def __init__(
        self,
        held: AbstractAsyncContextManager[AsyncModel],
        ask: Callable[[AsyncModel], Sequence[Stream]],
    ) -> None:
        self.results: list[R | None] = []
        self._held, self._ask = held, ask
        self._holding = AsyncExitStack()
        self._model: AsyncModel | None = None
        self._streams: Sequence[Stream] = ()
        self._is_watched = True
        self._tasks: dict[asyncio.Task[tuple[int, D | R]], int] = {}
        self._idle: list[int] = []
        """The numbers of those from which nothing is awaited."""

    async def start(self) -> Self:
        """Have the model, and submit all of them; what is wrong with the request is raised here."""
        try:
            self._model = await self._holding.enter_async_context(self._held)
            self._streams = self._ask(self._model)
            if not self._is_watched:
                for stream in self._streams:
                    stream.unwatch()
            self.results = [None] * len(self._streams)
            self._idle = list(range(len(self._streams)))
            for stream in self._streams:
                await stream.__aenter__()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def collect(self) -> list[R]:
        """Read all of them to their ends."""
        self._is_watched = False
        async with self:
            return [cast("R", await stream.collect()) for stream in self._streams]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, D | R]:
        if not self._idle and not self._tasks:
            await self.aclose()
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

    def logprobs(self, index: int) -> tuple[TokenLogprob, ...] | None:
        """Of what was read of an answer."""
        return self._streams[index].logprobs

    @property
    def request_ids(self) -> list[int]:
        return [stream.request_id for stream in self._streams]

    async def slots(self) -> list[dict[str, int | None]]:
        """The places of the model, once it is there."""
        assert self._model is not None
        return await asyncio.to_thread(self._model.slots)

    async def aclose(self) -> None:
        """End what has not ended, wait until the places are free, and let go of the model."""
        async with self._holding:
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

    def _next(self) -> Awaitable[tuple[int, D | R]]:
        return self._item(self._idle.pop()) if len(self._streams) == 1 else self._next_of_several()

    async def _next_of_several(self) -> tuple[int, D | R]:
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
