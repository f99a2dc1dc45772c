"""Local language models in your Python process: a Rust core over llama.cpp.

```python
from tabagent_model import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _native  # before everything else: it loads the native libraries
from .chat import AsyncSession, Session
from .errors import (
    BackendError,
    BinaryNotFoundError,
    BuildError,
    ContextLimitExceededError,
    ContextTooSmallError,
    ForkedProcessError,
    GenerationCancelled,
    GenerationTimeoutError,
    GpuNotAvailableError,
    GrammarError,
    HardwareError,
    InternalError,
    InvalidFormatError,
    InvalidModelError,
    InvalidRequestError,
    LoadCancelledError,
    MissingPackageError,
    ModelBusyError,
    ModelCorruptedError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelQuarantinedError,
    NoRoomError,
    NotSupportedError,
    OutOfMemoryError,
    ProtocolError,
    QueueFullError,
    QueueTimeoutError,
    SamplingError,
    ServerStartError,
    SessionFileError,
    TabAgentModelError,
    TemplateError,
    TokenizationError,
    UnreadableModelError,
    UnsupportedModelError,
    WorkerCrashedError,
)
from .manager import AsyncModelManager, ModelManager
from .manager._keeper import ManagedModel, ModelEvent, ModelUsage
from .model import AsyncModel, Model, inspect
from .params import GenerationConfig, ModelConfig
from .pin import Pin
from .results import (
    ChatCompletion,
    ChatDelta,
    Completion,
    InferenceMetrics,
    ModelDescription,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from .stream import AsyncChatStream, AsyncTextStream, ChatStream, TextStream

if TYPE_CHECKING:
    from . import advice, hardware, placement, recovery
    from .advice import recommend
    from .hardware import GpuContext, Machine
    from .placement import estimate
    from .placement._ledger import memory
    from .recovery import generate_with_fallback, strategy_for
    from .schema import Schema
    from .tool_loop import ToolEvent, ToolResult, ToolRun
    from .tools import Tool

_core = _native.core
PyContext = _core.PyContext
PyModel = _core.PyModel
get_cpu_variant = _core.get_cpu_variant
get_optimal_binary = _core.get_optimal_binary
__version__ = _core.__version__

# Loaded when they are first asked for: most programs need few of them.
_LATER = {
    "GpuContext": "hardware",
    "Machine": "hardware",
    "Schema": "schema",
    "Tool": "tools",
    "ToolEvent": "tool_loop",
    "ToolResult": "tool_loop",
    "ToolRun": "tool_loop",
    "advice": "advice",
    "estimate": "placement",
    "generate_with_fallback": "recovery",
    "hardware": "hardware",
    "memory": "placement._ledger",
    "placement": "placement",
    "recommend": "advice",
    "recovery": "recovery",
    "strategy_for": "recovery",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f".{_LATER[name]}", __name__)
    return module if name == _LATER[name] else getattr(module, name)


__all__ = [
    "AsyncChatStream",
    "AsyncModel",
    "AsyncModelManager",
    "AsyncSession",
    "AsyncTextStream",
    "BackendError",
    "BinaryNotFoundError",
    "BuildError",
    "ChatCompletion",
    "ChatDelta",
    "ChatStream",
    "Completion",
    "ContextLimitExceededError",
    "ContextTooSmallError",
    "ForkedProcessError",
    "GenerationCancelled",
    "GenerationConfig",
    "GenerationTimeoutError",
    "GpuContext",
    "GpuNotAvailableError",
    "GrammarError",
    "HardwareError",
    "InferenceMetrics",
    "InternalError",
    "InvalidFormatError",
    "InvalidModelError",
    "InvalidRequestError",
    "LoadCancelledError",
    "Machine",
    "ManagedModel",
    "MissingPackageError",
    "Model",
    "ModelBusyError",
    "ModelConfig",
    "ModelCorruptedError",
    "ModelDescription",
    "ModelEvent",
    "ModelManager",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelQuarantinedError",
    "ModelUsage",
    "NoRoomError",
    "NotSupportedError",
    "OutOfMemoryError",
    "Pin",
    "ProtocolError",
    "PyContext",
    "PyModel",
    "QueueFullError",
    "QueueTimeoutError",
    "SamplingError",
    "Schema",
    "ServerStartError",
    "Session",
    "SessionFileError",
    "TabAgentModelError",
    "TemplateError",
    "TextStream",
    "TokenLogprob",
    "TokenizationError",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolEvent",
    "ToolResult",
    "ToolRun",
    "UnreadableModelError",
    "UnsupportedModelError",
    "Usage",
    "WorkerCrashedError",
    "__version__",
    "advice",
    "estimate",
    "generate_with_fallback",
    "get_cpu_variant",
    "get_optimal_binary",
    "hardware",
    "inspect",
    "memory",
    "placement",
    "recommend",
    "recovery",
    "strategy_for",
]
