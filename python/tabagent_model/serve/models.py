"""Who has the model for a name: models that are there already, or a manager that loads them.

Service ──┬──▶ Given      somebody else's models; they are there
          └──▶ Managed    an AsyncModelManager's: loaded when wanted, unloaded for others
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from copy import copy
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import (
    InternalError,
    InvalidRequestError,
    LoadCancelledError,
    ModelNotFoundError,
    NotSupportedError,
    TabAgentModelError,
)
from ..manager import AsyncModelManager
from ..manager._keeper import ManagedModel, ModelEvent
from ..model import AsyncModel, Model

if TYPE_CHECKING:
    from ..manager import Duration

log = logging.getLogger("tabagent_model.serve")

Source = Model | AsyncModel | Mapping[str, Model | AsyncModel] | AsyncModelManager
Watcher = Callable[[ModelEvent], object]


def models_of(source: Source, default: str | None) -> Given | Managed:
    """What a service is given, behind one face."""
    if isinstance(source, AsyncModelManager):
        if default is not None:
            source.default_model = default
        return Managed(source)
    if isinstance(source, (Model, AsyncModel)):
        source = {source.info()["model"] or "model": source}
    if not isinstance(source, Mapping) or not source:
        message = f"`models` must be models by name or a manager, got {source!r:.60}"
        raise InvalidRequestError(message, name="models")
    models = {_name(name): _async_face(name, model) for name, model in source.items()}
    default = next(iter(models)) if default is None else _name(default)
    if default not in models:
        raise ModelNotFoundError(f"there is no model `{default}`", name="default")
    return Given(models, default)


class Given:
    """Models that were loaded by somebody else, who also unloads them."""

    def __init__(self, models: Mapping[str, AsyncModel], default: str) -> None:
        self._models = dict(models)
        self.default = default
        self.failures: dict[str, TabAgentModelError] = {}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def is_well(self) -> bool:
        return all(model.is_loaded for model in self._models.values())

    def described(self) -> list[ManagedModel]:
        return [
            ManagedModel(
                name=name,
                path="",
                state="loaded" if model.is_loaded else "unloaded",
                is_default=name == self.default,
                is_pinned=True,
                priority="normal",
                keep_alive_s=inf,
                needs_bytes=0,
                num_users=0,
                num_waiting=0,
            )
            for name, model in self._models.items()
        ]

    def model(self, name: str) -> AsyncModel:
        return self._models[name]

    @asynccontextmanager
    async def use(
        self, name: str, keep_alive: Duration | None, timeout_s: float | None
    ) -> AsyncIterator[AsyncModel]:
        """There is nothing to wait for, and they stay for ever."""
        yield self._models[name]

    async def load(self, name: str, keep_alive: Duration | None) -> None:
        if not self._models[name].is_loaded:
            raise _not_ours("loaded")

    async def unload(self, name: str, grace: Duration) -> None:
        raise _not_ours("unloaded")

    async def swap(self, name: str, grace: Duration) -> None:
        if name != self.default:
            raise _not_ours("swapped")

    def watch(self, watcher: Watcher) -> Callable[[], object]:
        return lambda: None

    def failed(self, name: str, error: BaseException) -> None:
        """Nothing is done here that could fail later."""


class Managed:
    """The models of a manager. Whoever asks hears nothing of the folders of this machine."""

    def __init__(self, manager: AsyncModelManager) -> None:
        self._manager = manager
        self.failures: dict[str, TabAgentModelError] = {}
        """What the last try to load a model died of, if it did."""
        self._watchers: dict[object, Watcher] = {}
        manager.watch(self._hear)

    @property
    def names(self) -> list[str]:
        return self._manager.names

    @property
    def default(self) -> str:
        if (name := self._manager.default_model) is None:
            raise ModelNotFoundError("no model is registered", name="model")
        return name

    @property
    def is_well(self) -> bool:
        return not self._manager.is_closed

    def described(self) -> list[ManagedModel]:
        return self._manager.list_models()

    def model(self, name: str) -> AsyncModel:
        return self._manager.get_model(name)

    @asynccontextmanager
    async def use(
        self, name: str, keep_alive: Duration | None, timeout_s: float | None
    ) -> AsyncIterator[AsyncModel]:
        """The model stays until the end of this, whoever else wants room."""
        held = self._manager.use(name, keep_alive=keep_alive, timeout_s=timeout_s)
        async with AsyncExitStack() as stack:
            with self._without_folder(name):
                model = await stack.enter_async_context(held)
            yield model

    async def load(self, name: str, keep_alive: Duration | None) -> None:
        with self._without_folder(name):
            await self._manager.load_model(name, keep_alive=keep_alive)

    async def unload(self, name: str, grace: Duration) -> None:
        await self._manager.unload_model(name, grace=grace)

    async def swap(self, name: str, grace: Duration) -> None:
        with self._without_folder(name):
            await self._manager.swap(name, grace=grace)

    def watch(self, watcher: Watcher) -> Callable[[], object]:
        """Tell of each step, in another thread, until what comes back is called."""
        number = object()
        self._watchers[number] = watcher
        return lambda: self._watchers.pop(number, None)

    def failed(self, name: str, error: BaseException) -> None:
        """Something died of this that nobody waited for."""
        self._hear(ModelEvent(name, "load", 0.0, 0.0, error))

    def _hear(self, event: ModelEvent) -> None:
        if isinstance(event.error, LoadCancelledError):  # nobody wanted it any more
            event = ModelEvent(event.model, "unload", 1.0, event.seconds)
        if event.error is not None:
            self.failures[event.model] = self._told(event)
            event = replace(event, error=self.failures[event.model])
        else:
            self.failures.pop(event.model, None)
        for watcher in list(self._watchers.values()):
            watcher(event)

    def _told(self, event: ModelEvent) -> TabAgentModelError:
        """What others may know of an error; the log knows the rest."""
        if isinstance(event.error, TabAgentModelError):
            return _shortened(event.error, self._folder(event.model))
        log.error("`%s` failed", event.model, exc_info=event.error)
        return InternalError(f"`{event.model}` failed, and the log says why")

    @contextmanager
    def _without_folder(self, name: str) -> Iterator[None]:
        try:
            yield
        except TabAgentModelError as error:
            raise _shortened(error, self._folder(name)) from None

    def _folder(self, name: str) -> str:
        path = next((each.path for each in self.described() if each.name == name), "")
        return str(Path(path).parent) + os.sep


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


def _not_ours(done: str) -> NotSupportedError:
    message = f"these models belong to the program that serves them, and are not {done} from here"
    return NotSupportedError(message, hint="serve an `AsyncModelManager`")


def _shortened(error: TabAgentModelError, folder: str) -> TabAgentModelError:
    """An error that names files without their folder."""
    error = copy(error)
    error.message = error.message.replace(folder, "")
    error.hint = error.hint and error.hint.replace(folder, "")
    return error
