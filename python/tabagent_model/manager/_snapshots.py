"""What was computed for the sessions of a model, kept while the model is unloaded.

A state means something to the same weights only, and to a context with the same settings. Where
they are others when the model comes back, a session computes its conversation again.
"""

from __future__ import annotations

import logging
import tempfile
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from .._session_file import engine_of, forget_identity, identity_of
from ..errors import TabAgentModelError

if TYPE_CHECKING:
    from .._base import Base
    from ..chat import _Session

Where = Literal["memory", "disk"]


class Snapshots:
    """The states of sessions, which go when their session does."""

    def __init__(self, where: Where | None) -> None:
        self._where = where
        self._kept: WeakKeyDictionary[_Session, _Snapshot] = WeakKeyDictionary()

    def save(self, model: Base) -> None:
        """Before a model is unloaded. A session whose state cannot be kept computes it again."""
        for session in list(model._sessions):
            try:
                self._save(model, session)
            except (TabAgentModelError, OSError, MemoryError) as error:
                _log.warning("a session's state is not kept: %s", error)

    def restore(self, model: Base) -> None:
        """After a model was loaded again."""
        forget_identity(model)  # another file may lie at the path by now
        for session in list(model._sessions):
            snapshot = self._kept.pop(session, None)
            if snapshot is not None:
                try:
                    snapshot.restore(model, session)
                except (TabAgentModelError, OSError, MemoryError) as error:
                    _log.warning("a session's state is computed again: %s", error)

    def _save(self, model: Base, session: _Session) -> None:
        with session._lock:
            tokens, is_idle = session._known.tokens, session._turn is None
            is_ours = session._spoken_by is model._native
        if self._where is None or not (tokens and is_idle and is_ours):
            return
        state = model._open_context.export_state(tokens)
        if state is not None:
            self._kept[session] = _Snapshot(model, tokens, state, is_on_disk=self._where == "disk")


class _Snapshot:
    """The state of one session, and what it belongs to."""

    def __init__(self, model: Base, tokens: list[int], state: bytes, is_on_disk: bool) -> None:
        self._tokens = tokens
        self._identity, self._engine = identity_of(model), engine_of(model)
        self._state: bytes | None = None if is_on_disk else state
        # It has no name: nobody else finds it, and it is gone with us, however we end.
        self._file = tempfile.TemporaryFile() if is_on_disk else None  # noqa: SIM115
        if self._file is not None:
            self._file.write(state)
            self._file.flush()

    def restore(self, model: Base, session: _Session) -> None:
        with session._lock:
            if self._identity != identity_of(model) or session._known.tokens is not self._tokens:
                return
            session._spoken_by = model._native  # its tokens mean the same as before
        if self._engine == engine_of(model):
            model._open_context.import_state(self._read(), self._tokens)

    def _read(self) -> bytes:
        if self._state is not None:
            return self._state
        assert self._file is not None
        self._file.seek(0)
        return self._file.read()

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            file.close()


_log = logging.getLogger("tabagent_model")
