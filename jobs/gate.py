"""What stands before every route: request id, API key, size of the body, errors in one shape."""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from cascade_model.errors import InputError
from jobs.openai_protocol import MAX_BODY_BYTES, MAX_HEADERS, ApiError
from jobs.page_routes import PAGE_FILES

KEYS_VARIABLE = "CASCADE_API_KEYS"
OPEN_PATH = "/health"
OPEN_PATHS = frozenset({OPEN_PATH, *PAGE_FILES})
"""What needs no key; the page asks for one before it asks the API for anything."""
log = logging.getLogger("cascade.endpoint")


class Keys(Protocol):
    """Whatever tells a right key from a wrong one."""

    def accepts(self, authorization: str) -> bool:
        """Whether an `Authorization: Bearer KEY` header holds one of the keys."""
        ...


class ApiKeys:
    """The accepted keys as SHA-256 digests; compared in constant time, never logged."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def accepts(self, authorization: str) -> bool:
        """Whether an `Authorization: Bearer KEY` header holds one of the keys."""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme.lower() == "bearer"


def load_api_keys(file: str | None, environment: str = "") -> ApiKeys:
    """Keys from a file (one a line, `#` starts a comment) and from a comma-separated variable."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"api_keys={file} cannot be read ({error}); give a text file with one key a line"
        ) from None
    keys = [line.strip() for line in [*lines, *environment.split(",")]]
    return ApiKeys([key for key in keys if key and not key.startswith("#")])


class RotatingKeys:
    """The keys of a file and of the variable, read again when either changes.

    A file that cannot be read any more leaves the keys as they were, and is told of once; one that
    is there counts as it is, so write a new one beside it and rename.
    """

    def __init__(
        self,
        file: str | None,
        every_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `InputError` for a file that cannot be read at the start."""
        self._file, self._every, self._clock = file, every_seconds, clock
        self._state = self._look()
        self._keys = self._read()
        self._next = clock() + every_seconds

    def accepts(self, authorization: str) -> bool:
        """See `Keys`; looks at the file at most once in `every_seconds`."""
        if self._clock() >= self._next:
            self._next = self._clock() + self._every
            self._renew()
        return self._keys.accepts(authorization)

    def _renew(self) -> None:
        state = self._look()
        if state == self._state:
            return
        self._state = state
        try:
            self._keys = self._read()
            log.info("the API keys were read again: %d", len(self._keys))
        except InputError:
            log.error("the file of API keys cannot be read; the keys stay as they were")

    def _read(self) -> ApiKeys:
        return load_api_keys(self._file, os.environ.get(KEYS_VARIABLE, ""))

    def _look(self) -> tuple[Any, ...]:
        """What tells that something changed."""
        variable = os.environ.get(KEYS_VARIABLE, "")
        try:
            found = os.stat(self._file) if self._file else None
        except OSError:
            return (variable, "unreadable")
        return (variable, found and (found.st_mtime_ns, found.st_size, found.st_ino))


def error_response(error: ApiError) -> JSONResponse:
    """The error as an HTTP answer."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def http_error(request: Request, error: HTTPException) -> JSONResponse:
    """The framework's own errors (404 route, 405, 413) in our shape."""
    codes = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large"}
    place = f"{request.method} {request.url.path}"
    message = f"{error.detail}: {place}" if error.status_code in (404, 405) else str(error.detail)
    wrapped = ApiError(
        error.status_code,
        message,
        code=codes.get(error.status_code),
        headers=dict(error.headers or {}),
    )
    return error_response(wrapped)


class Gate:
    """Outermost ASGI layer: request id, key, size of the body, and the last resort of a 500."""

    def __init__(self, app: Any, keys: Keys | None, behind_serve: bool) -> None:
        """`behind_serve`: Ray Serve's proxy has named the request and will answer the name."""
        self.app = app
        self.keys = keys
        self.behind_serve = behind_serve

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"") if self.behind_serve else b""
        request_id = given.decode("latin-1") or f"req_{secrets.token_hex(12)}"
        started = False

        async def send_with_id(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not given:
                    name = (b"x-request-id", request_id.encode())
                    message["headers"] = [*message.get("headers", []), name]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else error_response(refusal)
            await app(scope, _limited(receive), send_with_id)
        except ClientDisconnect:
            log.debug("request %s: the client left while sending", request_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            failure = ApiError(500, "The server failed.", type="server_error", code="internal")
            await error_response(failure)(scope, receive, send_with_id)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = dict(scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS:
            return ApiError(431, f"There are over {MAX_HEADERS} headers.", code="too_many_headers")
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        is_open = scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS
        if self.keys is not None and not is_open and not self.keys.accepts(authorization):
            return ApiError(
                401,
                "No valid API key; send the header `Authorization: Bearer KEY` with one of the "
                f"server's keys, which its {KEYS_VARIABLE} or the file of its --api-keys holds.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return ApiError(
                413, f"The body is over {MAX_BODY_BYTES} bytes.", code="request_too_large"
            )
        return None


def _limited(receive: Any) -> Any:
    """`receive` that refuses a body, sent in pieces, once it is too large."""
    size = 0

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise StarletteHTTPException(413, f"The body is over {MAX_BODY_BYTES} bytes.")
        return message

    return counted
