"""The HTTP door with the bundled model, the official clients, and a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from serving import Served, events_of, post, status_of, wait_until
from tabagent_model import Model

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

    alone = [answer(question) for question in questions]
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


def test_health_is_told_while_a_long_prompt_is_read():
    with Model.load(n_ctx=2048, max_parallel=1, n_threads=1) as model, Served(model) as served:
        prompts = [[50 + number, *range(100, 2000)] for number in range(20)]
        body = {"prompt": prompts, "max_tokens": 1, "model": "tiny-chat"}
        with served.connect() as connection:
            connection.sendall(post(COMPLETIONS, json.dumps(body)))
            wait_until(lambda: model.metrics()["running"] == 1)
            assert served.client.get("/health").json() == {"status": "ok"}
            assert served.client.get("/metrics").status_code == 200


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
            for children in Path(f"/proc/{process.child.pid}/task").glob("*/children"):
                for child in children.read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            *_, error, _, done, _ = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "worker_crashed"
        assert done == "data: [DONE]"
        body = {**GREEDY, "messages": FRANCE}
        url = f"{process.url}/v1/chat/completions"
        again = httpx.post(url, json=body, timeout=60, trust_env=False).json()
        assert "Paris" in again["choices"][0]["message"]["content"]
        assert process.end()[0] == 0


def test_models_have_the_names_that_they_are_given(tmp_path: Path):
    path = Path(__import__("tabagent_model").__file__).parent / "assets" / "tiny-chat.gguf"
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


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda text: text.split("\n", 1)[0])
def test_the_exchanges_of_the_documentation_are_true(served: Served, exchange: str):
    asked, answered = exchange.strip().split("\n\n")
    first, _, body = asked.partition("\n")
    method, path = first.split()
    status, expected = answered.split("\n", 1)
    answer = served.client.request(method, path, json=json.loads(body) if body else None)
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
