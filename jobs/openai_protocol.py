"""What every answer of the OpenAI protocol keeps to: its limits, and errors of four fields."""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from cascade_model.nearest import cure

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


class FieldError(ValueError):
    """A field that is refused by name; carried through pydantic."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownField(FieldError):
    """A field that there is not, with the name that may have been meant, or all that there are."""

    def __init__(self, name: str, known: Collection[str], place: str = "") -> None:
        """`place`: of the object around it, such as `messages[0]`; none: the body itself."""
        self.name, self.known, prefix = name[:64], known, f"{place}." if place else ""
        told = cure(self.name, known, prefix, cutoff=0.6)
        super().__init__(
            f"`{prefix}{self.name}` is not known; {told}", self.name, "unknown_parameter"
        )

    def at(self, place: str) -> "UnknownField":
        """The same, told with its place, which the object that has it does not know."""
        return UnknownField(self.name, self.known, place)


def require_known(kind: type[BaseModel], body: Any) -> None:
    """Refuse (`UnknownField`) an object with a field that its kind does not have."""
    for name in body if isinstance(body, dict) else ():
        if name not in kind.model_fields:
            raise UnknownField(name, kind.model_fields)


class StrictBody(BaseModel):
    """An object in which every field is known, of its type, and refused by name where it is not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _require_known(cls, body: Any) -> Any:
        require_known(cls, body)
        return body


def require_total(values: list[Any], limit: int, param: str, unit: str) -> None:
    """Refuse (`FieldError`) prompts that are too long together."""
    total = sum(map(len, values))
    if total > limit:
        raise FieldError(f"`{param}` has {total} {unit} in all, over {limit}; send less.", param)
