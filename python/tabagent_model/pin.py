"""A beginning that stays computed until it is released."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from ._courier import Context

if TYPE_CHECKING:
    from typing_extensions import Self


class Pin:
    """Made by `Model.pin`. Every later prompt that begins like this one finds it computed; with
    `isolation="process"` also in a worker that was started for one that died."""

    def __init__(self, context: Context, request_id: int, tokens: int) -> None:
        self.tokens = tokens
        """How many of them are kept."""
        self._context = context
        self._request_id = request_id

    def release(self) -> None:
        """From now on it may go like anything else in the prompt cache. Again: nothing."""
        if not self._context.is_closed:
            self._context.unpin(self._request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<Pin of {self.tokens} tokens>"
