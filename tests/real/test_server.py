"""The HTTP door with the bundled model, the official clients, and a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from serving import Served, events_of, post, status_of, wait_until
from tabagent_model import AsyncModelManager, Model
from tabagent_model.params import BUNDLED_MODEL
from workers import children

pytestmark = pytest.mark.model

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: Any = {"model": "tiny-chat", "temperature": 0}
LONG: Any = {**GREEDY, "prompt": "Once upon a time", "ignore_eos": True}
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.load(n_ctx=512, max_parallel=8, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with Served(model) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_official_client_chats(client: openai.OpenAI, model: Model):
    answer = client.chat.completions.create(messages=FRANCE, **GREEDY)
    assert answer.choices[0].message.content == model.chat(FRANCE, temperature=0).content
    assert [each.id for each in client.models.list()] == ["tiny-chat"]
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(
        messages=FRANCE, stream=True, stream_options=options, **GREEDY
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert last.usage is not None and answer.usage is not None
    assert last.usage.completion_tokens == answer.usage.completion_tokens


async def test_the_official_client_chats_with_asyncio(served: Served, model: Model):
    expected = model.chat(FRANCE, temperature=0).content
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        stream = await client.chat.completions.create(messages=FRANCE, stream=True, **GREEDY)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == expected


def test_errors_have_the_classes_of_the_official_client(client: openai.OpenAI, served: Served):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**{**GREEDY, "temperature": 3}, messages=FRANCE)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_request")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny-chat", prompt="word " * 2000)


def test_the_official_client_gets_responses(client: openai.OpenAI, model: Model):
    expected = model.chat(FRANCE, temperature=0).content
    question = FRANCE[0]["content"]
    response = client.responses.create(model="tiny-chat", input=question, temperature=0)
    assert (response.output_text, response.status) == (expected, "completed")
    with client.responses.stream(model="tiny-chat", input=question, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == expected
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    cut = client.responses.create(model="tiny-chat", input=question, max_output_tokens=1)
    assert cut.status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny-chat", input="a", previous_response_id="resp_1")


def test_anthropics_client_gets_messages(served: Served, model: Model):
    expected = model.chat(FRANCE, temperature=0)
    asked: Any = {"model": "tiny-chat", "max_tokens": 64, "messages": FRANCE}
    asked["extra_body"] = {"temperature": 0}
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        message = client.messages.create(**asked)
        assert (message.content[0].text, message.stop_reason) == (expected.content, "end_turn")
        assert message.usage.output_tokens == expected.usage.completion_tokens
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert (text, final.stop_reason) == (expected.content, "end_turn")
        assert final.usage.output_tokens == expected.usage.completion_tokens
        counted = client.messages.count_tokens(model="tiny-chat", messages=FRANCE)
        assert counted.input_tokens == expected.usage.prompt_tokens
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(**{**asked, "extra_body": {"temperature": 3}})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**asked, "model": "other"})


def test_a_thousand_tokens_are_streamed_and_all_arrive(served: Served, model: Model):
    with Model.load(n_ctx=2048, max_parallel=1, n_threads=1) as roomy, Served(roomy) as served:
        body = {**LONG, "max_tokens": 1200, "stream": True}
        body["stream_options"] = {"include_usage": True}
        *chunks, usage, done = events_of(served.client.post(COMPLETIONS, json=body).text)
        whole = served.client.post(COMPLETIONS, json={**LONG, "max_tokens": 1200}).json()
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert (text, done) == (whole["choices"][0]["text"], "[DONE]")
        assert usage["usage"]["completion_tokens"] == 1200
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_five_chats_at_once_get_the_answers_that_each_gets_alone(served: Served):
    questions = [f"What is the capital of {name}?" for name in _COUNTRIES]

    def answer(question: str) -> str:
        body = {**GREEDY, "messages": [{"role": "user", "content": question}]}
        text: str = served.client.post("/v1/chat/completions", json=body).json()["choices"][0][
            "message"
        ]["content"]
        return text

    answer(questions[0])
    begun = time.perf_counter()
    alone = [answer(question) for question in questions]
    in_turn_s, begun = time.perf_counter() - begun, time.perf_counter()
    together: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda q=question: together.update({q: answer(q)}))
        for question in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[question] for question in questions] == alone
    together_s = time.perf_counter() - begun
    print(f"a chat alone {in_turn_s / 5:.3f} s, five at once {together_s:.3f} s:", end=" ")
    print(f"each {together_s / in_turn_s * 5:.1f} times as long")


_COUNTRIES = ["France", "Italy", "Spain", "Germany", "Japan"]


def test_a_client_that_is_killed_frees_its_place(served: Served, model: Model):
    program = (
        "import sys, urllib.request as r\n"
        "body = sys.argv[2].encode()\n"
        "asked = r.Request(sys.argv[1], body, {'content-type': 'application/json'})\n"
        "answer = r.urlopen(asked); print(answer.readline(), flush=True); answer.read()"
    )
    body = json.dumps({**LONG, "max_tokens": 32_768, "overflow": "shift", "stream": True})
    with subprocess.Popen(
        [sys.executable, "-c", program, served.url + COMPLETIONS, body], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert model.metrics()["running"] == 1
        child.kill()
    wait_until(lambda: model.metrics()["running"] == 0)


def test_a_long_prompt_says_how_far_it_is_read():
    fields: Any = {"n_ctx": 2048, "max_parallel": 1, "n_threads": 1, "n_batch": 64}
    with Model.load(**fields) as model, Served(model) as served:
        body = {**LONG, "prompt": [*range(100, 2000)], "max_tokens": 4}
        wishes = {"stream": True, "return_progress": True, "num_ctx": 1024}
        text = served.client.post(COMPLETIONS, json={**body, **wishes}).text
    *chunks, _ = events_of(text)
    has_begun = [bool(chunk["choices"][0]["text"]) for chunk in chunks]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert told and not any("prompt_progress" in each for each in chunks[has_begun.index(True) :])
    processed = [each["processed"] for each in told]
    assert processed == sorted(processed) and {each["total"] for each in told} == {1900}
    assert chunks[-1]["timings"]["n_ctx"] == 2048  # more than was asked for, and it says so


def test_health_is_told_while_a_long_prompt_is_read():
    with Model.load(n_ctx=2048, max_parallel=1, n_threads=1) as model, Served(model) as served:
        prompts = [[50 + number, *range(100, 2000)] for number in range(20)]
        body = {"prompt": prompts, "max_tokens": 1, "model": "tiny-chat"}
        with served.connect() as connection:
            connection.sendall(post(COMPLETIONS, json.dumps(body)))
            wait_until(lambda: model.metrics()["running"] == 1)
            assert served.client.get("/health").json() == {"status": "ok"}
            assert served.client.get("/metrics").status_code == 200


# Several models.

FILES = {"chat": BUNDLED_MODEL, "draft": BUNDLED_MODEL.with_name("tiny-draft.gguf")}
STORY: Any = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def manager() -> Iterator[AsyncModelManager]:
    manager = AsyncModelManager(max_loaded=1)
    for name, path in FILES.items():
        manager.register_model(name, path, n_ctx=512, max_parallel=4, n_threads=1)
    yield manager
    asyncio.run(manager.close())


@pytest.fixture
def house(manager: AsyncModelManager) -> Iterator[Served]:
    with Served(manager) as served:
        yield served


@pytest.fixture(scope="module")
def stories() -> dict[str, str]:
    """What each model says with the process to itself."""
    told = {}
    for name, path in FILES.items():
        with Model.load(path, n_ctx=512, max_parallel=4, n_threads=1) as model:
            told[name] = model.generate(**STORY).text
    return told


def story(served: Served, **more: Any) -> str:
    answer = served.client.post(COMPLETIONS, json={**STORY, **more})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def statuses(served: Served) -> dict[str, Any]:
    listed = served.client.get("/v1/models").json()["data"]
    return {each["id"]: each["status"] for each in listed}


def states(served: Served) -> dict[str, str]:
    return {name: status["value"] for name, status in statuses(served).items()}


def control(served: Served, verb: str, name: str, **more: Any) -> httpx.Response:
    return served.client.post(f"/models/{verb}", json={"model": name, "wait": True, **more})


def test_models_are_loaded_when_they_are_wanted(house: Served, stories: dict[str, str]):
    assert states(house) == {"chat": "unloaded", "draft": "unloaded"}
    assert house.client.get("/ready").json() == house.client.get("/health").json()
    assert house.client.get("/slots").json() == []
    assert house.client.get("/props").json()["is_loaded"] is False
    for name, other in (("draft", "chat"), ("chat", "draft")):
        assert story(house, model=name) == stories[name]
        assert states(house) == {name: "loaded", other: "unloaded"}
        assert f'model_name="{name}"' in house.client.get("/metrics").text
    assert story(house) == stories["chat"]
    assert house.client.post(COMPLETIONS, json={**STORY, "model": "other"}).status_code == 404


def test_a_model_stays_as_long_as_a_request_wishes(house: Served):
    story(house, keep_alive="5m")
    assert statuses(house)["chat"]["keep_alive_s"] == 300
    story(house, keep_alive=0)
    wait_until(lambda: states(house)["chat"] == "unloaded")
    with house.client.stream(
        "POST", COMPLETIONS, json={**LONG, "model": "chat", "stream": True, "keep_alive": 0}
    ) as answer:
        assert answer.status_code == 200  # it is held although it would leave at once
        assert statuses(house)["chat"]["num_users"] == 1
        assert answer.read().endswith(b"data: [DONE]\n\n")
    wait_until(lambda: states(house)["chat"] == "unloaded")


def test_a_swap_lets_those_finish_who_are_being_answered(house: Served, stories: dict[str, str]):
    body = {**STORY, "max_tokens": 400, "ignore_eos": True}
    whole = house.client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    with house.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        asked = {"model": "draft"}
        assert house.client.post("/models/swap", json=asked).json() == {"success": True}
        assert story(house, model="draft") == stories["draft"]
        *chunks, _ = events_of("\n".join([first, *lines]) + "\n")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    wait_until(lambda: statuses(house)["draft"]["is_default"])
    assert states(house) == {"chat": "unloaded", "draft": "loaded"}
    assert story(house) == stories["draft"]


def test_whoever_watches_hears_of_each_step(house: Served):
    with house.client.stream("GET", "/models/sse") as answer:
        told = (json.loads(line[6:]) for line in answer.iter_lines() if line)
        heard = [next(told)["data"]["status"] for _ in FILES]
        assert heard == ["unloaded", "unloaded"]
        assert control(house, "load", "chat").json() == {"success": True}
        assert control(house, "unload", "chat").json() == {"success": True}
        steps = []
        while steps[-1:] != ["unloaded"]:
            event = next(told)
            assert (event["model"], event["event"]) == ("chat", "model_status")
            steps.append(event["data"]["status"])
    assert [*dict.fromkeys(steps)] == ["loading", "loaded", "unloading", "unloaded"]
    assert states(house)["chat"] == "unloaded"


def test_what_finds_no_room_is_told_so(manager: AsyncModelManager, house: Served):
    story(house, model="chat")
    endless = {**LONG, "model": "chat", "overflow": "shift", "max_tokens": 32_768, "stream": True}
    with house.client.stream("POST", COMPLETIONS, json=endless) as answer:
        lines = answer.iter_lines()
        next(lines)
        late = house.client.post(
            COMPLETIONS, json={**STORY, "model": "draft", "max_queue_wait_s": 0.05}
        )
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert late.json()["error"]["code"] == "queue_timeout"
        connection = house.connect()
        connection.sendall(post(COMPLETIONS, json.dumps({**STORY, "model": "draft"})))
        wait_until(lambda: statuses(house)["draft"]["num_waiting"] == 1)
        connection.close()
        wait_until(lambda: statuses(house)["draft"]["num_waiting"] == 0)
    manager.pin("chat")
    for path in (COMPLETIONS, "/models/load"):
        full = house.client.post(path, json={**STORY, "model": "draft"})
        assert (full.status_code, full.json()["error"]["code"]) == (507, "no_room")
    assert control(house, "unload", "chat", grace=0).status_code == 200
    assert states(house)["chat"] == "unloaded"


def test_a_file_that_cannot_be_loaded_is_named_without_its_folder(
    manager: AsyncModelManager, house: Served, tmp_path: Path
):
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    manager.register_model("broken", tmp_path / "broken.gguf")
    manager.register_model("gone", tmp_path / "gone.gguf")
    manager.register_model("damaged", damaged(tmp_path / "damaged.gguf"))
    for name, code in (
        ("broken", "invalid_format"),
        ("gone", "model_not_found"),
        ("damaged", "model_corrupted"),
    ):
        for answer in (
            house.client.post(COMPLETIONS, json={**STORY, "model": name}),
            control(house, "load", name),
            house.client.post("/models/load", json={"model": name}),
        ):
            error = answer.json()["error"]
            assert error["code"] == code
            assert f"{name}.gguf" in error["message"] and str(tmp_path) not in answer.text
    assert str(tmp_path) not in house.client.get("/models").text
    assert house.client.get("/health").status_code == 200


def damaged(path: Path) -> Path:
    path.write_bytes(BUNDLED_MODEL.read_bytes()[:-100_000])
    return path


def test_a_path_is_no_name(house: Served):
    for name in (str(BUNDLED_MODEL), f"../{BUNDLED_MODEL.name}", BUNDLED_MODEL.name):
        assert control(house, "load", name).status_code == 404


# As a process.


class Process:
    """`tabagent-model serve`, and what it says on standard error."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "tabagent_model", "serve", "--port", "0", *arguments]
        self.child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.child.stderr is not None
        self.first = self.child.stderr.readline()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate()

    @property
    def url(self) -> str:
        return self.first.strip()

    def wait_until_ready(self) -> None:
        wait_until(lambda: httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.child.send_signal(number)
        out, error = self.child.communicate(timeout=60)
        return self.child.returncode, out, error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_well(number: int):
    with Process("--n-ctx", "256") as process:
        process.wait_until_ready()
        answer = httpx.get(f"{process.url}/v1/models", trust_env=False).json()
        assert answer["data"][0]["context_window"] == 256
        status, out, error = process.end(number)
    assert (status, out) == (0, "")
    assert "Traceback" not in error


def test_a_server_that_is_still_loading_ends_well():
    with Process() as process:
        status, _, error = process.end()
    assert (status, "Traceback" in error) == (0, False)


def test_streams_end_within_the_grace_and_the_exit_is_a_success():
    with Process("--grace-s", "1", "--n-ctx", "256", "--in-process") as process:
        process.wait_until_ready()
        body = {**LONG, "max_tokens": 32_768, "overflow": "shift", "stream": True}
        with httpx.stream(
            "POST", process.url + COMPLETIONS, json=body, timeout=30, trust_env=False
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.child.send_signal(signal.SIGTERM)
            *_, error, _, done, _ = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        assert process.child.wait(timeout=60) == 0


def test_a_worker_that_dies_takes_only_its_requests_along():
    with Process("--n-ctx", "256") as process:
        process.wait_until_ready()
        body = {**LONG, "max_tokens": 32_768, "overflow": "shift", "stream": True}
        with httpx.stream(
            "POST", process.url + COMPLETIONS, json=body, timeout=60, trust_env=False
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            for worker in children(process.child.pid):
                os.kill(worker, signal.SIGKILL)
            *_, error, _, done, _ = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "worker_crashed"
        assert done == "data: [DONE]"
        body = {**GREEDY, "messages": FRANCE}
        url = f"{process.url}/v1/chat/completions"
        again = httpx.post(url, json=body, timeout=60, trust_env=False).json()
        assert "Paris" in again["choices"][0]["message"]["content"]
        assert process.end()[0] == 0


def test_models_have_the_names_that_they_are_given(tmp_path: Path):
    path = BUNDLED_MODEL
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    key = {"authorization": "Bearer two"}
    options = ("--api-key-file", str(keys), "--no-page", "--in-process")
    with Process(f"a={path}", str(path), *options) as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.url, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            listed = client.get("/v1/models", headers=key).json()["data"]
            assert [each["id"] for each in listed] == ["a", "tiny-chat"]
            assert client.get("/", headers=key).status_code == 404


def test_a_folder_of_models_is_served_with_what_the_options_allow(tmp_path: Path):
    for name in ("b.gguf", "sub/a-00001-of-00002.gguf", "sub/a-00002-of-00002.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(BUNDLED_MODEL)
    (tmp_path / "mmproj-b.gguf").write_bytes(b"")
    options = ("--max-loaded", "1", "--ttl", "90s", "--n-ctx", "256", "--max-memory-mb", "500")
    with Process(f"first={BUNDLED_MODEL}", "--models-dir", str(tmp_path), *options) as process:
        process.wait_until_ready()
        with httpx.Client(base_url=process.url, trust_env=False, timeout=30) as client:
            listed = client.get("/models").json()["data"]
            told = [(each["id"], each["status"]["value"]) for each in listed]
            assert told == [("first", "loaded"), ("a", "unloaded"), ("b", "unloaded")]
            assert {each["status"]["keep_alive_s"] for each in listed} == {90}
            body = {**STORY, "model": "b"}
            assert client.post(COMPLETIONS, json=body).status_code == 200
            listed = client.get("/models").json()["data"]
            states = [each["status"]["value"] for each in listed]
            assert states == ["unloaded", "unloaded", "loaded"]
        assert process.end()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--host", "0.0.0.0"], {}, "there is no key"),
        (["--host", "::"], {}, "there is no key"),
        (["--allow-origin", "*"], {}, "there is no key"),
        ([], {"TABAGENT_API_KEYS": " "}, "TABAGENT_API_KEYS is set and empty"),
        (["--api-key-file", "/dev/null"], {}, "there is no key in"),
        (["--api-key-file", "/nowhere"], {}, "cannot be read"),
        (["--host", "192.0.2.1"], {"TABAGENT_API_KEYS": "k"}, "cannot listen on `192.0.2.1`"),
        (["--host", "nowhere.invalid"], {"TABAGENT_API_KEYS": "k"}, "cannot listen"),
        (["--port", "99999"], {}, "`port` must be"),
        (["--n-ctx", "1"], {}, "n_ctx"),
        (["a=x.gguf", "a=y.gguf"], {}, "two models are called `a`"),
        (["/nowhere/model.gguf"], {}, "ModelNotFoundError"),
        ([str(BUNDLED_MODEL), "/nowhere/model.gguf"], {}, "ModelNotFoundError"),
        (["--models-dir", "/nowhere"], {}, "there is no model in `/nowhere`"),
        (["--max-loaded", "0"], {}, "`max_loaded` must be"),
        (["--keep-alive", "soon"], {}, "`keep_alive` must be"),
        (["--max-memory-mb", "1"], {}, "NoRoomError"),
        (["--tls-cert", "/nowhere.pem"], {}, "/nowhere.pem"),
    ],
)
def test_a_start_that_is_unsafe_or_impossible_is_refused_with_a_reason(
    arguments: list[str], environment: dict[str, str], said: str
):
    with Process(*arguments, **environment) as process:
        out, error = process.child.communicate(timeout=60)
    assert (process.child.returncode, out) == (1, "")
    assert said in process.first + error
    assert "Traceback" not in error


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Process("--port", str(port)) as process:
            _, error = process.child.communicate(timeout=60)
    assert process.child.returncode == 1
    assert re.search(f"port {port}: Address already in use", process.first + error)


def test_a_key_never_shows_up():
    with Process("--host", "0.0.0.0", TABAGENT_API_KEYS="hush-hush other") as process:
        process.wait_until_ready()
        url = process.url.replace("0.0.0.0", "127.0.0.1")
        key = {"x-api-key": "hush-hush"}
        assert httpx.get(f"{url}/v1/models", headers=key, trust_env=False).status_code == 200
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        _, out, error = process.end()
    assert "hush" not in process.first + out + error
    assert "GET /v1/models 401" in error


def test_bytes_that_end_nowhere_do_not_hurt(served: Served):
    for data in (b"\0" * 10_000, b"GET " + b"/" * 100_000, os.urandom(5000)):
        assert status_of(served.say(data)) in (0, 400, 431)
    assert served.client.get("/health").status_code == 200


# The documentation.

PAGE = Path(__file__).parents[2] / "docs" / "server.md"
EXCHANGES = re.findall(r"```http\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def documented() -> Iterator[Served]:
    manager = AsyncModelManager()
    manager.register_model("tiny-chat", n_ctx=512, max_parallel=1, n_threads=1)
    with Served(manager) as served:
        yield served
    asyncio.run(manager.close())


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda text: text.split("\n", 1)[0])
def test_the_exchanges_of_the_documentation_are_true(documented: Served, exchange: str):
    assert control(documented, "load", "tiny-chat").status_code == 200
    asked, answered = exchange.strip().split("\n\n")
    first, _, body = asked.partition("\n")
    method, path = first.split()
    status, expected = answered.split("\n", 1)
    if expected.startswith("data: "):
        with documented.client.stream(method, path) as events:
            answered, expected = next(events.iter_lines()).removeprefix("data: "), expected[6:]
            assert json.loads(answered).keys() == json.loads(expected).keys()
        return
    answer = documented.client.request(method, path, json=json.loads(body) if body else None)
    assert answer.status_code == int(status)
    wanted = json.loads(expected)
    if isinstance(wanted, dict):
        assert answer.json().keys() == wanted.keys()
    if int(status) >= 400:
        told = answer.json()["error"]
        known = {name: text for name, text in wanted["error"].items() if text != "…"}
        assert {name: told[name] for name in known} == known


def test_every_route_is_documented(served: Served):
    text = PAGE.read_text(encoding="utf-8")
    files = ("/app.js", "/markdown.js", "/style.css")
    paths = [route.path for route in served.door.app.routes if route.path not in files]
    assert [path for path in paths if path.replace("/{model:path}", "") not in text] == []
