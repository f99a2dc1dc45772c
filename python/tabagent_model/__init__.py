"""Local language models in your Python process: a Rust core over llama.cpp.

```python
from tabagent_model import Model

model = Model.load()
print(model.generate("Once upon a time", max_tokens=64))
```
"""

from __future__ import annotations

from . import _native  # before everything else: it loads the native libraries
from .chat import AsyncSession, Session
from .errors import (
    BackendError,
    BinaryNotFoundError,
    ContextLimitExceededError,
    ContextTooSmallError,
    ForkedProcessError,
    GenerationCancelled,
    GenerationTimeoutError,
    HardwareError,
    InternalError,
    InvalidFormatError,
    InvalidModelError,
    InvalidRequestError,
    LoadCancelledError,
    ModelBusyError,
    ModelCorruptedError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelQuarantinedError,
    OutOfMemoryError,
    ProtocolError,
    QueueFullError,
    QueueTimeoutError,
    SamplingError,
    SessionFileError,
    TabAgentModelError,
    TemplateError,
    TokenizationError,
    UnreadableModelError,
    UnsupportedModelError,
    WorkerCrashedError,
)
from .model import AsyncModel, Model, inspect
from .params import GenerationConfig, ModelConfig
from .pin import Pin
from .results import Completion, InferenceMetrics, ModelDescription, TokenLogprob, Usage
from .stream import AsyncTextStream, TextStream

_core = _native.core
PyContext = _core.PyContext
PyModel = _core.PyModel
get_cpu_variant = _core.get_cpu_variant
get_optimal_binary = _core.get_optimal_binary
__version__ = _core.__version__

__all__ = [
    "AsyncModel",
    "AsyncSession",
    "AsyncTextStream",
    "BackendError",
    "BinaryNotFoundError",
    "Completion",
    "ContextLimitExceededError",
    "ContextTooSmallError",
    "ForkedProcessError",
    "GenerationCancelled",
    "GenerationConfig",
    "GenerationTimeoutError",
    "HardwareError",
    "InferenceMetrics",
    "InternalError",
    "InvalidFormatError",
    "InvalidModelError",
    "InvalidRequestError",
    "LoadCancelledError",
    "Model",
    "ModelBusyError",
    "ModelConfig",
    "ModelCorruptedError",
    "ModelDescription",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelQuarantinedError",
    "OutOfMemoryError",
    "Pin",
    "ProtocolError",
    "PyContext",
    "PyModel",
    "QueueFullError",
    "QueueTimeoutError",
    "SamplingError",
    "Session",
    "SessionFileError",
    "TabAgentModelError",
    "TemplateError",
    "TextStream",
    "TokenLogprob",
    "TokenizationError",
    "UnreadableModelError",
    "UnsupportedModelError",
    "Usage",
    "WorkerCrashedError",
    "__version__",
    "get_cpu_variant",
    "get_optimal_binary",
    "inspect",
]
