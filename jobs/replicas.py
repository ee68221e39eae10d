"""The two tiers of the endpoint as Ray Serve replicas: an ingress over HTTP, samplers by handle."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cascade_model.engine_config import EngineConfig
from cascade_model.requests import masks_left
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check
from cascade_model.text_stream import TokenLogprob
from jobs.autoscaling import Load
from jobs.broadcast import answers_of_all
from jobs.choices import STEP

if TYPE_CHECKING:
    from jobs.resuming import Blocks
    from jobs.serve_config import ServeConfig
    from jobs.serve_metrics import ServeMetrics


class Sampler:
    """A replica with the weights; its engine decodes all running requests together."""

    def __init__(self, model: str, threads: int, engine: EngineConfig, places: int = 8) -> None:
        import torch

        from cascade_model.llm import LLM
        from cascade_model.weights import weights_digest

        torch.set_num_threads(threads)
        self._weights = weights_digest(model)
        self._llm = LLM.load(model, engine)
        check(
            weights_digest(model) == self._weights,
            f"model={model} was changed while it was loaded; deploy it again",
        )
        self._load = Load(places)
        self._turn = asyncio.Lock()  # one text at a time: the rest of the threads decode
        self._texts_to_score = 0

    async def ready(self) -> bool:
        """That a replica answers at all."""
        return True

    async def score(self, tokens: list[int], count: int, weights: str) -> "Blocks":
        """First the digest of the weights, as a greeting. Then, if `weights` is that digest, as
        `scores` the log-probability of each token given what is before it, none of the first, with
        the `count` likeliest of its place (`scoring`). A cancelled call ends after a forward
        pass."""
        from cascade_model.scoring import scored

        yield {"weights": self._weights}
        if weights != self._weights:
            return
        told: list[TokenLogprob | None] = [None] * len(tokens)
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        self._texts_to_score += 1
        try:
            async with self._turn:
                passes = scored(self._llm.model, tokens, count)
                while (part := await loop.run_in_executor(thread, next, passes, None)) is not None:
                    for place, logprob in part:
                        told[place] = logprob
        finally:
            self._texts_to_score -= 1
            # It ends with its text, and OpenMP's threads that helped it too (see `LLM.load`).
            thread.shutdown(wait=False)
        yield {"scores": told}

    async def blocks(
        self,
        prompt_tokens: list[int],
        params: dict[str, Any],
        choice: int,
        weights: str,
        committed: list[int],
        steps_made: int,
        watch: bool = False,
    ) -> "Blocks":
        """First the digest of the weights, as a greeting; then the blocks of one completion behind
        its `committed` tokens, if `weights` is that digest, and with `watch` the steps of each
        before it. Mask tokens among those of the prompt, which no client can write, are to be
        filled. A cancelled call frees its place."""
        from cascade_model.watching import DenoisedStep

        yield {"weights": self._weights}
        if weights != self._weights:
            return
        settings, config = SamplingParams(**params), self._llm.config
        stream = self._llm.stream_steps(
            prompt_tokens,
            settings,
            choice,
            committed=committed,
            steps_made=steps_made,
            has_holes=config.mask_id in prompt_tokens,
            watch=watch,
        )
        blocks_left = len(masks_left(config, prompt_tokens, settings, committed))
        with self._load.request(blocks_left) as block_done:
            async with contextlib.aclosing(stream) as told:
                async for each in told:
                    if isinstance(each, DenoisedStep):
                        yield {STEP: dataclasses.asdict(each)}
                        continue
                    block_done()
                    yield dataclasses.asdict(each)

    def state(self) -> dict[str, Any]:
        """What it holds and did so far, for metrics: read, not measured."""
        from ray.serve import get_replica_context

        return {
            **dataclasses.asdict(self._llm.counters),
            "replica": get_replica_context().replica_id.unique_id,
            "process": os.getpid(),
            "weights": self._weights,
            "places": self._load.places,
            "blocks_left": self._load.blocks_left,
            "choices": self._load.running,
            "scoring": self._texts_to_score,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy (called by Ray Serve)."""
        return self._load.statement()

    def check_health(self) -> None:
        """Raises where the engine has ended (called by Ray Serve, which then replaces it)."""
        if self._llm.engine.is_closed:
            raise RuntimeError("the engine has ended")


class Ingress:
    """The HTTP tier: builds its FastAPI application when the replica starts."""

    def __init__(self, config: "ServeConfig", sampler: Any) -> None:
        from jobs.readiness import Readiness
        from jobs.resuming import Patience, Pulse

        self._config = config
        self._sampler = sampler
        self._pulse = Pulse()
        self._readiness = Readiness(self._any_answers, lambda: self._pulse.last)
        self._is_draining = False
        self._patience = Patience(
            seconds=config.sampler_wait_seconds,
            losses=config.max_sampler_losses,
            blocks_ahead=config.blocks_ahead,
        )

    def __serve_build_asgi_app__(self) -> Any:
        """The application (called by Ray Serve)."""
        from ray.serve import get_replica_context

        from cascade_model.commit import Folder
        from cascade_model.engine_config import room_of
        from cascade_model.own_template import template_of
        from cascade_model.tokenizer import Tokenizer
        from cascade_model.weights import TOKENIZER, read_config, weights_digest
        from jobs.endpoint import Endpoint
        from jobs.gate import RotatingKeys
        from jobs.routes import build_api
        from jobs.serve_metrics import ServeMetrics
        from jobs.slow_readers import SlowReaders

        config, model = self._config, self._config.model
        if config.no_auth:
            require_loopback()
        tokenizer = Tokenizer(Folder(model).read_bytes(TOKENIZER), f"{model}/{TOKENIZER}")
        self._weights = weights_digest(model)
        self._metrics = ServeMetrics(get_replica_context().replica_id.unique_id)
        shape = read_config(model)
        endpoint = Endpoint(
            model_name=config.name,
            config=shape,
            room=room_of(shape, config.engine),
            tokenizer=tokenizer,
            template=template_of(model, tokenizer, config.chat_template),
            fingerprint=f"cascade-{self._weights[:12]}",
            decode=self._decode,
            score=self._score,
            require_open=self._require_open,
            ready=self._readiness.is_ready,
            metrics=self._scrape,
            keys=None if config.no_auth else RotatingKeys(config.api_keys),
            max_choices_in_flight=config.max_in_flight,
        )
        self._counted = Counted(build_api(endpoint, behind_serve=True), self._metrics)
        return SlowReaders(self._counted, config.reader_timeout_seconds)

    async def drain(self, seconds: float) -> int:
        """Take no new choices, wait for the answers under way, and end those that are not whole by
        then with an error event; how many these were."""
        from jobs.openai_protocol import ApiError

        self._is_draining = True
        await self._counted.until_idle(seconds)
        left = self._counted.under_way
        message = "The server is ending; send the request again."
        self._pulse.end(ApiError(503, message, type="server_error", code="server_ending"))
        await self._counted.until_idle(5)
        await asyncio.sleep(0.5)  # until the proxy has passed the last events on
        return left

    def _require_open(self) -> None:
        from jobs.openai_protocol import ApiError

        if self._is_draining:
            message = "The server is ending; send the request to another."
            raise ApiError(503, message, type="server_error", code="server_ending")

    async def _scrape(self) -> bytes:
        """The metrics of this ingress and of all samplers that answer in time."""
        states: list[dict[str, Any]] = []
        with contextlib.suppress(TimeoutError):
            async for state in answers_of_all(self._sampler, "state", seconds=5):
                states.append(state)
        return self._metrics.text(states)

    async def _any_answers(self) -> bool:
        """Whether a sampler answers; none is woken for it. `TimeoutError` where none does and one
        is silent for ten seconds: by then others may have come, who were not asked."""
        answers = answers_of_all(self._sampler, "ready", seconds=10)
        async with contextlib.aclosing(answers):
            async for _ in answers:
                return True
        return False

    async def _decode(
        self, prompt_tokens: list[int], params: SamplingParams, choice: int, *, watch: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """Blocks of one choice, and with `watch` their steps, from as many samplers as it takes."""
        from jobs.resuming import resuming

        def source(params: SamplingParams, committed: list[int], steps_made: int) -> "Blocks":
            request = (prompt_tokens, dataclasses.asdict(params), choice, self._weights)
            return spoken(self._sampler, "blocks", *request, committed, steps_made, watch)

        blocks = resuming(
            source,
            params,
            weights=self._weights,
            pulse=self._pulse,
            patience=self._patience,
            on_loss=self._metrics.sampler_lost,
        )
        with self._metrics.choice() as measured:
            async with contextlib.aclosing(blocks):
                async for block in blocks:
                    if STEP not in block:
                        measured.block(block)
                    yield block

    async def _score(self, tokens: list[int], count: int) -> list[TokenLogprob | None]:
        """Scores of a text, from another sampler where one dies over it."""
        from jobs.resuming import told_whole

        told = await told_whole(
            lambda: spoken(self._sampler, "score", tokens, count, self._weights),
            weights=self._weights,
            pulse=self._pulse,
            patience=self._patience,
            on_loss=self._metrics.sampler_lost,
        )
        return told["scores"]


async def spoken(sampler: Any, method: str, *request: Any) -> "Blocks":
    """What some sampler replica says to a request; leaving early ends its work. By gRPC, which
    costs half the processor time of an object reference a block (`make bench-serve`)."""
    by_value = sampler.options(method_name=method, stream=True, _by_reference=False)
    response = by_value.remote(*request)
    with as_told():
        try:
            async for item in response:
                yield item
        finally:
            response.cancel()


@contextlib.contextmanager
def as_told() -> Iterator[None]:
    """What Ray raises where no sampler can answer, in `resuming`'s words; what a sampler refuses,
    which the ingress should have, as a 400."""
    from grpc.aio import AioRpcError
    from ray.exceptions import ObjectLostError, RayActorError
    from ray.serve.exceptions import (
        BackPressureError,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
    )

    from cascade_model.errors import InputError
    from jobs.openai_protocol import ApiError
    from jobs.resuming import NoRoom, SamplerLost

    try:
        yield
    except InputError as error:  # wrapped: its own text would be the sampler's traceback
        cause = getattr(error, "cause", error)
        raise ApiError(400, str(cause), code="invalid_value") from None
    except BackPressureError:
        raise NoRoom from None
    except (
        AioRpcError,
        RayActorError,
        ObjectLostError,
        DeploymentUnavailableError,
        ReplicaUnavailableError,
    ):
        raise SamplerLost from None


class Counted:
    """ASGI layer that counts answers: by status, and those under way."""

    def __init__(self, app: Any, metrics: "ServeMetrics") -> None:
        self.app, self.metrics, self.under_way = app, metrics, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answered(message["status"])
            await send(message)

        self.under_way += 1
        try:
            await self.app(scope, receive, counted)
        finally:
            self.under_way -= 1

    async def until_idle(self, seconds: float) -> None:
        """Wait until nothing is under way, but no longer than that."""
        deadline = time.monotonic() + seconds
        while self.under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def require_loopback() -> None:
    """Refuse to serve without keys on an address that others reach, whoever deployed it."""
    from ray.serve.context import _get_global_client

    from jobs.serve_config import is_loopback

    host = _get_global_client().http_config.host  # type: ignore[union-attr]
    check(
        is_loopback(host or ""),
        f"no_auth=True with http_options.host={host} would serve strangers; use host 127.0.0.1 or "
        "give api_keys",
    )
