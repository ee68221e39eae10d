"""Bodies read strictly: JSON by its RFC, and what others let pass refused with a reason.

Python's reader takes NaN, the last of two equal names and halves of surrogate pairs, and fails in
ways of its own on deep nesting and on long numbers.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from jobs.openai_protocol import ApiError


def read_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8; an `ApiError` 400 that tells what is wrong."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except UnicodeEncodeError:
        raise _invalid("a text holds half of a surrogate pair") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from None
    except ValueError:  # a number of thousands of digits
        raise _invalid("a number is too long") from None
    return value


def _invalid(why: str) -> ApiError:
    return ApiError(400, f"The body is not valid JSON: {why}.", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _invalid(f"the name {json.dumps(twice[:64])} stands twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise _invalid(f"{name} is no JSON number")


class StrictRoute(APIRoute):
    """A route whose body is `application/json`, read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, given the value that was read."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(
                    415,
                    f"The content type is `{kind[:100]}`; send `application/json`.",
                    code="unsupported_media_type",
                )
            value = read_json(await request.body())
            return await handler(_Read(request.scope, request.receive, value))

        return strict


class _Read(Request):
    """A request whose body was read before."""

    def __init__(self, scope: Any, receive: Any, value: Any) -> None:
        super().__init__(scope, receive)
        self._value = value

    async def body(self) -> bytes:
        """Not empty, for FastAPI to ask for the value."""
        return b"read"

    async def json(self) -> Any:
        """The value."""
        return self._value
