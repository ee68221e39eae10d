"""The arms of `bench-generate` do the same work, and only then may be compared."""

import json

import pytest

from tests.benchmarks import generate, generate_arms
from tests.benchmarks.faults_generate import write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_model(folder / "model")
    generate.write_prompts(folder / "prompts.jsonl", 40)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = row["prompt"][:60]  # what the tiny model holds
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_arms_that_decode_here_write_the_same(place):
    told = {
        arm: generate_arms.decoded(arm, place / "model", place / "prompts.jsonl", 1)
        for arm in ("engine", "drained", "loop")
    }
    assert len({each["digest"] for each in told.values()}) == 1
    rows = generate_arms.rows_of(place / "prompts.jsonl")
    wanted = sum(row.decoding.params.max_tokens for row in rows)
    assert {each["tokens"] for each in told.values()} == {wanted}


def test_rows_are_of_mixed_length_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        generate.write_prompts(tmp_path / name, 200)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len({len(row["prompt"]) for row in rows}) > 100
    assert {row["params"]["max_tokens"] for row in rows} == set(range(8, 41))
