"""A model in a process of its own: objects that stand where `PyModel` and `PyContext` stand.

    Courier ──▶ RemoteContext ──▶ Keeper ──▶ Child ═══ frames ═══ worker.py ──▶ PyContext
                RemoteModel   ──▶

The courier's thread sleeps in `next_events` as it does with an engine in this process; here it
hears the worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty
from typing import TYPE_CHECKING, Any, Literal, cast

from .. import _core
from .._courier import begin
from ..errors import ModelNotLoadedError, TabAgentModelError, WorkerCrashedError
from ..hardware import Machine
from ..params import ModelConfig
from ..placement._ledger import LEDGER
from .child import Child, calling
from .frames import RemoteEvent, unpack
from .memory import GLIMPSE_S
from .respawn import Keeper, runs_an_event_loop, start
from .verdicts import KILLS, Verdict

if TYPE_CHECKING:
    from .._core import PyModel, UnloadReport
    from .._courier import Context

# As GLIMPSE_S, in an event loop, where others wait as long.
LOOP_GLIMPSE_S = 0.02


def open_isolated(
    config: ModelConfig,
    tell: Callable[[float], Any],
    is_wanted: Callable[[], bool],
    probe: bool | None,
) -> tuple[Context | None, PyModel]:
    """Load a model in a worker. `probe=None`: try it first if the file was never seen before."""
    verdict = Verdict(config, _core.inspect_gguf(config.path)["shards"])
    is_ours = config.model_path is None  # it came with the package, and was tested with it
    if probe or (probe is None and not is_ours and not verdict.is_tried):
        try_out(config, is_wanted, verdict)
    verdict.check()
    try:
        child, described = start(config, tell, is_wanted)
    except WorkerCrashedError as crash:
        verdict.note_crash(crash)
        raise
    keeper = Keeper(config, verdict, child, described)
    model = cast("PyModel", RemoteModel(keeper))
    if described["context"] is not None:
        return cast("Context", RemoteContext(keeper)), model
    begin(threading.Thread(target=keeper.hear, name="tabagent-remote", daemon=True))
    return None, model


class _Remote:
    """What both stand-ins do: tell plain facts from here, and ask the worker for the rest."""

    _what: Literal["model", "context"]

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            described = self._keeper.described(self._what)
            if name in described["facts"]:
                return unpack(described["facts"][name], [])
            if name in described["methods"]:
                keeper, what = self._keeper, self._what
                return lambda *given, **named: keeper.call(what, name, given, named)
        raise AttributeError(f"the {self._what} of the worker has no `{name}`")


class RemoteModel(_Remote):
    """Stands in the place of `_core.PyModel`."""

    _what = "model"

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self._known: dict[str, Any] = {}
        self._is_unloaded = False

    def __getattr__(self, name: str) -> Any:
        """What is asked without an argument is a fact of the file, and does not change."""
        found = super().__getattr__(name)
        if not callable(found):
            return found

        def asked(*given: Any, **named: Any) -> Any:
            if given or named:
                return found(*given, **named)
            if name not in self._known:
                self._known[name] = found()
            return self._known[name]

        return asked

    def render_chat(self, *asked: Any) -> Any:
        prompt = self._keeper.call("model", "render_chat", asked)
        prompt.rendered_from = asked
        return prompt

    @property
    def is_loaded(self) -> bool:
        return not self._keeper.is_closed

    @property
    def holder(self) -> Child:
        """What stands in the ledger."""
        return self._keeper.last_child

    def rss_mb(self) -> float | None:
        """What the worker holds in memory."""
        return self._keeper.last_child.rss_mb()

    def worker(self) -> dict[str, Any]:
        """For `Model.info()`."""
        child = self._keeper.last_child
        return {
            "worker_pid": child.pid,
            "worker_rss_mb": child.rss_mb(),
            "worker_restarts": self._keeper.num_restarts,
        }

    def unload(self, timeout: float = 5.0) -> UnloadReport:
        was_loaded, self._is_unloaded = not self._is_unloaded, True
        self._keeper.close()
        before = self._keeper.rss_at_close_mb if was_loaded else 0.0
        has_ended = self._keeper.last_child.wait(timeout) is not None
        after = 0.0 if has_ended else self.rss_mb()
        freed = None if before is None or after is None else before - after
        return {
            "was_loaded": was_loaded,
            "rss_before_mb": before,
            "rss_after_mb": after,
            "freed_mb": freed,
        }

    def __del__(self) -> None:
        try:
            self._keeper.close()
        except Exception:  # at exit anything may be gone already
            return


class RemoteContext(_Remote):
    """Stands in the place of `_core.PyContext`."""

    _what = "context"

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(keeper)
        self._glimpsed: dict[str, Any] = {"metrics": {}, "slots": []}

    @property
    def is_closed(self) -> bool:
        return self._keeper.is_closed

    def submit(
        self,
        request_id: int,
        prompt: Any,
        params: Mapping[str, Any],
        chat: Any = None,
        patience: int = 50,
    ) -> None:
        self._keeper.submit(request_id, prompt, params, chat, patience)

    def post(
        self,
        request_id: int,
        prompt: Any,
        params: Mapping[str, Any],
        reply: Callable[[Exception | None], object],
    ) -> bool:
        return self._keeper.post(request_id, prompt, params, reply)

    def abort(self, request_id: int) -> None:
        self._keeper.abort(request_id)

    def next_events(self) -> list[RemoteEvent]:
        return self._keeper.next_events()

    def tell_through(self, wire: _core.Wire) -> None:
        """Nothing: the worker does so."""

    def check_thread(self) -> None:
        """Every thread may wait: no logits hook runs here."""

    def close(self) -> None:
        self._keeper.close()

    def unpin(self, request_id: int) -> None:
        self._keeper.unpin(request_id)

    def metrics(self) -> dict[str, Any]:
        """The last ones, where the worker does not answer."""
        counted: dict[str, Any] = self._glimpse("metrics")
        return {**counted, "worker_restarts": self._keeper.num_restarts}

    def slots(self) -> list[dict[str, int | None]]:
        slots: list[dict[str, int | None]] = self._glimpse("slots")
        return slots

    def _glimpse(self, method: str) -> Any:
        """An answer that is late is the last one for the next look."""

        def keep(value: Any) -> None:
            self._glimpsed[method] = value

        within = LOOP_GLIMPSE_S if runs_an_event_loop() else GLIMPSE_S
        try:
            self._keeper.call("context", method, within=within, keep=keep)
        except (Empty, WorkerCrashedError):
            if method == "metrics" and not self._keeper.is_up:
                idle = {"running": 0, "waiting": self._keeper.num_held(), "held_tokens": 0}
                return {**self._glimpsed[method], **idle}
        return self._glimpsed[method]


def probe(config: ModelConfig, is_wanted: Callable[[], bool]) -> None:
    """Of a file that is to be loaded into this process afterwards."""
    try_out(config, is_wanted, Verdict(config, _core.inspect_gguf(config.path)["shards"]))


def scout() -> Machine:
    """This machine, as a worker sees it that is started for this alone."""
    child = Child(ModelConfig())
    try:
        question, _ = calling("memory", "machine", [], {})
        return LEDGER.without_reserved(Machine.from_dict(child.settle(question)))
    finally:
        child.end(ModelNotLoadedError("that was all"))


def try_out(config: ModelConfig, is_wanted: Callable[[], bool], verdict: Verdict) -> None:
    """Use a model in a worker that is thrown away, so that what kills it does no harm."""
    child = Child(config)
    try:
        described = child.load(lambda fraction: None, is_wanted)
        ids = [0]
        for text in _CORPUS:
            question, _ = calling("model", "tokenize", [text, True, True], {})
            with suppress(TabAgentModelError):  # refusing a text is no crash
                ids += child.settle(question, is_wanted)
        if (context := described["context"]) is not None:
            facts = context["facts"]
            num = min(512, int(facts["n_batch"]), int(facts["n_ctx"]) - 2)
            prompt = (ids * num)[:num]
            params = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True}
            question = {"action": "submit", "request": 1, "prompt": prompt, "params": params}
            child.settle(question, is_wanted, under_way=[1])
    except WorkerCrashedError as crash:
        if crash.signal not in KILLS:
            verdict.quarantine(crash)
        raise
    finally:
        child.end(ModelNotLoadedError("the probe is over"))
    verdict.passed()


# What tokenizers have stumbled over: scripts, characters outside the basic plane, marks, control
# words, long runs of one character, and blanks.
_CORPUS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? 3.14159 <html>&amp;</html>\n",
    "def f(x):\n\treturn {**x, 'a': [1, 2, 3]}  # 你好, мир, שלום, हिन्दी, 日本語テキスト\r\n",
    "👩‍👩‍👧‍👦 e\u0301\u0301\u0301 \u200b\ufeff\u2028 ÅÄÖ ﷺ \U0001d573\U0001d58a",
    "<|im_start|>system <s></s> [INST] <|endoftext|> <unk> <0x0A>",
    "a" * 2000,
    "-" * 2000 + " " * 2000 + "\n" * 200,
)
