"""A conversation: what was said, and the exact tokens that were computed for it.

Written out anew for each turn and tokenized anew, an answer may become other tokens than the model
chose, and from there on everything would be computed again. So a session keeps the tokens:

    [ prompt of the last turn | tokens of its answer | what the template writes after it ]
      computed                  computed               the new prompt's only new tokens

which holds as long as the template writes out the beginning of the conversation as it did before.
Where it does not (some leave the reasoning of earlier answers out), everything is tokenized again.
"""

from __future__ import annotations

import copy
import os
import threading
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from ._courier import LONG_TEXT, ChatPrompt, Request, request_ids
from ._options import ChatOptions
from ._prompt import Message, checked_messages, sound_text, token_ids
from .errors import InvalidRequestError, SessionFileError
from .params import GenerationConfig, GenerationFields
from .results import ChatCompletion, Completion
from .stream import AsyncTextStream, TextStream, settle

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._base import Base
    from ._session_file import SessionFile


class _Session:
    """Everything that needs no waiting."""

    def __init__(self, model: Base, system: str | None, fields: GenerationFields) -> None:
        self._model = model
        self._system = None if system is None else sound_text(system)
        self._config = GenerationConfig().with_fields(**fields)
        self._messages: list[dict[str, str]] = []
        self._first = 0
        """The first message that is still in the prompt; the system's is always."""
        self._dropped_tokens = 0
        self._known = _Known()
        self._spoken_by = model._native
        """Tokens mean something to one model only, and `reload` may bring another."""
        self._turn: _Turn | None = None
        self._lock = threading.RLock()  # a stream that is collected meanwhile ends its turn
        model._sessions.add(self)

    @property
    def system(self) -> str | None:
        """The message that stands before the conversation."""
        return self._system

    @property
    def history(self) -> list[dict[str, str]]:
        """What was said, as messages; an answer that did not end by itself says why."""
        with self._lock:
            return copy.deepcopy(self._messages)

    def fork(self) -> Self:
        """An independent copy. What was computed so far is shared, not computed again."""
        with self._lock:
            twin = copy.copy(self)
            twin._messages = copy.deepcopy(self._messages)
        twin._turn, twin._lock = None, threading.RLock()
        self._model._sessions.add(twin)
        return twin

    def undo(self) -> str:
        """Forget the last turn, and give what was asked in it."""
        with self._lock:
            self._check_idle()
            if not self._messages:
                raise InvalidRequestError("nothing was said yet", name="undo")
            *self._messages, asked, _ = self._messages
            self._first = min(self._first, len(self._messages))
            self._known = _Known()
            return asked["content"]

    def __len__(self) -> int:
        return len(self._messages)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self._messages)} messages with {self._model!r}>"

    def _request(self, text: str, fields: GenerationFields) -> Request:
        config = self._config.with_fields(**fields)
        turn = _Turn(self, sound_text(text), config)
        return Request(next(request_ids), turn.tokens, turn.params, turn.end)

    def _check_idle(self) -> None:
        if self._turn is not None:
            message = "this session is still answering, and takes one message after the other"
            raise InvalidRequestError(message, hint="wait, or use a `fork()`", name="session")

    def _save(self, path: str | os.PathLike[str]) -> None:
        from ._session_file import SessionFile, engine_of, identity_of

        with self._lock:
            self._check_idle()
            facts = {
                "model": identity_of(self._model),
                "name": self._model._source.model,
                "engine": engine_of(self._model),
                "system": self._system,
                "config": {k: v for k, v in self._config.to_dict().items() if not callable(v)},
                "messages": self._messages,
                "first": self._first,
                "dropped_tokens": self._dropped_tokens,
                "known": vars(self._known),
            }
            tokens = self._known.tokens
        state = self._model._open_context.export_state(tokens) if tokens else None
        SessionFile(facts, state).write(path)

    @classmethod
    def _load(cls, model: Base, path: str | os.PathLike[str], recompute: bool) -> Self:
        from ._session_file import SessionFile, identity_of, other_settings

        file = SessionFile.read(path)
        facts = file.facts
        if facts["model"] != identity_of(model):
            there, here = facts["name"] or "scripted", model._source.model or "scripted"
            message = f"`{os.fsdecode(path)}` is a session of another model"
            raise SessionFileError(f"{message} (`{there}`) than this one (`{here}`)")
        if not recompute and (differ := other_settings(facts["engine"], model)):
            message = f"`{os.fsdecode(path)}` was saved in another kind of context: {differ}"
            hint = "open the model as it was then, or let `recompute=True` compute it again"
            raise SessionFileError(message, hint=hint)
        try:
            config = cast("GenerationFields", facts["config"])
            session = cls(model, facts["system"], config)
            if facts["messages"]:
                checked_messages(facts["messages"])
            session._messages = facts["messages"]  # with why an answer ended, which is no message's
            session._first = min(facts["first"], len(session._messages))
            session._dropped_tokens = int(facts["dropped_tokens"])
            prompt, answer, tokens = (facts["known"][name] for name in vars(session._known))
            session._known = _Known(sound_text(prompt), sound_text(answer), token_ids(tokens))
        except (InvalidRequestError, LookupError, TypeError) as error:
            message = f"`{os.fsdecode(path)}` was written by another version of this package"
            raise SessionFileError(f"{message}: {error!r}") from None
        session._restore(file)
        return session

    def _restore(self, file: SessionFile) -> None:
        """Give the engine its state back; without it, everything is computed again."""
        from ._session_file import engine_of

        held, why = 0, "the file holds no state"
        context = self._model._open_context
        if file.state is not None and file.facts["engine"] != engine_of(self._model):
            why = "it was saved with another llama.cpp or other settings"
        elif file.state is not None:
            try:
                held = context.import_state(file.state, self._known.tokens)
            except InvalidRequestError as error:
                why = str(error)
        if held == 0 and self._known.tokens:
            import logging

            log = logging.getLogger("tabagent_model")
            log.info("a session's state is computed again: %s", why)


class Session(_Session):
    """A conversation with a model. Made by `Model.session`.

    Any thread may use it, one at a time.
    """

    def send(self, text: str, **fields: Unpack[GenerationFields]) -> Completion:
        """Say something, and get the answer. Both become part of the history."""
        return self._stream(text, fields).collect()

    def stream(self, text: str, **fields: Unpack[GenerationFields]) -> TextStream:
        """The answer piece by piece. It becomes part of the history when it ends; if it is left
        early, with what was said so far."""
        return self._stream(text, fields).submit()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation down, with what was computed for it, for `load_session`."""
        self._save(path)

    def _stream(self, text: str, fields: GenerationFields) -> TextStream:
        model, request = self._model, self._request(text, fields)
        return TextStream(model._open_courier, request, model._source, model)


class AsyncSession(_Session):
    """A conversation with a model. Made by `AsyncModel.session`.

    Cancelling the task that waits for an answer leaves what was said so far in the history.
    """

    async def send(self, text: str, **fields: Unpack[GenerationFields]) -> Completion:
        """As `Session.send`."""
        return await self.stream(text, **fields).collect()

    def stream(self, text: str, **fields: Unpack[GenerationFields]) -> AsyncTextStream:
        """As `Session.stream`; nothing to await here. The turn begins with the first `await`."""
        model, request = self._model, self._request(text, fields)
        return AsyncTextStream(model._open_courier, request, model._source, model)

    async def save(self, path: str | os.PathLike[str]) -> None:
        """As `Session.save`."""
        import asyncio

        await settle(asyncio.get_running_loop().run_in_executor(None, self._save, path))


@dataclass(frozen=True)
class _Known:
    """The text of the last turn and the tokens that stand for it: prompt and answer."""

    prompt: str = ""
    answer: str = ""
    tokens: list[int] = field(default_factory=list)

    def continued(self, prompt: ChatPrompt, limit: int | None) -> list[int]:
        """The tokens of a new prompt: the known ones and what comes after them, if they fit."""
        if self.tokens:
            # Templates may trim an answer; its tokens stay as they are.
            said = self.answer
            for answer in dict.fromkeys((said, said.rstrip(), said.lstrip(), said.strip())):
                new = prompt.tokens(self.prompt + answer, limit)
                if new is not None:
                    return self.tokens + new
        return prompt.tokens(limit=limit) or []


class Asked:
    """Messages on their way to the engine; the oldest turns stay behind if that was asked for."""

    def __init__(
        self, model: Base, messages: list[Message], options: ChatOptions, params: dict[str, Any]
    ) -> None:
        self.params = params
        self.first = self.dropped_tokens = 0
        """How many messages are left out, and how many tokens that makes."""
        self.text = ""
        self._model, self._options = model, options
        self._prompt: ChatPrompt | None = None
        roles = [message["role"] for message in messages]
        num_system = next((i for i, r in enumerate(roles) if r not in _SYSTEM), len(roles))
        self._system, self._messages = messages[:num_system], messages[num_system:]
        self._drops = params["overflow"] == "drop_oldest"
        if self._drops:
            params["overflow"] = "error"  # that is what the engine makes of what still is too long

    def tokens(self) -> list[int]:
        """The prompt. What one message alone cannot fit is refused before it takes time."""
        n_ctx, most = self._model.n_ctx, self.params["max_tokens"]
        if self._drops and any(len(m["content"] or "") > LONG_TEXT for m in self._messages[-1:]):
            self._model._render(self._messages[-1:], self._options).tokens(limit=n_ctx)
        prompt, tokens = self._rendered(self.first)
        room = n_ctx - (n_ctx // 4 if most < 0 else min(most, n_ctx // 2))
        if self._drops and len(tokens) > room:
            needed = len(tokens)
            prompt, tokens = self._rendered(self._first_that_fits(room))
            self.dropped_tokens += needed - len(tokens)
        self.text, self._prompt = prompt.text, prompt
        self.params["stop"] = (*self.params["stop"], *prompt.stops)
        return tokens

    def prompt(self) -> ChatPrompt:
        assert self._prompt is not None
        return self._prompt

    def end(self, completion: Completion | None) -> Completion | None:
        """The answer, with what it had to do without."""
        if completion is None or not self.first:
            return completion
        dropped = completion.usage.dropped_tokens + self.dropped_tokens
        usage = replace(completion.usage, dropped_tokens=dropped, dropped_messages=self.first)
        return replace(completion, usage=usage)

    def _first_that_fits(self, room: int) -> int:
        """Turns begin with the user; the last one stays."""
        roles = enumerate(message["role"] for message in self._messages)
        starts = [index for index, role in roles if index > self.first and role == "user"]

        def fits(first: int) -> bool:
            return len(self._rendered(first)[1]) <= room

        if starts:
            self.first = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
        return self.first

    def _rendered(self, first: int) -> tuple[ChatPrompt, list[int]]:
        messages = [*self._system, *self._messages[first:]]
        prompt = self._model._render(messages, self._options)
        return prompt, self._read(prompt, None if self._drops else self._model.n_ctx)

    def _read(self, prompt: ChatPrompt, limit: int | None) -> list[int]:
        return prompt.tokens(limit=limit) or []


class Chat(Asked):
    """Messages whose answer is read: content, reasoning, tool calls, the object of a schema."""

    def tokens(self) -> list[int]:
        tokens = super().tokens()
        assert self._prompt is not None
        wanted = self._constraint(self._prompt)
        self.params["preserved_tokens"] = list(self._prompt.preserved_tokens)
        if wanted is not None:
            self.params["constraint"] = wanted
        return tokens

    def end(self, completion: Completion | None) -> Completion | None:
        schema = self._options.schema
        if schema is None or not isinstance(completion, ChatCompletion):
            return super().end(completion)
        is_cut_short = completion.finish_reason in ("length", "cancelled")
        parsed, error = schema.outcome(completion.content, is_cut_short)
        return super().end(replace(completion, parsed=parsed, parse_error=error))

    def _constraint(self, prompt: ChatPrompt) -> dict[str, Any] | None:
        """What the engine keeps to: the form of tool calls, or a schema behind the thoughts."""
        schema = self._options.schema
        if schema is None:
            return prompt.constraint
        if prompt.thinking is not None and prompt.is_thinking:
            return {**schema.constraint, "after": prompt.thinking[1]}
        if prompt.thinking is not None and self._options.enable_thinking:
            return schema.behind(prompt.thinking)
        return schema.constraint


_SYSTEM = ("system", "developer")


class _Turn(Asked):
    """One message and its answer, on their way into a session."""

    def __init__(self, session: _Session, text: str, config: GenerationConfig) -> None:
        params = {name: value for name, value in vars(config).items() if value is not None}
        self._session = session
        self._message = {"role": "user", "content": text}
        self._tokens: list[int] = []
        super().__init__(session._model, [self._message], ChatOptions(), params)

    def tokens(self) -> list[int]:
        """From here on the session takes no other message."""
        session, native = self._session, self._model._native
        with session._lock:
            session._check_idle()
            session._turn = self
        if session._spoken_by is not native:
            session._known, session._spoken_by = _Known(), native
        if session._system is not None:
            self._system = [{"role": "system", "content": session._system}]
        said = [{"role": m["role"], "content": m["content"]} for m in session._messages]
        self._messages = [*said, self._message]
        self.first, self.dropped_tokens = session._first, session._dropped_tokens
        self._tokens = super().tokens()
        return self._tokens

    def end(self, completion: Completion | None) -> Completion | None:
        """Add the message and its answer to the session; nothing at all if there is no answer."""
        session = self._session
        with session._lock:
            if session._turn is not self:
                return completion
            session._turn = None
            if completion is None:
                return None
            answer = {"role": "assistant", "content": completion.text}
            if completion.finish_reason != "stop":
                answer["finish_reason"] = completion.finish_reason
            session._messages += [self._message, answer]
            session._first, session._dropped_tokens = self.first, self.dropped_tokens
            session._known = self._computed(completion)
        return super().end(completion)

    def _read(self, prompt: ChatPrompt, limit: int | None) -> list[int]:
        return self._session._known.continued(prompt, limit)

    def _computed(self, completion: Completion) -> _Known:
        """What the engine computed, as far as it belongs to the text: a stop string's tokens were
        cut off the text."""
        answer, tokens = completion.text, list(completion.tokens)
        if completion.stop is not None:
            detokenize = self._session._model._tokenizer.detokenize
            while not completion.text.startswith(answer := detokenize(tokens)):
                tokens.pop()
        return _Known(self.text, answer, self._tokens + tokens)
