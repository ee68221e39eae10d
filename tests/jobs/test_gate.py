"""What stands before every route, on bare ASGI messages."""

import asyncio
import json
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect

from cascade_model.errors import InputError
from jobs.gate import KEYS_VARIABLE, ApiKeys, Gate, RotatingKeys, load_api_keys
from jobs.openai_protocol import MAX_BODY_BYTES

BEARER = [(b"authorization", b"Bearer right")]


async def echo(scope, receive, send):
    """An application that reads the whole body and answers its size."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def visit(app, headers=(), path="/v1/models", pieces=(b"",), keys=("right",), behind_serve=False):
    """Status, headers and body of one request through the gate."""
    gate = Gate(app, None if keys is None else ApiKeys(keys), behind_serve)
    bodies = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces)
    ]
    waiting, sent = iter(bodies), []

    async def receive():
        return next(waiting)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "GET", "headers": list(headers)}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])


def test_a_key_is_accepted_only_whole_and_as_a_bearer():
    keys = ApiKeys(["right", "other"])
    assert len(keys) == 2
    assert keys.accepts("Bearer right")
    assert keys.accepts("bearer  other ")
    for header in ("", "right", "Basic right", "Bearer", "Bearer righ", "Bearer right right"):
        assert not keys.accepts(header)
    assert not ApiKeys([]).accepts("Bearer ")


def test_keys_come_from_a_file_and_a_variable_without_comments(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nalpha \n")
    keys = load_api_keys(str(file), " beta,,# gamma")
    assert len(keys) == 2
    assert keys.accepts("Bearer alpha")
    assert keys.accepts("Bearer beta")
    assert len(load_api_keys(None)) == 0
    with pytest.raises(InputError, match=r"api_keys=.*none cannot be read"):
        load_api_keys(str(tmp_path / "none"))


def test_without_a_key_only_health_is_open():
    status, headers, body = visit(echo)
    assert status == 401
    assert headers[b"www-authenticate"] == b"Bearer"
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_api_key"
    assert f"its {KEYS_VARIABLE} or the file of its --api-keys" in error["message"]
    assert visit(echo, path="/health")[0] == 200
    assert visit(echo, BEARER)[0] == 200
    assert visit(echo, keys=None)[0] == 200


def test_every_answer_has_an_id_and_behind_serve_only_one():
    _, headers, _ = visit(echo, BEARER)
    assert headers[b"x-request-id"].startswith(b"req_")
    named = [*BEARER, (b"x-request-id", b"mine")]
    assert visit(echo, named)[1][b"x-request-id"] != b"mine"
    assert b"x-request-id" not in visit(echo, named, behind_serve=True)[1]


def test_a_large_body_is_refused_by_its_header_and_by_its_pieces():
    large = str(MAX_BODY_BYTES + 1).encode()
    status, _, body = visit(echo, [*BEARER, (b"content-length", large)])
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    pieces = [b"x" * (MAX_BODY_BYTES // 4)] * 4
    assert visit(echo, BEARER, pieces=pieces)[2] == str(MAX_BODY_BYTES).encode()
    # The framework turns what the gate raises here into a 413; without it, it is a 500.
    assert visit(echo, BEARER, pieces=[*pieces, b"x"])[0] == 500


def test_a_failure_is_a_500_without_its_words_and_raises_once_an_answer_began():
    async def fails(scope, receive, send):
        raise ValueError("secret detail")

    async def fails_late(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret detail")

    status, _, body = visit(fails, BEARER)
    assert status == 500
    assert b"secret" not in body
    with pytest.raises(ValueError, match="secret"):
        visit(fails_late, BEARER)


def test_what_is_no_http_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Gate(app, ApiKeys(["right"]), False)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


class Clock:
    """Time that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rotating(tmp_path, monkeypatch):
    """Keys of a file, the file, and what lets their time pass."""
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file, clock = tmp_path / "keys", Clock()
    file.write_text("old\n")
    keys = RotatingKeys(str(file), every_seconds=1.0, clock=clock)

    def later() -> None:
        clock.now += 1.5

    return keys, file, later


def accepted(keys, *names: str) -> list[str]:
    return [name for name in names if keys.accepts(f"Bearer {name}")]


def test_keys_are_rotated_without_a_restart(rotating, monkeypatch):
    keys, file, later = rotating
    file.write_text("old\nnew\n")
    assert accepted(keys, "old", "new") == ["old"]  # not looked at again yet
    later()
    assert accepted(keys, "old", "new") == ["old", "new"]
    fresh = file.with_name("fresh")
    fresh.write_text("new\n")
    fresh.rename(file)
    later()
    assert accepted(keys, "old", "new") == ["new"]
    monkeypatch.setenv(KEYS_VARIABLE, "third")
    later()
    assert accepted(keys, "new", "third") == ["new", "third"]


def test_a_file_that_goes_leaves_the_keys_and_one_that_is_emptied_takes_them(rotating, caplog):
    keys, file, later = rotating
    file.rename(file.with_name("away"))
    for _ in range(3):
        later()
        assert accepted(keys, "old") == ["old"]
    assert len(caplog.records) == 1
    file.write_text("")
    later()
    assert accepted(keys, "old", "") == []
    file.write_text("old\nsesame\n")
    later()
    assert accepted(keys, "old", "sesame") == ["old", "sesame"]
    assert not any(word in caplog.text for word in ("old", "sesame"))


def test_an_unchanged_file_is_not_read_again(rotating, monkeypatch):
    keys, _, later = rotating
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read again"))
    later()
    assert accepted(keys, "old") == ["old"]


def test_a_client_that_leaves_while_sending_is_no_failure(caplog):
    async def reads(scope, receive, send):
        raise ClientDisconnect

    gate, sent = Gate(reads, None, False), []
    scope = {"type": "http", "path": "/", "method": "POST", "headers": []}
    asyncio.run(gate(scope, None, sent.append))
    assert sent == []
    assert not caplog.records


def test_a_path_behind_a_prefix_is_judged_without_it():
    async def visited(path: str) -> int:
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "path": path, "root_path": "/tiny", "method": "GET", "headers": []}
        await Gate(echo, ApiKeys(["right"]), False)(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(visited("/tiny/health")) == 200
    assert asyncio.run(visited("/tiny/ready")) == 401
