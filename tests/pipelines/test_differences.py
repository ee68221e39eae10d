"""Which settings make another job of it, each by its own name and with both values."""

import pytest

from pipelines.differences import differences

NAMED = {"input_sha256": "input=prompts.jsonl", "weights_sha256": "model=run/model"}
MODEL = {
    "sampling": {"temperature": 1.0, "seed": 0, "top_p": 1.0, "top_k": 0, "max_tokens": 64},
    "stop": [],
    "rows_per_shard": 64,
    "engine": {"precision": "float32", "device": "cpu"},
    "weights_sha256": "a" * 64,
    "chat_template_sha256": "b" * 64,
    "input_sha256": "c" * 64,
}
ENDPOINT = {
    name: MODEL[name] for name in ("sampling", "stop", "rows_per_shard", "input_sha256")
} | {
    "model_name": "tiny",
    "fingerprint": "cascade-0123",
    "chat_template_sha256": None,
}


def changed(**sampling) -> dict:
    return MODEL | {"sampling": MODEL["sampling"] | sampling}


def test_the_same_job_does_not_differ():
    assert differences(MODEL, MODEL, NAMED) == []
    assert differences(ENDPOINT, ENDPOINT, NAMED) == []
    assert differences(MODEL, MODEL | {"a later setting": None}, NAMED) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (changed(temperature=0.7), ["sampling.temperature=0.7, the folder was made with 1.0"]),
        (MODEL | {"stop": ["x"]}, ["stop=['x'], the folder was made with []"]),
        (
            MODEL | {"input_sha256": "d"},
            ["input=prompts.jsonl is not what the folder was made with"],
        ),
        (MODEL | {"weights_sha256": "d"}, ["model=run/model is not what the folder was made with"]),
        (MODEL | {"late": 1}, ["late=1, the folder was made without it"]),
        (
            {name: value for name, value in MODEL.items() if name != "stop"},
            ["no stop, the folder was made with []"],
        ),
    ],
)
def test_only_what_differs_is_told_and_no_digest(now, told):
    assert differences(MODEL, now, NAMED) == told


def test_many_differences_are_counted():
    now = changed(temperature=0.5, seed=1, top_p=0.9, top_k=3, max_tokens=8)
    told = differences(MODEL, now, NAMED)
    assert len(told) == 5
    assert told[-1] == "and 1 more"


def test_another_kind_of_answerer_is_one_difference():
    named = NAMED | {"weights_sha256": "endpoint=http://x"}
    one = "endpoint=http://x is to answer, the folder was made by a model"
    assert differences(MODEL, ENDPOINT, named) == [one]
    other = "model=run/model is to answer, the folder was made by an endpoint"
    seeded = changed(seed=3)
    assert differences(ENDPOINT, seeded, NAMED) == [
        other,
        "sampling.seed=3, the folder was made with 0",
    ]
