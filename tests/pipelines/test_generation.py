"""Batch generation without Ray: parts, seeds, dead letters, commits, resume."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch

from cascade_model.commit import Folder
from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError, Unfinished
from cascade_model.sampling import SamplingParams
from pipelines.completions import (
    TooManyDead,
    claim,
    manifest_of,
    read_record,
    require_sound,
    take_back,
)
from pipelines.generation import PartWorker, Work
from pipelines.model_answers import ModelSource
from pipelines.prompt_rows import Columns
from pipelines.prompts import plan
from pipelines.row_settings import Decoding, row_seed
from tests.tiny_models import saved_text_model

PARAMS = SamplingParams(max_tokens=9, temperature=1.0, seed=5, stop_at_eos=False)
LINES = [
    b'{"prompt": "one", "id": "first"}\n',
    b"\n",
    b'{"prompt": "two"}\n',
    b"{broken\n",
    b'{"prompt": "a\\ud800"}\n',
    b'{"prompt": "\xff"}\n',
    b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
    b'{"prompt": "' + b"x" * 300 + b'"}\n',
    b'"a text"\n',
    b'{"prompt": "<|mask|>"}',
]
ROWS = len(LINES) - 1
ALIVE = (0, 1, 5, 8)
"""Rows that are answered: the long one is too much for the model, four more are broken."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved_text_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(LINES))
    return str(path)


@pytest.fixture(autouse=True)
def same_threads():
    """The worker sets the process's threads; put them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def worker(model: str, output, format="jsonl") -> PartWorker:
    """One that works for a job which has claimed the folder."""
    claim(Folder(output), {}, {})
    work = Work(
        source=ModelSource(model=model),
        output=str(output),
        columns=Columns(),
        common=Decoding(params=PARAMS),
        format=format,
        rows_per_part=5,
    )
    return PartWorker(work)


def test_a_rows_seed_depends_on_the_jobs_seed_and_its_number_alone():
    seeds = {row_seed(job, row) for job in range(20) for row in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(1, 2) == row_seed(1, 2)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_every_row_is_answered_or_dead_and_the_manifest_says_which(
    tmp_path, model, prompts, format
):
    parts, digest = plan([prompts], 5)
    folder, job = Folder(tmp_path / "out"), {"input_sha256": digest}
    answerer = worker(model, tmp_path / "out", format)
    records = [answerer.answer(part) for part in parts]
    manifest = manifest_of(job, parts, records)
    counts = manifest["counts"]
    assert counts["rows_in"] == ROWS == counts["rows_out"] + counts["rows_dead"]
    assert counts["dead_by_reason"] == {
        "broken_json": 1,
        "invalid_utf8": 1,
        "lone_surrogate": 1,
        "not_an_object": 1,
        "refused": 1,
    }
    rows = []
    for file in manifest["files"]:
        if format == "parquet":
            rows += pq.read_table(tmp_path / "out" / file["name"]).to_pylist()
        else:
            lines = folder.read_bytes(file["name"]).decode().splitlines()
            rows += [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == ["first", *map(str, ALIVE[1:])]
    for row, number in zip(rows, ALIVE, strict=True):
        assert row["seed"] == row_seed(PARAMS.seed, number)
        assert row["num_tokens"] == PARAMS.max_tokens
        assert row["tokens_per_forward"] == row["num_tokens"] / row["passes"]
        assert row["finish_reason"] == "length"
    assert sum(row["passes"] for row in rows) == counts["passes"]
    letters = [folder.read_bytes(file["name"]) for file in manifest["dead_files"]]
    dead = [json.loads(line) for data in letters for line in data.splitlines()]
    assert [letter["row"] for letter in dead] == sorted(set(range(ROWS)) - set(ALIVE))


def test_a_part_done_twice_gives_the_same_bytes(tmp_path, model, prompts):
    parts, _ = plan([prompts], 5)
    first, second = worker(model, tmp_path / "a"), worker(model, tmp_path / "b")
    assert [first.answer(part) for part in parts] == [second.answer(part) for part in parts]
    again = worker(model, tmp_path / "a")
    assert again.answer(parts[0]) == read_record(Folder(tmp_path / "a"), parts[0], "jsonl")


def test_the_shards_cut_does_not_change_a_completion(tmp_path, model, prompts):
    def texts(rows_per_part: int) -> list[str]:
        parts, _ = plan([prompts], rows_per_part)
        output = tmp_path / str(rows_per_part)
        answerer = worker(model, output)
        names = [answerer.answer(part).file["name"] for part in parts]
        data = b"".join(Folder(output).read_bytes(name) for name in names)
        return [json.loads(line)["completion"] for line in data.decode().splitlines()]

    assert texts(2) == texts(100)


def test_a_part_without_its_record_counts_as_not_done(tmp_path, model, prompts):
    parts, _ = plan([prompts], 5)
    folder = Folder(tmp_path / "out")
    assert read_record(folder, parts[0], "jsonl") is None
    made = worker(model, tmp_path / "out").answer(parts[0])
    assert read_record(folder, parts[0], "jsonl") == made
    (tmp_path / "out" / f"{made.file['name']}.record.json").unlink()
    assert read_record(folder, parts[0], "jsonl") is None
    assert worker(model, tmp_path / "out").answer(parts[0]) == made


def test_an_output_belongs_to_one_job(tmp_path):
    folder = Folder(tmp_path / "out")
    job = {"max_tokens": 5}
    assert claim(folder, job, {})
    assert not claim(folder, job, {})
    with pytest.raises(InputError, match="job: max_tokens=6, the folder was made with 5; give"):
        claim(folder, {"max_tokens": 6}, {})


@pytest.mark.parametrize("name", ["note.txt", "thesis.tmp"])
def test_a_folder_with_other_files_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds '{name}' and no generate job"):
        claim(Folder(tmp_path), {}, {})


def test_a_part_that_outlives_its_job_writes_nothing(tmp_path, model, prompts):
    parts, _ = plan([prompts], 100)
    answerer, folder = worker(model, tmp_path / "out"), Folder(tmp_path / "out")
    take_back(folder, parts, "jsonl")
    with pytest.raises(InputError, match=r"has no job\.json"):
        answerer.answer(parts[0])
    assert folder.list() == []
    claim(folder, {}, {})  # the control: the same worker writes where its job stands
    answerer.answer(parts[0])
    assert "completions-000000.jsonl" in folder.list()


def test_too_many_dead_rows_stop_the_job_as_soon_as_that_is_sure(tmp_path, model, prompts):
    parts, _ = plan([prompts], 2)
    answerer = worker(model, tmp_path / "out")
    records = [answerer.answer(part) for part in parts]
    require_sound(records, parts, 5 / 9)
    for done in (records, records[:3]):  # three of the nine are dead by then
        with pytest.raises(TooManyDead, match=r"rows .*'broken_json': 1.* row 2: '{broken'.*=0\.3"):
            require_sound(done, parts, 0.3)
    require_sound(records[:1], parts, 0.0)


def test_a_folder_that_stays_takes_a_higher_rate_and_no_other_input(tmp_path):
    error = TooManyDead("2 of 3 rows cannot be answered")
    gone, stays = error.told("out", stays=False), error.told("out", stays=True)
    assert not isinstance(gone, Unfinished)
    assert "; mend the input, set prompt_column, or raise max_dead_rate" in str(gone)
    assert isinstance(stays, Unfinished)
    assert "; raise max_dead_rate and run the same command again" in str(stays)
    assert "prompt_column give another output, as out is bound" in str(stays)


def test_a_lost_row_is_a_fault_that_stops_the_manifest(tmp_path, model, prompts):
    parts, _ = plan([prompts], 100)
    record = worker(model, tmp_path / "out").answer(parts[0])
    with pytest.raises(RuntimeError, match="lost rows"):
        manifest_of({}, parts, [dataclasses.replace(record, rows=record.rows - 1)])


def test_an_input_that_changed_while_the_job_ran_is_named(tmp_path, model, prompts):
    parts, _ = plan([prompts], 100)
    answerer = worker(model, tmp_path / "out")
    with open(prompts, "wb") as file:
        file.write(LINES[0])
    with pytest.raises(InputError, match="changed while the job ran"):
        answerer.answer(parts[0])
    assert Folder(tmp_path / "out").list() == ["job.json"]


def test_an_edit_in_place_is_seen_by_the_bytes_of_its_rows(tmp_path, model, prompts):
    parts, _ = plan([prompts], 5)
    answerer = worker(model, tmp_path / "out")
    with open(prompts, "r+b") as file:
        file.write(LINES[0].replace(b"one", b"ten"))
    with pytest.raises(InputError, match="changed while the job ran"):
        answerer.answer(parts[0])
    answerer.answer(parts[1])  # which is as it was


def test_a_worker_that_goes_ends_its_answerer(tmp_path, model):
    answerer = worker(model, tmp_path / "out")
    engine = answerer._answerer._llm.engine
    assert not engine.is_closed
    del answerer
    assert engine.is_closed


def test_completions_go_to_a_store_and_come_out_as_they_do_locally(
    tmp_path, model, prompts, s3_url
):
    parts, _ = plan([prompts], 5)
    here, there = worker(model, tmp_path / "out"), worker(model, s3_url)
    local = [here.answer(part) for part in parts]
    stored = [there.answer(part) for part in parts]
    for one, other in zip(local, stored, strict=True):
        assert one.file["sha256"] == other.file["sha256"]
        assert other.file["object"] != other.file["name"]  # an attempt's own name
        data = Folder(s3_url).read_bytes(other.file["name"])
        assert data == (tmp_path / "out" / one.file["name"]).read_bytes()
    again = worker(model, s3_url)
    assert [again.answer(part) for part in parts] == stored
    job = {"input_sha256": "i"}
    told = manifest_of(job, parts, stored)["counts"]
    assert told == manifest_of(job, parts, local)["counts"]


def test_a_part_ends_while_the_next_fills_its_places():
    def at_once(slots: int, rows: int) -> int:
        source = ModelSource(model="m", engine=EngineConfig(max_sequences=slots))
        work = Work(
            source=source,
            output="o",
            columns=Columns(),
            common=Decoding(params=PARAMS),
            format="jsonl",
            rows_per_part=rows,
        )
        return work.parts_at_once

    assert [at_once(32, rows) for rows in (1, 8, 32, 64, 1000)] == [33, 5, 2, 2, 2]
