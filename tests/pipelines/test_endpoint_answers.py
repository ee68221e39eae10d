"""An endpoint answers as its model does; what passes with time is tried again, the rest is not."""

import asyncio
import dataclasses
import json
import time
from email.utils import formatdate

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from cascade_model.chat_template import ChatTemplate
from cascade_model.commit import Folder
from cascade_model.errors import InputError, Unavailable, Unfinished
from cascade_model.sampling import SamplingParams
from jobs.gate import ApiKeys
from jobs.routes import build_api
from pipelines import endpoint_client
from pipelines.completions import claim
from pipelines.endpoint_answers import EndpointAnswers, EndpointSource, body_of, found
from pipelines.endpoint_client import (
    LONGEST_WAIT,
    EndpointClient,
    Refused,
    base_url,
    retry_after,
    wait_seconds,
)
from pipelines.generation import PartWorker, Work
from pipelines.model_answers import ModelAnswers
from pipelines.prompt_rows import Columns, DeadRow, Prompt
from pipelines.prompts import plan
from pipelines.row_settings import Decoding, row_seed
from tests.jobs.tiny_endpoint import endpoint, tiny_llm
from tests.pipelines.http_server import Scripted, error, serving, sound


def prompt_of(row: int, text: str = "a", **changes) -> Prompt:
    stop, messages = changes.pop("stop", ()), changes.pop("messages", None)
    settings = {"max_tokens": 9, "temperature": 1.0, "seed": row_seed(0, row)} | changes
    decoding = Decoding(params=SamplingParams(**settings), stop=stop)
    return Prompt(row=row, id=str(row), text=text, decoding=decoding, messages=messages)


@pytest.fixture(scope="module")
def llm():
    with tiny_llm() as model:
        yield model


@pytest.fixture(scope="module")
def served(llm):
    with serving(build_api(endpoint(llm, fingerprint="cascade-0123"))) as url:
        yield url


@pytest.fixture
def quick(monkeypatch):
    """Waits of hundredths, where the endpoint names none."""
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


def answers(url: str, prompts: list[Prompt], **settings):
    asker = EndpointAnswers(EndpointSource(url=url, **settings))
    try:
        return asker.answer(prompts)
    finally:
        asker.close()


PROMPTS = [
    prompt_of(0, "abc"),
    prompt_of(1, "abc", rule="low_confidence", top_k=5),
    prompt_of(2, "a longer prompt", max_tokens=21, stop=("e", "q")),
    prompt_of(3, "x" * 300),
    prompt_of(4, "ä", stop_at_eos=False, stop_ids=(65,), temperature=0.0),
    prompt_of(5, "", messages=({"role": "user", "content": "Hi"},)),
]


def test_an_endpoint_gives_what_its_model_gives(llm, served):
    source = found(EndpointSource(url=served, key="right"))
    assert (source.model_name, source.fingerprint) == ("tiny", "cascade-0123")
    assert source.longest == 128
    here = ModelAnswers(llm).answer(PROMPTS)
    there = answers(served, PROMPTS, key="right", model_name="tiny")
    assert [type(result).__name__ for result in there] == ["Answered"] * 3 + ["DeadRow"] + [
        "Answered"
    ] * 2
    for place in (0, 1, 2, 4):
        assert there[place] == here[place]
    assert dataclasses.replace(there[5], prompt="") == dataclasses.replace(here[5], prompt="")
    assert here[5].prompt == "User: Hi\n\nAssistant:"
    assert there[5].prompt == '[{"role": "user", "content": "Hi"}]'
    assert there[3].detail == f"400: {here[3].detail}"
    assert "over the context of 128" in here[3].detail


def test_other_weights_behind_the_same_name_end_the_job(served):
    with pytest.raises(Unfinished, match="serves the weights cascade-0123 and this job began with"):
        answers(served, PROMPTS[:1], model_name="tiny", key="right", fingerprint="cascade-4567")


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        (None, r"and CASCADE_API_KEY is not set in this process; set it to a key of the endpoint"),
        ("wrong", r"to the key in CASCADE_API_KEY; set it to one that the endpoint knows"),
    ],
)
def test_a_wrong_key_ends_the_job_and_is_not_shown(llm, key, cure):
    with (
        serving(build_api(endpoint(llm, keys=ApiKeys(["right"])))) as url,
        pytest.raises(Unfinished, match=rf"answers 401 \(.*\) {cure} and run") as caught,
    ):
        found(EndpointSource(url=url, key=key))
    assert not (key and key in str(caught.value))
    assert key is None or key not in repr(EndpointSource(url=url, key=key))


@pytest.mark.parametrize(
    ("status", "key", "cure"),
    [
        (403, "k", r" to the key in CASCADE_API_KEY; give it the rights, or set another"),
        (403, None, r" and CASCADE_API_KEY is not set in this process; set it to a key .*"),
        (404, None, r"; check endpoint and model_name"),
    ],
)
def test_what_every_request_would_meet_is_told_with_its_cure(status, key, cure):
    with (
        serving(Scripted(error(status)).app) as url,
        pytest.raises(Unfinished, match=rf"answers {status} \({status}: no\){cure} and run the"),
    ):
        answers(url, [prompt_of(0)], key=key)


@pytest.mark.parametrize("key", ["secret\n", " secret", "se\tcret", "secrét"])
def test_a_key_that_no_header_takes_is_refused_at_once_and_is_not_shown(key):
    with pytest.raises(InputError, match="CASCADE_API_KEY has white space") as caught:
        found(EndpointSource(url="http://127.0.0.1:9", key=key, patience_seconds=9))
    assert key.strip() not in str(caught.value)


def test_a_model_that_is_not_served_is_refused_by_name():
    with serving(Scripted().app) as url:
        told = found(EndpointSource(url=url, model_name="b"))
        assert (told.fingerprint, told.longest) == (None, None)
        for name in ("", "c"):
            with pytest.raises(InputError, match=r"serves a, b; name one of these"):
                found(EndpointSource(url=url, model_name=name))


def test_the_endpoints_chat_template_is_told_where_it_tells_one(llm):
    told = set()
    for words in ("plain", "{{ messages[0].content }}"):
        template = ChatTemplate.of(words, llm.tokenizer)
        with serving(build_api(endpoint(llm, template=template))) as url:
            told.add(found(EndpointSource(url=url, key="right")).chat_template_sha256)
    assert len(told) == 2
    assert None not in told
    with serving(Scripted().app) as url:  # which has no such route
        assert found(EndpointSource(url=url, model_name="a")).chat_template_sha256 is None


@pytest.mark.parametrize("answer", [error(401), error(403), error(404), PlainTextResponse("page")])
def test_who_guards_the_routes_it_does_not_know_has_no_template(answer):
    async def stranger(request):
        return answer

    app = Scripted().app
    app.routes.append(Route("/tokenizer_info", stranger))
    with serving(app) as url:
        assert found(EndpointSource(url=url, model_name="a")).chat_template_sha256 is None


def test_an_endpoint_that_has_chats_only_answers_chats():
    async def models(request):
        return JSONResponse({"data": [{"id": "talker"}]})

    async def chat(request):
        said = (await request.json())["messages"][-1]["content"]
        choice = {"message": {"role": "assistant", "content": f"{said}!"}, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": 2}})

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    with serving(Starlette(routes=routes)) as url:
        source = found(EndpointSource(url=url))
        assert (source.model_name, source.fingerprint) == ("talker", None)
        hello = prompt_of(0, "", messages=({"role": "user", "content": "Hi"},))
        [result] = answers(url, [hello], model_name="talker")
        assert result.completion == "Hi!"
        with pytest.raises(Unfinished, match="answers 404"):  # a prompt is met so by every one
            answers(url, [prompt_of(1)], model_name="talker")


def test_what_passes_with_time_is_tried_again(quick):
    for status in (408, 409, 500, 502, 503):
        script = Scripted(error(status), error(status))
        with serving(script.app) as url:
            [result] = answers(url, [prompt_of(0)])
        assert result.completion == "a!"
        assert result.passes is None
        assert len(script.asked) == 3


def test_the_time_that_is_asked_for_is_waited(quick):
    script = Scripted(error(429, **{"Retry-After": "1"}), error(503, **{"Retry-After": "0"}))
    with serving(script.app) as url:
        answers(url, [prompt_of(0)])
    first, second, third = (when for when, _, _ in script.asked)
    assert 1.0 <= second - first < 3.0
    assert third - second < 1.0


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_request_that_is_wrong_costs_its_row_alone(status):
    script = Scripted(error(status, "temperature is wrong"))
    with serving(script.app) as url:
        results = answers(url, [prompt_of(0, "b"), prompt_of(1)], in_flight=1)
    assert results[0] == DeadRow(
        row=0, reason="refused", input="b", detail=f"{status}: temperature is wrong"
    )
    assert results[1].completion == "a!"
    assert len(script.asked) == 2


def test_an_endpoint_that_stays_away_ends_the_job_to_be_run_again(quick):
    with serving(Scripted().app) as url:
        pass
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"does not answer \(ConnectError") as caught:
        answers(url, [prompt_of(0), prompt_of(1)], patience_seconds=0.3)
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == 75
    broken = Scripted(*[error(500, "on fire") for _ in range(1000)])
    with serving(broken.app) as url, pytest.raises(Unavailable, match="500: on fire"):
        answers(url, [prompt_of(0)], patience_seconds=0.3)
    assert len(broken.asked) > 2


def test_who_is_told_to_wait_waits_as_long_as_others_are_answered(quick):
    async def run() -> list[float]:
        clock = [0.0]
        told = 0

        async def handler(request: httpx.Request) -> httpx.Response:
            nonlocal told
            if b"slow" in request.content and told < 30:
                told += 1
                clock[0] += 1.0
                return httpx.Response(429, headers={"Retry-After": "0"})
            return httpx.Response(200, json={"at": clock[0]})

        client = EndpointClient(
            "http://x",
            patience_seconds=5.0,
            clock=lambda: clock[0],
            transport=httpx.MockTransport(handler),
        )

        async def others() -> None:
            while told < 30:
                await client.post("/", {"fast": 1})
                await asyncio.sleep(0)

        slow, _ = await asyncio.gather(client.post("/", {"slow": 1}), others())
        told = 0
        with pytest.raises(Unavailable):  # the control: nobody else is answered
            await client.post("/", {"slow": 1})
        return [slow["at"], told]

    at, told = asyncio.run(run())
    assert at == 30.0
    assert told < 10


def test_no_more_requests_than_allowed_are_in_flight():
    running, most = 0, 0

    class Slow(Scripted):
        async def _completions(self, request):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            return sound("a")

    with serving(Slow().app) as url:
        answers(url, [prompt_of(row) for row in range(24)], in_flight=5)
    assert most == 5


def test_an_answer_of_another_protocol_ends_the_job():
    for wrong in (httpx.Response(200, text="hello"), httpx.Response(200, json={"choices": []})):
        script = Scripted()
        script.answers = [_as_starlette(wrong)]
        with serving(script.app) as url, pytest.raises(Unfinished, match="OpenAI"):
            answers(url, [prompt_of(0)])


def _as_starlette(response: httpx.Response):
    from starlette.responses import Response

    return Response(response.content, response.status_code)


def test_settings_are_sent_where_an_endpoint_would_choose_others():
    decoding = Decoding(params=SamplingParams(seed=3, stop_ids=(1,), rule="margin"), stop=("x",))
    assert body_of(decoding) == {
        "max_tokens": 64,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 3,
        "stop_ids": [1],
        "rule": "margin",
        "stop": ["x"],
    }
    assert set(body_of(Decoding(params=SamplingParams()))) == {
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
    }


def test_waits_grow_to_a_cap_and_follow_what_is_told():
    for failures in range(1, 40):
        longest = min(LONGEST_WAIT, 0.5 * 2 ** (failures - 1))
        assert longest / 2 <= wait_seconds(failures, None) <= longest
    assert 7.0 <= wait_seconds(3, 7.0) <= 7.75


def test_the_time_to_wait_is_a_number_or_a_date():
    def told(value):
        headers = {} if value is None else {"Retry-After": value}
        return retry_after(httpx.Response(429, headers=headers))

    assert told(None) is None
    assert told("2.5") == 2.5
    assert told("-1") == 0.0
    assert told("soon") is None
    assert 28 < told(formatdate(time.time() + 30, usegmt=True)) <= 30


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://a:b@x/v1"])
def test_what_is_no_endpoint_is_refused_without_showing_a_password(url):
    with pytest.raises(InputError) as caught:
        base_url(url)
    assert "a:b" not in str(caught.value)


def test_the_url_may_end_as_openai_s_do():
    wanted = "http://127.0.0.1:8000"
    assert {base_url(wanted + end) for end in ("", "/", "/v1", "/v1/")} == {wanted}


def test_a_refusal_of_the_list_of_models_is_told():
    async def refuse(request):
        return httpx.Response(400, json={"error": {"message": "no"}})

    async def ask():
        await EndpointClient("http://x", transport=httpx.MockTransport(refuse)).get("/v1/models")

    with pytest.raises(Refused, match="400: no"):
        asyncio.run(ask())


def test_who_is_told_to_wait_longer_than_its_patience_does_not_wait():
    script = Scripted(error(429, "full", **{"Retry-After": "3600"}))
    began = time.monotonic()
    with serving(script.app) as url, pytest.raises(Unavailable, match="429: full"):
        answers(url, [prompt_of(0)], patience_seconds=60)
    assert time.monotonic() - began < 30


def test_a_worker_whose_endpoint_goes_away_goes_on_later_to_the_same_bytes(tmp_path, quick):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "row {row}"}}\n' for row in range(9)))
    parts, _ = plan([str(source)], 3)

    def work_at(url: str, output) -> PartWorker:
        claim(Folder(output), {}, {})
        return PartWorker(
            Work(
                source=EndpointSource(url=url, patience_seconds=0.2),
                output=str(output),
                columns=Columns(),
                common=Decoding(params=SamplingParams()),
                format="jsonl",
                rows_per_part=3,
            )
        )

    def ask(worker: PartWorker, part) -> dict:
        return asyncio.run(worker({"part": [json.dumps(dataclasses.asdict(part))]}))

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with serving(Scripted().app) as url:
        undisturbed = work_at(url, whole)
        assert not any(ask(undisturbed, part)["refusal"][0] for part in parts)
        ask(work_at(url, cut), parts[0])
    [refusal] = ask(work_at(url, cut), parts[1])["refusal"]
    told = InputError.from_data(json.loads(refusal))
    assert isinstance(told, Unavailable)
    assert sorted(path.name for path in cut.glob("completions-*.jsonl")) == [
        "completions-000000.jsonl"
    ]
    with serving(Scripted().app) as url:
        for part in parts[1:]:
            ask(work_at(url, cut), part)
    for path in whole.iterdir():
        assert (cut / path.name).read_bytes() == path.read_bytes()
