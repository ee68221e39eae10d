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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.errors import CorpusMismatch, InputError, Unfinished
from cascade_model.tokenizer import byte_tokenizer
from jobs.cli import dump
from pipelines import claim
from pipelines import prepare as job
from pipelines.config import FilterConfig, PrepareConfig, SourceConfig
from pipelines.held_out import is_held_out
from pipelines.isolation import KILLED
from pipelines.prepare import prepare
from pipelines.report import REPORT_HTML, REPORT_JSON
from pipelines.runner import run_tasks
from tests.pipelines.config_making import config_for


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


@pytest.mark.parametrize("stop_at", [0, 7, 11, 12, 13, 14, 15, 26, 36, 37, 45, 50])
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
    # Of a part that stopped between its two units, the table of documents is made again.
    redone = set(done) & set(again)
    assert len(redone) <= 1
    assert all(name.startswith("documents-") for name in redone)


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
    settings += ["--tokenizer-engine", "reference"]
    process = subprocess.Popen([sys.executable, "-c", program, *settings])
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(output.glob("_work/part-*.record.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists()
    prepare(config_for(output, documents_jsonl))
    assert contents(output) == contents(undisturbed)


def test_a_corpus_below_its_own_source_is_no_part_of_it(documents_jsonl, tmp_path):
    shutil.copy(documents_jsonl, tmp_path / "a.jsonl")
    config = config_for(tmp_path / "corpus", tmp_path)
    manifest = prepare(config)
    assert [source["path"] for source in manifest.sources] == [f"{tmp_path}/a.jsonl"]
    assert prepare(config).digest == manifest.digest


def test_other_settings_into_the_same_folder_are_refused(undisturbed, documents_jsonl, tmp_path):
    with pytest.raises(InputError, match="made with sequence_length=64 but this run has 128"):
        prepare(config_for(undisturbed, documents_jsonl, sequence_length=128))
    rules = FilterConfig(min_words=3)
    with pytest.raises(InputError, match=r"filters\.min_words=None but this run has 3; choose"):
        prepare(config_for(undisturbed, documents_jsonl, filters=rules))
    mixture = {"web": SourceConfig(paths=(str(documents_jsonl),))}
    with pytest.raises(InputError, match=r"source\.paths=\[.*\] but this run has \[\]; choose"):
        prepare(config_for(undisturbed, "", source=SourceConfig(), mixture=mixture))
    other = tmp_path / "other.jsonl"
    shutil.copy(documents_jsonl, other)
    output = tmp_path / "corpus"
    prepare(config_for(output, other))
    other.write_text(other.read_text().replace("import", "export"))
    with pytest.raises(InputError, match="other source files"):
        prepare(config_for(output, other))


def test_a_finished_corpus_that_lost_files_is_no_success(undisturbed, documents_jsonl, tmp_path):
    names = ["shard-train-00001.arrow", "documents-00000.arrow", "tokenizer.json"]
    for number, name in enumerate(names):
        output = tmp_path / str(number)
        shutil.copytree(undisturbed, output)
        (output / name).unlink()
        with pytest.raises(CorpusMismatch, match=f"{name} is gone.*delete the corpus"):
            prepare(config_for(output, documents_jsonl))
    cut = tmp_path / "cut"
    shutil.copytree(undisturbed, cut)
    os.truncate(cut / names[0], 5000)
    before = contents(cut)
    with pytest.raises(CorpusMismatch, match=f"{names[0]} has 5000 bytes but the manifest says"):
        prepare(config_for(cut, documents_jsonl))
    assert contents(cut) == before


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


def test_the_sentence_on_dead_documents_names_the_worst_source_and_its_column(tmp_path):
    web = write_lines(tmp_path / "a.jsonl", [b'{"text": "fine"}'] * 8 + [b"broken"])
    chats = write_lines(tmp_path / "b.jsonl", [b'{"turns": []}'] * 3)
    sources = {
        "web": SourceConfig(paths=(str(web),)),
        "chats": SourceConfig(paths=(str(chats),), messages_column="messages"),
    }
    with pytest.raises(Unfinished) as caught:
        prepare(config_for(tmp_path / "corpus", "", source=SourceConfig(), mixture=sources))
    assert f"in {chats} at byte 0: missing_messages" in str(caught.value)
    assert "set mixture.chats.messages_column (now messages)" in str(caught.value)


def test_a_corpus_without_one_good_line_leaves_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"body": "fine"}'] * 5)
    with pytest.raises(InputError, match=r"5 of 5 .*missing_text.*set source\.text_column"):
        prepare(config_for(tmp_path / "corpus", path))
    assert not (tmp_path / "corpus").exists()


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": ""}', b'{"text": " "}'])
    with pytest.raises(InputError, match="leaves no document"):
        prepare(config_for(tmp_path / "corpus", path))
    assert not (tmp_path / "corpus").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="leaves no document"):
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
    monkeypatch.setattr(claim, "_RUN", "unseen-")
    monkeypatch.setattr(claim.uuid, "uuid4", lambda: uuid.UUID(int=0))
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
    with pytest.raises(InputError, match="leaves no document"):
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


def run_in_child(tmp_path, program, config_flags) -> int:
    """Exit code of `cascade prepare` in a process of its own, after some lines of Python."""
    lines = [program, "import sys", "from jobs.prepare import main", "sys.exit(main(sys.argv[1:]))"]
    return subprocess.run([sys.executable, "-c", "\n".join(lines), *config_flags]).returncode


DEADLY = "this text kills"
KILLING = f"""
import os, signal
from pipelines import encoding
make = encoding.engine_of
class Deadly:
    def __init__(self, engine):
        self.engine = engine
    def encode_arrays(self, texts):
        if any("{DEADLY}" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.engine.encode_arrays(texts)
encoding.engine_of = lambda *given: Deadly(make(*given))
"""


@pytest.fixture
def deadly_jsonl(tmp_path):
    texts = [f"document {number}" for number in range(30)]
    texts[4:4] = [f"{DEADLY} once"]
    texts[20:20] = [f"{DEADLY} twice"]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    return write_lines(tmp_path / "a.jsonl", lines)


def flags_of(config: PrepareConfig, folder) -> list[str]:
    file = folder / "prepare.yaml"
    file.write_text(dump(config))
    return ["--config", str(file)]


def require_isolated(manifest, output):
    assert manifest.counts["dead"] == {KILLED: 2}
    assert manifest.counts["documents"] == 30
    letters = [
        json.loads(line)
        for file in sorted(output.glob("dead_letter-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert [letter["excerpt"] for letter in letters] == [f"{DEADLY} once", f"{DEADLY} twice"]


def test_records_that_kill_the_process_are_set_aside_by_running_again(deadly_jsonl, tmp_path):
    output = tmp_path / "corpus"
    config = config_for(output, deadly_jsonl, max_dead_rate=0.1)
    flags = flags_of(config, tmp_path)
    codes = [run_in_child(tmp_path, KILLING, flags) for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    require_isolated(prepare(config), output)


def deadly_pack_step(*given):
    """What a worker does whose tokenizer dies of some texts."""
    from pipelines import encoding, prepare

    if not hasattr(encoding, "is_deadly"):
        exec(KILLING, {})
        encoding.is_deadly = True
    return prepare._pack_step(*given)


@pytest.mark.ray
def test_ray_sets_records_that_kill_its_workers_aside_by_itself(
    deadly_jsonl, tmp_path, monkeypatch, ray_local
):
    from ray import cloudpickle

    output = tmp_path / "corpus"
    config = config_for(output, deadly_jsonl, max_dead_rate=0.1, runner="ray", part_bytes=500)
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # workers cannot import a test file
    try:
        with monkeypatch.context() as patch:
            patch.setattr(job, "_pack_step", deadly_pack_step)
            manifest = prepare(config)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    require_isolated(manifest, output)


def test_equal_documents_are_kept_once_over_all_parts(documents_jsonl, tmp_path, undisturbed):
    twice = write_lines(tmp_path / "a.jsonl", documents_jsonl.read_bytes().splitlines() * 2)
    manifest = prepare(config_for(tmp_path / "corpus", twice))
    once = read_manifest(Folder(undisturbed))
    assert manifest.counts["dropped"] == {"duplicate": once.counts["documents"]}
    for name in ("documents", "characters", "bytes", "tokens"):
        assert manifest.counts[name] == once.counts[name]
    kept = prepare(config_for(tmp_path / "kept", twice, dedup="none"))
    assert kept.counts["documents"] == 2 * once.counts["documents"]
    assert kept.counts["dropped"] == {}


@pytest.fixture
def mixed(real_documents, tmp_path):
    """Two sources and a third of conversations, by the name of the source."""
    chats = [
        {"messages": [{"role": "user", "content": text[:200]},
                      {"role": "assistant", "content": text[200:900]}]}
        for text in real_documents[20:30]
    ]  # fmt: skip
    write_lines(tmp_path / "c.jsonl", [json.dumps(chat).encode() for chat in chats])
    for name, texts in (("b", real_documents[:10]), ("a", real_documents[10:20])):
        lines = [json.dumps({"text": text}).encode() for text in texts]
        write_lines(tmp_path / f"{name}.jsonl", lines)
    sources = {name: SourceConfig(paths=(str(tmp_path / f"{name}.jsonl"),)) for name in "ba"}
    chat = SourceConfig(paths=(str(tmp_path / "c.jsonl"),), messages_column="messages", weight=2)
    return {**sources, "c": chat}


def mixture_config(output, mixed, **changes) -> PrepareConfig:
    return config_for(output, "", source=SourceConfig(), mixture=mixed, **changes)


def test_the_sources_of_a_mixture_follow_each_other_and_have_their_shares(mixed, tmp_path):
    output = tmp_path / "corpus"
    manifest = prepare(mixture_config(output, mixed, packing="best_fit", part_bytes=30_000))
    entries = manifest.splits["train"].sources
    assert [(entry.name, entry.share) for entry in entries] == [("b", 256), ("a", 256), ("c", 512)]
    assert manifest.chat_template == "plain"
    ends = [entry.first_sequence + entry.num_sequences for entry in entries]
    assert [0, *ends] == [*(entry.first_sequence for entry in entries),
                          manifest.splits["train"].num_sequences]  # fmt: skip
    assert sum(entry.num_tokens for entry in entries) == manifest.splits["train"].num_tokens
    corpus = Corpus.open(str(output))
    batch = corpus.batch(0, 1024, manifest.noise)
    owners = [sum(int(i) >= end for end in ends) for i in batch.sequence_ids]
    assert [owners.count(number) for number in range(3)] == [256, 256, 512]
    first = corpus.rows([ends[1]])  # the first conversation: its question is never masked
    is_text = first.tokens[0] != manifest.pad_id
    assert is_text.sum() > first.is_maskable[0].sum()
    report = json.loads((output / REPORT_JSON).read_text())
    assert [source["name"] for source in report["sources"]] == ["b", "a", "c"]
    assert report["timing"]["runner"] == "local"
    assert set(report["timing"]["rounds"]) == {"hash", "merge", "pack", "mask"}


def test_each_source_of_a_mixture_must_hold_documents(mixed, tmp_path):
    empty = write_lines(tmp_path / "empty.jsonl", [b'{"text": " "}'])
    sources = {**mixed, "d": SourceConfig(paths=(str(empty),))}
    with pytest.raises(InputError, match=r"mixture\.d\.paths=.* leaves no document"):
        prepare(mixture_config(tmp_path / "corpus", sources))
    assert not (tmp_path / "corpus").exists()


@pytest.mark.ray
def test_ray_gives_the_same_bytes_for_a_mixture_too(mixed, tmp_path, ray_local):
    settings = {"packing": "best_fit", "tokenizer_engine": "auto", "part_bytes": 30_000}
    for runner in ("local", "ray"):
        prepare(mixture_config(tmp_path / runner, mixed, runner=runner, **settings))
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_a_fast_engine_is_admitted_named_and_changes_no_token(documents_jsonl, tmp_path):
    settings = {"tokenizer": "train", "vocab_size": 400}
    fast = prepare(
        config_for(tmp_path / "fast", documents_jsonl, tokenizer_engine="auto", **settings)
    )
    slow = prepare(config_for(tmp_path / "slow", documents_jsonl, **settings))
    assert fast.tokenizer_engine["name"] != slow.tokenizer_engine["name"]
    assert fast.tokenizer_engine["sample_bytes"] > 100_000
    assert slow.tokenizer_engine["sample_texts"] == 0
    assert "tokenizer_engine=reference asks for it" in slow.tokenizer_engine["note"]
    shards = {name for name in contents(tmp_path / "slow") if name.startswith("shard")}
    for name in shards:
        if name.endswith(".arrow"):
            assert contents(tmp_path / "fast")[name] == contents(tmp_path / "slow")[name]


def test_a_check_that_killed_its_process_is_not_tried_again(documents_jsonl, tmp_path):
    Folder(tmp_path / "corpus" / "_work").publish("engine.json.attempt-0", b"")
    with pytest.raises(InputError, match="already holds"):
        prepare(config_for(tmp_path / "corpus", documents_jsonl, tokenizer_engine="auto"))
    config = config_for(tmp_path / "other", documents_jsonl, tokenizer_engine="auto")
    program = (
        "import os, signal\n"
        "from pipelines import admission\n"
        "admission.admit = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    codes = [run_in_child(tmp_path, program, flags_of(config, tmp_path)) for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    manifest = read_manifest(Folder(config.output))
    assert "killed its process" in manifest.tokenizer_engine["note"]


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_check_that_died_of_something_else_changes_no_byte(documents_jsonl, tmp_path, deaths):
    died, calm = (
        config_for(tmp_path / name, documents_jsonl, tokenizer_engine="auto")
        for name in ("died", "calm")
    )
    program = (
        "import os, signal\n"
        "from pipelines import admission\n"
        "admission.admit = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(deaths):
        assert run_in_child(tmp_path, program, flags_of(died, tmp_path)) == -signal.SIGKILL
    prepare(died)
    assert prepare(calm).tokenizer_engine["name"] == "tiktoken"
    assert contents(tmp_path / "died") == contents(tmp_path / "calm")


def test_cleaning_settings_reach_the_corpus(tmp_path):
    texts = ["short", "a\r\nlonger\x00 text", "LOREM ipsum, as ever"]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    path = write_lines(tmp_path / "a.jsonl", lines)
    filters = FilterConfig(min_bytes=10, banned_phrases=("lorem ipsum",))
    config = config_for(
        tmp_path / "corpus", path, normalise="nfc", filters=filters, held_out_rate=0.0
    )
    manifest = prepare(config)
    assert manifest.counts["dropped"] == {"banned_phrases": 1, "min_bytes": 1}
    corpus = Corpus.open(config.output)
    assert corpus.tokenizer().decode(corpus.rows([0]).tokens[0]) == "a\nlonger text"


@pytest.mark.parametrize("name", ["a.jinja", "nope"])
def test_a_chat_template_that_is_no_text_is_refused_before_anything_is_made(mixed, tmp_path, name):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe{{")
    config = mixture_config(tmp_path / "corpus", mixed, chat_template=str(tmp_path / name))
    with pytest.raises(InputError, match=f"chat_template=.*{name} cannot be read"):
        prepare(config)
    assert not (tmp_path / "corpus").exists()


def test_a_chat_template_of_a_file_is_part_of_the_identity(mixed, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    config = mixture_config(tmp_path / "corpus", mixed, chat_template=str(template))
    assert prepare(config).chat_template == template.read_text()
    template.write_text(template.read_text().replace("': '", "'> '"))
    with pytest.raises(InputError, match="made with chat_template="):
        prepare(config)


def test_sources_and_output_may_lie_in_an_object_store(tmp_path, real_documents, s3_url):
    table = pa.table({"text": real_documents[:20]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    store, bucket = fsspec.filesystem("s3"), s3_url.removesuffix("/corpus")
    store.pipe_file(f"{bucket}/in/a.parquet", sink.getvalue().to_pybytes())
    local = tmp_path / "a.parquet"
    local.write_bytes(sink.getvalue().to_pybytes())
    there = prepare(config_for(s3_url, f"{bucket}/in", packing="best_fit"))
    here = prepare(config_for(tmp_path / "corpus", local, packing="best_fit"))
    assert there.counts == here.counts
    for split in ("train", "held_out"):
        pairs = zip(there.splits[split].shards, here.splits[split].shards, strict=True)
        assert all(a.sha256 == b.sha256 for a, b in pairs)
    left = {name.split("-")[0] for name in Folder(s3_url).list()}
    assert left == {"manifest.json", "tokenizer.json", "documents", "shard",
                    REPORT_HTML, REPORT_JSON}  # fmt: skip


def test_a_source_that_changes_while_it_is_read_is_refused(documents_jsonl, tmp_path, monkeypatch):
    source = tmp_path / "documents.jsonl"
    shutil.copy(documents_jsonl, source)
    pack = job._pack_all

    def pack_and_write(*given):
        with source.open("a") as file:
            file.write('{"text": "one more"}\n')
        return pack(*given)

    monkeypatch.setattr(job, "_pack_all", pack_and_write)
    with pytest.raises(InputError, match=r"documents.jsonl changed while it was read"):
        prepare(config_for(tmp_path / "corpus", source))
    assert not (tmp_path / "corpus").exists()
    monkeypatch.undo()
    assert prepare(config_for(tmp_path / "corpus", source)).counts["documents"] > 0
