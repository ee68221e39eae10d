"""What stands before every route: request id, API key, size of the body, errors in one shape."""

import hashlib
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cascade_model.errors import InputError
from jobs.openai_protocol import MAX_BODY_BYTES, ApiError

log = logging.getLogger("cascade.endpoint")


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

    def __init__(self, app: Any, keys: ApiKeys | None, behind_serve: bool) -> None:
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
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise
            failure = ApiError(500, "The server failed.", type="server_error", code="internal")
            await error_response(failure)(scope, receive, send_with_id)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = dict(scope["headers"])
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        is_open = self.keys is None or scope["path"] == "/health"
        if not is_open and self.keys is not None and not self.keys.accepts(authorization):
            return ApiError(
                401,
                "No valid API key; send the header `Authorization: Bearer KEY`.",
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
