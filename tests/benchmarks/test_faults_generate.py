"""The fault table's own rules: where it strikes, what it counts, and that it can fail."""

import json

import pytest

from cascade_model.commit import Folder
from cascade_model.sampling import SamplingParams
from pipelines.completions import claim, dead_name, shard_name
from pipelines.generation import PartWorker, Work
from pipelines.model_answers import ModelSource
from pipelines.prompt_rows import Columns
from pipelines.prompts import plan
from pipelines.row_settings import Decoding
from tests.benchmarks.fault_points import AFTER_MANIFEST, BEFORE_MANIFEST, IN_COMMIT, PHASES
from tests.benchmarks.faults_generate import (
    ROWS,
    ROWS_PER_SHARD,
    VICTIMS,
    points_of,
    rows_in,
    write_model,
    write_prompts,
)
from tests.benchmarks.faults_generate_poison import KINDS, letters_of, write_poisoned


@pytest.mark.parametrize("count", [1, 2, 20, 50])
def test_enough_points_lie_in_a_commit(count):
    passed = dict.fromkeys(PHASES, 7)
    points = points_of(count, passed)
    assert points == points_of(count, passed)
    assert len(points) == count
    assert sum(p.phase in IN_COMMIT for p in points) >= count / 4
    assert all(1 <= p.number <= 7 for p in points)
    ends = BEFORE_MANIFEST + AFTER_MANIFEST
    assert {p.victim for p in points if p.phase in ends} <= {"driver"}
    assert count < 20 or {p.victim for p in points} == set(VICTIMS)
    assert count < 2 or points != points_of(count, passed, seed=1)


def answer_here(model, source, output, rows_per_part: int) -> list:
    """The job without Ray: all its parts, committed."""
    parts, _ = plan([str(source)], rows_per_part)
    claim(Folder(output), {}, {})
    work = Work(
        source=ModelSource(model=str(model)),
        output=str(output),
        columns=Columns(),
        common=Decoding(params=SamplingParams(max_tokens=4)),
        format="jsonl",
        rows_per_part=rows_per_part,
    )
    worker = PartWorker(work)
    for part in parts:
        worker.answer(part)
    return parts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    write_model(folder)
    return folder


def test_what_is_lost_or_doubled_is_counted(model, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    write_prompts(source)
    parts = answer_here(model, source, output, ROWS_PER_SHARD)
    whole = rows_in(output)
    assert whole == dict.fromkeys(range(ROWS), 1)
    shard = output / shard_name(parts[3], "jsonl")
    (output / "completions-000099.jsonl").write_bytes(shard.read_bytes())
    assert max(rows_in(output).values()) == 2
    (output / "completions-000099.jsonl").unlink()
    kept = shard.read_text()
    shard.write_text(kept[: len(kept) // 2])
    assert sum((whole - rows_in(output)).values()) >= 2
    shard.write_text(kept)
    dead = next(part for part in parts if (output / dead_name(part)).exists())
    (output / dead_name(dead)).unlink()
    assert sum((whole - rows_in(output)).values()) == 1


def test_each_kind_of_poison_becomes_one_dead_letter_with_its_reason(model, tmp_path):
    source, output = tmp_path / "rows.jsonl", tmp_path / "out"
    planted = write_poisoned(source, 80, 2 * len(KINDS), seed=10)
    answer_here(model, source, output, 16)
    assert sorted(letters_of(output)) == sorted(planted)
    assert len(planted) == 2 * len(KINDS)
    shards = sorted(output.glob("completions-*.jsonl"))
    rows = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    assert len(rows) == 80 - len(planted)
