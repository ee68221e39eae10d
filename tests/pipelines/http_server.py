"""A real HTTP server on loopback, in a thread, for as long as a test needs one."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of an application that is served."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Scripted:
    """An endpoint that gives the answers of a list, then sound ones; it notes what it was asked."""

    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[float, dict[str, str], dict[str, Any]]] = []
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "a"}, {"id": "b"}]})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append((time.monotonic(), dict(request.headers), body))
        return self.answers.pop(0) if self.answers else sound(body["prompt"])


def sound(prompt: str) -> Response:
    """An answer as another project's server would give it."""
    return JSONResponse(
        {
            "choices": [{"index": 0, "text": f"{prompt}!", "finish_reason": "stop"}],
            "usage": {"completion_tokens": 2},
        }
    )


def error(status: int, message: str = "no", **headers: str) -> Response:
    """An error in OpenAI's shape."""
    return JSONResponse({"error": {"message": message}}, status, headers)
