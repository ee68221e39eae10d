"""Ends the answers whose reader takes nothing any more, so that nobody holds memory for ever.

An ASGI server's `send` returns as soon as there is room in the socket's buffer. Serve's proxy has
it, and puts this layer there by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`; behind HAProxy the
ingress replica has it.
"""

import asyncio
import logging
import os
import socket
import struct
from typing import Any

SECONDS_VARIABLE = "CASCADE_READER_TIMEOUT_SECONDS"
DEFAULT_SECONDS = 60.0
log = logging.getLogger("cascade.endpoint")


class SlowReaders:
    """ASGI layer: a `send` that takes longer than `seconds` aborts the connection."""

    def __init__(self, app: Any, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_in_time(message: Any) -> None:
            try:
                await asyncio.wait_for(send(message), self.seconds)
            except TimeoutError:
                log.warning("a reader took nothing for %g s; its answer is ended", self.seconds)
                _abort(receive)

        await self.app(scope, receive, send_in_time)


def middlewares() -> list[Any]:
    """For Serve's proxy, which calls this when it starts."""
    from starlette.middleware import Middleware

    seconds = float(os.environ.get(SECONDS_VARIABLE, DEFAULT_SECONDS))
    return [Middleware(SlowReaders, seconds=seconds)]


def _abort(receive: Any) -> None:
    """Drop the connection, as if the client had hung up; closing it kindly would wait for the
    reader again. In uvicorn `receive` is a method of the object that has the transport."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is None:
        raise OSError("the reader is gone")
    connection = transport.get_extra_info("socket")
    if connection is not None:  # by a reset: the kernel too lets go of what it holds, megabytes
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
