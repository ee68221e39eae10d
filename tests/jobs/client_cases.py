"""What an OpenAI client of any version must see, as functions of a client; they import only openai.

`python client_cases.py URL KEY MODEL` runs them all with the client that is installed, synchronous
and asynchronous, and prints how many passed: so `make openai-clients` runs old versions too.
"""

import asyncio
import sys
from collections.abc import Callable

import openai

CASES: list[Callable] = []


def case(function: Callable) -> Callable:
    """Add a case to the list."""
    CASES.append(function)
    return function


def refused(kind: type, call: Callable):
    """The error of a call that must fail with this class."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


@case
def models_are_listed_and_retrieved(client, model):
    assert [each.id for each in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    error = refused(openai.NotFoundError, lambda: client.models.retrieve("other"))
    assert error.code == "model_not_found"


@case
def a_completion_repeats_with_its_seed(client, model):
    request = {"model": model, "prompt": "def", "max_tokens": 13, "seed": 7, "n": 2}
    first, second = (client.completions.create(**request) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert first._request_id


@case
def a_completion_takes_token_ids_and_lists(client, model):
    one = client.completions.create(model=model, prompt=[97, 98], max_tokens=5, seed=1)
    both = client.completions.create(model=model, prompt=[[97, 98], [99]], max_tokens=5, seed=1)
    assert both.choices[0].text == one.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1]


@case
def a_stream_joins_to_the_whole_answer(client, model):
    request = {"model": model, "prompt": "abc", "max_tokens": 18, "seed": 1}
    whole = client.completions.create(**request)
    stream = client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len(pieces) > 2


@case
def a_stream_tells_its_denoising_steps_and_the_same_text(client, model):
    request = {"model": model, "prompt": "abc", "max_tokens": 18, "seed": 1}
    whole = client.completions.create(**request)
    stream = client.completions.create(**request, stream=True, extra_body={"stream_steps": True})
    pieces = [piece.choices[0] for piece in stream]
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    steps = [piece.denoised for piece in pieces if getattr(piece, "denoised", None)]
    assert sum(step["step"] == 0 for step in steps) == len(pieces) - len(steps) > 2
    assert all(len(step["places"]) == len(step["confidences"]) for step in steps)


@case
def a_completions_logprobs_have_an_entry_for_each_token(client, model):
    made = client.completions.create(
        model=model, prompt="abc", max_tokens=4, logprobs=2, echo=True, seed=1
    )
    told = made.choices[0].logprobs
    assert told.token_logprobs[0] is None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)
    assert len(told.tokens) == 3 + made.usage.completion_tokens
    assert made.choices[0].text.startswith("abc")


@case
def a_chat_answers_whole_and_streamed(client, model):
    request = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello <|mask|>"}],
        "max_completion_tokens": 10,
        "seed": 2,
    }
    whole = client.chat.completions.create(**request).choices[0].message
    pieces = list(client.chat.completions.create(**request, stream=True))
    assert whole.role == pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.content


@case
def a_chat_goes_on_from_the_clients_own_message(client, model):
    messages = [{"role": "user", "content": "Hi"}]
    said = client.chat.completions.create(model=model, messages=messages, max_tokens=6, seed=3)
    messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
    again = client.chat.completions.create(model=model, messages=messages, max_tokens=6, seed=3)
    assert again.usage.prompt_tokens > said.usage.prompt_tokens


@case
def a_chats_logprobs_have_bytes(client, model):
    made = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        seed=3,
    )
    tokens = made.choices[0].logprobs.content
    assert len(tokens) == made.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 and token.bytes for token in tokens)


@case
def a_stop_ends_a_completion(client, model):
    request = {"model": model, "prompt": "abc", "max_tokens": 40, "seed": 3}
    whole = client.completions.create(**request).choices[0].text
    cut = client.completions.create(**request, stop=[whole[5]])
    assert cut.choices[0].text == whole[: whole.index(whole[5])]
    assert cut.choices[0].finish_reason == "stop"


@case
def diffusion_fields_go_by_extra_body(client, model):
    request = {"model": model, "prompt": "abc", "max_tokens": 21, "seed": 5}
    made = client.completions.create(
        **request, extra_body={"confidence_threshold": 1.0, "max_steps": 11, "stop_at_eos": False}
    )
    assert made.usage.completion_tokens_details.passes == 11


@case
def a_wrong_key_is_an_authentication_error(client, model):
    other = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, other.models.list).code == "invalid_api_key"


@case
def a_refused_parameter_is_named(client, model):
    for name, value in (("logit_bias", {"5": 1}), ("presence_penalty", 1.0), ("best_of", 3)):
        request = {"model": model, "prompt": "x", name: value}
        error = refused(
            openai.BadRequestError, lambda request=request: client.completions.create(**request)
        )
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert error.request_id


@case
def tools_are_refused_by_name(client, model):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    error = refused(
        openai.BadRequestError,
        lambda: client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "x"}], tools=tools
        ),
    )
    assert error.param == "tools"


@case
def a_prompt_beyond_the_context_is_a_bad_request(client, model):
    error = refused(
        openai.BadRequestError,
        lambda: client.completions.create(model=model, prompt="x", max_tokens=100_000),
    )
    assert error.code == "context_length_exceeded"


@case
def raw_answers_have_one_request_id(client, model):
    raw = client.completions.with_raw_response.create(model=model, prompt="a", max_tokens=2)
    assert raw.headers.get("x-request-id")
    assert "," not in raw.headers["x-request-id"]


async def as_the_synchronous_one(client, other, model: str) -> int:
    """The same answers from an asynchronous client, many at once and streamed."""
    request = {"model": model, "prompt": "abc", "max_tokens": 12}
    made = await asyncio.gather(
        *(other.completions.create(**request, seed=seed) for seed in range(4))
    )
    for seed, each in enumerate(made):
        assert (
            each.choices[0].text == client.completions.create(**request, seed=seed).choices[0].text
        )
    stream = await other.completions.create(**request, seed=0, stream=True)
    text = "".join([piece.choices[0].text async for piece in stream])
    assert text == made[0].choices[0].text
    found = await asyncio.gather(
        other.completions.create(model="other", prompt="x"), return_exceptions=True
    )
    assert [type(error) for error in found] == [openai.NotFoundError]
    await other.close()
    return 6


def main(url: str, key: str, model: str) -> None:
    """Run all cases; an exception ends it."""
    settings = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0, "timeout": 120}
    with openai.OpenAI(**settings) as client:
        for each in CASES:
            each(client, model)
        count = asyncio.run(as_the_synchronous_one(client, openai.AsyncOpenAI(**settings), model))
    told = f"{len(CASES)} cases and {count} asynchronous calls passed"
    print(f"openai {openai.__version__}: {told}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
