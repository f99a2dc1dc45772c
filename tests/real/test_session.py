"""Sessions with the bundled model: each token is computed once, and a file brings it all back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_files import tiny_gguf
from tabagent_model import AsyncModel, Model, SessionFileError
from tabagent_model._session_file import SessionFile

pytestmark = pytest.mark.model

CAPITALS = ["France", "Italy", "Spain"]


def question(turn: int) -> str:
    return f"What is the capital of {CAPITALS[turn % 3]}?"


@pytest.fixture(scope="module", params=[1, 3], ids=["one slot", "three slots"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model.load(n_ctx=1024, max_parallel=request.param) as model:
        yield model


def test_twenty_turns_compute_each_token_once(model: Model):
    session = model.session("You are a helpful assistant.", temperature=0, max_tokens=24)
    known = 0
    for turn in range(20):
        answer = session.send(question(turn))
        usage = answer.usage
        if turn:
            assert usage.cached_tokens == known
            # The end of the answer, the question, and the marks around it.
            assert usage.prompt_tokens - usage.cached_tokens < 24
        known = usage.prompt_tokens + len(answer.tokens) - (answer.finish_reason == "length")
    assert "Italy is Rome" in answer.text


def test_sampled_answers_are_not_computed_again_either(model: Model):
    session = model.session(temperature=1.5, max_tokens=12)
    known = 0
    for turn in range(6):
        answer = session.send(question(turn), seed=turn)
        if turn:
            assert answer.usage.cached_tokens == known
        # The last token of an answer that was cut off is not decoded until it is asked for.
        known = answer.usage.prompt_tokens + len(answer.tokens)
        known -= answer.finish_reason == "length"


def test_a_stopped_answer_goes_on_where_its_text_ends(model: Model):
    session = model.session(temperature=0, max_tokens=24)
    answer = session.send(question(0), stop="is")
    assert (answer.text, answer.stop) == ("The capital of France ", "is")
    assert "Rome" in session.send(question(1)).text
    assert session.history[1]["content"] == "The capital of France "


def test_a_fork_shares_what_was_computed(model: Model):
    session = model.session("You are a helpful assistant.", temperature=0, max_tokens=24)
    session.send(question(0))
    known = session.send(question(1)).usage.total_tokens
    twins = [session.fork() for _ in range(2)]
    for twin in twins:
        assert twin.send(question(2)).usage.cached_tokens >= known - 1
    assert [twin.history for twin in twins] == [twins[0].history] * 2


def test_the_answer_is_that_of_the_whole_conversation(model: Model):
    session = model.session(temperature=0, max_tokens=24)
    for turn in range(3):
        answer = session.send(question(turn))
    whole = model.chat(session.history[:-1], temperature=0, max_tokens=24)
    assert (whole.text, whole.tokens) == (answer.text, answer.tokens)


def test_old_turns_are_dropped_and_the_system_message_stays():
    with Model.load(n_ctx=256) as model:
        session = model.session(
            "You are a helpful assistant.", overflow="drop_oldest", temperature=0, max_tokens=32
        )
        answers = [session.send(question(turn)) for turn in range(12)]
    assert all("The capital of" in answer.text for answer in answers)
    assert all(answer.usage.prompt_tokens + 32 <= 256 for answer in answers)
    dropped = [(a.usage.dropped_messages, a.usage.dropped_tokens) for a in answers]
    assert dropped == sorted(dropped)
    assert dropped[0] == (0, 0)
    assert dropped[-1][0] >= 4
    assert dropped[-1][1] >= 20 * dropped[-1][0] / 2
    assert len(session.history) == 24


async def test_an_async_session_remembers_as_well():
    async with await AsyncModel.load(n_ctx=512, max_parallel=1) as model:
        session = model.session(temperature=0, max_tokens=24)
        await session.send(question(0))
        async with session.stream(question(1)) as pieces:
            text = "".join([piece async for piece in pieces])
        assert "Rome" in text
        assert pieces.usage.cached_tokens > 20


def test_a_saved_session_goes_on(model: Model, tmp_path: Path):
    path = tmp_path / "capitals.session"
    session = model.session("You are a helpful assistant.", temperature=0, max_tokens=24)
    session.send(question(0))
    session.save(path)
    expected = session.send(question(1))
    assert model.load_session(path).send(question(1)) == expected
    with Model.load(n_ctx=512, kv_type="f32") as other:  # the same model in other clothes
        with pytest.raises(SessionFileError, match="`kv_type` was 'auto' and is 'f32' here"):
            other.load_session(path)
        again = other.load_session(path, recompute=True)
        assert again.history == session.history[:2]
        assert "Rome" in again.send(question(1)).text


def test_a_loaded_session_computes_nothing_again(tmp_path: Path):
    path = tmp_path / "capitals.session"
    with Model.load(n_ctx=512, max_parallel=1) as model:
        session = model.session("You are a helpful assistant.", temperature=0, max_tokens=24)
        session.send(question(0))
        session.save(path)
        known = session.fork().send(question(1))
    with Model.load(n_ctx=512, max_parallel=1) as model:
        again = model.load_session(path).send(question(1))
    assert (again.text, again.usage) == (known.text, known.usage)
    assert again.usage.cached_tokens > 20


def test_bytes_that_are_no_state_cost_only_time(tmp_path: Path):
    path = tmp_path / "capitals.session"
    with Model.load(n_ctx=512, max_parallel=1) as model:
        session = model.session(temperature=0, max_tokens=24)
        session.send(question(0))
        session.save(path)
        known = session.fork().send(question(1))
        saved = SessionFile.read(path)
        SessionFile(saved.facts, (saved.state or b"")[:-9]).write(path)
    with Model.load(n_ctx=512, max_parallel=1) as model:
        again = model.load_session(path).send(question(1))
    assert (again.text, again.usage.cached_tokens < 20) == (known.text, True)


def test_a_session_goes_on_after_a_reload_with_another_model(tmp_path: Path):
    with Model.load(tiny_gguf(tmp_path / "a.gguf"), n_ctx=256) as model:
        session = model.session(max_tokens=4, ignore_eos=True)
        session.send("in the")
        model.reload(model_path=None)
        assert session.send("and").usage.prompt_tokens == model.count_tokens(session.history[:3])


def test_a_session_of_another_model_is_refused(model: Model, tmp_path: Path):
    path = tmp_path / "capitals.session"
    model.session().save(path)
    other = tiny_gguf(tmp_path / "other.gguf")
    with (
        Model.load(other, n_ctx=64) as stranger,
        pytest.raises(SessionFileError, match="of another model") as caught,
    ):
        stranger.load_session(path)
    assert "(`tiny-chat`) than this one (`other`)" in str(caught.value)


def test_models_that_differ_in_their_weights_only_are_different(tmp_path: Path):
    path = tmp_path / "talk"
    with Model.load(tiny_gguf(tmp_path / "a.gguf"), n_ctx=64) as model:
        model.session().save(path)
    with (
        Model.load(tiny_gguf(tmp_path / "b.gguf", weights="zero output"), n_ctx=64) as other,
        pytest.raises(SessionFileError, match="another model"),
    ):
        other.load_session(path)
