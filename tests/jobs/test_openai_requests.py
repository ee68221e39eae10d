"""The wire format alone: every field is honoured, harmless, or refused by name."""

import pytest
from pydantic import ValidationError

from jobs.openai_requests import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "Hi"}]


def completion(**fields) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})


def chat(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": USER, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": ["a", 1]},
        {"prompt": [-1]},
        {"n": 9},
        {"n": 0},
        {"n": True},
        {"max_tokens": 0},
        {"max_tokens": "5"},
        {"temperature": 2.5},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"seed": 2**63},
        {"stop": ["a"] * 5},
        {"rule": "quick"},
        {"confidence_threshold": 1.5},
        {"steps_per_block": 0},
        {"max_steps": 0},
        {"max_steps": 2.5},
        {"deadline_seconds": 0},
        {"deadline_seconds": float("inf")},
        {"deadline_seconds": "soon"},
        {"stop_ids": [-1]},
        {"stop_ids": [1] * 65},
        {"stop_ids": 7},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_a_value_outside_its_bounds_is_refused(fields):
    with pytest.raises(ValidationError):
        completion(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {"5": 1}),
        ("best_of", 2),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("confidence_treshold", 0.5),
    ],
)
def test_an_unsupported_or_unknown_field_is_refused_by_its_name(name, value):
    with pytest.raises(ValidationError, match=f"`{name}`"):
        completion(**{name: value})


def test_a_suffix_is_for_completions_and_not_for_chats():
    assert completion(suffix="end").suffix == "end"
    with pytest.raises(ValidationError, match="`suffix` is not supported"):
        chat(suffix="end")
    for wrong in (["end"], 1, "x" * 1_000_001):
        with pytest.raises(ValidationError, match="suffix"):
            completion(suffix=wrong)
    completion(suffix="end", echo=True)
    with pytest.raises(ValidationError, match="so without a `suffix`"):
        completion(suffix="end", echo=True, logprobs=1)


def test_a_misspelt_field_is_answered_with_the_right_name():
    with pytest.raises(ValidationError, match="did you mean `confidence_threshold`"):
        completion(confidence_treshold=0.5)


def test_neutral_values_and_harmless_fields_are_taken():
    completion(
        best_of=1,
        echo=False,
        logprobs=None,
        suffix=None,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        user="someone",
        n=None,
        stop=None,
        seed=None,
    )
    chat(logprobs=False, tools=[], response_format={"type": "text"}, metadata={"a": "b"})


def test_the_settings_reach_the_engine():
    params = completion(
        temperature=0,
        top_p=0.5,
        rule="low_confidence",
        confidence_threshold=0.25,
        steps_per_block=2,
        max_steps=9,
        deadline_seconds=5,
        stop_ids=[10, 13],
    ).sampling(7, 11)
    assert (params.max_steps, params.deadline_seconds, params.stop_ids) == (9, 5, (10, 13))
    assert (params.max_tokens, params.seed, params.temperature, params.top_p) == (7, 11, 0, 0.5)
    assert (params.rule, params.confidence_threshold, params.steps_per_block) == (
        "low_confidence",
        0.25,
        2,
    )


def test_a_field_left_out_takes_openais_default():
    params = completion(temperature=None).sampling(16, 0)
    assert (params.temperature, params.top_p) == (1.0, 1.0)


def test_stops_are_a_text_or_a_list_without_empty_ones():
    assert completion(stop="a").stops == ("a",)
    assert completion(stop=["a", "", "b"]).stops == ("a", "b")
    assert completion().stops == ()


def test_the_two_names_of_a_chats_length_must_agree():
    assert chat(max_completion_tokens=5).length == 5
    assert chat(max_tokens=5).length == 5
    assert chat(max_tokens=5, max_completion_tokens=5).length == 5
    assert chat().length is None
    with pytest.raises(ValidationError, match="differ"):
        chat(max_tokens=5, max_completion_tokens=6)


def test_messages_may_come_in_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts}])
    assert body.messages[0].plain() == {"role": "system", "content": "ab"}
    with pytest.raises(ValidationError):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(ValidationError):
        chat(messages=[{"role": "tool", "content": "x"}])
