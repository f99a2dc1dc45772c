"""Conversations over a scripted engine: what is sent, what is kept, who may speak when."""

import asyncio
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Face
from tabagent_model import (
    AsyncModel,
    AsyncSession,
    AsyncTextStream,
    ChatDelta,
    Completion,
    ContextLimitExceededError,
    InvalidRequestError,
    QueueFullError,
    SamplingError,
    Session,
    SessionFileError,
)
from tabagent_model._session_file import SessionFile
from tabagent_model.testing import ScriptedContext

MakeFace = Callable[[ScriptedContext], Face]
SPOKEN = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because!"},
]


async def call(session: Session | AsyncSession, name: str, *args: Any, **fields: Any) -> Any:
    method = getattr(session, name)
    if isinstance(session, AsyncSession):
        return await method(*args, **fields)
    return await asyncio.to_thread(method, *args, **fields)


async def send(session: Session | AsyncSession, text: str, **fields: Any) -> Completion:
    answer = await call(session, "send", text, **fields)
    assert isinstance(answer, Completion)
    return answer


def texts_of(context: ScriptedContext) -> list[str]:
    return [context.detokenize(request.prompt) for request in context.submitted]  # type: ignore[arg-type]


def endless(prompt: Any) -> Iterator[str]:
    return itertools.repeat("la ")


async def test_a_chat_is_written_out_for_the_engine(face: MakeFace):
    context = ScriptedContext(["Be", "cause", "!"])
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    answer = await face(context).call("chat", messages, seed=3)
    assert (answer.text, answer.finish_reason) == ("Because!", "stop")
    assert texts_of(context) == ["system: Be kind.\nuser: Why?\nassistant: "]
    assert context.submitted[0].params["seed"] == 3


async def test_a_chat_streams(face: MakeFace):
    spoken = face(ScriptedContext(["Be", "cause", "!"]))
    stream = spoken.model.stream_chat("Why?")
    deltas = [delta async for delta in spoken.pieces(stream)]
    assert deltas == [ChatDelta("Be"), ChatDelta("cause"), ChatDelta("!")]


async def test_a_text_alone_is_a_message_of_the_user(face: MakeFace):
    context = ScriptedContext()
    await face(context).call("chat", "Why?", template="<{role}|{content}> ")
    assert texts_of(context) == ["<user|Why?> assistant: "]


async def test_templates_and_tokens_can_be_looked_at(face: MakeFace):
    asked = face(ScriptedContext())
    assert await asked.call("apply_chat_template", "Why?") == "user: Why?\nassistant: "
    assert await asked.call("apply_chat_template", SPOKEN, False) == (
        "user: Why?\nassistant: Because!\n"
    )
    assert await asked.call("count_tokens", "Why is that?") == 4
    assert await asked.call("count_tokens", [{"role": "user", "content": "Why?"}]) == 4


async def test_what_a_template_demands_to_stop_at_is_added(face: MakeFace):
    class Demanding(ScriptedContext):
        def render_chat(self, *args: Any, **kwargs: Any) -> Any:
            prompt = super().render_chat(*args, **kwargs)
            return type(prompt)(prompt.text, self, ["<end>"])

    context = Demanding()
    asked = face(context)
    await asked.call("chat", "Why?", stop="!")
    await send(asked.model.session(stop="!"), "Why?")
    assert [request.params["stop"] for request in context.submitted] == [("!", "<end>")] * 2


async def test_a_session_remembers_what_was_said(face: MakeFace):
    session = face(ScriptedContext(["Be", "cause", "!"])).model.session("Be kind.")
    assert (session.system, session.history) == ("Be kind.", [])
    await send(session, "Why?")
    await send(session, "Really?")
    assert session.history == [
        *SPOKEN,
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "Because!"},
    ]
    session.history.clear()
    assert len(session) == len(session.history) == 4


async def test_a_prompt_begins_with_the_very_tokens_of_the_turn_before(face: MakeFace):
    context = ScriptedContext(["Be", "cause", "!"])  # written out anew, "Because!" is one token
    session = face(context).model.session()
    answers = [await send(session, text) for text in ("Why?", "Really?", "Sure?")]
    prompts = [list(request.prompt) for request in context.submitted]
    for before, answer, prompt in zip(prompts, answers, prompts[1:], strict=False):
        known = before + list(answer.tokens)
        assert prompt[: len(known)] == known
    assert texts_of(context)[1] == "user: Why?\nassistant: Because!\nuser: Really?\nassistant: "


async def test_a_template_that_rewrites_what_was_said_is_followed(face: MakeFace):
    class Forgetful(ScriptedContext):
        """Leaves out what stands before the last `|` of earlier answers."""

        def render_chat(self, messages: str, *args: Any, **kwargs: Any) -> Any:
            said = json.loads(messages)
            for message in said:
                message["content"] = message["content"].rpartition("|")[2]
            return super().render_chat(json.dumps(said), *args, **kwargs)

    context = Forgetful(["hm|", "yes"])
    session = face(context).model.session()
    await send(session, "Why?")
    await send(session, "Really?")
    assert texts_of(context)[1] == "user: Why?\nassistant: yes\nuser: Really?\nassistant: "


async def test_an_answer_that_a_template_trims_keeps_its_tokens(face: MakeFace):
    class Trimming(ScriptedContext):
        def render_chat(self, messages: str, *args: Any, **kwargs: Any) -> Any:
            said = [{**m, "content": m["content"].strip()} for m in json.loads(messages)]
            return super().render_chat(json.dumps(said), *args, **kwargs)

    context = Trimming([" yes", " "])
    session = face(context).model.session()
    answer = await send(session, "Why?")
    await send(session, "Really?")
    first, second = (list(request.prompt) for request in context.submitted)
    assert second[: len(first) + 2] == first + list(answer.tokens)
    assert texts_of(context)[1].endswith(" yes \nuser: Really?\nassistant: ")


async def test_fields_of_a_session_are_the_defaults_of_its_answers(face: MakeFace):
    context = ScriptedContext()
    session = face(context).model.session(temperature=0, max_tokens=7)
    await send(session, "Why?")
    await send(session, "Why?", max_tokens=9)
    params = [request.params for request in context.submitted]
    assert [(p["temperature"], p["max_tokens"]) for p in params] == [(0, 7), (0, 9)]


async def test_a_stream_becomes_history_when_it_ends(face: MakeFace):
    spoken = face(ScriptedContext(["Be", "cause", "!"]))
    session = spoken.model.session()
    stream = session.stream("Why?")
    assert [piece async for piece in spoken.pieces(stream)] == ["Be", "cause", "!"]
    assert session.history == SPOKEN


async def test_what_was_said_before_a_cancel_is_kept(face: MakeFace):
    spoken = face(ScriptedContext(endless, delay=0.001))
    session = spoken.model.session(max_tokens=-1)
    stream = session.stream("Why?")
    async for _ in spoken.pieces(stream):
        break
    await spoken.close(stream)
    asked, answer = session.history
    assert asked == SPOKEN[0]
    assert answer == {
        "role": "assistant",
        "content": stream.text,
        "finish_reason": "cancelled",
    }
    assert (await send(session, "Go on", max_tokens=2)).text == "la la "


async def test_an_answer_cut_short_says_so_in_the_history(face: MakeFace):
    session = face(ScriptedContext(endless)).model.session()
    await send(session, "Why?", max_tokens=2)
    assert session.history[1] == {
        "role": "assistant",
        "content": "la la ",
        "finish_reason": "length",
    }


async def test_a_turn_that_failed_leaves_no_trace(face: MakeFace):
    session = face(ScriptedContext(["a", SamplingError("no")])).model.session()
    with pytest.raises(SamplingError):
        await send(session, "Why?")
    with pytest.raises(InvalidRequestError, match="temperature"):
        await send(session, "Why?", temperature="hot")
    with pytest.raises(ContextLimitExceededError):
        await send(session, "why " * 5000)
    assert session.history == []


async def test_a_full_queue_leaves_the_session_usable(face: MakeFace):
    context = ScriptedContext(["yes"], n_seq_max=1, queue_size=1)
    context.pause()
    spoken = face(context)
    waiting = asyncio.create_task(spoken.generate("a"))
    while not context.submitted:
        await asyncio.sleep(0.001)
    session = spoken.model.session()
    for _ in range(2):
        with pytest.raises(QueueFullError) as caught:
            await send(session, "Why?")
        assert caught.value  # and with it every frame that it went through
    context.resume()
    await waiting
    assert (await send(session, "Why?")).text == "yes"


async def test_a_session_takes_one_message_after_the_other(face: MakeFace):
    spoken = face(ScriptedContext(endless, delay=0.001))
    session = spoken.model.session(max_tokens=-1)
    stream = session.stream("Why?")
    async for _ in spoken.pieces(stream):
        break
    with pytest.raises(InvalidRequestError, match="still answering"):
        await send(session, "And why not?")
    with pytest.raises(InvalidRequestError, match="still answering"):
        session.undo()
    assert (await send(session.fork(), "Me, too?", max_tokens=1)).text == "la "
    await spoken.close(stream)
    assert (await send(session, "And now?", max_tokens=1)).text == "la "


async def test_a_stream_that_was_dropped_is_no_answer(face: MakeFace):
    spoken = face(ScriptedContext(endless, delay=0.001))
    session = spoken.model.session(max_tokens=-1)
    stream = session.stream("Why?")
    is_async = isinstance(stream, AsyncTextStream)
    await (anext(stream) if is_async else asyncio.to_thread(next, stream))
    del stream
    while session._turn is not None:  # the thread that submitted it is still letting go
        await asyncio.sleep(0.001)
    assert (await send(session, "And now?", max_tokens=1)).text == "la "
    assert len(session) == 2


async def test_cancelling_a_send_keeps_what_was_said():
    model = AsyncModel(ScriptedContext(endless, delay=0.001))
    session = model.session(max_tokens=-1)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(session.send("Why?"), 0.05)
    assert session.history[1]["finish_reason"] == "cancelled"
    assert (await session.send("And now?", max_tokens=1)).text == "la "
    await model.unload()


async def test_a_fork_goes_its_own_way(face: MakeFace):
    session = face(ScriptedContext(["Be", "cause", "!"])).model.session("Be kind.")
    await send(session, "Why?")
    twin = session.fork()
    await send(twin, "Really?")
    assert session.history == SPOKEN
    assert (twin.history[:2], len(twin), twin.system) == (SPOKEN, 4, "Be kind.")


async def test_undo_gives_back_what_was_asked(face: MakeFace):
    context = ScriptedContext(["Be", "cause", "!"])
    session = face(context).model.session()
    await send(session, "Why?")
    await send(session, "Really?")
    assert session.undo() == "Really?"
    assert session.history == SPOKEN
    await send(session, "Sure?")
    assert texts_of(context)[2] == "user: Why?\nassistant: Because!\nuser: Sure?\nassistant: "
    session.undo(), session.undo()
    with pytest.raises(InvalidRequestError, match="nothing was said yet"):
        session.undo()


async def test_the_oldest_turns_are_dropped_and_counted(face: MakeFace):
    context = ScriptedContext(["Be", "cause", "!"], n_ctx=40)
    session = face(context).model.session("Be kind.", overflow="drop_oldest", max_tokens=8)
    usages = [(await send(session, f"Why {turn}?")).usage for turn in range(8)]
    for request, usage in zip(context.submitted, usages, strict=True):
        text = context.detokenize(request.prompt)  # type: ignore[arg-type]
        assert text.startswith("system: Be kind.\nuser: ")
        assert len(request.prompt) + 8 <= 40
        assert text.count("user: ") == (len(session) - usage.dropped_messages) // 2 - (
            7 - usages.index(usage)
        )
    assert usages[0].dropped_tokens == usages[0].dropped_messages == 0
    assert [u.dropped_messages for u in usages] == sorted(u.dropped_messages for u in usages)
    assert usages[-1].dropped_messages % 2 == 0
    assert usages[-1].dropped_tokens >= 4 * usages[-1].dropped_messages > 0
    assert len(session) == 16  # the history forgets nothing


async def test_without_being_asked_nothing_is_dropped(face: MakeFace):
    session = face(ScriptedContext(["yes"], n_ctx=20)).model.session()
    await send(session, "Why?")
    with pytest.raises(ContextLimitExceededError):
        for _ in range(9):
            await send(session, "Why?")


async def test_a_message_that_fits_no_context_is_refused_with_the_numbers(face: MakeFace):
    session = face(ScriptedContext(n_ctx=40)).model.session(overflow="drop_oldest")
    await send(session, "Why?")
    with pytest.raises(ContextLimitExceededError) as caught:
        await send(session, "why " * 60)
    assert (caught.value.max, caught.value.required > 60) == (40, True)
    assert session.history[0] == SPOKEN[0]


async def test_the_oldest_turns_of_a_chat_are_dropped_as_well(face: MakeFace):
    context = ScriptedContext(["yes"], n_ctx=24)
    messages = [{"role": "system", "content": "Be kind."}]
    for turn in range(4):
        messages.append({"role": "user", "content": f"Why {turn}?"})
        messages.append({"role": "assistant", "content": "Because!"})
    messages[-1] = {"role": "user", "content": "Now?"}
    answer = await face(context).call("chat", messages, overflow="drop_oldest", max_tokens=9)
    assert texts_of(context) == [
        "system: Be kind.\nuser: Why 2?\nassistant: Because!\nuser: Why 3?\nuser: Now?\nassistant: "
    ]
    assert (answer.usage.dropped_messages, answer.usage.dropped_tokens) == (4, 10)
    assert context.submitted[0].params["overflow"] == "error"


async def test_a_system_message_alone_has_nothing_to_drop(face: MakeFace):
    spoken = face(ScriptedContext(["yes"]))
    messages = [{"role": "system", "content": "Be kind."}]
    assert (await spoken.call("chat", messages, overflow="drop_oldest")).text == "yes"


async def test_a_prompt_has_no_turns_to_drop(face: MakeFace):
    with pytest.raises(InvalidRequestError, match="for chats only"):
        await face(ScriptedContext()).generate("Why?", overflow="drop_oldest")
    with pytest.raises(InvalidRequestError, match="`overflow` must be one of"):
        face(ScriptedContext()).model.session(overflow="forget")  # type: ignore[typeddict-item]


async def test_a_session_is_saved_and_loaded(face: MakeFace, tmp_path: Path):
    context = ScriptedContext(["Be", "cause", "!"], n_ctx=200)
    spoken = face(context)
    session = spoken.model.session("Be kind.", overflow="drop_oldest", temperature=0)
    await send(session, "Why?")
    await call(session, "save", tmp_path / "talk")
    again = await spoken.call("load_session", tmp_path / "talk")
    assert type(again) is type(session)
    assert (again.system, again.history) == ("Be kind.", SPOKEN)
    await send(again, "Really?")
    await send(session, "Really?")
    first, second = context.submitted[1:]
    assert (first.prompt, first.params) == (second.prompt, second.params)
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]


async def test_the_engine_gets_its_state_back(face: MakeFace, tmp_path: Path):
    class Stateful(ScriptedContext):
        imported: tuple[bytes, list[int]] | None = None

        def export_state(self, tokens: list[int]) -> bytes | None:
            return b"state of " + str(tokens).encode()

        def import_state(self, data: bytes, tokens: list[int]) -> int:
            self.imported = data, tokens
            return len(tokens)

    context = Stateful(["yes"])
    spoken = face(context)
    session = spoken.model.session()
    answer = await send(session, "Why?")
    await call(session, "save", tmp_path / "talk")
    await spoken.call("load_session", tmp_path / "talk")
    tokens = [*context.submitted[0].prompt, *answer.tokens]
    assert context.imported == (b"state of " + str(tokens).encode(), tokens)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "is no saved session"),
        (lambda data: b"GGUF" + data, "is no saved session"),
        (lambda data: data.replace(b"SESSION 1", b"SESSION 2"), "another version"),
        (lambda data: data[:30], "is damaged: it has 30 bytes"),
        (lambda data: data[:-1], "is damaged: it has"),
        (lambda data: data + b"x", "is damaged: it has"),
        (lambda data: data.replace(b"Why", b"Who"), "its checksum does not match"),
        (lambda data: data[:19] + b"\xff" * 16 + data[35:], "is damaged: it has"),
    ],
    ids=["empty", "model", "version", "head", "short", "long", "changed", "lengths"],
)
async def test_a_damaged_file_is_refused(
    face: MakeFace, tmp_path: Path, damage: Callable[[bytes], bytes], said: str
):
    spoken, path = face(ScriptedContext()), tmp_path / "talk"
    session = spoken.model.session()
    await send(session, "Why?")
    await call(session, "save", path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SessionFileError, match=said) as caught:
        await spoken.call("load_session", path)
    assert str(path) in str(caught.value)


async def test_a_file_with_other_fields_is_refused(face: MakeFace, tmp_path: Path):
    spoken, path = face(ScriptedContext()), tmp_path / "talk"
    await call(spoken.model.session(), "save", path)
    facts = SessionFile.read(path).facts
    for name, value in [("config", {"charm": 3}), ("known", {}), ("messages", [{"role": 7}])]:
        SessionFile({**facts, name: value}, None).write(path)
        with pytest.raises(SessionFileError, match="another version of this package"):
            await spoken.call("load_session", path)


async def test_what_is_not_there_cannot_be_loaded_or_written(face: MakeFace, tmp_path: Path):
    spoken = face(ScriptedContext())
    with pytest.raises(FileNotFoundError):
        await spoken.call("load_session", tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        await call(spoken.model.session(), "save", tmp_path / "no folder" / "talk")


def test_both_sessions_have_the_same_methods_with_the_same_arguments():
    def methods(kind: type) -> dict[str, list[str]]:
        found = {name for name in dir(kind) if not name.startswith("_")}
        return {
            name: list(inspect.signature(member).parameters)
            for name in sorted(found)
            if callable(member := getattr(kind, name))
        }

    assert methods(Session) == methods(AsyncSession)
