"""The two tiers of the endpoint as Ray Serve replicas: an ingress over HTTP, samplers by handle."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from cascade_model.config import EngineConfig
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check
from cascade_model.text_stream import TokenLogprob

if TYPE_CHECKING:
    from jobs.serve import ServeConfig

KEYS_VARIABLE = "CASCADE_API_KEYS"


class Sampler:
    """A replica with the weights; its engine decodes all running requests together."""

    def __init__(self, model: str, threads: int, engine: EngineConfig) -> None:
        import torch

        from cascade_model.llm import LLM

        torch.set_num_threads(threads)
        self._llm = LLM.load(model, engine)
        self._scoring = asyncio.Lock()  # one text at a time: the rest of the threads decode

    async def ready(self) -> bool:
        """That a replica answers at all."""
        return True

    async def score(self, tokens: list[int], count: int) -> list[TokenLogprob | None]:
        """Log-probability of each token given what is before it, none of the first, with the
        `count` likeliest of its place (`scoring`); a cancelled call ends after a forward pass."""
        from cascade_model.scoring import scored

        told: list[TokenLogprob | None] = [None] * len(tokens)
        async with self._scoring:
            passes = scored(self._llm.model, tokens, count)
            while (part := await asyncio.to_thread(next, passes, None)) is not None:
                for place, logprob in part:
                    told[place] = logprob
        return told

    async def blocks(
        self, prompt_tokens: list[int], params: dict[str, Any], choice: int
    ) -> AsyncIterator[dict[str, Any]]:
        """Decoded blocks of one completion; a cancelled call frees its place."""
        stream = self._llm.stream_blocks(prompt_tokens, SamplingParams(**params), choice)
        async with contextlib.aclosing(stream) as blocks:  # type: ignore[type-var]
            async for block in blocks:
                yield dataclasses.asdict(block)


class Ingress:
    """The HTTP tier: builds its FastAPI application when the replica starts."""

    def __init__(self, config: "ServeConfig", sampler: Any) -> None:
        self._config = config
        self._sampler = sampler

    def __serve_build_asgi_app__(self) -> Any:
        """The application (called by Ray Serve)."""
        from cascade_model.commit import Folder
        from cascade_model.tokenizer import Tokenizer
        from cascade_model.weights import TOKENIZER, read_config, weights_digest
        from jobs.endpoint import Endpoint, build_api
        from jobs.gate import load_api_keys

        config, model = self._config, self._config.model
        if config.no_auth:
            require_loopback()
        keys = load_api_keys(config.api_keys, os.environ.get(KEYS_VARIABLE, ""))
        endpoint = Endpoint(
            model_name=config.name,
            config=read_config(model),
            tokenizer=Tokenizer(Folder(model).read_bytes(TOKENIZER), f"{model}/{TOKENIZER}"),
            fingerprint=f"cascade-{weights_digest(model)[:12]}",
            decode=self._decode,
            keys=None if config.no_auth else keys,
            max_choices_in_flight=config.max_in_flight,
        )
        return build_api(endpoint, behind_serve=True)

    async def _decode(
        self, prompt_tokens: list[int], params: SamplingParams, choice: int
    ) -> AsyncIterator[dict[str, Any]]:
        """Blocks from some sampler replica, in the words of the protocol when none can."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        from jobs.openai_protocol import ApiError, overloaded

        blocks = self._sampler.options(stream=True).blocks
        response = blocks.remote(prompt_tokens, dataclasses.asdict(params), choice)
        try:
            async for block in response:
                yield block
        except BackPressureError:
            raise overloaded() from None
        except (RayActorError, DeploymentUnavailableError):
            message = "The sampler that decoded this request is gone; send the request again."
            raise ApiError(503, message, type="server_error", code="sampler_lost") from None
        finally:
            response.cancel()


def require_loopback() -> None:
    """Refuse to serve without keys on an address that others reach, whoever deployed it."""
    from ray.serve.context import _get_global_client

    from jobs.serve import is_loopback

    host = _get_global_client().http_config.host  # type: ignore[union-attr]
    check(
        is_loopback(host or ""),
        f"no_auth=True with http_options.host={host} would serve strangers; use host 127.0.0.1 or "
        "give api_keys",
    )
