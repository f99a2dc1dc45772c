"""What the models of a process offer to others: one service, and a door for each way in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._package import package

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from .config import ServerConfig
    from .models import Source


def app(
    models: Source,
    config: ServerConfig | None = None,
    *,
    default: str | None = None,
    **rules: Any,
) -> Starlette:
    """An ASGI application that answers for these models, by name, or for those of an
    `AsyncModelManager`; they stay the caller's to unload.

    It can be run by itself, or mounted in a FastAPI or Starlette application. `rules` are the
    fields of ServerConfig. It needs the extra `server`.
    """
    package("starlette.applications", "tabagent-model[server]")
    from .config import ServerConfig
    from .http import Door
    from .service import Service

    door = Door(config.with_fields(**rules) if config else ServerConfig(**rules))
    door.service = Service(models, default)
    return door.app


__all__ = ["app"]
