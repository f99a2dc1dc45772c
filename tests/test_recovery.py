"""What is done after an error, and who asks again on the CPU: with a scripted engine."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from conftest import Face
from tabagent_model import (
    AsyncModel,
    InvalidRequestError,
    Model,
    ModelConfig,
    ModelNotLoadedError,
    _base,
    errors,
    generate_with_fallback,
    strategy_for,
)
from tabagent_model.errors import (
    GpuNotAvailableError,
    InternalError,
    ModelQuarantinedError,
    OutOfMemoryError,
    QueueFullError,
    TabAgentModelError,
    WorkerCrashedError,
)
from tabagent_model.recovery import (
    FallbackToCpu,
    Fatal,
    ReinitializeGpu,
    ReloadModel,
    Retry,
    SkipAndContinue,
    is_gpu_error,
    is_resource_exhaustion,
)
from tabagent_model.results import Source
from tabagent_model.testing import ScriptedContext

ALL = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, TabAgentModelError)
]
ABORT = "/llama.cpp/ggml/src/ggml-cuda/ggml-cuda.cu:98: CUDA error"

FULL = OutOfMemoryError("`m` needs 9 GiB on CUDA0, but 6 GiB is free", device="CUDA0")
LOST = WorkerCrashedError("the worker was killed by SIGABRT", last_line=ABORT)
THROWN_FULL = InternalError("llama.cpp threw: vk::Device::allocateMemory: ErrorOutOfDeviceMemory")


def test_every_error_of_the_package_has_a_strategy():
    found = {kind.__name__: strategy_for(kind("what went wrong")) for kind in ALL}
    assert {name: strategy for name, strategy in found.items() if strategy != Fatal()} == {
        "GenerationTimeoutError": Retry(2, 500),
        "QueueTimeoutError": Retry(2, 500),
        "ProtocolError": Retry(3, 100),
        "QueueFullError": Retry(3, 100),
        "WorkerCrashedError": Retry(1, 100),
        "GpuNotAvailableError": FallbackToCpu(),
        "ModelCorruptedError": ReloadModel(),
        "ModelNotLoadedError": ReloadModel(),
        "TokenizationError": SkipAndContinue(),
        "SamplingError": SkipAndContinue(),
        "GenerationCancelled": SkipAndContinue(),
    }


@pytest.mark.parametrize(
    ("error", "strategy", "is_of_gpu", "is_exhausted"),
    [
        (FULL, FallbackToCpu(), True, True),
        (THROWN_FULL, FallbackToCpu(), True, True),
        (LOST, ReinitializeGpu(), True, False),
        (WorkerCrashedError("died", last_line="CUDA error: out of memory"), FallbackToCpu(), 1, 1),
        (
            WorkerCrashedError("died", last_line="  what():  vk::Queue::submit: ErrorDeviceLost"),
            *(ReinitializeGpu(), True, False),
        ),
        (ModelQuarantinedError(f"`m` is in quarantine: {ABORT}"), FallbackToCpu(), True, False),
        (OutOfMemoryError("no memory for a step", device="gpu"), FallbackToCpu(), True, True),
        (OutOfMemoryError("no memory for a step", device="cpu"), Fatal(), False, True),
        (InternalError("internal error: llama_decode gave -3"), Fatal(), False, False),
        (OutOfMemoryError("the CPU is full", device="cpu"), Fatal(), False, True),
        (OutOfMemoryError("the system refuses a thread"), Fatal(), False, True),
        # A line of the log that says where something lies is no error of that device.
        (WorkerCrashedError("died", last_line="CUDA0 compute buffer"), Retry(1, 100), False, False),
        (WorkerCrashedError("died", last_line=None), Retry(1, 100), False, False),
        (
            WorkerCrashedError("died", last_line="memory allocation of 39 bytes failed"),
            *(Retry(1, 100), False, True),
        ),
        (ConnectionResetError(), Retry(3, 100), False, False),
        (TimeoutError(), Retry(2, 500), False, False),
        (MemoryError(), Fatal(), False, True),
        (KeyError("whatever"), Fatal(), False, False),
        (KeyboardInterrupt(), Fatal(), False, False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_known_of_an_error_decides(
    error: BaseException, strategy: Any, is_of_gpu: bool, is_exhausted: bool
):
    assert strategy_for(error) == strategy
    assert (is_gpu_error(error), is_resource_exhaustion(error)) == (is_of_gpu, is_exhausted)


def test_each_further_try_waits_twice_as_long():
    assert Retry(3, 100).delays_ms == (100, 200, 400)
    assert Retry(2, 500).delays_ms == (500, 1000)


MakeFace = Callable[[ScriptedContext], Face]


class Cpu:
    """Where a model is loaded again: what was asked for, and what speaks there then."""

    def __init__(self) -> None:
        self.configs: list[ModelConfig] = []
        self.context = ScriptedContext(["From", " the", " CPU"])

    def open_model(self, config: ModelConfig, on_progress: Any) -> tuple[ScriptedContext, None]:
        self.configs.append(config)
        return self.context, None


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    cpu = Cpu()
    monkeypatch.setattr(_base, "open_model", cpu.open_model)
    return cpu


ON_CPU = [ModelConfig(device="cpu", gpu_layers=0)]


def on_gpu(face: Face) -> Face:
    face.model._source = Source(gpu_utilized=True)
    return face


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "GPU OOM, falling back to CPU: `m` needs 9 GiB on CUDA0"),
        (THROWN_FULL, "GPU OOM, falling back to CPU: llama.cpp threw: vk::"),
        (LOST, "GPU error, falling back to CPU: the worker was killed by SIGABRT"),
        (GpuNotAvailableError("there is no CUDA0"), "GPU error, falling back to CPU: there is no"),
    ],
    ids=["full", "full in its own words", "lost", "not there any more"],
)
async def test_what_fails_on_a_gpu_is_answered_by_the_cpu_and_told(
    face: MakeFace, cpu: Cpu, caplog: pytest.LogCaptureFixture, error: Exception, said: str
):
    model = on_gpu(face(ScriptedContext(["From", error])))
    with caplog.at_level(logging.WARNING, "tabagent_model"):
        answer = await model.call("generate_with_fallback", "Why?", max_tokens=9, temperature=0)
    assert (answer.text, cpu.configs, model.model.config) == ("From the CPU", ON_CPU, *ON_CPU)
    (warning,) = caplog.messages
    assert warning.startswith(said)
    (asked,) = cpu.context.submitted
    assert (asked.prompt, asked.params["max_tokens"]) == ("Why?", 9)


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("full"),
        ModelNotLoadedError("unloaded"),
        OutOfMemoryError("the CPU is full", device="cpu"),
        WorkerCrashedError("killed", last_line="ggml.c:12: GGML_ASSERT(a == b) failed"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_error_is_raised_as_it_is(face: MakeFace, cpu: Cpu, error: Exception):
    model = on_gpu(face(ScriptedContext([error])))
    with pytest.raises(type(error), match=str(error)):
        await model.call("generate_with_fallback", "Why?")
    assert cpu.configs == []


async def test_a_model_on_the_cpu_is_not_loaded_again(face: MakeFace, cpu: Cpu):
    model = face(ScriptedContext([FULL]))
    with pytest.raises(OutOfMemoryError, match="on CUDA0"):
        await model.call("generate_with_fallback", "Why?")
    assert cpu.configs == []


async def test_it_asks_once_more_and_no_further(face: MakeFace, cpu: Cpu):
    cpu.context = ScriptedContext([OutOfMemoryError("full again", device="CUDA0")])
    with pytest.raises(OutOfMemoryError, match="full again"):
        await on_gpu(face(ScriptedContext([FULL]))).call("generate_with_fallback", "Why?")
    assert (len(cpu.configs), len(cpu.context.submitted)) == (1, 1)


async def test_where_the_cpu_has_no_room_either_the_model_is_as_before(
    face: MakeFace, cpu: Cpu, monkeypatch: pytest.MonkeyPatch
):
    no_room = OutOfMemoryError("the CPU is full, too", device="cpu")

    def open_model(config: ModelConfig, on_progress: Any) -> Any:
        if config.device == "cpu":
            raise no_room
        return cpu.open_model(config, on_progress)

    monkeypatch.setattr(_base, "open_model", open_model)
    model = on_gpu(face(ScriptedContext([FULL])))
    with pytest.raises(OutOfMemoryError) as caught:
        await model.call("generate_with_fallback", "Why?")
    assert (caught.value, type(caught.value.__context__)) == (no_room, OutOfMemoryError)
    assert (cpu.configs, model.model.config) == ([ModelConfig()], ModelConfig())
    assert (await model.generate("Why?")).text == "From the CPU"


async def test_of_many_who_fail_together_one_loads_and_all_are_answered(face: MakeFace, cpu: Cpu):
    fail = threading.Event()

    def script(prompt: Any) -> Any:
        while not fail.is_set():
            yield "word "
        if prompt == "the unlucky one":
            yield FULL
        while True:  # these are in the middle of an answer when the model is loaded elsewhere
            yield "word "

    model = on_gpu(face(ScriptedContext(script, delay=0.001)))
    prompts = ["the unlucky one", *"abc"]  # as many as `to_thread` has threads for
    asked = [
        asyncio.create_task(model.call("generate_with_fallback", prompt, max_tokens=-1))
        for prompt in prompts
    ]
    while model.model.metrics()["running"] < len(prompts):
        await asyncio.sleep(0.001)
    fail.set()
    answers = await asyncio.gather(*asked)
    assert [answer.text for answer in answers] == ["From the CPU"] * len(prompts)
    assert cpu.configs == ON_CPU


async def test_a_stream_is_refused_as_its_pieces_cannot_be_taken_back(face: MakeFace):
    with pytest.raises((InvalidRequestError, TypeError), match="stream"):
        await face(ScriptedContext()).call("generate_with_fallback", "Why?", stream=True)


async def test_the_function_is_the_method(cpu: Cpu):
    with Model(ScriptedContext([FULL])) as model:
        on_gpu(Face(model))
        assert generate_with_fallback(model, "Why?", max_tokens=2).text == "From the"
    async with AsyncModel(ScriptedContext(["Here"])) as here:
        assert (await generate_with_fallback(here, "Why?")).text == "Here"
