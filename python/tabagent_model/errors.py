"""Everything that can go wrong, as one tree of exceptions.

TabAgentModelError (RuntimeError)
├── ModelNotFoundError (FileNotFoundError)
├── UnreadableModelError (OSError)
├── InvalidModelError (ValueError)
│   ├── InvalidFormatError          the file is something else
│   └── ModelCorruptedError         the file is a model, but damaged
├── UnsupportedModelError           a sound model that cannot be run here
├── LoadCancelledError
├── BackendError (ImportError)      no usable llama.cpp library in the package's folder
├── BuildError                      a backend cannot be compiled here
├── OutOfMemoryError (MemoryError)
│   └── NoRoomError                 what a manager could unload for a model is not enough
├── ContextTooSmallError            llama.cpp could not make the context that was asked for
├── InvalidRequestError (ValueError)
│   └── ContextLimitExceededError   the prompt does not fit the context
├── TokenizationError (ValueError)
├── TemplateError (ValueError)      the chat template cannot be applied to these messages
├── SessionFileError (ValueError)   the file is no session of this model
├── GrammarError (ValueError)       a schema, regular expression or grammar that cannot be kept
├── SamplingError
├── GenerationTimeoutError (TimeoutError)
├── GenerationCancelled             somebody else cancelled the request one waits for
├── QueueFullError
│   └── QueueTimeoutError (TimeoutError)   no place within `max_queue_wait_s`
├── ModelBusyError                  who asks is what would be waited for
├── ModelNotLoadedError
├── WorkerCrashedError              with `isolation="process"`: the worker died, or hung
├── ModelQuarantinedError           it did so again and again, and is not started any more
├── ProtocolError                   what came over a socket makes no sense
├── ForkedProcessError
├── NotSupportedError (NotImplementedError)   what is asked for does not exist here yet
├── MissingPackageError (ImportError)   an optional package is not installed
├── ServerStartError (OSError)      a server cannot listen there, or must not without a key
├── HardwareError                   the machine does not tell what it is or has
├── GpuNotAvailableError            a GPU was asked for that is not there or cannot be used
├── BinaryNotFoundError (FileNotFoundError)
└── InternalError

Each message names the thing and the numbers; `hint`, where there is one, can be typed.
"""

from __future__ import annotations

from typing import Any


class TabAgentModelError(RuntimeError):
    """The base of them all. Further facts are keywords and become attributes."""

    hint: str | None

    def __init__(self, message: str = "", *, hint: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self._facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.message, self.hint, self._facts)


def _restore(
    kind: type[TabAgentModelError], message: str, hint: str | None, facts: dict[str, Any]
) -> TabAgentModelError:
    return kind(message, hint=hint, **facts)


class ModelNotFoundError(TabAgentModelError, FileNotFoundError):
    """There is no model file at that path."""


class UnreadableModelError(TabAgentModelError, OSError):
    """The operating system refused to read the model file."""


class InvalidModelError(TabAgentModelError, ValueError):
    """The file is no model that can be trusted."""


class InvalidFormatError(InvalidModelError):
    """The file is something else than a GGUF model; the message says what."""


class ModelCorruptedError(InvalidModelError):
    """The file is a GGUF model, but it contradicts itself or ends too early."""


class UnsupportedModelError(TabAgentModelError):
    """The model is sound, but this build cannot run it."""


class LoadCancelledError(TabAgentModelError):
    """The progress callback asked the load to stop."""


class BackendError(TabAgentModelError, ImportError):
    """The package's folder holds no llama.cpp library that runs on this machine."""


class BuildError(TabAgentModelError):
    """A backend cannot be compiled here: something is missing, or a compiler failed."""


class OutOfMemoryError(TabAgentModelError, MemoryError):
    """Not enough memory; `needed` and `free` are bytes.

    A refused load also says on which `device`, what was tried (`rungs`), and how many bytes
    unloading each other model would free there (`unloading`).
    """

    needed: int
    free: int
    device: str
    rungs: tuple[str, ...]
    unloading: dict[str, int]


class NoRoomError(OutOfMemoryError):
    """A manager has no room for a model, and nothing that could leave; `pinned` are their names."""

    pinned: tuple[str, ...]


class ContextTooSmallError(TabAgentModelError):
    """llama.cpp could not create a context of the size that was asked for."""


class InvalidRequestError(TabAgentModelError, ValueError):
    """A parameter is out of its range; `name` says which."""

    name: str


class ContextLimitExceededError(InvalidRequestError):
    """The prompt needs `required` tokens and the context has `max`."""

    max: int
    required: int


class TokenizationError(TabAgentModelError, ValueError):
    """The text cannot be turned into tokens."""


class TemplateError(TabAgentModelError, ValueError):
    """The chat template is broken, refuses these messages, or uses more than a template needs."""


class SessionFileError(TabAgentModelError, ValueError):
    """The file is no saved session, is damaged, or belongs to another model or kind of context."""


class GrammarError(TabAgentModelError, ValueError):
    """What the answer has to be is written wrongly, or the model has no way to keep it.

    `name` is the field; `position` is a line and a column, counted from 1, or None.
    """

    name: str
    position: tuple[int, int] | None


class SamplingError(TabAgentModelError):
    """No token could be chosen."""


class GenerationTimeoutError(TabAgentModelError, TimeoutError):
    """The request did not end within its `timeout_s`."""


class GenerationCancelled(TabAgentModelError):  # noqa: N818 - the name users of the origin know
    """The request was cancelled by somebody else than its own reader."""


class QueueFullError(TabAgentModelError):
    """As many requests as allowed are waiting already."""


class QueueTimeoutError(QueueFullError, TimeoutError):
    """The request found no place within its `max_queue_wait_s`."""


class ModelBusyError(TabAgentModelError):
    """Who asks is what would be waited for: a logits hook of its model, or whoever uses a model
    that would have to leave for what he wants."""


class ModelNotLoadedError(TabAgentModelError):
    """The model was never loaded, or has been unloaded."""


class WorkerCrashedError(TabAgentModelError):
    """The worker process of an isolated model died, or was killed because it hung."""

    signal: str | None
    """The name of the signal that killed it."""
    exit_code: int | None
    last_line: str | None
    """What it wrote last: the words of an abort, or the last line of llama.cpp's log."""
    request_ids: tuple[int, ...]
    """Of all requests that were under way."""
    was_hanging: bool = False
    """It was still there, without a sign of life or of sense, and was killed for that by us."""


class ModelQuarantinedError(TabAgentModelError):
    """This file crashes its worker process with this configuration, and is not tried again."""

    retry_after_s: float | None = None
    """When it may be tried again all the same; None: not before a probe has gone well."""


class ProtocolError(TabAgentModelError):
    """What came over a socket is not what the protocol allows."""


class ForkedProcessError(TabAgentModelError):
    """The model belongs to the parent of this forked process."""


class NotSupportedError(TabAgentModelError, NotImplementedError):
    """What is asked for makes sense, but this package does not do it yet."""


class MissingPackageError(TabAgentModelError, ImportError):
    """An optional package is not installed; the hint installs it."""


class ServerStartError(TabAgentModelError, OSError):
    """The address is taken or not this machine's, or it would let everybody in."""


class HardwareError(TabAgentModelError):
    """The machine does not tell what it is."""


class GpuNotAvailableError(TabAgentModelError):
    """`device` names a GPU that is not there, or that this installation cannot compute on."""

    device: str


class BinaryNotFoundError(TabAgentModelError, FileNotFoundError):
    """No program lies at any of the paths where it was looked for."""


class InternalError(TabAgentModelError):
    """A fault of the package or of llama.cpp, caught before it could do harm."""
