"""The file of a session: a header of ours, what was said as JSON, and the engine's own state.

    b"TABAGENT SESSION 1\\n"  length of the JSON, length of the state   JSON   state   SHA-256

The checksum is over all that comes before it. The state's bytes are llama.cpp's: they say nothing
of the model that they belong to, so the JSON does.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from . import _core
from .errors import SessionFileError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._base import Base

_MAGIC = b"TABAGENT SESSION "
_FORMAT = b"1\n"
_LENGTHS = struct.Struct("<QQ")
_SUM_BYTES = 32


@dataclass(frozen=True)
class SessionFile:
    """What is written down of a session."""

    facts: Mapping[str, Any]
    state: bytes | None

    def write(self, path: str | os.PathLike[str]) -> None:
        """The whole file or none: a reader never sees a part of it."""
        facts = json.dumps(self.facts, ensure_ascii=False).encode()
        state = self.state or b""
        parts = [_MAGIC, _FORMAT, _LENGTHS.pack(len(facts), len(state)), facts, state]
        checksum = hashlib.sha256()
        target = Path(os.path.expanduser(path))  # noqa: PTH111 - Path's would raise
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{id(parts):x}")
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    checksum.update(part)
                    file.write(part)
                file.write(checksum.digest())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):  # a full disk does not say of itself which file it was
                raise OSError(error.errno, error.strerror, str(target)) from None
            raise

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        data = memoryview(Path(os.path.expanduser(path)).read_bytes())  # noqa: PTH111
        begin = len(_MAGIC) + len(_FORMAT)
        if bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise _refusal(path, "is no saved session")
        if bytes(data[len(_MAGIC) : begin]) != _FORMAT:
            raise _refusal(path, "was written by another version of this package")
        head = begin + _LENGTHS.size
        lengths = _LENGTHS.unpack(data[begin:head]) if len(data) >= head else (0, 0)
        wanted = head + sum(lengths) + _SUM_BYTES
        if len(data) != wanted:
            raise _refusal(path, f"is damaged: it has {len(data)} bytes instead of {wanted}")
        if hashlib.sha256(data[:-_SUM_BYTES]).digest() != bytes(data[-_SUM_BYTES:]):
            raise _refusal(path, "is damaged: its checksum does not match")
        middle = head + lengths[0]
        return cls(json.loads(bytes(data[head:middle])), bytes(data[middle:-_SUM_BYTES]) or None)


def _refusal(path: str | os.PathLike[str], what: str) -> SessionFileError:
    return SessionFileError(f"`{os.fsdecode(path)}` {what}")


def identity_of(model: Base) -> str:
    """Tells model files apart without reading them: their header, and samples of the weights."""
    native = model._native
    if native is None:
        return "scripted"
    if (known := _identities.get(model, ("", "")))[0] == native.path:
        return known[1]
    size = native.size_bytes
    found = hashlib.sha256(f"{native.n_params} {size} {sorted(native.metadata().items())}".encode())
    path = Path(native.path)
    with path.open("rb") as file:
        length = path.stat().st_size
        for index in range(_SAMPLES + 1):
            file.seek(max(length - _SAMPLE_BYTES, 0) * index // _SAMPLES)
            found.update(file.read(_SAMPLE_BYTES))
    identity = found.hexdigest()
    _identities[model] = native.path, identity
    return identity


def forget_identity(model: Base) -> None:
    """The model was loaded again, maybe from another file at the same path."""
    _identities.pop(model, None)


def engine_of(model: Base) -> dict[str, Any]:
    """On what the bytes of a state depend besides the model."""
    config = model.config
    return {
        "llama.cpp": _core.LLAMA_CPP_VERSION,
        "kv_type": config.kv_type,
        "flash_attn": config.flash_attn,
    }


def other_settings(engine: Mapping[str, Any], model: Base) -> str:
    """Which settings of a saved context differ from those of this model's, in words."""
    here = engine_of(model)
    return ", ".join(
        f"`{name}` was {engine.get(name)!r} and is {here[name]!r} here"
        for name in ("kv_type", "flash_attn")
        if engine.get(name) != here[name]
    )


_SAMPLES, _SAMPLE_BYTES = 64, 4096
_identities: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()
