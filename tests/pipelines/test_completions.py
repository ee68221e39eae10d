"""A part is committed once and whole: wherever its worker dies, whoever else commits it."""

import hashlib
import json
import os

import pytest
from starlette.requests import Request
from starlette.responses import Response

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.sampling import SamplingParams
from pipelines.completions import (
    PartRecord,
    claim,
    commit_part,
    manifest_of,
    read_record,
    require_claimed,
    take_back,
)
from pipelines.endpoint_answers import EndpointSource
from pipelines.generation import PartWorker, Work
from pipelines.prompt_rows import Columns, DeadRow
from pipelines.prompts import Part, plan
from pipelines.row_settings import Decoding
from tests.pipelines.http_server import Scripted, error, serving, sound

ROWS = 7


class Fickle(Scripted):
    """Never the same answer twice, and every third prompt refused in other words."""

    async def _completions(self, request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        self.asked.append((0.0, {}, {"prompt": prompt}))
        said = f"{prompt}, asked {len(self.asked)} times"
        return error(400, said) if int(prompt.split()[1]) % 3 == 1 else sound(said)


@pytest.fixture
def part(tmp_path) -> Part:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "row {row}"}}\n' for row in range(ROWS)))
    [only], _ = plan([str(source)], ROWS)
    return only


@pytest.fixture
def folder(tmp_path) -> Folder:
    output = Folder(tmp_path / "out")
    claim(output, {}, {})
    return output


def answer(url: str, folder: Folder, part: Part) -> PartRecord:
    """The part, answered by a worker of its own."""
    work = Work(
        source=EndpointSource(url=url),
        output=folder.url,
        columns=Columns(),
        common=Decoding(params=SamplingParams()),
        format="jsonl",
        rows_per_part=ROWS,
    )
    return PartWorker(work).answer(part)


def require_whole(folder: Folder, part: Part, record: PartRecord) -> None:
    """Every row stands once, in files that are what the manifest says."""
    manifest = manifest_of({}, [part], [record])
    rows = []
    for file in manifest["files"] + manifest["dead_files"]:
        data = folder.read_bytes(file["object"])
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
        rows += [json.loads(line) for line in data.decode().splitlines()]
    assert sorted(int(row.get("id", row.get("row"))) for row in rows) == list(range(ROWS))
    assert manifest["counts"]["rows_dead"] == 2


def test_a_part_that_is_committed_is_told_and_not_asked_for_again(folder, part):
    fickle = Fickle()
    with serving(fickle.app) as url:
        first = answer(url, folder, part)
        assert answer(url, folder, part) == first == read_record(folder, part, "jsonl")
    assert len(fickle.asked) == ROWS
    require_whole(folder, part, first)


class Killed(BaseException):
    """Nothing runs behind it, as behind `kill -9`, but what a test needs."""


@pytest.mark.parametrize("step", range(5))
def test_a_part_whose_worker_dies_over_its_commit_is_whole_after_the_next(
    folder, part, monkeypatch, step
):
    """Files get their names in four steps: two units, and a record for each."""
    left = [step]

    def dying(call):
        def named(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*args, **kwargs)

        return named

    with serving(Fickle().app) as url:
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying(os.replace))
            patched.setattr(os, "link", dying(os.link))
            if step < 4:
                with pytest.raises(Killed):
                    answer(url, folder, part)
            else:
                answer(url, folder, part)
        assert left == [0]
        record = answer(url, folder, part)
        assert record == read_record(folder, part, "jsonl")
        require_whole(folder, part, record)


def test_of_two_that_commit_a_part_the_first_is_believed_in_all(folder, part):
    row = {"id": "0", "prompt": "a", "completion": "b", "num_tokens": 1, "passes": 1}
    row |= {"tokens_per_forward": 1.0, "finish_reason": "stop", "seed": 1}
    one, other = (
        [DeadRow(row=1, reason="refused", input="c", detail=f"request {number}")]
        for number in range(2)
    )
    first = commit_part(folder, part, "jsonl", [row], one)
    before = folder.read_bytes("dead-000000.jsonl")
    assert commit_part(folder, part, "jsonl", [row], other) == first
    assert folder.read_bytes("dead-000000.jsonl") == before
    assert b"request 0" in before


def dead_rows(part: Part) -> list[DeadRow]:
    rows = range(part.first_row, part.first_row + part.num_rows)
    return [DeadRow(row=row, reason="empty_prompt", input="") for row in rows]


def test_only_the_jobs_own_files_are_taken_back(folder, part):
    commit_part(folder, part, "jsonl", [], dead_rows(part))
    others = ["completions-notes.jsonl", "dead-000099.jsonl", "note.txt"]
    for name in others:
        folder.publish(name, b"mine")
    assert take_back(folder, [part], "jsonl")
    assert folder.list() == others


def test_what_any_run_has_answered_is_not_taken_back(folder, part):
    with serving(Scripted().app) as url:
        answer(url, folder, part)  # by another run of the same job
    before = folder.list()
    assert not take_back(folder, [part], "jsonl")
    assert folder.list() == before
    require_claimed(folder)


def test_a_job_that_was_taken_back_under_a_run_of_it_gets_no_manifest(folder, part):
    require_claimed(folder)
    commit_part(folder, part, "jsonl", [], dead_rows(part))
    take_back(folder, [part], "jsonl")
    with pytest.raises(InputError, match=r"has no job\.json; another run of this job failed"):
        require_claimed(folder)
