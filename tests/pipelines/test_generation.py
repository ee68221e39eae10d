"""Batch generation without Ray: parts, seeds, dead letters, commits, resume."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig, SamplingParams
from cascade_model.errors import InputError
from cascade_model.model import Transformer
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import save_model
from pipelines.generation import (
    MANIFEST,
    PartWorker,
    claim,
    manifest_of,
    read_record,
    row_seed,
)
from pipelines.prompts import Columns, DeadRow, Prompt, plan, read_part

PARAMS = SamplingParams(max_tokens=9, temperature=1.0, seed=5, stop_at_eos=False)
LINES = [
    b'{"prompt": "one", "id": "first"}\n',
    b"\n",
    b'{"prompt": "two"}\n',
    b"{broken\n",
    b'{"prompt": "\xff"}\n',
    b'{"prompt": ""}\n',
    b'{"text": "no prompt"}\n',
    b'{"prompt": 7}\n',
    b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
    b'{"messages": "Hi"}\n',
    b'{"prompt": "' + b"x" * 300 + b'"}\n',
    b'"a text"\n',
    b'{"prompt": "<|mask|>"}',
]
ROWS = len(LINES) - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_sequence_length=128,
        block_size=4,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
    )
    network = Transformer(config)
    network.init_weights(0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, network, tokenizer)
    return str(folder)


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
    return PartWorker(model, str(output), PARAMS, Columns(), format, 1)


def rows_of(parts) -> list[Prompt | DeadRow]:
    chat = byte_tokenizer().apply_chat_template
    return [row for part in parts for row in read_part(part, Columns(), chat)]


def test_a_rows_seed_depends_on_the_jobs_seed_and_its_number_alone():
    seeds = {row_seed(job, row) for job in range(20) for row in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(1, 2) == row_seed(1, 2)


@pytest.mark.parametrize("rows_per_part", [1, 3, 5, 100])
def test_however_the_input_is_cut_the_rows_are_the_same(prompts, rows_per_part):
    parts, _ = plan([prompts], rows_per_part)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert sum(part.num_rows for part in parts) == ROWS
    found = rows_of(parts)
    assert [row.row for row in found] == list(range(ROWS))
    assert found == rows_of(plan([prompts], 4)[0])


def test_broken_rows_come_with_their_reason(prompts):
    found = rows_of(plan([prompts], 100)[0])
    reasons = {row.row: row.reason for row in found if isinstance(row, DeadRow)}
    assert reasons == {
        2: "not JSON",
        3: "not UTF-8",
        4: "prompt is empty",
        5: "no column prompt or messages",
        6: "prompt is not text",
        8: "messages are not a list of {role, content} texts",
        10: "not a JSON object",
    }
    kept = [row for row in found if isinstance(row, Prompt)]
    assert [row.id for row in kept[:2]] == ["first", "1"]
    assert kept[2].text == "User: Hi\n\nAssistant:"


def test_parquet_parts_read_their_own_rows(tmp_path):
    table = pa.table({"prompt": [f"row {i}" for i in range(23)], "id": list(range(100, 123))})
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=4)
    parts, _ = plan([str(tmp_path / "prompts.parquet")], 5)
    found = rows_of(parts)
    assert [row.text for row in found] == table["prompt"].to_pylist()
    assert [row.id for row in found] == [str(i) for i in range(100, 123)]


def test_a_part_never_crosses_a_file(tmp_path, prompts):
    other = tmp_path / "more.jsonl"
    other.write_text('{"prompt": "z"}\n')
    parts, _ = plan([prompts, str(other)], 5)
    assert [part.num_rows for part in parts] == [5, 5, 2, 1]
    assert rows_of(parts)[-1] == Prompt(row=12, id="12", text="z")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_input_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="holds no rows"):
        plan([str(tmp_path / "empty.jsonl")], 5)


def test_a_missing_or_damaged_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        plan([str(tmp_path / "none.jsonl")], 5)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match="cannot be read"):
        plan([str(tmp_path / "bad.parquet")], 5)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_every_row_is_answered_or_dead_and_the_manifest_says_which(
    tmp_path, model, prompts, format
):
    parts, digest = plan([prompts], 5)
    folder, job = Folder(tmp_path / "out"), {"input_sha256": digest}
    assert not claim(folder, job)
    answerer = worker(model, tmp_path / "out", format)
    records = [answerer.answer(part) for part in parts]
    manifest = manifest_of(job, parts, records)
    counts = manifest["counts"]
    assert counts["rows_in"] == ROWS == counts["rows_out"] + counts["rows_dead"]
    assert counts["dead_by_reason"]["refused"] == 1
    rows = []
    for name in sorted(file["name"] for file in manifest["files"]):
        if name.startswith("completions") and format == "parquet":
            rows += pq.read_table(tmp_path / "out" / name).to_pylist()
        elif name.startswith("completions"):
            lines = folder.read_bytes(name).decode().splitlines()
            rows += [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == ["first", "1", "7", "11"]
    for row, number in zip(rows, (0, 1, 7, 11), strict=True):
        assert row["seed"] == row_seed(PARAMS.seed, number)
        assert row["num_tokens"] == PARAMS.max_tokens
        assert row["tokens_per_forward"] == row["num_tokens"] / row["passes"]
        assert row["finish_reason"] == "length"
    assert sum(row["passes"] for row in rows) == counts["passes"]


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
    assert not claim(folder, job)
    assert not claim(folder, job)
    with pytest.raises(InputError, match="max_tokens=5, this one has max_tokens=6"):
        claim(folder, {"max_tokens": 6})
    folder.publish(MANIFEST, b"{}")
    assert claim(folder, job)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        claim(Folder(tmp_path), {})


def test_a_lost_row_is_a_fault_that_stops_the_manifest(tmp_path, model, prompts):
    parts, _ = plan([prompts], 100)
    record = worker(model, tmp_path / "out").answer(parts[0])
    with pytest.raises(RuntimeError, match="lost rows"):
        manifest_of({}, parts, [dataclasses.replace(record, rows=record.rows - 1)])
