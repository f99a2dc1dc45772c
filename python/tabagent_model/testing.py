"""An engine that speaks the lines it was given: for tests without a model.

    model = Model(ScriptedContext(["Be", "cause", "!"]))
    assert model.generate("Why?").text == "Because!"

Every piece is a token. A step gives one piece to each request that runs, and takes `delay`
seconds; requests beyond `n_seq_max` wait for their turn, as in the real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from re import DOTALL, findall, sub
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import (
    ContextLimitExceededError,
    GenerationTimeoutError,
    InvalidRequestError,
    ModelNotLoadedError,
    QueueFullError,
    TabAgentModelError,
)
from .params import GenerationConfig
from .results import Logprobs

if TYPE_CHECKING:
    from ._core import Wire
    from ._courier import ChatParser, Reading

Prompt = str | Sequence[int]
Lines = Iterable[str | TabAgentModelError]
Script = Lines | Mapping[str, Lines] | Callable[[Any], Lines]


@dataclass(frozen=True)
class ScriptedEvent:
    """News of one request, like `_core.Event`."""

    request_id: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    is_last: bool = False
    finish_reason: Literal["stop", "length", "cancelled", "error"] | None = None
    stop: str | None = None
    error: Exception | None = None
    stats: dict[str, float] | None = None
    logprobs: Logprobs = ()
    read: Reading | None = None


class Submitted(NamedTuple):
    """A request as it came in."""

    request_id: int
    prompt: Prompt
    params: Mapping[str, Any]


@dataclass(frozen=True)
class ScriptedPrompt:
    """A conversation written out, like `_core.ChatPrompt`."""

    text: str
    context: ScriptedContext
    stops: Sequence[str] = ()
    preserved_tokens: Sequence[int] = ()
    constraint: dict[str, Any] | None = None
    thinking: tuple[str, str] | None = None
    is_thinking: bool = False
    is_plain: bool = False

    def tokens(self, after: str | None = None, limit: int | None = None) -> list[int] | None:
        if not self.text.startswith(after or ""):
            return None
        return self.context.tokenize(self.text[len(after or "") :], add_bos=after is None)

    def parser(self, patience: int = 50) -> ScriptedParser:
        return ScriptedParser()


class ScriptedParser:
    """Reads `<think>…</think>` and `<tool_call>{"name": …, "arguments": …}</tool_call>`, like
    `_core.ChatParser`; everything else is content, told as it comes until there is a `<`."""

    def __init__(self) -> None:
        self._text = ""
        self._told = 0

    def feed(self, text: str) -> list[tuple[Any, ...]]:
        self._text += text
        plain = self._text.partition("<")[0]
        piece, self._told = plain[self._told :], len(plain)
        return [("content", piece)] if piece else []

    def finish(self, is_complete: bool = True) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
        import json

        text, calls, error = self._text, [], None
        try:
            for index, found in enumerate(findall("<tool_call>(.*?)</tool_call>", text, DOTALL)):
                call = json.loads(found)
                arguments = json.dumps(call["arguments"])
                calls.append({"id": f"call_{index}", "name": call["name"], "arguments": arguments})
            content = sub("<(tool_call|think)>.*?</\\1>", "", text, flags=DOTALL)
        except (ValueError, LookupError, TypeError) as wrong:
            content, calls, error = text, [], f"a tool call cannot be read: {wrong!r}"
        reasoning = "" if error else "".join(findall("<think>(.*?)</think>", text, DOTALL))
        deltas: list[tuple[Any, ...]] = [("reasoning", reasoning)] if reasoning else []
        deltas += [("content", content[self._told :])] if content[self._told :] else []
        for index, call in enumerate(calls):
            deltas.append(("tool_call", index, call["id"], call["name"], call["arguments"]))
        return deltas, {
            "content": content,
            "reasoning": reasoning,
            "tool_calls": calls,
            "error": error,
        }


class ScriptedContext:
    """Stands in the place of `_core.PyContext`.

    `script` is what every request is answered with, or a mapping from prompts to that, or a
    function of the prompt. An error among the pieces ends the request with that error.
    """

    def __init__(
        self,
        script: Script = ("Hello", "!"),
        *,
        delay: float = 0.0,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_seq_max: int = 8,
        n_threads: int = 1,
        queue_size: int = 1024,
    ) -> None:
        self.submitted: list[Submitted] = []
        self.aborted: list[int] = []
        self.unpinned: list[int] = []
        self.n_ctx = n_ctx
        self.n_batch = n_batch
        self.n_seq_max = n_seq_max
        self.n_threads = n_threads
        self.flash_attn, self.kv_type = "on", "f16"
        self._script = script
        self._delay = delay
        self._queue_size = queue_size
        self._vocabulary: dict[str, int] = {"": 0}
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._events: list[ScriptedEvent] = []
        self._counted = dict.fromkeys(_COUNTERS, 0)
        self._is_closed = self._is_paused = False
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None

    def submit(
        self,
        request_id: int,
        prompt: Prompt,
        params: Mapping[str, Any],
        chat: Any = None,
        patience: int = 50,
    ) -> None:
        is_pin = params.get("pin", False)
        config = GenerationConfig.from_dict({k: v for k, v in params.items() if k not in _CORES})
        if is_pin:
            config = config.with_max_tokens(0)
        tokens = self.tokenize(prompt, config.add_bos) if isinstance(prompt, str) else [*prompt]
        parser = None if chat is None else chat.parser(patience)
        sequence = _Sequence(request_id, iter(self._lines(prompt)), config, len(tokens), parser)
        with self._changed:
            if self._is_closed:
                raise ModelNotLoadedError("the scripted model is closed")
            if not tokens:
                raise InvalidRequestError("`prompt` must hold at least one token", name="prompt")
            if len(tokens) >= self.n_ctx:
                required, message = len(tokens) + 1, "the prompt does not fit the context"
                raise ContextLimitExceededError(message, max=self.n_ctx, required=required)
            if len(self._waiting) >= self._queue_size:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
            self.submitted.append(Submitted(request_id, prompt, params))
            self._counted["requests"] += 1
            self._waiting.append(sequence)
            if self._owner is None:
                self._owner = threading.Thread(target=self._run, name="scripted", daemon=True)
                self._owner.start()
            self._changed.notify_all()

    def abort(self, request_id: int) -> None:
        with self._changed:
            self.aborted.append(request_id)
            for sequence in self._waiting + self._running:
                if sequence.request_id == request_id:
                    sequence.is_aborted = True
            self._changed.notify_all()

    def next_events(self) -> list[ScriptedEvent]:
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._is_closed)
            events, self._events = self._events, []
            return events

    def tell_through(self, wire: Wire) -> None:
        """Nothing: a script is in no hurry, and all its events come from `next_events`."""

    def check_thread(self) -> None:
        """Every thread may wait: a script has no logits hooks."""

    def close(self) -> None:
        with self._changed:
            unloaded = ModelNotLoadedError("the model was unloaded", hint="load it again")
            for sequence in self._waiting + self._running:
                self._events.append(sequence.last("error", error=copy(unloaded)))
            self._waiting, self._running = [], []
            self._is_closed = True
            self._changed.notify_all()

    def pulse(self) -> tuple[int, bool]:
        with self._changed:
            return self._counted["steps"], bool(self._waiting or self._running)

    def pause(self) -> None:
        """No further step until `resume`; what runs stays where it is, and can be aborted."""
        with self._changed:
            self._is_paused = True

    def resume(self) -> None:
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        """A word with the blanks behind it is a token; ids are given as words are first seen."""
        ids = [self._token(word) for word in findall(r"\s+|\S+\s*", text)]
        return [0, *ids] if add_bos else ids

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        return "".join(map(self.token_to_text, tokens))

    def render_chat(
        self,
        messages: str,
        add_generation_prompt: bool = True,
        template: str | None = None,
        options_json: str | None = None,
    ) -> ScriptedPrompt:
        """A line for each message; `template`, if given, with `{role}` and `{content}`."""
        import json

        line = template or "{role}: {content}\n"
        said = [
            {**message, "content": message["content"] or ""} for message in json.loads(messages)
        ]
        text = "".join(line.format(**message) for message in said)
        return ScriptedPrompt(text + "assistant: " * add_generation_prompt, self)

    def token_to_text(self, token: int) -> str:
        for word, known in self._vocabulary.items():
            if known == token:
                return word
        raise InvalidRequestError(f"there is no token {token}", name="tokens")

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 512,
        *,
        callback: Callable[[str], bool | None] | None = None,
        **sampling: Any,
    ) -> str:
        """Without a courier and without waiting for a turn."""
        config = GenerationConfig(max_tokens=max_tokens, **sampling)
        sequence = _Sequence(0, iter(self._lines(prompt)), config, len(prompt))
        text = ""
        while True:
            event = sequence.next_event(self._token, self.n_ctx)
            text += event.text
            if event.error is not None:
                raise event.error
            if event.is_last or (callback is not None and callback(event.text) is False):
                return text

    def memory(self) -> list[dict[str, Any]]:
        return []

    def slots(self) -> list[dict[str, int | None]]:
        with self._changed:
            places: list[_Sequence | None] = [*self._running]
            places += [None] * (self.n_seq_max - len(places))
            return [
                {
                    "request_id": sequence.request_id if sequence else None,
                    "held_tokens": sequence.prompt_tokens + sequence.generated if sequence else 0,
                    "prompt_tokens": sequence.prompt_tokens if sequence else 0,
                    "cached_tokens": 0,
                    "generated_tokens": sequence.generated if sequence else 0,
                }
                for sequence in places
            ]

    def unpin(self, request_id: int) -> None:
        self.unpinned.append(request_id)

    def export_state(self, tokens: Sequence[int]) -> bytes | None:
        """There is nothing to export: a script computes nothing."""
        return None

    def import_state(self, data: bytes, tokens: Sequence[int]) -> int:
        return 0

    def metrics(self) -> dict[str, Any]:
        with self._changed:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                **self._counted,
            }

    def _lines(self, prompt: Prompt) -> Lines:
        if callable(self._script):
            return self._script(prompt)
        if isinstance(self._script, Mapping):
            return self._script[prompt if isinstance(prompt, str) else self.detokenize(prompt)]
        return self._script

    def _token(self, word: str) -> int:
        return self._vocabulary.setdefault(word, len(self._vocabulary))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._can_step)
                if self._is_closed:
                    return
                self._step()
                self._changed.notify_all()
            if self._delay:
                time.sleep(self._delay)

    def _can_step(self) -> bool:
        sequences = self._waiting + self._running
        if self._is_paused:
            return self._is_closed or any(sequence.is_aborted for sequence in sequences)
        return self._is_closed or bool(sequences)

    def _step(self) -> None:
        for queue in (self._waiting, self._running):
            for sequence in [sequence for sequence in queue if sequence.is_aborted]:
                self._events.append(sequence.last("cancelled"))
                queue.remove(sequence)
        if self._is_paused:
            return
        while self._waiting and len(self._running) < self.n_seq_max:
            sequence = self._waiting.pop(0)
            self._counted["prompt_tokens"] += sequence.prompt_tokens
            self._running.append(sequence)
        for sequence in [*self._running]:
            event = sequence.next_event(self._token, self.n_ctx)
            self._counted["generated_tokens"] += len(event.tokens)
            self._events.append(event)
            if event.is_last:
                self._running.remove(sequence)
        self._counted["steps"] += 1


# Keys of a request that are no fields of a config.
_CORES = ("pin", "constraint", "preserved_tokens")
_COUNTERS = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "steps")


@dataclass
class _Sequence:
    """One request on its way through the script."""

    request_id: int
    lines: Iterator[str | TabAgentModelError]
    config: GenerationConfig
    prompt_tokens: int
    parser: ChatParser | None = None
    is_aborted: bool = False
    generated: int = 0
    begun: float = field(default_factory=time.perf_counter)
    first_token_ms: float = 0.0

    def next_event(self, token_of: Callable[[str], int], n_ctx: int) -> ScriptedEvent:
        limit = n_ctx - self.prompt_tokens
        if self.config.max_tokens >= 0:
            limit = min(limit, self.config.max_tokens)
        if self.generated >= limit:
            return self.last("length")
        timeout_s = self.config.timeout_s
        if timeout_s is not None and self._elapsed_ms() >= timeout_s * 1000:
            return self.last("error", error=GenerationTimeoutError(f"no end within {timeout_s} s"))
        try:
            line = next(self.lines, None)
        except Exception as error:  # the script itself failed
            return self.last("error", error=error)
        if line is None:
            return self.last("stop")
        if isinstance(line, Exception):
            return self.last("error", error=line)
        self.generated += 1
        self.first_token_ms = self.first_token_ms or self._elapsed_ms()
        tokens = [token_of(line)]
        certain = (tokens[0], line, 0.0)
        logprobs: Logprobs = ()
        if self.config.logprobs is not None:
            logprobs = [(certain, [certain] if self.config.logprobs else [])]
        if self.generated == limit:
            return self.last("length", text=line, tokens=tokens, logprobs=logprobs)
        read = None if self.parser is None else (self.parser.feed(line), None)
        return ScriptedEvent(self.request_id, line, tokens, logprobs=logprobs, read=read)

    def last(
        self,
        reason: Literal["stop", "length", "cancelled", "error"],
        *,
        text: str = "",
        tokens: Sequence[int] = (),
        logprobs: Logprobs = (),
        error: Exception | None = None,
    ) -> ScriptedEvent:
        total_ms = self._elapsed_ms()
        stats = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": 0,
            "dropped_tokens": 0,
            "generated_tokens": self.generated,
            "seed": max(self.config.seed, 0),
            "n_ctx": 0,
            "queue_ms": 0.0,
            "prompt_ms": 0.0,
            "first_token_ms": self.first_token_ms,
            "decode_ms": total_ms - self.first_token_ms,
            "total_ms": total_ms,
            "gap_p50_ms": 0.0,
            "gap_p99_ms": 0.0,
        }
        read: Reading | None = None
        if self.parser is not None:
            deltas = self.parser.feed(text)
            rest, message = self.parser.finish(reason == "stop")
            read = [*deltas, *rest], message
        return ScriptedEvent(
            self.request_id,
            text,
            [*tokens],
            True,
            reason,
            error=error,
            stats=stats,
            logprobs=logprobs,
            read=read,
        )

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self.begun) * 1000
