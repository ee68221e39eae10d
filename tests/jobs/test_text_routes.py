"""Tokenising over HTTP as lm-eval's remote tokenizer asks for it."""

import pytest

from tests.jobs.tiny_endpoint import client_of, require_error, tiny_llm

HOSTILE = "a <|mask|> b <|pad|><|endoftext|>"


@pytest.fixture(scope="module")
def client():
    return client_of(tiny_llm())


def tokens_of(client, prompt: str) -> list[int]:
    reply = client.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False})
    assert reply.status_code == 200, reply.text
    assert reply.json()["count"] == len(reply.json()["tokens"])
    return reply.json()["tokens"]


@pytest.mark.parametrize("text", ["", "abc", "Bäume 🌳", HOSTILE])
def test_a_text_comes_back_from_its_tokens(client, text):
    tokens = tokens_of(client, text)
    assert tokens == list(text.encode())
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_the_name_of_the_end_alone_is_its_token_and_no_other_special_is(client):
    info = client.get("/tokenizer_info").json()
    assert tokens_of(client, info["eos_token"]) == [256]
    assert tokens_of(client, info["mask_token"]) == list(b"<|mask|>")
    assert tokens_of(client, info["pad_token"]) == list(b"<|pad|>")
    assert info["bos_token"] is None
    assert info["special_tokens"]["<|mask|>"] == 258
    assert "message.role" in info["chat_template"]
    assert client.post("/detokenize", json={"tokens": [256]}).json()["prompt"] == info["eos_token"]


def test_a_chat_is_tokenised_by_the_template(client):
    messages = [{"role": "user", "content": "Hi"}]
    opened = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    closed = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
    assert bytes(opened) == b"User: Hi\n\nAssistant:"
    assert bytes(closed.json()["tokens"]) == b"User: Hi\n\n"
    strings = client.post("/tokenize", json={"prompt": "aä", "return_token_strs": True}).json()
    assert strings["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa4"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [2**31]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1], "text": "x"}, "text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, path, body, param):
    reply = client.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_another_models_name_is_a_404(client):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert client.post(path, json={**body, "model": "tiny"}).status_code == 200
        reply = client.post(path, json={**body, "model": "other"})
        require_error(reply, 404, "model", "model_not_found")
