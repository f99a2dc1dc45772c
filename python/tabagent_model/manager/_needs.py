"""What models take, for a manager: as estimated before a load, as allocated after it.

Mapped pages count. They need not be free for a load, but a budget whose models push each other's
weights out of the memory is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .._loading import memory_of
from ..errors import InvalidRequestError
from ..params import ModelConfig, checked_whole
from ._pool import ANYWHERE, Needs

if TYPE_CHECKING:
    from .._base import Base
    from ..hardware import Machine
    from ..placement._estimate import Share

Estimate = Callable[[ModelConfig], int | Mapping[str, int]]
"""Bytes, of all devices together or by device, as a user's function tells them."""


def before_load(config: ModelConfig, estimate: Estimate | None) -> Needs:
    """Looks at the file, and raises what is wrong with it."""
    if estimate is not None:
        return checked_needs("estimate", estimate(config))
    if config.vocab_only:
        return {}
    from .. import placement

    return _taken(placement.estimate(config, machine=_machine(config)).shares)


def after_load(model: Base, estimate: Estimate | None) -> Needs:
    """With what was chosen for the model, or as the ledger has it."""
    config, context = model.config, model._context
    if estimate is None:
        found = memory_of(model._native)
        return {} if found is None else _taken(found.shares)
    if context is not None:
        config = config.with_fields(
            n_ctx=context.n_ctx, max_parallel=context.n_seq_max, kv_type=context.kv_type
        )
    return checked_needs("estimate", estimate(config))


def _taken(shares: Iterable[Share]) -> Needs:
    return {share.device: share.needed + share.mapped for share in shares}


def checked_needs(name: str, given: Any) -> Needs:
    """A number of bytes, or one for each device."""
    if not isinstance(given, Mapping):
        return {ANYWHERE: checked_whole(name, given, 0, 2**62)}
    if not all(isinstance(device, str) and device for device in given):
        message = f"`{name}` must be bytes by names of devices, like 'cpu', got {dict(given)!r:.60}"
        raise InvalidRequestError(message, name=name)
    return {device: checked_whole(name, size, 0, 2**62) for device, size in given.items()}


def _machine(config: ModelConfig) -> Machine:
    """Without what loads under way will take. For a worker one of them looks: llama.cpp shall not
    start here for that."""
    from ..placement._ledger import LEDGER

    if config.isolation == "process" and not LEDGER.can_detect:
        from ..isolation.remote import scout

        return scout()
    return LEDGER.machine()
