"""A reader that takes nothing is let go, over real sockets and the server that Serve uses."""

import asyncio
import contextlib
import socket
import time
from types import SimpleNamespace

import pytest
import uvicorn

from jobs.slow_readers import SECONDS_VARIABLE, SlowReaders, middlewares
from tests.benchmarks.serve_runs import free_port

PIECES, PIECE = 400, b"x" * 100_000  # more than all buffers between two sockets hold


class Endless:
    """Sends many pieces, and notes how it ended."""

    def __init__(self) -> None:
        self.sent, self.end = 0, ""

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.create_task(self.hears_of_the_end(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(PIECES):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            self.sent += 1
            if self.end:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        gone.cancel()
        self.end = "whole"

    async def hears_of_the_end(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end = "gone"


async def visited(app, reads: bool, seconds: float) -> float:
    """Ask, read everything or nothing; the seconds until the server had ended the answer."""
    port = free_port()
    config = uvicorn.Config(app, port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port))
    reader.setblocking(False)
    loop, began = asyncio.get_running_loop(), time.monotonic()
    await loop.sock_sendall(reader, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    inner = app.app if isinstance(app, SlowReaders) else app
    while not inner.end and time.monotonic() - began < seconds:
        if reads:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(loop.sock_recv(reader, 1 << 20), 0.05)
        else:
            await asyncio.sleep(0.02)
    took = time.monotonic() - began
    reader.close()
    server.should_exit = True
    await task
    return took


def test_a_reader_that_takes_nothing_is_let_go_in_time():
    app = Endless()
    took = asyncio.run(visited(SlowReaders(app, 0.5), reads=False, seconds=20))
    assert app.end == "gone"
    assert 0.5 <= took < 15
    assert app.sent < PIECES


def test_without_the_layer_the_same_reader_holds_its_answer():
    app = Endless()
    asyncio.run(visited(app, reads=False, seconds=2))
    assert app.end != "whole"
    assert app.sent < PIECES


def test_a_reader_that_reads_gets_everything():
    app = Endless()
    asyncio.run(visited(SlowReaders(app, 5.0), reads=True, seconds=60))
    assert (app.end, app.sent) == ("whole", PIECES)


def test_a_server_without_a_transport_is_told_by_an_error():
    async def app(scope, receive, send):
        await send({"type": "http.response.start"})

    async def never(message):
        await asyncio.sleep(60)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(SlowReaders(app, 0.01)({"type": "http"}, lambda: None, never))


def test_other_connections_pass_untouched():
    seen = []

    async def app(scope, receive, send):
        seen.append(send)

    send = SimpleNamespace()
    asyncio.run(SlowReaders(app, 0.01)({"type": "lifespan"}, None, send))
    assert seen == [send]


def test_serves_proxy_gets_the_layer_with_the_seconds_of_the_environment(monkeypatch):
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    monkeypatch.setenv(SECONDS_VARIABLE, "7")
    [layer] = validate_http_proxy_callback_return(middlewares())
    assert layer.cls is SlowReaders
    assert layer.kwargs == {"seconds": 7.0}
