"""The routes in process, over a real tiny model: no Ray, milliseconds."""

import asyncio
import dataclasses
import json

from starlette.testclient import TestClient

from cascade_model.chat_template import ChatTemplate
from cascade_model.engine_config import EngineConfig
from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.scoring import scored
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from cascade_model.watching import DenoisedStep
from jobs.choices import STEP
from jobs.endpoint import Endpoint
from jobs.gate import ApiKeys
from jobs.routes import build_api
from tests.tiny_models import text_config

KEY = {"Authorization": "Bearer right"}


def tiny_llm(
    tokenizer: Tokenizer | None = None, engine: EngineConfig | None = None, **changes
) -> LLM:
    tokenizer = tokenizer or byte_tokenizer()
    model = Transformer(text_config(tokenizer, **changes))
    model.init_weights(0)
    return LLM(model.eval(), tokenizer, engine)


def endpoint(llm: LLM, **changes) -> Endpoint:
    async def decode(tokens, params, choice, watch=False):
        has_holes = llm.config.mask_id in tokens
        if watch:
            async for told in llm.stream_steps(tokens, params, choice, has_holes=has_holes):
                own = dataclasses.asdict(told)
                yield {STEP: own} if isinstance(told, DenoisedStep) else own
            return
        for block in llm.blocks(tokens, params, choice, has_holes=has_holes):
            await asyncio.sleep(0)
            yield dataclasses.asdict(block)

    async def score(tokens, count):
        told = dict(pair for part in scored(llm.model, tokens, count) for pair in part)
        return [told.get(place) for place in range(len(tokens))]

    async def ready():
        return True

    async def metrics():
        return b"cascade_tests 1\n"

    def require_open():
        pass

    settings = {
        "model_name": "tiny",
        "config": llm.config,
        "room": llm.engine.scheduler.room,
        "tokenizer": llm.tokenizer,
        "template": ChatTemplate.of("plain", llm.tokenizer),
        "fingerprint": "cascade-test",
        "decode": decode,
        "score": score,
        "require_open": require_open,
        "ready": ready,
        "metrics": metrics,
        "keys": ApiKeys(["other", "right"]),
        "max_choices_in_flight": 16,
    }
    return Endpoint(**{**settings, **changes})


def client_of(llm: LLM, **changes) -> TestClient:
    api = build_api(endpoint(llm, **changes))
    return TestClient(api, headers=KEY, raise_server_exceptions=False)


def complete(client: TestClient, **fields):
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", **fields})


def chat(client: TestClient, *contents: str, **fields):
    messages = [{"role": "user", "content": content} for content in contents or ("Hi",)]
    body = {"model": "tiny", "messages": messages, **fields}
    return client.post("/v1/chat/completions", json=body)


def events_of(response) -> list:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [
        line[6:] if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
        for line in lines
    ]


def require_error(response, status: int, param: str | None, code: str | None) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    return error
