"""The OpenAPI document against the server: requests made up from it, good ones and bad ones.

Every answer must have a documented status and shape, none may be a 5xx, and what the document
forbids must be refused. The control is a server that breaks each of these promises.
"""

from typing import Any

import hypothesis
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from jobs.routes import build_api
from tests.jobs.tiny_endpoint import KEY, endpoint, tiny_llm

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import load_all_checks  # noqa: E402
from schemathesis.core.failures import FailureGroup  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

load_all_checks()
# A document has no words for fields that contradict each other, so a 400 may meet good data.
LEFT_OUT = [checks.positive_data_acceptance]
# The largest of the bad bodies are over the limit of any body, which is a 413.
REFUSALS = {"checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}}}
ROUTES = [
    "GET /health",
    "GET /metrics",
    "GET /ready",
    "GET /tokenizer_info",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /detokenize",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
]


def operations(api: Any) -> dict[str, Any]:
    """Every operation of the document that an application serves."""
    config = schemathesis.Config.from_dict(REFUSALS)
    schema = schemathesis.openapi.from_asgi("/openapi.json", api, config=config, headers=KEY)
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in found}


def try_out(operation: Any, mode: Any, count: int = 20) -> int:
    """How many requests were made up and answered as the document says; raises for the first that
    was not."""
    tried = 0

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def attempt(case: Any) -> None:
        nonlocal tried
        case.call_and_validate(headers=KEY, excluded_checks=LEFT_OUT)
        tried += 1

    attempt()
    return tried


@pytest.fixture(scope="module")
def served():
    return operations(build_api(endpoint(tiny_llm(), max_choices_in_flight=64)))


def test_the_document_has_every_route(served):
    assert sorted(served) == ROUTES


@pytest.mark.parametrize("route", ROUTES)
def test_good_requests_are_answered_as_the_document_says(served, route):
    assert try_out(served[route], GenerationMode.POSITIVE) > 0


@pytest.mark.parametrize("route", [route for route in ROUTES if route.startswith("POST")])
def test_bad_requests_are_refused_as_the_document_says(served, route):
    assert try_out(served[route], GenerationMode.NEGATIVE) > 0


async def failing(request: Request) -> JSONResponse:
    return JSONResponse({"error": "x"}, status_code=500)


async def undocumented(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"}, status_code=207)


async def other_shape(request: Request) -> JSONResponse:
    return JSONResponse({"status": 5})


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (failing, "Server error"),
        (undocumented, "Undocumented status code"),
        (other_shape, "violates schema"),
    ],
)
def test_a_server_that_breaks_the_promises_is_found(wrong, found):
    """The control: the right document before another server."""
    api = FastAPI()
    api.add_route("/health", wrong)
    document = build_api(endpoint(tiny_llm())).openapi()
    api.openapi = lambda: {**document, "paths": {"/health": document["paths"]["/health"]}}
    with pytest.raises(FailureGroup, match=found):
        try_out(operations(api)["GET /health"], GenerationMode.POSITIVE)
