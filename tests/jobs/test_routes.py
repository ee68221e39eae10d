"""The routes in process, over a real tiny model: no Ray, milliseconds."""

import asyncio
import json

import pytest
from starlette.testclient import TestClient

from cascade_model.engine_config import EngineConfig
from cascade_model.llm import LLM
from cascade_model.sampling import SamplingParams
from cascade_model.tokenizer import byte_tokenizer
from jobs.openai_protocol import MAX_BODY_BYTES, ApiError, overloaded
from jobs.routes import build_api
from tests.jobs.tiny_endpoint import (
    KEY,
    chat,
    client_of,
    complete,
    endpoint,
    events_of,
    require_error,
    tiny_llm,
)

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


@pytest.fixture
def client(llm) -> TestClient:
    return client_of(llm)


def test_an_answer_has_text_reason_usage_and_passes(client):
    body = complete(client, max_tokens=10, seed=1, temperature=0).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] in ("length", "stop")
    assert body["usage"]["prompt_tokens"] == 3
    assert 1 <= body["usage"]["completion_tokens"] <= 10
    assert body["usage"]["completion_tokens_details"]["passes"] >= 1


def test_the_same_seed_gives_the_same_text_and_a_missing_seed_another(client):
    texts = [complete(client, seed=4).json()["choices"][0]["text"] for _ in range(2)]
    assert texts[0] == texts[1]
    drawn = {complete(client).json()["choices"][0]["text"] for _ in range(3)}
    assert len(drawn) > 1


def test_choice_0_of_three_equals_the_only_choice(client):
    one = complete(client, seed=4).json()
    three = complete(client, seed=4, n=3).json()
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["choices"][0]["text"] == one["choices"][0]["text"]
    assert len({choice["text"] for choice in three["choices"]}) > 1
    assert three["usage"]["prompt_tokens"] == 3


def test_a_list_of_prompts_is_answered_in_order_as_each_alone(client):
    both = complete(client, prompt=["abc", "xyz"], n=2, seed=2).json()["choices"]
    alone = complete(client, prompt="xyz", n=2, seed=2).json()["choices"]
    assert [choice["text"] for choice in both[2:]] == [choice["text"] for choice in alone]


@pytest.fixture(scope="module")
def filling():
    """A model that claims to be trained on rearranged texts."""
    tokenizer = byte_tokenizer().with_infill()
    with tiny_llm(tokenizer, infill="psm", infill_ids=tokenizer.infill_ids) as own:
        yield own


def test_a_suffix_is_seen_and_counted(filling):
    client = client_of(filling)
    asked = {"suffix": "xy", "max_tokens": 10, "seed": 3}
    body = complete(client, **asked).json()
    assert body["usage"]["prompt_tokens"] == len("abc") + len("xy") + 3
    tokens = filling.prompt_tokens("abc", "xy")
    assert (
        body["choices"]
        == complete(client, **(asked | {"prompt": tokens, "suffix": None})).json()["choices"]
    )
    streamed = events_of(complete(client, stream=True, **asked))
    text = "".join(choice["text"] for event in streamed[:-1] for choice in event["choices"])
    assert text == body["choices"][0]["text"]
    assert complete(client, **(asked | {"suffix": "xz"})).json()["choices"] != body["choices"]
    several = complete(client, **(asked | {"prompt": ["abc", "d"]})).json()
    assert several["choices"][0] == body["choices"][0]
    assert several["usage"]["prompt_tokens"] == 8 + 6
    echoed = complete(client, echo=True, **asked).json()["choices"]
    assert echoed[0]["text"] == "abc" + body["choices"][0]["text"]
    without = complete(client, **(asked | {"suffix": ""})).json()
    assert without["usage"]["prompt_tokens"] == 3


def test_a_suffix_that_the_model_cannot_see_is_refused_by_its_name(client, filling):
    error = require_error(complete(client, suffix="xy"), 400, "suffix", "unsupported_parameter")
    assert "infill=psm" in error["message"]
    assert "beyond the hole's block" in error["message"]
    able = client_of(filling)
    too_long = complete(able, suffix="x" * 126)
    require_error(too_long, 400, "prompt", "context_length_exceeded")
    body = {"model": "tiny", "messages": USER, "suffix": "xy"}
    refused = able.post("/v1/chat/completions", json=body)
    require_error(refused, 400, "suffix", "unsupported_parameter")


@pytest.fixture(scope="module")
def both_ways():
    with tiny_llm(attention="bidirectional", block_size=8) as own:
        yield own


def test_a_model_that_sees_both_ways_fills_the_place_before_a_suffix(both_ways):
    client = client_of(both_ways)
    asked = {"suffix": "xyz", "max_tokens": 20, "seed": 3, "logprobs": 0, "n": 2}
    body = complete(client, **asked).json()
    assert body["usage"]["prompt_tokens"] == len("abc") + len("xyz")
    assert body["usage"]["completion_tokens"] == 40
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 2
    params = SamplingParams(max_tokens=20, seed=3, temperature=1.0)
    answers = both_ways.generate(["abc"], params, n=2, suffix="xyz")
    assert [choice["text"] for choice in body["choices"]] == [answer.text for answer in answers]
    other = complete(client, **(asked | {"suffix": "xyw"})).json()
    told = [each["choices"][0]["logprobs"]["token_logprobs"] for each in (body, other)]
    assert len(told[0]) == len(told[1]) == 20
    assert told[0] != told[1]  # one token of the suffix changes what is seen
    streamed = events_of(complete(client, stream=True, **(asked | {"n": 1})))
    assert len(streamed) > 2
    text = "".join(choice["text"] for event in streamed[:-1] for choice in event["choices"])
    assert text == answers[0].text
    stop = answers[0].text[4]
    [cut] = complete(client, **(asked | {"n": 1, "stop": stop})).json()["choices"]
    assert (cut["text"], cut["stop_reason"]) == (answers[0].text.partition(stop)[0], stop)
    first = complete(client, **(asked | {"prompt": ["", "abc"], "n": 1})).json()
    assert len(first["choices"]) == 2  # nothing before the hole
    echoed = complete(client, suffix="xyz", max_tokens=0, echo=True).json()
    assert (echoed["choices"][0]["text"], echoed["usage"]["completion_tokens"]) == ("abc", 0)


def test_a_block_that_has_room_for_hole_and_suffix_sees_it(client, llm):
    asked = {"prompt": "hello", "suffix": "x", "max_tokens": 2, "seed": 3}
    body = complete(client, **asked).json()
    assert body["usage"]["completion_tokens"] == 2
    params = SamplingParams(max_tokens=2, seed=3, temperature=1.0)
    [answer] = llm.generate(["hello"], params, suffix="x")
    assert body["choices"][0]["text"] == answer.text
    for change in ({"max_tokens": 3}, {"suffix": "xy"}, {"prompt": "hell", "suffix": "xyz"}):
        error = require_error(complete(client, **(asked | change)), 400, "suffix",
                              "unsupported_parameter")  # fmt: skip
        assert "make the two together shorter by 1 tokens" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"stop_ids": [5]}, "stop_ids", "invalid_value"),
        ({"stop_at_eos": True}, "stop_at_eos", "invalid_value"),
        ({"prompt": [97, 258]}, "prompt", "invalid_value"),
        ({"prompt": [97, 999]}, "prompt", "invalid_value"),
        ({"suffix": "x" * 120}, "max_tokens", "context_length_exceeded"),
        ({"suffix": "x" * 125}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 123}, "max_tokens", "context_length_exceeded"),
        ({"max_steps": 1}, "max_steps", "invalid_value"),
    ],
)
def test_what_a_hole_cannot_have_is_refused_by_name(both_ways, fields, param, code):
    asked = {"suffix": "xyz", "max_tokens": 20, **fields}
    require_error(complete(client_of(both_ways), **asked), 400, param, code)


def test_token_ids_are_taken_as_they_are(client):
    assert (
        complete(client, prompt=[97, 98, 99], seed=1).json()["choices"]
        == (complete(client, prompt="abc", seed=1).json()["choices"])
    )


def test_a_stream_joins_to_the_whole_answer_and_ends_with_done(client):
    whole = complete(client, seed=3, n=2, max_tokens=18).json()
    reply = complete(
        client, seed=3, n=2, max_tokens=18, stream=True, stream_options={"include_usage": True}
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    *pieces, last, done = events_of(reply)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        reasons = [piece["finish_reason"] for piece in own]
        assert reasons == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_a_stop_cuts_the_text_and_the_usage(client):
    whole = complete(client, seed=3, max_tokens=40).json()["choices"][0]["text"]
    stop = whole[5]
    body = complete(client, seed=3, max_tokens=40, stop=[stop]).json()
    assert body["choices"][0]["text"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == stop
    assert body["usage"]["completion_tokens"] < 40


def test_a_token_that_the_request_names_ends_it(client):
    whole = complete(client, seed=3, max_tokens=40).json()["choices"][0]
    last = next(letter for letter in whole["text"] if letter.isascii())
    [choice] = complete(client, seed=3, max_tokens=40, stop_ids=[ord(last)]).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord(last))
    assert choice["text"] == whole["text"].partition(last)[0] + last


def test_naming_no_end_is_naming_none(client):
    expected = complete(client, seed=3).json()["choices"]
    for nothing in ({"stop_ids": []}, {"stop": []}, {"stop": ""}, {"stop_ids": None}):
        assert complete(client, seed=3, **nothing).json()["choices"] == expected


def test_a_budget_bounds_the_passes_and_one_that_is_too_small_names_the_cure(client):
    settings = {"seed": 5, "max_tokens": 21, "confidence_threshold": 1.0}  # blocks of 1 and 4
    usage = complete(client, **settings, max_steps=11, deadline_seconds=60).json()["usage"]
    assert usage["completion_tokens"] == 21
    assert usage["completion_tokens_details"]["passes"] == 11
    short = complete(client, **settings, max_steps=5)
    error = require_error(short, 400, "max_steps", "invalid_value")
    assert "raise max_steps to 6" in error["message"]
    wrong = complete(client, stop_ids=[10**6])
    error = require_error(wrong, 400, "stop_ids", "invalid_value")
    assert "outside the vocabulary" in error["message"]


def test_a_chat_answers_as_the_assistant_whole_and_streamed(client):
    request = {"model": "tiny", "messages": USER, "max_completion_tokens": 9, "seed": 1}
    whole = client.post("/v1/chat/completions", json=request).json()
    message = whole["choices"][0]["message"]
    assert (whole["object"], message["role"]) == ("chat.completion", "assistant")
    reply = client.post("/v1/chat/completions", json={**request, "stream": True})
    *pieces, done = events_of(reply)
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert done == "[DONE]"
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == message["content"]


def test_the_text_of_a_special_token_reaches_the_sampler_as_ordinary_text(llm):
    seen = []

    async def decode(tokens, params, choice):
        seen.append(tokens)
        yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": "length"}

    client = TestClient(build_api(endpoint(llm, decode=decode)), headers=KEY)
    hostile = "<|mask|><|pad|><|endoftext|>"
    complete(client, prompt=hostile)
    client.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": hostile}]},
    )
    assert len(seen) == 2
    assert all(max(tokens) < 256 for tokens in seen)


def test_what_the_cache_does_not_hold_is_refused_and_never_asked_for_by_default():
    """The context has 128 tokens and the engine's memory 64, or 32 of each of guidance's two."""
    token = 2 * 2 * 16 * 4  # keys and values, heads, size, bytes
    with tiny_llm(engine=EngineConfig(cache_bytes=64 * token)) as llm:
        client = client_of(llm)
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 64
        assert client.post("/tokenize", json={"prompt": "a"}).json()["max_model_len"] == 64
        assert client.get("/tokenizer_info").json()["model_max_length"] == 64
        for guidance, longest in ((0, 64), (1.5, 32)):
            asked = {"guidance_scale": guidance, "stop_at_eos": False}
            assert chat(client, **asked).json()["usage"]["total_tokens"] == longest
            assert complete(client, max_tokens=longest - 3, **asked).status_code == 200
            for stream in (False, True):
                over = complete(client, max_tokens=longest - 2, stream=stream, **asked)
                error = require_error(over, 400, "max_tokens", "context_length_exceeded")
                assert f"makes {longest + 1}, over the {longest} that" in error["message"]
            long = chat(client, "x" * longest, **asked)
            require_error(long, 400, "messages", "context_length_exceeded")
        scored = complete(client, prompt="x" * 100, max_tokens=0, echo=True, logprobs=0)
        assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == 100


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"max_tokens": 126}, "max_tokens", "lower max_tokens to 125 or shorten the prompt"),
        ({"prompt": "a" * 120}, "prompt", "plus the default max_tokens=16 makes 136, over the con"),
        ({"prompt": "a" * 120, "max_tokens": None}, "prompt", "the default max_tokens=16 makes"),
        ({"prompt": "a" * 120}, "prompt", "prompt by 8 tokens or give a max_tokens of at most 8"),
        ({"prompt": "a" * 120, "max_tokens": 16}, "max_tokens", "plus max_tokens=16 makes 136"),
        ({"prompt": "a" * 130, "max_tokens": 5}, "prompt", "shorten the prompt by 3 tokens"),
        ({"prompt": "a" * 130, "max_tokens": 0, "echo": True}, "prompt", "prompt by 2 tokens"),
    ],
)
def test_too_many_tokens_are_told_with_the_field_that_would_mend_it(client, fields, field, words):
    error = require_error(complete(client, **fields), 400, field, "context_length_exceeded")
    assert words in error["message"]


def test_a_mended_length_is_taken(client):
    assert complete(client, max_tokens=125).status_code == 200
    assert complete(client, prompt="a" * 120, max_tokens=8).status_code == 200
    assert complete(client, prompt="a" * 127, max_tokens=1).status_code == 200


def test_where_positions_are_learned_an_answer_ends_with_the_last_whole_block_of_them():
    with tiny_llm(network="gpt2", max_sequence_length=126) as llm:
        whole = 126 // llm.config.block_size * llm.config.block_size
        assert whole < 126
        client = client_of(llm)
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == whole
        assert chat(client, stop_at_eos=False).json()["usage"]["total_tokens"] == whole
        assert complete(client, max_tokens=whole - 3).status_code == 200
        over = complete(client, max_tokens=whole - 2)
        error = require_error(over, 400, "max_tokens", "context_length_exceeded")
        assert f"over the {whole} that whole blocks take of the context of 126" in error["message"]
        over = complete(client, prompt="a" * (whole - 4))
        error = require_error(over, 400, "prompt", "context_length_exceeded")
        assert "give a max_tokens of at most 4" in error["message"]
        scored = complete(client, prompt="x" * 126, max_tokens=0, echo=True, logprobs=0)
        assert len(scored.json()["choices"][0]["logprobs"]["tokens"]) == 126  # decodes nothing


def test_a_chat_that_is_too_long_is_told_to_be_shortened_whatever_its_length_is_called(client):
    error = require_error(chat(client, "x" * 128), 400, "messages", "context_length_exceeded")
    assert "messages of 146 tokens plus an answer is over the context of 128" in error["message"]
    assert "max_tokens" not in error["message"]
    for name in ("max_tokens", "max_completion_tokens"):
        over = chat(client, "Hi", **{name: 120})
        error = require_error(over, 400, name, "context_length_exceeded")
        assert f"messages of 20 tokens plus {name}=120 makes 140" in error["message"]


def test_a_server_that_is_ending_takes_no_new_request_and_goes_on_with_those_it_has(llm):
    is_ending = []

    def require_open():
        if is_ending:
            raise ApiError(503, "over", type="server_error", code="server_ending")

    async def score(tokens, count):
        is_ending.append(True)
        return [None] * len(tokens)

    client = client_of(llm, require_open=require_open, score=score)
    asked = {"prompt": ["ab", "cd"], "echo": True, "max_tokens": 4}
    assert len(complete(client, logprobs=0, **asked).json()["choices"]) == 2
    replies = [complete(client, **asked), complete(client, stream=True), chat(client)]
    for reply in (*replies, client.get("/ready")):
        require_error(reply, 503, None, "server_ending")


def test_it_is_ready_as_long_as_its_samplers_are(llm):
    told = [True, False]

    async def ready():
        return told.pop(0)

    client = client_of(llm, ready=ready)
    assert client.get("/ready").json() == {"status": "ok"}
    reply = client.get("/ready")
    require_error(reply, 503, None, "not_ready")
    assert reply.headers["retry-after"] == "1"


def test_models_are_listed_and_shown_by_name(client):
    [card] = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert client.get("/v1/models/tiny").json() == card
    require_error(client.get("/v1/models/other"), 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": [258]}, "prompt", "invalid_value"),
        ({"prompt": [5000]}, "prompt", "invalid_value"),
        ({"max_tokens": 126}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "a" * 128}, "prompt", "context_length_exceeded"),
        ({"max_tokens": "x"}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"prompt": ["a"] * 3, "n": 8}, "n", "invalid_value"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": ["a"] * 64, "max_tokens": 100_000}, "max_tokens", "invalid_value"),
        ({"prompt": ["a" * 600_000] * 2}, "prompt", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"echo": "yes"}, "echo", "invalid_value"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(client, fields, param, code):
    content = json.dumps({"model": "tiny", "prompt": "abc", **fields})
    head = {"Content-Type": "application/json"}
    reply = client.post("/v1/completions", content=content, headers=head)
    require_error(reply, 400, param, code)


def test_every_other_error_has_the_same_shape(client, llm):
    post = {"url": "/v1/completions", "headers": {"Content-Type": "application/json"}}
    require_error(client.post(**post, content="{bad"), 400, None, "invalid_json")
    require_error(client.post(**post, content="[1]"), 400, None, "invalid_value")
    require_error(client.post(**post, content=b'{"model": "\xff"}'), 400, None, "invalid_json")
    require_error(client.post(**post, content=""), 400, None, "invalid_json")
    endless = '{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    require_error(client.post(**post, content=endless), 400, "temperature", "invalid_value")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp"):
        reply = client.post(post["url"], content="{}", headers={"Content-Type": kind})
        require_error(reply, 415, None, "unsupported_media_type")
    bare = client.build_request("POST", post["url"], content=b"{}")
    require_error(client.send(bare), 415, None, "unsupported_media_type")
    crowd = client.get("/v1/models", headers={f"x-{place}": "y" for place in range(120)})
    require_error(crowd, 431, None, "too_many_headers")
    missing = client.post("/v1/completions", json={"model": "tiny"})
    require_error(missing, 400, "prompt", "missing_required_parameter")
    require_error(client.get("/nowhere"), 404, None, "unknown_url")
    require_error(client.get("/v1/completions"), 405, None, "method_not_allowed")
    require_error(complete(client, model="other"), 404, "model", "model_not_found")
    large = "x" * (MAX_BODY_BYTES + 1)
    require_error(client.post(**post, content=large), 413, None, "request_too_large")
    pieces = iter([b"x" * (1 << 20)] * 9)
    require_error(client.post(**post, content=pieces), 413, None, "request_too_large")


def test_every_route_but_health_needs_one_of_the_keys(llm):
    bare = TestClient(build_api(endpoint(llm)))
    assert bare.get("/health").status_code == 200
    for path in ("/v1/models", "/openapi.json", "/nowhere"):
        require_error(bare.get(path), 401, None, "invalid_api_key")
    for header in ("Bearer wrong", "right", "Basic right", "Bearer", "Bearer righ", "Bearer \xff"):
        reply = bare.get("/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
        require_error(reply, 401, None, "invalid_api_key")
    for key in ("right", "other"):
        headers = {"Authorization": f"Bearer {key}"}
        assert bare.get("/v1/models", headers=headers).status_code == 200
    open_house = TestClient(build_api(endpoint(llm, keys=None)))
    assert open_house.get("/v1/models").status_code == 200


def test_a_full_sampler_is_a_429_with_the_time_to_wait_before_any_stream_starts(llm):
    async def decode(tokens, params, choice):
        raise overloaded()
        yield

    client = TestClient(build_api(endpoint(llm, decode=decode)), headers=KEY)
    for stream in (False, True):
        reply = complete(client, stream=stream)
        require_error(reply, 429, None, "rate_limit_exceeded")
        assert reply.headers["retry-after"] == "1"


def test_a_failure_is_a_500_or_an_event_in_mid_stream_never_silence(llm):
    async def decode(tokens, params, choice):
        yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": None}
        raise ValueError("secret detail")

    api = build_api(endpoint(llm, decode=decode))
    client = TestClient(api, headers=KEY, raise_server_exceptions=False)
    error = require_error(complete(client), 500, None, "internal")
    assert "secret" not in error["message"]
    first, last = events_of(complete(client, stream=True))
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "internal"
    assert set(last["error"]) == {"message", "type", "param", "code"}


def test_a_sampler_that_stops_without_a_reason_is_an_error_not_a_short_answer(llm):
    async def decode(tokens, params, choice):
        yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": None}

    api = build_api(endpoint(llm, decode=decode))
    client = TestClient(api, headers=KEY, raise_server_exceptions=False)
    require_error(complete(client), 500, None, "internal")
    assert "error" in events_of(complete(client, stream=True))[-1]


def test_places_are_given_back_after_success_and_failure(llm):
    calls = []

    async def decode(tokens, params, choice):
        calls.append(choice)
        if len(calls) % 2:
            raise overloaded()
        yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": "length"}

    api = build_api(endpoint(llm, decode=decode, max_choices_in_flight=1))
    client = TestClient(api, headers=KEY)
    codes = [complete(client, stream=bool(i % 3)).status_code for i in range(12)]
    assert codes == [429, 200] * 6


def test_a_client_that_leaves_ends_its_decoding(llm):
    """The ASGI messages of a client that reads three blocks and hangs up."""
    decoded, ended = [], []

    async def decode(tokens, params, choice):
        try:
            while True:
                await asyncio.sleep(0.001)
                decoded.append(len(decoded))
                yield {"tokens": [97], "passes": 1, "steps": 1, "finish_reason": None}
        finally:
            ended.append(True)

    async def visit():
        await leave_after_three_blocks(build_api(endpoint(llm, decode=decode)))
        return list(ended), len(decoded)

    # Judged inside the loop: one that ends cancels whatever was left behind.
    was_ended, blocks = asyncio.run(asyncio.wait_for(visit(), timeout=120))
    assert was_ended == [True]
    assert 3 <= blocks < 20


async def leave_after_three_blocks(api) -> None:
    """Returns once the application has ended by itself."""
    body = json.dumps({"model": "tiny", "prompt": "abc", "stream": True}).encode()
    asked, left, pieces = iter([body]), asyncio.Event(), []

    async def receive():
        for content in asked:
            return {"type": "http.request", "body": content, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        pieces.append(message)
        if sum(b"data:" in piece.get("body", b"") for piece in pieces) >= 3:
            left.set()

    headers = [(b"authorization", b"Bearer right"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST"}
    scope |= {"http_version": "1.1", "scheme": "http", "path": "/v1/completions", "raw_path": b""}
    scope |= {"query_string": b"", "root_path": "", "headers": headers, "server": ("test", 80)}
    await api(scope, receive, send)
