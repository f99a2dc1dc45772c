"""The HTTP door over real sockets, with an engine that speaks the lines it was given."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from serving import Served, events_of, post, read_all, scripted, status_of, wait_until
from tabagent_model import (
    AsyncModelManager,
    BackendError,
    InvalidRequestError,
    LoadCancelledError,
    Model,
    ModelCorruptedError,
    serve,
)
from tabagent_model.serve import http
from tabagent_model.serve.config import ServerConfig
from tabagent_model.serve.guard import host_name, printable
from tabagent_model.serve.sse import Outbox
from tabagent_model.testing import ScriptedContext

ASKED = {"model": "model", "prompt": "Why?"}
STREAMED = {**ASKED, "stream": True}
COMPLETIONS = "/v1/completions"


@pytest.fixture
def served() -> Iterator[Served]:
    _, model = scripted()
    with model, Served(model) as served:
        yield served


def endless(piece: str = "word ") -> Any:
    return lambda _: itertools.repeat(piece)


# What is asked is answered.


def test_a_completion_is_answered(served: Served):
    answer = served.client.post(COMPLETIONS, json=ASKED)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["text"] == "Because!"


def test_a_stream_is_framed_to_the_byte(served: Served):
    answer = served.say(post(COMPLETIONS, json.dumps(STREAMED)))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 200
    assert b"content-type: text/event-stream; charset=utf-8" in head
    assert b"transfer-encoding: chunked" in head
    body = b""
    while rest != b"0\r\n\r\n":
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        assert rest[int(size, 16) :][:2] == b"\r\n"
        rest = rest[int(size, 16) + 2 :]
    *chunks, done = events_of(body.decode())
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Be", "cause", "!", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 3 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_models_are_listed_and_told_apart():
    (_, one), (_, two) = scripted("1"), scripted("2")
    with one, two, Served({"one": one, "org/two:Q4": two}) as served:
        listed = served.client.get("/v1/models").json()
        assert [each["id"] for each in listed["data"]] == ["one", "org/two:Q4"]
        assert served.client.get("/v1/models/org/two:Q4").json()["id"] == "org/two:Q4"
        assert served.client.get("/v1/models/org%2Ftwo:Q4").json()["id"] == "org/two:Q4"
        for name, expected in (("one", "1"), ("org/two:Q4", "2"), (None, "1")):
            answer = served.client.post(COMPLETIONS, json={"prompt": "Why?", "model": name})
            assert answer.json()["choices"][0]["text"] == expected


def test_health_and_readiness_follow_the_model():
    _, model = scripted()
    with Served(None) as served:
        assert served.client.get("/health").json() == {"status": "loading", "progress": 0.0}
        refused = served.client.post(COMPLETIONS, json=ASKED)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "model_loading"
        assert served.client.get("/ready").status_code == 503
        served.door.service = http.Service(model)
        assert served.client.get("/health").json() == {"status": "ok"}
        assert served.client.get("/ready").json() == {"status": "ok"}
        model.close()
        assert served.client.get("/health").status_code == 503


def test_metrics_of_all_models_can_be_read_by_prometheus():
    (_, one), (_, two) = scripted(), scripted()
    with one, two, Served({"one": one, 'two"': two}) as served:
        served.client.post(COMPLETIONS, json={"prompt": "Why?", "model": "one"})
        served.client.post(COMPLETIONS, json={"prompt": "Why?", "n": 0})
        text = served.client.get("/metrics").text
        told = {family.name: family for family in text_string_to_metric_families(text)}
        assert {
            sample.labels["model_name"]: sample.value
            for sample in told["llamacpp:tokens_predicted"].samples
        } == {"one": 3.0, 'two"': 0.0}
        statuses = told["tabagent:http_requests"].samples
        assert {sample.labels["status"]: sample.value for sample in statuses} == {
            "200": 1.0,
            "400": 1.0,
        }


def test_what_llama_server_has_besides(served: Served):
    client = served.client
    tokens = client.post("/tokenize", json={"content": "so it is"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"content": "so it is"}
    pieces = client.post("/tokenize", json={"content": "so it is", "with_pieces": True}).json()
    assert [each["piece"] for each in pieces["tokens"]] == ["so ", "it ", "is"]
    messages = [{"role": "user", "content": "Why?"}]
    prompt = client.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert prompt == "user: Why?\nassistant: "
    props = client.get("/props").json()
    assert (props["model_alias"], props["total_slots"]) == ("model", 8)
    slots = client.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [False] * 8


def test_it_can_be_mounted_in_another_application():
    _, model = scripted()
    inner = serve.app(model, allowed_hosts=["testserver"])
    with model, TestClient(Starlette(routes=[Mount("/llm", inner)])) as client:
        answer = client.post("/llm/v1/completions", json=ASKED)
        assert answer.json()["choices"][0]["text"] == "Because!"
        assert client.get("/llm/").headers["content-type"].startswith("text/html")
        assert client.get("/llm/style.css").status_code == 200


def test_a_mounted_application_asks_for_its_keys_too():
    _, model = scripted()
    inner = serve.app(model, allowed_hosts=["testserver"], api_keys=["secret"])
    with model, TestClient(Starlette(routes=[Mount("/llm", inner)])) as client:
        assert client.get("/llm/health").status_code == 200
        assert client.get("/llm/v1/models").status_code == 401
        key = {"authorization": "Bearer secret"}
        assert client.get("/llm/v1/models", headers=key).status_code == 200


def test_models_of_somebody_else_are_listed_and_left_alone():
    (_, one), (_, two) = scripted(), scripted()
    with one, two, Served({"one": one, "two": two}) as served:
        assert served.client.get("/models").json() == served.client.get("/v1/models").json()
        wishes = [("load", "two", 200), ("load", "three", 404), ("swap", "one", 200)]
        wishes += [("swap", "two", 400), ("unload", "two", 400)]
        for verb, name, status in wishes:
            answer = served.client.post(f"/models/{verb}", json={"model": name})
            assert answer.status_code == status
        assert answer.json()["error"]["code"] == "not_supported"
        two.close()
        assert served.client.post("/models/load", json={"model": "two"}).status_code == 400
        states = [each["status"]["value"] for each in served.client.get("/models").json()["data"]]
        assert states == ["loaded", "unloaded"]


def test_what_a_load_died_of_is_told_without_what_it_knows_of_this_machine():
    with Served(manager := AsyncModelManager()) as served:
        manager.register_model("one", "/home/me/one.gguf")
        assert served.door.service is not None
        models = served.door.service.models
        failures = [
            (
                ModelCorruptedError("`/home/me/one.gguf` ends"),
                ("model_corrupted", "`one.gguf` ends"),
            ),
            (OSError("/home/me"), ("internal_error", "`one` failed, and the log says why")),
            (LoadCancelledError("by somebody"), None),
        ]
        for error, told in failures:
            models.failed("one", error)
            status = served.client.get("/models").json()["data"][0]["status"]
            found = status.get("error")
            assert (found and (found["code"], found["message"])) == told
            assert ("failed" in status) == (told is not None)
    asyncio.run(manager.close())


def test_whoever_watches_hears_the_states_first_and_does_not_keep_the_server_up():
    _, model = scripted()
    with (
        model,
        Served(model, grace_s=60) as served,
        served.client.stream("GET", "/models/sse") as answer,
    ):
        lines = answer.iter_lines()
        told = json.loads(next(lines).removeprefix("data: "))
        assert (told["model"], told["event"]) == ("model", "model_status")
        assert (told["data"]["status"], told["data"]["is_default"]) == ("loaded", True)
        served.stop()
        assert list(lines) == [""]


# Who leaves, or is slow.


@pytest.mark.parametrize("body", [STREAMED, ASKED], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_place(body: dict[str, Any]):
    context = ScriptedContext(endless(), delay=0.001, n_ctx=10**9)
    with Model(context) as model, Served(model) as served:
        connection = served.connect()
        connection.sendall(post(COMPLETIONS, json.dumps({**body, "max_tokens": 32_768})))
        wait_until(lambda: context.metrics()["generated_tokens"] > 3)
        connection.close()
        wait_until(lambda: context.metrics()["running"] == 0)
        assert len(context.aborted) >= 1


def test_a_client_that_leaves_while_it_waits_for_a_place_is_never_served():
    context, model = scripted(n_seq_max=1)
    context.pause()
    with model, Served(model) as served:
        connection = served.connect()
        connection.sendall(post(COMPLETIONS, json.dumps(STREAMED)))
        wait_until(lambda: context.metrics()["waiting"] == 1)
        connection.close()
        wait_until(lambda: context.metrics()["waiting"] == 0)
        context.resume()
        assert served.client.post(COMPLETIONS, json=ASKED).status_code == 200
        assert context.metrics()["generated_tokens"] == 3


def test_a_client_that_does_not_read_is_cut_off():
    context = ScriptedContext(endless("x" * 60_000), delay=0.001, n_ctx=10**9)
    with Model(context) as model, Served(model, send_timeout_s=0.2) as served:
        connection = served.connect()
        connection.sendall(post(COMPLETIONS, json.dumps({**STREAMED, "max_tokens": 32_768})))
        wait_until(lambda: context.metrics()["running"] == 1)
        wait_until(lambda: context.metrics()["running"] == 0)
        assert not read_all(connection).endswith(b"0\r\n\r\n")
        connection.close()


def test_a_long_silence_is_filled_with_pings():
    context, model = scripted()
    context.pause()
    with model, Served(model, ping_s=0.02) as served:
        with served.client.stream("POST", COMPLETIONS, json=STREAMED) as answer:
            lines = answer.iter_lines()
            assert [next(lines), next(lines)] == [": ping", ""]
            context.resume()
            rest = "\n".join(line for line in lines if not line.startswith(":"))
        assert rest.rstrip().endswith("data: [DONE]")


def test_an_answer_that_takes_too_long_is_ended():
    context = ScriptedContext(endless(), delay=0.001, n_ctx=10**9)
    with Model(context) as model, Served(model, request_timeout_s=0.2) as served:
        whole = served.client.post(COMPLETIONS, json=ASKED)
        assert (whole.status_code, whole.json()["error"]["code"]) == (408, "generation_timeout")
        *_, error, done = events_of(served.client.post(COMPLETIONS, json=STREAMED).text)
        assert (error["error"]["code"], done) == ("generation_timeout", "[DONE]")
        wait_until(lambda: context.metrics()["running"] == 0)


def test_a_full_queue_is_told_with_a_time_to_come_back():
    context, model = scripted(n_seq_max=1, queue_size=1)
    context.pause()
    with model, Served(model) as served:
        connection = served.connect()
        connection.sendall(post(COMPLETIONS, json.dumps(ASKED)))
        wait_until(lambda: context.metrics()["waiting"] == 1)
        refused = served.client.post(COMPLETIONS, json=STREAMED)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        context.resume()
        assert status_of(read_all(connection)) == 200
        connection.close()


def test_an_engine_that_fails_midway_ends_the_stream_with_the_reason():
    script = {"Why?": ["one", BackendError("decode failed")], "And?": ["two"]}
    with Model(ScriptedContext(script)) as model, Served(model) as served:
        text = served.client.post(COMPLETIONS, json=STREAMED).text
        first, error, done = events_of(text)
        assert first["choices"][0]["text"] == "one"
        assert (error["error"]["message"], done) == ("decode failed", "[DONE]")
        answer = served.client.post(COMPLETIONS, json={"prompt": "And?"})
        assert answer.json()["choices"][0]["text"] == "two"


def test_answers_under_way_are_finished_at_the_end():
    context = ScriptedContext(["a"] * 50, delay=0.005)
    with (
        Model(context) as model,
        Served(model) as served,
        served.client.stream("POST", COMPLETIONS, json=STREAMED) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.stop()
        assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_answers_that_take_longer_than_the_grace_are_told_why_they_end():
    context = ScriptedContext(endless(), delay=0.005, n_ctx=10**9)
    with Model(context) as model, Served(model, grace_s=1) as served:
        with served.client.stream("POST", COMPLETIONS, json=STREAMED) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.stop()
            *_, error, _, done, _ = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"


async def test_an_outbox_gives_the_first_at_once_and_then_what_has_come():
    outbox = Outbox(batch=3)
    outbox.put(b"1")
    taken = [await anext(outbox)]
    outbox.acknowledge()
    for piece in (b"2", b"3", b"4", b"5"):
        outbox.put(piece)
    taken.append(await anext(outbox))  # a full batch does not wait
    outbox.acknowledge()
    outbox.put(b"6")
    taken.append(await anext(outbox))  # what is left goes when 10 ms have passed
    outbox.put(b"7")
    outbox.close()
    taken += [data async for data in outbox]
    assert taken == [(b"1", False), (b"2345", False), (b"6", False), (b"7", True)]


async def test_an_outbox_waits_for_nobody_while_it_can_write():
    outbox, written, taken = Outbox(batch=3), [], []
    outbox.write = lambda data: len(written) < 2 and not written.append(data)
    for piece in (b"1", b"2", b"3"):
        outbox.put(piece)
    assert written == [b"1"]
    while len(written) < 2:  # what is left goes when 10 ms have passed
        await asyncio.sleep(0.001)
    for piece in (b"4", b"5", b"6", b"7"):  # and what cannot be written is waited for
        outbox.put(piece)
    outbox.close()
    taken += [data async for data in outbox]
    assert (written, taken) == ([b"1", b"23"], [(b"4567", True)])


# Who may ask.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("192.168.1.5", 200),
        ("known.example", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 400),
        ("a b", 400),
        ("localhost:port", 400),
        ("localhost, evil.example", 400),
    ],
)
def test_only_known_hosts_are_answered_for(host: str, status: int):
    _, model = scripted()
    with model, Served(model, allowed_hosts=["Known.example"]) as served:
        answer = served.say(f"GET /health HTTP/1.1\r\nHost: {host}\r\n{_CLOSE}".encode())
        assert status_of(answer) == status


def test_two_hosts_are_none(served: Served):
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"
    assert status_of(served.say(two + _CLOSE.encode())) == 400


_CLOSE = "Connection: close\r\n\r\n"


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost.evil.example",
        "chrome-extension://other",
        "http://127.0.0.1:1",
        "",
    ],
)
def test_pages_of_others_are_refused_and_get_no_permission(served: Served, origin: str):
    for method, path in (("POST", COMPLETIONS), ("OPTIONS", COMPLETIONS), ("GET", "/v1/models")):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = served.client.request(method, path, headers=headers, json=ASKED)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_of_the_server_itself_may_ask(served: Served):
    answer = served.client.post(COMPLETIONS, json=ASKED, headers={"origin": served.url})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["https://app.example", "chrome-extension://abcdef"])
def test_an_origin_that_is_allowed_gets_permission_for_itself_alone(origin: str):
    _, model = scripted()
    rules: Any = {"allowed_origins": ["https://app.example", "chrome-extension://abcdef"]}
    with model, Served(model, api_keys=["secret"], **rules) as served:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        }
        asked = served.client.options(COMPLETIONS, headers=headers)  # browsers send no key here
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == origin
        assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "origin" in asked.headers["vary"].lower()
        refused = served.client.post(COMPLETIONS, json=ASKED, headers={"origin": origin})
        assert refused.status_code == 401  # and the page can see that
        assert refused.headers["access-control-allow-origin"] == origin
        key = {"origin": origin, "authorization": "Bearer secret"}
        answer = served.client.post(COMPLETIONS, json=STREAMED, headers=key)
        assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer first-ke"},
        {"authorization": "Bearer first-key2"},
        {"authorization": "Bearer"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": ""},
        {"x-api-key": "FIRST-KEY"},
        {"cookie": "key=first-key"},
    ],
)
def test_without_the_right_key_nothing_is_told(headers: dict[str, str]):
    _, model = scripted()
    with model, Served(model, api_keys=["first-key", "second"]) as served:
        paths = ("/v1/models", "/models/sse", "/metrics", "/slots", "/v1/nothing", "/%2e%2e/health")
        for path in paths:
            answer = served.client.get(f"{path}?api_key=first-key", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in (COMPLETIONS, "/models/load", "/models/unload", "/models/swap"):
            assert served.client.post(path, json=ASKED, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer  second"},
        {"x-api-key": "second"},
    ],
)
def test_each_key_opens_everything(headers: dict[str, str]):
    _, model = scripted()
    with model, Served(model, api_keys=["first-key", "second"]) as served:
        assert served.client.get("/v1/models", headers=headers).status_code == 200
        assert served.client.get("/health").status_code == 200


# What is no request.


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b'"x"', b"{", b'{"prompt": "a",}', b'{"prompt": "a"} x', b"NaN"),
        *(b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"prompt": "\\ud800"}', b"9" * 5000),
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "seed": 1e400}',
    ],
    ids=lambda body: str(body[:12]),
)
def test_a_body_that_is_no_request_is_refused(served: Served, body: bytes):
    answer = served.client.post(
        COMPLETIONS, content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_only_plain_json_is_read(served: Served, headers: dict[str, str]):
    answer = served.client.post(COMPLETIONS, content=json.dumps(ASKED), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", 'Application/JSON; charset="UTF-8"'])
def test_json_may_say_that_it_is_utf_8(served: Served, kind: str):
    headers = {"content-type": kind}
    answer = served.client.post(COMPLETIONS, content=json.dumps(ASKED), headers=headers)
    assert answer.status_code == 200


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not():
    _, model = scripted()
    large = json.dumps({"prompt": "a" * 3_000_000})
    with model, Served(model, max_body_mb=1) as served:
        headers = {"content-type": "application/json"}
        told = served.client.post(COMPLETIONS, content=large, headers=headers)
        pieces = (large[at : at + 50_000].encode() for at in range(0, len(large), 50_000))
        untold = served.client.post(COMPLETIONS, content=pieces, headers=headers)
        assert (told.status_code, untold.status_code) == (413, 413)
        expecting = post(COMPLETIONS, b"", "Expect: 100-continue")
        expecting = expecting.replace(b"Content-Length: 0", b"Content-Length: 99999999")
        assert status_of(served.say(expecting)) == 413
        assert served.client.post(COMPLETIONS, json=ASKED).status_code == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [("-1", 400), ("x", 400), ("5, 6", 400), ("5\r\nContent-Length: 6", 400), ("9" * 30, 400)],
)
def test_a_length_that_is_none_is_refused(served: Served, length: str, status: int):
    request = post(COMPLETIONS, b"").replace(b"Length: 0", f"Length: {length}".encode())
    assert status_of(served.say(request)) == status


def test_a_body_that_does_not_come_is_not_waited_for_for_ever():
    _, model = scripted()
    with model, Served(model, body_timeout_s=0.1) as served:
        request = post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 50")
        assert status_of(served.say(request + b"{")) == 408


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"a" * 1_000_000 + b"\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(10_000)),
        b"".join(b"X-%d: a\r\n" % number for number in range(101)),
        b"X: " + b"a" * 40_000,  # and it never ends
    ],
    ids=["large", "10,000", "101", "endless"],
)
def test_a_head_that_is_too_large_is_refused(served: Served, head: bytes):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head
    with served.connect() as connection:
        with contextlib.suppress(OSError):  # it may not want to hear the rest
            connection.sendall(request + (b"" if head.endswith(b"a") else b"\r\n"))
        assert status_of(read_all(connection)) == 431
    assert served.client.get("/health").status_code == 200


def test_a_path_that_is_too_long_is_refused_also_when_it_comes_at_once(served: Served):
    for length, status in ((31_000, 404), (33_000, 431), (200_000, 431)):
        request = b"GET /" + b"a" * length + b" HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE.encode()
        assert status_of(served.say(request)) == status
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(40))
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + _CLOSE.encode()
    assert status_of(served.say(request)) == 431


def test_whoever_dawdles_is_sent_away_and_nobody_else_notices():
    _, model = scripted()
    with model, Served(model, header_timeout_s=0.3, max_connections=30) as served:
        slow = [served.connect() for _ in range(20)]
        for connection in slow[:10]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert served.client.get("/health").status_code == 200
        answers = [status_of(read_all(connection)) for connection in slow]
        assert answers == [408] * 10 + [0] * 10
        for connection in slow:
            connection.close()


def test_one_connection_too_many_is_told_so_and_the_others_go_on():
    _, model = scripted()
    with model, Served(model, max_connections=3) as served:
        held = [served.connect() for _ in range(3)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        wait_until(lambda: status_of(served.say(b"")) == 503)
        held[0].sendall(b"Host: localhost\r\nConnection: close\r\n\r\n")
        assert status_of(read_all(held[0])) == 200
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "//v1/models", 404),
        ("GET", "/v1/../metrics", 404),
        ("GET", "/v1/%2e%2e/metrics", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%00", 404),
        ("GET", "/V1/models", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/health/", 404),
        ("GET", "/page/app.js", 404),
        ("GET", "/../http.py", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("OPTIONS", "/v1/models", 405),
        ("HEAD", "/health", 200),
    ],
)
def test_paths_are_taken_as_they_are(served: Served, method: str, path: str, status: int):
    answer = served.say(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{_CLOSE}".encode())
    assert status_of(answer) == status
    assert (b"\r\nallow: " in answer) == (status == 405)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE.encode(), 200),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE.encode(), 404),
        (b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n" + _CLOSE.encode(), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /health\r\n\r\n", 200),  # HTTP/0.9
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
    ],
)
def test_what_is_no_http_gets_a_clean_answer(served: Served, request_: bytes, status: int):
    assert status_of(served.say(request_)) == status
    assert served.client.get("/health").status_code == 200


def test_an_upgrade_to_something_else_is_ignored(served: Served):
    head = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\n"
    answer = served.say(f"{head}Upgrade: websocket\r\n\r\n".encode())
    assert status_of(answer) == 200


def test_a_connection_goes_on_after_an_error(served: Served):
    good, bad = json.dumps(ASKED), json.dumps({**ASKED, "temperature": 9})
    with served.connect() as connection:
        for body, status in ((bad, 400), (good, 200), ("{", 400), (good, 200)):
            connection.sendall(post(COMPLETIONS, body, close=False))
            head, _, rest = connection.recv(65_536).partition(b"\r\n\r\n")
            assert status_of(head) == status
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            assert len(rest) == length


def test_requests_in_one_breath_are_answered_in_order(served: Served):
    bodies = [json.dumps(ASKED), json.dumps({**ASKED, "n": 0}), json.dumps(ASKED)]
    request = b"".join(post(COMPLETIONS, body, close=False) for body in bodies[:2])
    answer = served.say(request + post(COMPLETIONS, bodies[2]))
    starts = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert starts == [b"200", b"400", b"200"]


ODD: list[Any] = [None, True, 0, -1, 1e300, 2**70, "", "x", [], [1], {}, {"a": 1}, [[]], [None]]
FIELDS = {
    "/v1/completions": (
        *("prompt", "model", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "seed"),
        *(
            "logit_bias",
            "logprobs",
            "echo",
            "best_of",
            "suffix",
            "stream_options",
            "top_k",
            "min_p",
        ),
        *(
            "repeat_penalty",
            "priority",
            "num_ctx",
            "keep_alive",
            "return_progress",
            "grammar",
            "json_schema",
            "response_format",
        ),
        *("timeout_s", "mirostat", "dry_sequence_breakers", "stop_tokens", "n_keep", "overflow"),
    ),
    "/v1/chat/completions": (
        *("messages", "tools", "tool_choice", "reasoning_effort", "chat_template_kwargs"),
        *("top_logprobs", "max_completion_tokens", "modalities", "functions"),
    ),
    "/v1/messages": (
        *("messages", "system", "max_tokens", "stop_sequences", "tools", "tool_choice", "thinking"),
    ),
    "/v1/responses": ("input", "instructions", "tools", "tool_choice", "text", "reasoning"),
    "/tokenize": ("content", "add_special", "with_pieces", "model"),
    "/detokenize": ("tokens",),
    "/apply-template": ("messages",),
    "/models/load": ("model", "keep_alive", "wait"),
    "/models/unload": ("model", "grace", "wait"),
    "/models/swap": ("model", "grace", "wait"),
}


@pytest.mark.parametrize("path", FIELDS)
def test_no_value_of_any_field_is_the_servers_fault(path: str):
    _, model = scripted("x")
    said = [{"role": "user", "content": "a"}]
    needed = {"prompt": "a", "messages": said, "input": "a", "max_tokens": 4, "content": "a"}
    needed |= {"model": "model"} if path.startswith("/models/") else {}
    with model, Served(model) as served:
        for field in FIELDS[path]:
            for value in ODD:
                answer = served.client.post(path, json={**needed, field: value})
                assert answer.status_code in (200, 400, 404), (field, value, answer.text)


NEEDED: dict[str, Any] = {
    "prompt": "a",
    "messages": [{"role": "user", "content": "a"}],
    "input": "a",
    "max_tokens": 4,
    "content": "a",
    "tokens": [0],
    "model": "model",
}
REFUSED = {"/models/unload"}
"""There is no manager behind these models."""


def test_what_is_described_is_what_is_taken():
    _, model = scripted("x")
    with model, Served(model) as served:
        paths = served.client.get("/openapi.json").json()["paths"]
        assert set(FIELDS) <= set(paths)
        for path, fields, required in described(paths):
            body = {name: NEEDED[name] for name in required}
            status = 400 if path in REFUSED else 200
            assert served.client.post(path, json=body).status_code == status
            for name in required:
                rest = {each: body[each] for each in required if each != name}
                assert served.client.post(path, json=rest).status_code == 400, (path, name)
            for name, schema in fields.items():
                for value, is_good in values_of(schema):
                    answer = served.client.post(path, json={**body, name: value})
                    good = is_good and path not in REFUSED
                    assert (answer.status_code == 200) == good, (path, name, value, answer.text)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_that_fits_the_description_or_nearly_does_is_the_servers_fault(
    mode: GenerationMode,
):
    _, model = scripted("x")
    with model, Served(model, max_body_mb=1) as served:
        description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        operations = [found.ok() for found in description.get_all_operations()]
        for operation in operations:
            if operation.path != "/models/sse":  # which has no end
                send_any_of(operation.as_strategy(generation_mode=mode))
    assert len(operations) == 20


def send_any_of(cases: SearchStrategy[schemathesis.Case]) -> None:
    @settings(
        max_examples=8,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def send(case: schemathesis.Case) -> None:
        answer = case.call(timeout=30)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    with contextlib.suppress(Unsatisfiable):  # nothing about it can be wrong
        send()


def described(paths: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Each path with the fields of its body, and the names of those that it needs."""
    for path, methods in paths.items():
        if "post" in methods:
            body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            yield path, body["properties"], body["required"]


def values_of(schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
    """Values at the edges of a range, beyond them, and of another type."""
    if "minimum" in schema and schema["maximum"] < 2**40:
        yield from ((schema["minimum"], True), (schema["maximum"], True), ("1", False))
        yield from ((schema["minimum"] - 5, False), (schema["maximum"] + 5, False))
    if schema.get("type") == "boolean":
        yield from ((True, True), (False, True), (1, False), ("true", False))
    if "enum" in schema:
        yield from ((value, True) for value in schema["enum"])
        yield ("another", False)


# What is left behind in a log.


def test_a_log_line_is_one_line_and_tells_no_secret(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    _, model = scripted()
    with model, Served(model, api_keys=["sesame-key"]) as served:
        key = {"authorization": "Bearer sesame-key"}
        body = {"prompt": "my-private-words", "model": "x\r\n\x1b[31mfake line"}
        served.client.post(COMPLETIONS, json=body, headers=key)
        served.client.post(COMPLETIONS, json={"prompt": "my-private-words"}, headers=key)
        served.client.get("/a%0d%0ab%1b[31m", headers={"authorization": "Bearer wrong-key"})
        served.client.get("/health", headers={"x-request-id": "from-outside.1"})
        served.client.get("/health", headers={"x-request-id": "no good"})
    lines = [record.getMessage() for record in caplog.records if "tabagent" in record.name]
    assert all(line.isprintable() for line in lines)
    written = "\n".join(lines)
    for secret in ("my-private-words", "sesame-key", "wrong-key", "no good"):
        assert secret not in written
    assert "from-outside.1 GET /health 200" in written
    assert "GET /a\\r\\nb\\x1b[31m 401" in written


def test_each_answer_has_an_id(served: Served):
    given = served.client.get("/health", headers={"x-request-id": "abc-1"})
    made = served.client.get("/health", headers={"x-request-id": "a b"})
    assert given.headers["x-request-id"] == "abc-1"
    assert made.headers["x-request-id"].startswith("req-")


# The page.


def test_the_page_is_complete_and_asks_nobody_else(served: Served):
    page = served.client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name, kind in (
        ("style.css", "text/css"),
        ("app.js", "text/javascript"),
        ("markdown.js", "text/javascript"),
    ):
        part = served.client.get(f"/{name}")
        assert part.headers["content-type"].startswith(kind)
        for foreign in ("src=", "@import", "url(", "innerHTML", "eval(", "importScripts"):
            assert foreign not in part.text
    assert "http" not in page.text.lower().replace("http-equiv", "")


def test_the_page_can_be_left_out():
    _, model = scripted()
    with model, Served(model, has_page=False) as served:
        assert served.client.get("/").status_code == 404
        assert served.client.get("/app.js").status_code == 404


# Rules.


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"api_keys": "abc"}, "api_keys"),
        ({"api_keys": [""]}, "api_keys"),
        ({"api_keys": ["a b"]}, "api_keys"),
        ({"allowed_origins": ["app.example"]}, "allowed_origins"),
        ({"allowed_origins": ["https://app.example/"]}, "allowed_origins"),
        ({"allowed_hosts": ["https://app.example"]}, "allowed_hosts"),
        ({"stream_batch": 0}, "stream_batch"),
        ({"max_body_mb": 1.5}, "max_body_mb"),
        ({"ping_s": 0}, "ping_s"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"has_page": 1}, "has_page"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(rules: dict[str, Any], name: str):
    with pytest.raises(InvalidRequestError) as caught:
        ServerConfig(**rules)
    assert caught.value.name == name


def test_a_key_is_never_part_of_an_error():
    with pytest.raises(InvalidRequestError) as caught:
        ServerConfig(api_keys=["my secret"])
    assert "secret" not in str(caught.value)


def test_host_names_are_read_as_browsers_write_them():
    told = ["a.example:80", "[::1]", "LOCALHOST.", "a:b:c", "a/b", "user@host"]
    assert [host_name(each) for each in told] == ["a.example", "[::1]", "localhost", *[None] * 3]
    assert printable("a\nb\x1b\u202e'\"") == "a\\nb\\x1b\\u202e\\'\""


def test_threads_of_clients_are_all_served():
    context = ScriptedContext(["a"] * 20, delay=0.0005, n_seq_max=4)
    with Model(context) as model, Served(model) as served:
        texts: list[str] = []

        def ask() -> None:
            with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as client:
                for _ in range(5):
                    *chunks, _ = events_of(client.post(COMPLETIONS, json=STREAMED).text)
                    texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == ["a" * 20] * 40
        assert context.metrics()["running"] == context.metrics()["waiting"] == 0
