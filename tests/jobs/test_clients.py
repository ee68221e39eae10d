"""The real client over real HTTP, and two hundred hostile requests, against one server process."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
import uvicorn

from jobs.routes import build_api
from tests.jobs.client_cases import CASES, as_the_synchronous_one
from tests.jobs.tiny_endpoint import endpoint, tiny_llm


@contextlib.contextmanager
def http_server(api) -> Iterator[str]:
    """The URL of an application on loopback, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def url():
    with http_server(build_api(endpoint(tiny_llm(), max_choices_in_flight=64))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_real_client_sees(client, case):
    case(client, "tiny")


def test_the_asynchronous_client_sees_the_same(client, url):
    other = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="right", max_retries=0)
    assert asyncio.run(as_the_synchronous_one(client, other, "tiny")) == 6


NUMBERS = [-1, 0, 2**31, 2**63, -(2**63) - 1, 1.5, "1", True, [], {}, 1e308, -0.0]
NUMBER_FIELDS = ["max_tokens", "n", "seed", "temperature", "top_p", "logprobs", "steps_per_block"]
NAMES = ["", "x" * 5000, "__class__", "model\x00", "\u202e", "a.b[0]", "$ref", "constructor"]
TEXTS = ["\x00" * 500, "\U0010ffff" * 500, "e" + "\u0301" * 3000, "<|mask|>" * 300, "\ufeff", " "]
RAW = [
    b"", b"null", b"[]", b'"x"', b"1", b"{", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000,
    b'{"model": "tiny", "model": "tiny", "prompt": "a"}', b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "\\udfff", "prompt": "a"}', b'{"model": NaN, "prompt": "a"}', b"9" * 100_000,
    b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 9000 + b"}",
    b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', b" " * 1_000_000, b"x" * 9_000_000,
]  # fmt: skip


def body_of(**fields) -> bytes:
    """A short completion with these fields."""
    return json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2, **fields}).encode()


def bodies() -> Iterator[bytes]:
    """Bodies for a completion that nobody should send."""
    yield from RAW
    for field in NUMBER_FIELDS:
        for value in NUMBERS:
            yield json.dumps(
                {"model": "tiny", "prompt": "a", "max_tokens": 2, field: value}
            ).encode()
    for name in NAMES:
        yield body_of(**{name: 1})
        yield body_of(model=name)
    for text in TEXTS:
        yield body_of(prompt=text)
        yield json.dumps(
            {"model": "tiny", "prompt": "a", "stop": text[:9], "max_tokens": 2}
        ).encode()
        yield body_of(prompt=text, echo=True, logprobs=20)
    for prompt in ([], [[]], [""] * 65, [[97], "a"], [[-1]], [2**40], [258], [257], {"a": 1},
                   [[[1]]], [None], "a" * 999_999, [97] * 900_000):  # fmt: skip
        yield body_of(prompt=prompt)


def requests() -> Iterator[dict]:
    """Two hundred requests and some."""
    json_headers = {"Authorization": "Bearer right", "Content-Type": "application/json"}
    for body in bodies():
        yield {"url": "/v1/completions", "content": body, "headers": json_headers}
    chats = [
        [{"role": "user"}], [{"role": "root", "content": "a"}], [{"content": "a"}], "a", [],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
        [{"role": "user", "content": "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}"}],
        [{"role": "user", "content": "a", "tool_calls": [{}]}], [["a"]], [{}] * 2000,
    ]  # fmt: skip
    for messages in chats:
        body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 2}).encode()
        yield {"url": "/v1/chat/completions", "content": body, "headers": json_headers}
    for path in ("/tokenize", "/detokenize"):
        for body in RAW:
            yield {"url": path, "content": body, "headers": json_headers}
    for kind in ("", "text/plain", "multipart/form-data", "application/json; charset=utf-16"):
        headers = {"Authorization": "Bearer right", "Content-Type": kind}
        yield {"url": "/v1/completions", "content": b"{}", "headers": headers}
    for key in ("", "Bearer", "Bearer " + "x" * 4000, "Basic cmlnaHQ=", "Bearer right\x01"):
        yield {"url": "/v1/models", "headers": {"Authorization": key}, "method": "GET"}
    for path in ("/v1/../secret", "/%00", "/v1/models/%ff", "/v1//completions", "/" + "a" * 4000):
        yield {"url": path, "headers": json_headers, "method": "GET"}
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
        yield {"url": "/v1/completions", "headers": json_headers, "method": method}


def resident() -> int:
    return psutil.Process().memory_info().rss


def statuses_of(url: str, hostile: list[dict]) -> list[int]:
    """How each was answered; every error has the four fields and a request id, and after each
    tenth an honest request is answered."""
    good = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "seed": 1}
    found = []
    with httpx.Client(base_url=url, timeout=240) as http:
        for number, request in enumerate(hostile):
            reply = http.request(request.pop("method", "POST"), **request)
            found.append(reply.status_code)
            if reply.status_code >= 400 and reply.headers.get("x-request-id"):
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            elif reply.status_code >= 400:  # below HTTP: the server's own parser
                assert reply.text == "Invalid HTTP request received."
            if number % 10 == 0:
                honest = http.post(
                    "/v1/completions", json=good, headers={"Authorization": "Bearer right"}
                )
                assert honest.status_code == 200
    return found


def test_two_hundred_hostile_requests_fail_none_of_the_others(url):
    hostile = list(requests())
    assert len(hostile) >= 200
    statuses_of(url, list(requests())[:40])  # what is loaded at the first use
    before = resident()
    found = statuses_of(url, hostile)
    assert max(found) < 500
    assert found.count(200) < len(found) / 3
    assert resident() - before < 200 * 2**20


def test_a_server_that_fails_hostile_requests_is_found():
    """The control: the same requests before a server that reads them carelessly."""
    from fastapi import FastAPI, Request

    careless = FastAPI()

    @careless.api_route("/{path:path}", methods=["GET", "POST"])
    async def read(request: Request) -> dict:
        body = json.loads(await request.body())
        return {"length": len(body["prompt"])}

    found = []
    with http_server(careless) as url, httpx.Client(base_url=url) as http:
        for each in requests():
            with contextlib.suppress(httpx.TransportError):  # it hangs up on some, too
                found.append(http.request(each.pop("method", "POST"), **each).status_code)
    assert found.count(500) > 20, found
