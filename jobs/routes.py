"""The ingress as a FastAPI application: OpenAI routes, and those that clients and operators need.

Every answer has `x-request-id`, every error the four fields; every route but `/health` and the
page's own files asks for a key, `/ready` too, since it asks a sampler and so may wake one.
"""

import asyncio
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from jobs.choices import Admission
from jobs.endpoint import Endpoint
from jobs.field_errors import validation_error
from jobs.gate import OPEN_PATH, Gate, error_response, http_error
from jobs.openai_answers import (
    DECODES,
    READS,
    ChatAnswer,
    CompletionAnswer,
    ModelCard,
    ModelList,
    Status,
    answers,
)
from jobs.openai_protocol import ApiError
from jobs.openai_requests import ChatRequest, CompletionRequest
from jobs.page_routes import add_page
from jobs.preparation import chat_job, completion_job
from jobs.replies import reply
from jobs.strict_json import StrictRoute
from jobs.text_routes import text_routes

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def build_api(endpoint: Endpoint, behind_serve: bool = False) -> FastAPI:
    """The application. `behind_serve`: Ray Serve's proxy names the requests."""
    api = FastAPI(title="CASCADE", docs_url=None, redoc_url=None, redirect_slashes=False)
    api.router.route_class = StrictRoute
    api.add_middleware(Gate, keys=endpoint.keys, behind_serve=behind_serve)
    api.add_exception_handler(ApiError, lambda _, error: error_response(error))  # type: ignore[arg-type]
    api.add_exception_handler(
        RequestValidationError,
        lambda _, error: error_response(validation_error(error)),  # type: ignore[arg-type]
    )
    api.add_exception_handler(StarletteHTTPException, http_error)  # type: ignore[arg-type]
    _add_operators_routes(api, endpoint)
    _add_openai_routes(api, endpoint)
    api.include_router(text_routes(endpoint))
    add_page(api, asks_for_key=endpoint.keys is not None)
    document = api.openapi
    api.openapi = lambda: _as_answered(document(), endpoint.model_name)
    return api


def _add_operators_routes(api: FastAPI, endpoint: Endpoint) -> None:
    @api.get(OPEN_PATH, responses=answers(Status, 431, 500))
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @api.get("/ready", responses=answers(Status, *READS, 503))
    async def ready() -> Response:
        endpoint.require_open()
        if not await endpoint.ready():
            raise ApiError(
                503,
                "No sampler answers: it is starting, or has died and is replaced; ask again.",
                type="server_error",
                code="not_ready",
                headers={"Retry-After": "1"},
            )
        return JSONResponse({"status": "ok"})

    @api.get("/metrics", response_class=Response, responses=_metrics_answers())
    async def metrics() -> Response:
        return Response(await endpoint.metrics(), media_type=PROMETHEUS)


def _add_openai_routes(api: FastAPI, endpoint: Endpoint) -> None:
    admission = Admission(endpoint.max_choices_in_flight)

    @api.get("/v1/models", responses=answers(ModelList, *READS))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [endpoint.model_card()]})

    @api.get(
        "/v1/models/{name:path}", responses=answers(ModelCard, *READS, 404), response_model=None
    )
    async def model(name: str) -> Response:
        endpoint.require_model(name)
        return JSONResponse(endpoint.model_card())

    @api.post("/v1/completions", responses=answers(CompletionAnswer, *DECODES, stream=True))
    async def completions(body: CompletionRequest) -> Response:
        endpoint.require_model(body.model)
        endpoint.require_open()
        job = await asyncio.to_thread(completion_job, endpoint, body)
        return await reply(endpoint, job, admission, bool(body.stream))

    @api.post("/v1/chat/completions", responses=answers(ChatAnswer, *DECODES, stream=True))
    async def chat(body: ChatRequest) -> Response:
        endpoint.require_model(body.model)
        endpoint.require_open()
        job = await asyncio.to_thread(chat_job, endpoint, body)
        return await reply(endpoint, job, admission, bool(body.stream))


def _metrics_answers() -> dict[Any, Any]:
    text = {PROMETHEUS: {"schema": {"type": "string"}}}
    errors = {k: v for k, v in answers(Status, *READS).items() if k != 200}
    return {200: {"content": text, "description": "Prometheus text."}, **errors}


def _as_answered(document: dict[str, Any], model_name: str) -> dict[str, Any]:
    """FastAPI's document without its 422, which is a 400 here, with the key that is asked and the
    one model that there is."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if path != OPEN_PATH:
                operation["security"] = [{"key": []}]
    parts = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    for name, schema in parts["schemas"].items():
        if name.endswith("Request"):
            schema["properties"]["model"] |= {"enum": [model_name]}
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
