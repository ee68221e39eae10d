"""What a wrong field is answered with: one sentence of its name, its value and what is allowed."""

import json

import pytest

from tests.jobs.tiny_endpoint import client_of, require_error, tiny_llm

USER = {"role": "user", "content": "Hi"}
TEXT = {"type": "text", "text": "Hi"}


@pytest.fixture(scope="module")
def client():
    return client_of(tiny_llm())


def refused(client, route: str, content: str) -> dict:
    reply = client.post(route, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 9}, "`temperature`=9 must be at most 2."),
        ({"temperature": "hot"}, '`temperature`="hot" must be a number.'),
        ({"top_p": 0}, "`top_p`=0 must be above 0."),
        ({"n": True}, "`n`=true must be a whole number."),
        ({"stream": "yes"}, '`stream`="yes" must be true or false.'),
        ({"prompt": 5}, "`prompt`=5 must be a text or a list."),
        ({"prompt": []}, "`prompt`=[] must be at least 1 long."),
        ({"prompt": [-1]}, "`prompt[0]`=-1 must be at least 0."),
        ({"prompt": ["a", 1]}, "`prompt[1]`=1 must be a text or a list."),
        ({"prompt": [[1], [2, -3]]}, "`prompt[1][1]`=-3 must be at least 0."),
        ({"stop": ["a"] * 5}, '`stop`=["a", "a", "a", "a", "a"] must be at most 4 long.'),
        ({"stop": 7}, "`stop`=7 must be a text or a list."),
        ({"seed": 2**63}, f"`seed`={2**63} must be below {2**63}."),
        ({"rule": "quick"}, "`rule`=\"quick\" must be one of 'confidence_threshold', "),
        ({"metadata": [1]}, "`metadata`=[1] must be an object."),
        ({"suffix": "é" * 10**6 + "x"}, f'`suffix`="{"é" * 59}… must be at most 1000000 '),
        ({"deadline_seconds": 1e7}, "`deadline_seconds`=10000000.0 must be at most 1000000."),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(client, fields, sentence):
    body = json.dumps({"model": "tiny", "prompt": "a", **fields}, ensure_ascii=False)
    error = refused(client, "/v1/completions", body)
    assert error["message"].startswith(sentence)
    assert (error["param"], error["code"]) == (next(iter(fields)), "invalid_value")


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({**USER, "role": "tool"}, "`messages[0].role`=\"tool\" must be one of 'system', "),
        ({"role": "user"}, "`messages[0].content` is missing; give it."),
        ({"role": "user", "content": None}, "`messages[0].content` is missing; give it."),
        ({**USER, "content": 5}, "`messages[0].content`=5 must be a text or a list."),
        (
            {**USER, "content": [{"type": "image_url", "image_url": {}}]},
            "`messages[0].content[0].type`=\"image_url\" must be 'text'.",
        ),
        ("hi", '`messages[0]`="hi" must be an object.'),
    ],
)
def test_a_wrong_message_is_told_with_its_place(client, message, sentence):
    body = json.dumps({"model": "tiny", "messages": [message]})
    error = refused(client, "/v1/chat/completions", body)
    assert error["message"].startswith(sentence)
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("route", "body", "param", "sentence"),
    [
        ("/tokenize", {"promt": "a"}, "promt", "`promt` is not known; did you mean `prompt`?"),
        ("/detokenize", {"tokns": [1]}, "tokns", "`tokns` is not known; did you mean `tokens`?"),
        ("/detokenize", {"zzz": 1}, "zzz", "`zzz` is not known; known are model, tokens"),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [USER, {**USER, "nme": "x"}]},
            "messages",
            "`messages[1].nme` is not known; known are role, content",
        ),
        (
            "/tokenize",
            {"messages": [{**USER, "contnt": "x"}]},
            "messages",
            "`messages[0].contnt` is not known; did you mean `messages[0].content`?",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{**USER, "content": [{**TEXT, "txt": 1}]}]},
            "messages",
            "`messages[0].content[0].txt` is not known; did you mean "
            "`messages[0].content[0].text`?",
        ),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": "a", "stream_options": {"include_usge": True}},
            "stream_options",
            "`stream_options.include_usge` is not known; did you mean "
            "`stream_options.include_usage`?",
        ),
    ],
)
def test_a_field_that_there_is_not_is_answered_with_the_nearest_one(
    client, route, body, param, sentence
):
    error = refused(client, route, json.dumps(body))
    assert (error["message"], error["param"]) == (sentence, param)
    assert error["code"] == "unknown_parameter"


def test_a_missing_field_and_a_body_that_is_no_object_are_named(client):
    missing = client.post("/v1/completions", json={"model": "tiny"})
    error = require_error(missing, 400, "prompt", "missing_required_parameter")
    assert error["message"] == "`prompt` is missing; give it."
    error = refused(client, "/v1/completions", "[1]")
    assert (error["message"], error["param"]) == ("The body [1] must be an object.", None)
