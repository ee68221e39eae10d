"""The same bytes by any runner, after a kill, and nothing at all after a user's mistake."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.errors import InputError, Unfinished
from cascade_model.tokenizer import byte_tokenizer
from pipelines import prepare as job
from pipelines.config import PrepareConfig, SourceConfig
from pipelines.held_out import is_held_out
from pipelines.prepare import prepare
from pipelines.report import REPORT_HTML, REPORT_JSON
from pipelines.runner import run_tasks


def config_for(output, path, **changes) -> PrepareConfig:
    settings = {
        "output": str(output),
        "source": SourceConfig(paths=(str(path),)),
        "tokenizer": "bytes",
        "sequence_length": 64,
        "noise": NoiseConfig(block_size=8),
        "part_bytes": 60_000,
        "held_out_rate": 0.1,
        "runner": "local",
    }
    return PrepareConfig(**{**settings, **changes})


def contents(folder) -> dict[str, str]:
    """Digest of every file by name, but for the report, which tells of a run's times."""
    found = (p for p in Path(folder).rglob("*") if p.is_file())
    files = sorted(p for p in found if p.name not in (REPORT_HTML, REPORT_JSON))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def undisturbed(documents_jsonl, tmp_path_factory):
    """A corpus prepared in one go, in this process."""
    output = tmp_path_factory.mktemp("undisturbed") / "corpus"
    prepare(config_for(output, documents_jsonl))
    return output


def test_every_document_is_in_exactly_one_split(undisturbed, real_documents):
    manifest = read_manifest(Folder(undisturbed))
    held_out = {text for text in real_documents if is_held_out(text, 0.1)}
    assert manifest.splits["held_out"].num_documents == len(held_out)
    assert manifest.counts["documents_in"] == len(real_documents)
    assert manifest.counts["bytes"] == sum(len(text.encode()) for text in real_documents)
    # With the byte tokenizer a token is a byte, and each document has one EOS.
    assert manifest.counts["tokens"] == manifest.counts["bytes"] + len(real_documents)
    assert len(manifest.splits["train"].shards) > 1


def test_only_the_corpus_stays_behind(undisturbed):
    names = {name.split("-")[0] for name in os.listdir(undisturbed)}
    assert names == {"manifest.json", "tokenizer.json", "documents", "shard",
                     REPORT_HTML, REPORT_JSON}  # fmt: skip


def test_a_second_run_does_no_work_and_changes_no_byte(undisturbed, documents_jsonl, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()}
    monkeypatch.setattr(job, "run_tasks", None)
    prepare(config_for(undisturbed, documents_jsonl, num_workers=7, runner="ray"))
    assert {p.name: p.stat().st_mtime_ns for p in undisturbed.iterdir()} == before


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray_gives_the_same_bytes(undisturbed, documents_jsonl, tmp_path, ray_local, num_workers):
    output = tmp_path / "corpus"
    prepare(config_for(output, documents_jsonl, runner="ray", num_workers=num_workers))
    assert contents(output) == contents(undisturbed)


@pytest.mark.ray
def test_a_users_mistake_inside_a_ray_task_is_the_same_one_sentence(tmp_path, ray_local):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"not gzip")
    sentences = []
    for runner in ("local", "ray"):
        with pytest.raises(InputError, match="damaged compressed file") as caught:
            prepare(config_for(tmp_path / "out", path, runner=runner))
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
def test_a_run_stopped_at_any_commit_is_finished_to_the_same_bytes(
    undisturbed, documents_jsonl, tmp_path, monkeypatch, stop_at
):
    done = []
    commit = Folder.commit

    def commit_until(self, name, write, facts=None):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(name)
        return commit(self, name, write, facts)

    output = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "commit", commit_until)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_for(output, documents_jsonl))
    again = []

    def commit_and_count(self, name, write, facts=None):
        again.append(name)
        return commit(self, name, write, facts)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "commit", commit_and_count)
        prepare(config_for(output, documents_jsonl))
    assert contents(output) == contents(undisturbed)
    assert not set(done) & set(again)


def test_a_killed_process_is_taken_up_again(undisturbed, documents_jsonl, tmp_path):
    output = tmp_path / "corpus"
    program = (
        "import sys, time\n"
        "from cascade_model.commit import Folder\n"
        "commit = Folder.commit\n"
        "def slow(self, *rest):\n"
        "    made = commit(self, *rest); time.sleep(0.3); return made\n"
        "Folder.commit = slow\n"
        "from jobs.prepare import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    settings = ["--output", str(output), "--source.paths", str(documents_jsonl)]
    settings += ["--tokenizer", "bytes", "--sequence-length", "64", "--noise.block-size", "8"]
    settings += ["--part-bytes", "60000", "--held-out-rate", "0.1", "--runner", "local"]
    process = subprocess.Popen([sys.executable, "-c", program, *settings])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(output.glob("_work/part-*.record.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    prepare(config_for(output, documents_jsonl))
    assert contents(output) == contents(undisturbed)


def test_other_settings_into_the_same_folder_are_refused(undisturbed, documents_jsonl, tmp_path):
    with pytest.raises(InputError, match="made with sequence_length=64 but this run has 128"):
        prepare(config_for(undisturbed, documents_jsonl, sequence_length=128))
    other = tmp_path / "other.jsonl"
    shutil.copy(documents_jsonl, other)
    output = tmp_path / "corpus"
    prepare(config_for(output, other))
    other.write_text(other.read_text().replace("import", "export"))
    with pytest.raises(InputError, match="other source files"):
        prepare(config_for(output, other))


@pytest.mark.parametrize("name", ["thesis.txt", "thesis.tmp", ".thesis.tmp", "_work/thesis.txt"])
def test_a_folder_with_other_files_is_left_alone(documents_jsonl, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(InputError, match=rf"already holds '{name}' but no corpus"):
        prepare(config_for(tmp_path, documents_jsonl))
    assert contents(tmp_path).keys() == {name}


def write_lines(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_broken_lines_are_counted_and_set_aside_with_their_reasons(tmp_path):
    good = [json.dumps({"text": f"sentence number {i}"}).encode() for i in range(50)]
    bad = [b'{"text": "cut', b'{"text": "\xff"}', b'{"body": 1}', b'{"text": "  "}']
    path = write_lines(tmp_path / "a.jsonl", good[:25] + bad + good[25:])
    output = tmp_path / "corpus"
    manifest = prepare(config_for(output, path, max_dead_rate=0.1, part_bytes=500))
    assert manifest.counts["dead"] == {"broken_json": 1, "invalid_utf8": 1, "missing_text": 1}
    assert manifest.counts["dropped"] == {"empty": 1}
    assert manifest.counts["documents_in"] == 54
    assert manifest.counts["documents"] == 50
    letters = [
        json.loads(line)
        for file in sorted(output.glob("dead_letter-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert [letter["reason"] for letter in letters] == list(manifest.counts["dead"])
    assert all(letter["path"] == str(path) and letter["where"] for letter in letters)


def test_too_many_broken_lines_fail_the_job_which_then_goes_on_with_another_rate(
    tmp_path, monkeypatch
):
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": "fine"}', b"broken"] * 5)
    output = tmp_path / "corpus"
    with pytest.raises(
        Unfinished, match=r"5 of 10 .*broken_json.* at byte 17.*max_dead_rate=0\.01"
    ):
        prepare(config_for(output, path, dedup="none"))
    assert not (output / "manifest.json").exists()
    assert len((output / "dead_letter-00000.jsonl").read_text().splitlines()) == 5
    packed = []
    monkeypatch.setattr(job, "pack_part", lambda *order: packed.append(order))
    again = config_for(output, path, dedup="none", max_dead_rate=0.5)
    assert prepare(again).counts["documents"] == 5
    assert not packed
    assert not (output / "_work").exists()


def test_a_corpus_without_one_good_line_leaves_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"body": "fine"}'] * 5)
    with pytest.raises(InputError, match=r"5 of 5 .*missing_text.*set source\.text_column"):
        prepare(config_for(tmp_path / "corpus", path))
    assert not (tmp_path / "corpus").exists()


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": ""}', b'{"text": " "}'])
    with pytest.raises(InputError, match="no document with text"):
        prepare(config_for(tmp_path / "corpus", path))
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="no document with text"):
        prepare(config_for(tmp_path / "mine", path))
    assert list((tmp_path / "mine").iterdir()) == []


def failing_after(count, error, between=lambda: None):
    """`run_tasks`, until `count` parts are packed."""

    def run(step, orders, **settings):
        if step.func is not job._pack_step:
            return run_tasks(step, orders, **settings)
        results = run_tasks(step, orders[:count], **settings)
        if len(orders) <= count:
            return results
        between()
        raise error

    return run


def test_what_somebody_put_there_meanwhile_survives_a_failing_job(
    documents_jsonl, tmp_path, monkeypatch
):
    output = tmp_path / "corpus"

    def somebody():
        (output / "thesis.txt").write_text("years of work")
        (output / "shard-notes.txt").write_text("mine")

    monkeypatch.setattr(job, "run_tasks", failing_after(1, InputError("damaged"), somebody))
    with pytest.raises(InputError, match="damaged"):
        prepare(config_for(output, documents_jsonl))
    assert contents(output).keys() == {"thesis.txt", "shard-notes.txt"}


def fail_beside_a_second_run(config, monkeypatch) -> tuple[set[str], set[str]]:
    """The work folder's files when the second run stops, and after the first one failed."""
    output, packed = Path(config.output), set()

    def second_run():
        with monkeypatch.context() as patch:
            patch.setattr(job, "run_tasks", failing_after(2, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                prepare(config)
        packed.update(contents(output / "_work"))

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_tasks", failing_after(1, InputError("damaged"), second_run))
        with pytest.raises(InputError, match="damaged"):
            prepare(config)
    return packed, set(contents(output / "_work"))


def test_a_failing_job_leaves_a_second_run_of_the_same_job_its_work(
    undisturbed, documents_jsonl, tmp_path, monkeypatch
):
    config = config_for(tmp_path / "corpus", documents_jsonl)
    before, after = fail_beside_a_second_run(config, monkeypatch)
    assert len([name for name in before if name.endswith(".arrow")]) == 3
    assert before == after
    prepare(config)
    assert contents(config.output) == contents(undisturbed)


def test_two_runs_with_one_mark_would_lose_the_work(documents_jsonl, tmp_path, monkeypatch):
    config = config_for(tmp_path / "corpus", documents_jsonl)
    monkeypatch.setattr(job, "_RUN", "unseen-")
    monkeypatch.setattr(job.uuid, "uuid4", lambda: uuid.UUID(int=0))
    before, after = fail_beside_a_second_run(config, monkeypatch)
    assert before
    assert not after


def test_a_source_that_cannot_be_read_now_keeps_what_was_packed(
    undisturbed, documents_jsonl, tmp_path, monkeypatch
):
    output, local = tmp_path / "corpus", fsspec.get_filesystem_class("file")
    opened, open_file = [], local.open
    fail_at = -1

    def open_but_one(self, path, *rest, **settings):
        opened.extend([path] if path == str(documents_jsonl) else [])
        if len(opened) == fail_at:
            raise PermissionError
        return open_file(self, path, *rest, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(local, "open", open_but_one)
        prepare(config_for(tmp_path / "whole", documents_jsonl))
        fail_at = len(opened) - 1  # the last but one of the parts that are packed
        opened.clear()
        with pytest.raises(Unfinished, match=r"cannot be read \(PermissionError\).*same command"):
            prepare(config_for(output, documents_jsonl))
    assert list(output.glob("_work/part-*.record.json"))
    prepare(config_for(output, documents_jsonl))
    assert contents(output) == contents(undisturbed)


@pytest.mark.parametrize("is_taken_back", [True, False])
def test_a_task_that_outlives_its_job_writes_nothing(documents_jsonl, tmp_path, is_taken_back):
    output = tmp_path / "corpus"
    orders = []

    def keep(step, all_orders, **settings):
        if step.func is not job._pack_step:
            return run_tasks(step, all_orders, **settings)
        orders.append((step, all_orders[0]))
        raise InputError("damaged") if is_taken_back else Unfinished("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_tasks", keep)
        with pytest.raises(InputError, match=r"damaged|away"):
            prepare(config_for(output, documents_jsonl))
    # The task had read the tokenizer before.
    Folder(output).publish("tokenizer.json", byte_tokenizer().to_bytes())
    [(step, order)] = orders
    if is_taken_back:
        with pytest.raises(InputError, match="no longer there"):
            step(order)
        assert contents(output).keys() == {"tokenizer.json"}
    else:  # the control: the same task writes where its job stands
        step(order)
        assert "_work/part-00000.arrow" in contents(output)


def test_a_bucket_survives_a_failing_job_whose_output_it_is(tmp_path, s3_url):
    bucket = s3_url.removesuffix("/corpus")
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": ""}'])
    with pytest.raises(InputError, match="no document with text"):
        prepare(config_for(bucket, path))
    store = fsspec.filesystem("s3")
    assert store.exists(bucket)
    assert store.ls(bucket) == []


@pytest.mark.parametrize("where", ["/dev/null/x", "/proc/x/corpus"])
def test_an_output_that_cannot_be_written_is_one_sentence(documents_jsonl, where):
    with pytest.raises(InputError, match=f"output={where} cannot be written"):
        prepare(config_for(where, documents_jsonl))


def test_a_corpus_that_is_all_held_out_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": "alone"}'])
    with pytest.raises(InputError, match=r"held_out_rate=0\.999999 keeps all 1 documents"):
        prepare(config_for(tmp_path / "corpus", path, held_out_rate=0.999999))


def test_literal_special_tokens_in_a_document_stay_text(tmp_path):
    text = "a <|mask|> b <|endoftext|> c <|pad|>"
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}).encode()])
    output = tmp_path / "corpus"
    prepare(config_for(output, path, tokenizer="train", vocab_size=300, held_out_rate=0.0))
    corpus = Corpus.open(str(output))
    rows = corpus.rows([0])
    assert (rows.tokens == corpus.manifest.mask_id).sum() == 0
    assert corpus.tokenizer().decode(rows.tokens[0]) == text


def test_a_given_tokenizer_is_kept_in_the_folder_and_part_of_the_identity(
    undisturbed, documents_jsonl, tmp_path
):
    given = tmp_path / "tokenizer.json"
    shutil.copy(undisturbed / "tokenizer.json", given)
    output = tmp_path / "corpus"
    manifest = prepare(config_for(output, documents_jsonl, tokenizer=str(given)))
    assert manifest.tokenizer_sha256 == read_manifest(Folder(undisturbed)).tokenizer_sha256
    given.write_bytes(given.read_bytes() + b"\n")
    with pytest.raises(InputError, match="tokenizer_sha256"):
        prepare(config_for(output, documents_jsonl, tokenizer=str(given)))


def test_the_corpus_may_lie_behind_any_url(undisturbed, documents_jsonl):
    url = "memory://prepared/corpus"
    prepare(config_for(url, documents_jsonl))
    there, here = Corpus.open(url), Corpus.open(str(undisturbed))
    assert there.batch(0, 5, there.manifest.noise).sequence_ids.tolist() == (
        here.batch(0, 5, here.manifest.noise).sequence_ids.tolist()
    )
    assert not [name for name in Folder(url).list() if name == "_work"]
    prepare(config_for(url, documents_jsonl))
