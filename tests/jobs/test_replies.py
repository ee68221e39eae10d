"""Log-probabilities and echoes in whole answers and in streams, over a real tiny model."""

import math

import pytest

from cascade_model.sampling import SamplingParams
from jobs.logprobs import joined
from jobs.openai_answers import ChatAnswer, ChatEvent, CompletionAnswer
from tests.jobs.tiny_endpoint import (
    chat,
    client_of,
    complete,
    events_of,
    require_error,
    tiny_llm,
)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def client(llm):
    return client_of(llm)


def choice_of(response) -> dict:
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return choice


def test_a_completions_logprobs_are_what_the_engine_told(client, llm):
    params = SamplingParams(max_tokens=11, temperature=1.0, seed=5, logprobs=3)
    [made] = llm.generate(["abc"], params)
    logprobs = choice_of(complete(client, max_tokens=11, seed=5, logprobs=3))["logprobs"]
    assert logprobs["token_logprobs"] == [told.logprob for told in made.logprobs]
    for top, told in zip(logprobs["top_logprobs"], made.logprobs, strict=True):
        assert max(top.values()) == max(value for _, value in told.top)
        assert 3 <= len(top) <= 4


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 0}])
@pytest.mark.parametrize("n", [1, 3])
def test_a_streams_pieces_join_to_the_whole_answer(client, fields, n):
    request = {"seed": 3, "n": n, "max_tokens": 13, "prompt": ["abc", "xyzä"], **fields}
    whole = CompletionAnswer.model_validate(complete(client, **request).json())
    *pieces, done = events_of(complete(client, **request, stream=True))
    assert done == "[DONE]"
    pieces = [CompletionAnswer.model_validate(piece).model_dump() for piece in pieces]
    for choice in whole.model_dump()["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert len(own) > 2
        assert "".join(piece["text"] for piece in own) == choice["text"]
        if choice["logprobs"] is not None:
            assert joined([piece["logprobs"] for piece in own]) == choice["logprobs"]


def test_a_chats_logprobs_whole_and_streamed(client):
    fields = {"seed": 1, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    whole = ChatAnswer.model_validate(chat(client, **fields).json())
    *pieces, _ = events_of(chat(client, **fields, stream=True))
    events = [ChatEvent.model_validate(piece) for piece in pieces]
    [choice] = whole.choices
    assert choice.logprobs is not None
    tokens = [token for each in events for token in each.choices[0].logprobs.content]
    assert tokens == choice.logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    spelt = b"".join(bytes(token.bytes) for token in tokens if not token.token.startswith("<|"))
    assert spelt.decode(errors="replace") == choice.message.content
    bare = chat(client, **fields | {"top_logprobs": None}).json()["choices"][0]["logprobs"]
    assert [token["top_logprobs"] for token in bare["content"]] == [[]] * len(tokens)


def test_an_echo_repeats_the_prompt_as_text_and_from_tokens(client):
    plain = choice_of(complete(client, prompt="Bäume", seed=2))["text"]
    for prompt in ("Bäume", list("Bäume".encode())):
        assert choice_of(complete(client, prompt=prompt, seed=2, echo=True))["text"] == (
            "Bäume" + plain
        )


def id_of(token: str) -> int:
    """Tokens are bytes here, but for the end of text."""
    if token == "<|endoftext|>":
        return 256
    return int(token.removeprefix("bytes:\\x"), 16) if len(token) > 1 else ord(token)


def test_an_echos_logprobs_are_the_sequential_rules_own(client):
    """What a client decodes in sequence, it can have scored again: the same numbers."""
    text = choice_of(
        complete(client, max_tokens=9, rule="sequential", logprobs=2, seed=4, stop_at_eos=False)
    )
    own = text["logprobs"]["token_logprobs"]
    tokens = [*b"abc", *map(id_of, text["logprobs"]["tokens"])]
    scored = choice_of(complete(client, prompt=tokens, max_tokens=0, echo=True, logprobs=2))
    found = scored["logprobs"]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][3:] == pytest.approx(own, abs=1e-5)
    assert len(found["tokens"]) == len(tokens) == len(found["text_offset"])
    assert found["text_offset"][:4] == [0, 1, 2, 3]


def test_scores_do_not_depend_on_what_follows_and_so_add_up_wherever_they_are_cut(client):
    def scores(text: str) -> list[float]:
        reply = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=0)
        return choice_of(reply)["logprobs"]["token_logprobs"]

    whole = scores("a sentence that is scored")
    for cut in range(1, len(whole)):
        first, *part = scores("a sentence that is scored"[:cut])
        assert first is None
        assert part == pytest.approx(whole[1:cut], abs=1e-5)


def test_what_lm_eval_sends_has_one_generated_token_and_an_exact_maximum(client):
    request = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    body = complete(client, prompt=[list(b"What is it? It"), list(b"ab")], **request).json()
    for choice, length in zip(body["choices"], (14, 2), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == length + 1
        pairs = zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
        for value, top in pairs:
            assert value <= max(top.values()) <= 0
            assert value in top.values()
    assert body["usage"]["completion_tokens"] == 2


def test_an_echo_alone_decodes_nothing(client):
    reply = complete(client, max_tokens=0, echo=True, n=2, prompt=["abc", "de"]).json()
    assert [choice["text"] for choice in reply["choices"]] == ["abc", "abc", "de", "de"]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert reply["usage"]["completion_tokens"] == 0
    assert reply["usage"]["completion_tokens_details"] == {"passes": 0}
    [piece, done] = events_of(complete(client, max_tokens=0, echo=True, stream=True))
    assert (piece["choices"][0]["text"], done) == ("abc", "[DONE]")


def test_a_stop_cuts_text_and_logprobs_at_the_same_token(client):
    request = {"seed": 3, "max_tokens": 40, "logprobs": 0}
    whole = choice_of(complete(client, **request))
    stop = whole["text"][5]
    cut = choice_of(complete(client, **request, stop=[stop]))
    count = len(cut["logprobs"]["tokens"])
    assert count < len(whole["logprobs"]["tokens"])
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:count]
    assert cut["logprobs"]["text_offset"][-1] == len(cut["text"])


def test_a_score_that_fails_is_an_error_before_the_stream(llm):
    async def score(tokens, count):
        raise ValueError("secret detail")

    client = client_of(llm, score=score)
    for stream in (False, True):
        reply = complete(client, echo=True, logprobs=0, stream=stream)
        assert "secret" not in require_error(reply, 500, None, "internal")["message"]
    assert complete(client, echo=True).status_code == 200


def test_every_logprob_is_a_number_that_json_has(client):
    choice = choice_of(complete(client, temperature=0, logprobs=20, max_tokens=30))
    values = [v for top in choice["logprobs"]["top_logprobs"] for v in top.values()]
    assert all(math.isfinite(value) and value <= 0 for value in values)
