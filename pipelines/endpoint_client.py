"""Requests to an OpenAI-compatible endpoint: each is sent until it is answered or refused.

429, 408, 409, 5xx and broken connections pass with time: they are tried again, after what
`Retry-After` says or else a time that doubles up to a cap. Any other 4xx is an answer: this request
is wrong, and no other. 401, 403 and 404 would meet every request alike, so they end the job; but
where a probe asks for a route that an endpoint need not have, 404 is its answer.
"""

import asyncio
import random
import time
from collections.abc import Callable, Collection, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from cascade_model.errors import InputError, Unavailable, Unfinished
from cascade_model.settings import check

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
KEY_VARIABLE = "CASCADE_API_KEY"
"""Holds the key of an endpoint; it stands in no file and no log."""
_MET_BY_ALL = (401, 403, 404)
_BUSY = (408, 409, 429)
_ANSWER_SECONDS = 600.0
"""A request without an answer for this long counts as a broken connection."""


class Refused(Exception):
    """A request that the endpoint calls wrong; the message is the endpoint's."""


class EndpointClient:
    """One endpoint, `in_flight` requests at once; used within one event loop."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        in_flight: int = 32,
        patience_seconds: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`patience_seconds`: so long may a request fail, or while it is told to wait may nobody be
        answered, before `Unavailable` is raised."""
        self.url = base_url(url)
        self._patience, self._clock = patience_seconds, clock
        self._places = asyncio.Semaphore(in_flight)
        self._answered = clock()
        check(
            not key or (key.isascii() and key.isprintable() and " " not in key),
            f"{KEY_VARIABLE} has white space or letters that no HTTP header takes; set it to the "
            "key alone",
        )
        self._has_key = bool(key)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10.0),
            transport=transport,
        )

    async def get(self, route: str) -> dict[str, Any]:
        """The answer to a GET."""
        return await self._ask("GET", route, None)

    async def post(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body; `Refused` where it is wrong, `Unavailable` where nobody answers."""
        return await self._ask("POST", route, body)

    async def probe(
        self, route: str, body: Mapping[str, Any] | None = None, absent: Collection[int] = (404,)
    ) -> dict[str, Any] | None:
        """The answer of a route that an endpoint need not have (a GET, or a POST of `body`); None
        where it has none, which it says by a status of `absent`, or by no JSON object."""
        response = await self._response("GET" if body is None else "POST", route, body)
        status = response.status_code
        if status in _MET_BY_ALL and status not in absent:
            return self._taken(response)
        return _object_in(response) if status == 200 else None

    async def close(self) -> None:
        """Give the connections up."""
        await self._http.aclose()

    async def _ask(self, method: str, route: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        return self._taken(await self._response(method, route, body))

    async def _response(
        self, method: str, route: str, body: Mapping[str, Any] | None
    ) -> httpx.Response:
        """The first response that is no passing failure."""
        failures, failing_since = 0, None
        while True:
            try:
                async with self._places:
                    response = await self._http.request(method, self.url + route, json=body)
                status, reason, after = response.status_code, "", retry_after(response)
            except httpx.TransportError as error:
                response, status, after = None, 0, None
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if response is not None and not passes_with_time(status):
                self._answered = self._clock()
                return response
            now = self._clock()
            failing_since = now if failing_since is None else failing_since
            # Who is told to wait has an endpoint that lives: it may be busy with the others.
            is_told = status == 429 or after is not None
            since = max(failing_since, self._answered) if is_told else failing_since
            reason = reason or _message(response)
            if now - since + (after or 0.0) >= self._patience:
                raise Unavailable(
                    f"endpoint={self.url} does not answer ({reason[:200]}) within "
                    f"patience_seconds={self._patience:g}; run the same command again when it "
                    "does, which goes on from here"
                )
            failures += 1
            await asyncio.sleep(wait_seconds(failures, after))

    def _taken(self, response: httpx.Response) -> dict[str, Any]:
        status = response.status_code
        if status in _MET_BY_ALL:
            told = _message(response)[:200]
            raise Unfinished(
                f"endpoint={self.url} answers {status} ({told}){self._cure(status)} and run the "
                "same command again"
            )
        if 400 <= status < 500:
            raise Refused(_message(response))
        answer = _object_in(response)
        if status == 200 and answer is not None:
            return answer
        raise Unfinished(
            f"endpoint={self.url} answers {status} without a JSON object, which is no "
            "OpenAI-compatible answer; check the URL"
        )

    def _cure(self, status: int) -> str:
        """Of an answer that every request would meet."""
        if status == 404:
            return "; check endpoint and model_name"
        if not self._has_key:
            return (
                f" and {KEY_VARIABLE} is not set in this process; set it to a key of the endpoint"
            )
        if status == 401:
            return f" to the key in {KEY_VARIABLE}; set it to one that the endpoint knows"
        return f" to the key in {KEY_VARIABLE}; give it the rights, or set another"


def base_url(url: str) -> str:
    """The URL without a closing slash or `/v1`; `InputError` where it is none or tells a secret."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"endpoint={url} is no http URL; use http://127.0.0.1:8000")
    if parsed.userinfo or parsed.query:
        raise InputError(
            f"endpoint of {parsed.host} holds a password or a query, which would be shown; set "
            f"{KEY_VARIABLE} instead"
        )
    return url.rstrip("/").removesuffix("/v1")


def passes_with_time(status: int) -> bool:
    """Whether the same request may be answered later."""
    return status in _BUSY or status >= 500


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to wait: a number or a date of `Retry-After`."""
    told = response.headers.get("Retry-After")
    if told is None:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass  # a date, or nothing
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def wait_seconds(failures: int, told: float | None) -> float:
    """How long to wait after so many failures: what was told and a little more, so that not all
    come back at once, or a doubling time up to the cap."""
    if told is not None:
        return told + random.uniform(0.0, 0.1 * told + 0.05)
    longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (min(failures, 16) - 1))
    return random.uniform(longest / 2, longest)


def _object_in(response: httpx.Response) -> dict[str, Any] | None:
    """The JSON object of a response, if it holds one."""
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _message(response: httpx.Response | None) -> str:
    """What an error says, in one line."""
    if response is None:
        return ""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text or response.reason_phrase
    return f"{response.status_code}: {' '.join(str(said).split())}"[:400]
