"""A client that looks closely at streams: what came, whether they ended, and how. No retries."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

KEY = "sesame"


@dataclass
class Told:
    """What a server told of one request."""

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list] = field(default_factory=dict)
    fingerprints: set[str] = field(default_factory=set)
    completion_tokens: int = 0
    error: dict[str, Any] | None = None
    is_done: bool = False
    broke: str = ""
    """The connection's own error."""
    retry_after: str | None = None
    pieces: int = 0

    @property
    def is_whole(self) -> bool:
        """Every choice with its reason, and the stream with its end."""
        return self.status == 200 and self.is_done and self.texts.keys() == self.reasons.keys()

    @property
    def is_told(self) -> bool:
        """Whole, or with an error that says so: no silence."""
        return self.is_whole or self.error is not None

    def content(self) -> tuple:
        """What must be equal to the byte, whatever happened on the way."""
        return self.texts, self.reasons, self.logprobs, self.completion_tokens

    def add(self, event: dict[str, Any]) -> None:
        """One event of a stream."""
        self.pieces += 1
        self.error = event.get("error", self.error)
        if "system_fingerprint" in event:
            self.fingerprints.add(event["system_fingerprint"])
        for choice in event.get("choices", []):
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            if choice["logprobs"]:
                self.logprobs.setdefault(index, []).append(choice["logprobs"])
            if choice["finish_reason"] is not None:
                self.reasons[index] = choice["finish_reason"]
        if event.get("usage"):
            self.completion_tokens = event["usage"]["completion_tokens"]


def client(url: str) -> httpx.AsyncClient:
    """For many requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits)


async def streamed(
    http: httpx.AsyncClient,
    request: dict[str, Any],
    on_piece: Callable[[Told], Any] = lambda told: None,
) -> Told:
    """One completion, streamed; `on_piece` may raise `EOFError` to hang up."""
    told = Told()
    body = {**request, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            told.status = response.status_code
            told.retry_after = response.headers.get("retry-after")
            if told.status != 200:
                await response.aread()
                told.error = response.json()["error"]
                return told
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    told.is_done = True
                elif line.startswith("data: "):
                    told.add(json.loads(line[6:]))
                    on_piece(told)
    except EOFError:
        told.broke = "hung up"
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        told.broke = f"{type(error).__name__}: {error}"
    return told


async def streams(url: str, requests: Sequence[dict[str, Any]], **settings: Any) -> list[Told]:
    """Many at once."""
    async with client(url) as http:
        return list(await asyncio.gather(*(streamed(http, each, **settings) for each in requests)))
