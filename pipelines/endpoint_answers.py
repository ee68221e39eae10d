"""Answers of a running OpenAI-compatible endpoint, many requests in flight.

Each request carries all its settings and its seed, so an endpoint over the same weights gives the
rows that the model gives here; only a chat's `prompt` is told as its messages, since the template
is the endpoint's.
"""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade_model.errors import InputError, Unfinished
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check, digest
from pipelines.answers import REFUSED, Answered, Result, longest_first
from pipelines.endpoint_client import EndpointClient, Refused
from pipelines.prompt_rows import DeadRow, Prompt
from pipelines.row_settings import NAMES, Decoding

_ALWAYS = ("max_tokens", "temperature", "top_p", "seed")
"""An endpoint has defaults of its own for them."""
_NAMES_WEIGHTS = "cascade-"
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(SamplingParams)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSource:
    """An endpoint, the model asked for, and what its answers must say of the weights."""

    url: str
    model_name: str = ""
    fingerprint: str | None = None
    """What every answer's `system_fingerprint` must be: CASCADE's names the weights. None: it is
    another server's, which may change for any reason."""
    chat_template_sha256: str | None = None
    """Of the template that it writes chats with; None where it does not tell."""
    longest: int | None = None
    """Tokens of prompt and answer together, at most; None where it does not tell."""
    key: str | None = field(default=None, repr=False)
    in_flight: int = 32
    patience_seconds: float = 120.0

    @property
    def num_cpus(self) -> float:
        """A worker mostly waits."""
        return 1

    @property
    def num_gpus(self) -> int:
        """None: the weights are elsewhere."""
        return 0

    @property
    def rows_at_once(self) -> int:
        """The requests in flight."""
        return self.in_flight

    def open(self) -> "EndpointAnswers":
        """Connections are made as they are needed."""
        return EndpointAnswers(self)

    def client(self) -> EndpointClient:
        """A client of the running event loop."""
        return EndpointClient(
            self.url,
            key=self.key,
            in_flight=self.in_flight,
            patience_seconds=self.patience_seconds,
        )


def found(source: EndpointSource) -> EndpointSource:
    """The source with the model that the endpoint serves, the fingerprint of its weights, the
    digest of its chat template and the tokens that it has room for.

    `InputError` where it does not serve `model_name`, or several where none is named;
    `Unavailable` where it does not answer.
    """
    return asyncio.run(_found(source))


async def _found(source: EndpointSource) -> EndpointSource:
    client = source.client()
    try:
        listed = await client.get("/v1/models")
        cards = {str(each["id"]): each for each in listed["data"]}
        names = list(cards)
        name = source.model_name or (names[0] if len(names) == 1 else "")
        check(
            name in names,
            f"model_name={source.model_name or None} and endpoint={client.url} serves "
            f"{', '.join(names)}; name one of these",
        )
        body = {"model": name, "prompt": "a", "max_tokens": 1, "temperature": 0}
        answer = await client.probe("/v1/completions", body) or {}  # it may have chats only
        told = str(answer.get("system_fingerprint"))
        # Others' gateways may guard what they do not know; ours has one key for all routes.
        known = await client.probe("/tokenizer_info", absent=(401, 403, 404)) or {}
        template, longest = known.get("chat_template"), cards[name].get("max_model_len")
        return dataclasses.replace(
            source,
            model_name=name,
            fingerprint=told if told.startswith(_NAMES_WEIGHTS) else None,
            chat_template_sha256=digest(template) if template else None,
            longest=longest if isinstance(longest, int) else None,
        )
    except Refused as error:
        raise InputError(
            f"endpoint={client.url} lists no models ({error}); check the URL"
        ) from None
    except (KeyError, TypeError):
        raise InputError(
            f"endpoint={client.url} lists no models in the form of OpenAI; check the URL"
        ) from None
    finally:
        await client.close()


def body_of(decoding: Decoding) -> dict[str, Any]:
    """The settings as fields of a request: OpenAI's always, ours where they are not the default."""
    params = decoding.params
    given = {name: getattr(params, name) for name in NAMES if name in _DEFAULTS}
    body = {k: v for k, v in given.items() if k in _ALWAYS or v != _DEFAULTS[k]}
    if "stop_ids" in body:
        body["stop_ids"] = list(body["stop_ids"])
    return body | ({"stop": list(decoding.stop)} if decoding.stop else {})


class EndpointAnswers:
    """Asks for rows; an event loop in a thread of its own serves all callers."""

    def __init__(self, source: EndpointSource) -> None:
        self._source = source
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = self._wait(self._connect())

    def answer(self, prompts: Sequence[Prompt]) -> list[Result]:
        """See `Answerer`."""
        return self._wait(self._together(prompts))

    def close(self) -> None:
        """End the connections and the thread."""
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _connect(self) -> EndpointClient:
        return self._source.client()

    async def _together(self, prompts: Sequence[Prompt]) -> list[Result]:
        """All rows of a part; the first failure that ends the job ends the other requests too."""
        tasks = {
            place: asyncio.create_task(self._one(prompts[place]))
            for place in longest_first(prompts)
        }
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [tasks[place].result() for place in range(len(prompts))]

    async def _one(self, prompt: Prompt) -> Result:
        body = {"model": self._source.model_name, **body_of(prompt.decoding)}
        messages = None if prompt.messages is None else list(prompt.messages)
        shown = prompt.text if messages is None else json.dumps(messages, ensure_ascii=False)
        try:
            if messages is None:
                body |= {"prompt": prompt.text}
                body |= {"suffix": prompt.suffix} if prompt.suffix else {}
                answer = await self._client.post("/v1/completions", body)
            else:
                body |= {"messages": messages}
                answer = await self._client.post("/v1/chat/completions", body)
        except Refused as error:
            return DeadRow(row=prompt.row, reason=REFUSED, input=shown[:200], detail=str(error))
        self._require_same_weights(answer)
        return self._read(shown, answer, is_chat=messages is not None)

    def _require_same_weights(self, answer: dict[str, Any]) -> None:
        wanted, told = self._source.fingerprint, answer.get("system_fingerprint")
        if wanted is not None and told != wanted:
            raise Unfinished(
                f"endpoint={self._source.url} serves the weights {told} and this job began with "
                f"{wanted}; serve those again and run the same command, or give another output"
            )

    def _read(self, shown: str, answer: dict[str, Any], *, is_chat: bool) -> Answered:
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            text = choice["message"]["content"] if is_chat else choice["text"]
            details = usage.get("completion_tokens_details") or {}
            return Answered(
                prompt=shown,
                completion=text or "",
                num_tokens=int(usage["completion_tokens"]),
                passes=details.get("passes"),
                finish_reason=str(choice["finish_reason"]),
            )
        except (KeyError, IndexError, TypeError):
            raise Unfinished(
                f"endpoint={self._source.url} gives an answer without choices or usage "
                f"({repr(answer)[:100]}); check that it speaks OpenAI's protocol"
            ) from None
