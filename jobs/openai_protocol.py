"""What every answer of the OpenAI protocol keeps to: its limits, and errors of four fields."""

from typing import Any

from fastapi.exceptions import RequestValidationError

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_REQUESTED_TOKENS = 1_000_000
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_LOGPROBS = 20
MAX_BODY_BYTES = 8_000_000
MAX_HEADERS = 100


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = error_body(message, type=type, param=param, code=code)


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """`{"error": {message, type, param, code}}`, always all four."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def overloaded() -> ApiError:
    """429 with the time to wait."""
    return ApiError(
        429,
        "The server is at its limit of running requests; try again shortly.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def validation_error(error: RequestValidationError) -> ApiError:
    """A 400 that names the first wrong field (FastAPI's own answer would be a 422)."""
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        param = getattr(cause, "param", None)
        return ApiError(400, str(cause), param=param, code=getattr(cause, "code", "invalid_value"))
    name = str(place[0]) if place else None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"`{name}`: {first['msg']}." if name else f"The body: {first['msg']}."
    return ApiError(400, message, param=name, code=code)


class FieldError(ValueError):
    """A field that is refused by name; carried through pydantic."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def require_total(values: list[Any], limit: int, param: str, unit: str) -> None:
    """Refuse (`FieldError`) prompts that are too long together."""
    total = sum(map(len, values))
    if total > limit:
        raise FieldError(f"`{param}` has {total} {unit} in all, over {limit}; send less.", param)
