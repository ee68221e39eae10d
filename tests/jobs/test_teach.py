"""Targets by command: the same bytes whoever writes them, and a student that cannot tell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cascade_model.corpus import Corpus
from cascade_model.stored_teaching import Stored
from cascade_model.teacher_targets import TARGETS, TeacherTargets, read_targets
from cascade_model.weights import load_model
from jobs import distil, pretrain, teach
from tests.cascade_model.corpus_making import make_corpus

ROOT = Path(__file__).parents[2]
SHAPE = ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-heads", "2"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.intermediate-size", "32"]
STEPS = ["--trainer.num-steps", "4", "--trainer.sequences-per-step", "4", "--num-workers", "0"]
STEPS += ["--trainer.log-every", "1", "--trainer.checkpoint-every", "2"]
TEXTS = {"a": [f"text {i} says {i * i} " * (5 + i % 20) for i in range(60)]}
OUTCOMES = 257  # bytes and end of text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", TEXTS, parts=5)


def trained(corpus, folder, *more) -> str:
    """The folder of an autoregressive model."""
    words = ["--corpus", corpus, "--output", str(folder), *SHAPE, *STEPS, *more]
    assert pretrain.main([*words, "--model.block-size", "1", "--model.logits", "shifted"]) == 0
    return str(folder / "model")


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> str:
    return trained(corpus, tmp_path_factory.mktemp("teacher"))


def asked(corpus, teacher, output, *more) -> list[str]:
    words = ["--corpus", corpus, "--teacher", teacher, "--output", str(output)]
    return [*words, "--threads-per-worker", "1", "--sequences-per-forward", "4", *more]


@pytest.fixture(scope="module")
def targets(corpus, teacher, tmp_path_factory) -> Path:
    """Of every token that the teacher can emit."""
    output = tmp_path_factory.mktemp("targets") / "targets"
    assert (
        teach.main(asked(corpus, teacher, output, "--runner", "local", "--k", str(OUTCOMES))) == 0
    )
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_unit_for_each_shard_and_a_manifest_last(corpus, targets):
    manifest, shards = (
        read_targets(str(targets)),
        Corpus.open(corpus).manifest.splits["train"].shards,
    )
    assert [each.rows for each in manifest.shards] == [each.rows for each in shards]
    assert len(shards) == 5
    assert manifest.k == OUTCOMES


def test_a_finished_job_is_left_as_it_is(corpus, teacher, targets):
    before = contents(targets)
    assert teach.main(asked(corpus, teacher, targets, "--k", str(OUTCOMES))) == 0  # without Ray
    assert contents(targets) == before


@pytest.mark.ray
def test_actors_write_the_bytes_of_one_process(corpus, teacher, targets, tmp_path, ray_local):
    output = tmp_path / "ray"
    words = asked(corpus, teacher, output, "--k", str(OUTCOMES), "--num-workers", "2")
    assert teach.main(words) == 0
    assert contents(output) == contents(targets)


def test_a_killed_job_goes_on_to_the_same_bytes(corpus, teacher, targets, tmp_path):
    output = tmp_path / "killed"
    words = asked(corpus, teacher, output, "--runner", "local", "--k", str(OUTCOMES))
    command = [sys.executable, "-m", "jobs.teach", *words]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(output.glob("*.record.json")):
        assert job.poll() is None
        time.sleep(0.002)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = {path: path.stat().st_mtime_ns for path in output.glob("*.record.json")}
    assert not (output / TARGETS).exists()
    assert teach.main(words) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    for path in output.glob(".*"):
        path.unlink()  # what was being written when the job was killed
    assert contents(output) == contents(targets)


def test_another_job_does_not_write_into_the_folder(corpus, teacher, targets, capsys):
    assert teach.main(asked(corpus, teacher, targets, "--k", "3")) == 2
    assert f"holds other targets: k=3, the folder was made with {OUTCOMES};" in said(capsys)


def test_another_teacher_is_named_by_its_folder(corpus, targets, tmp_path, capsys):
    other = trained(corpus, tmp_path / "other", "--trainer.seed", "1")
    capsys.readouterr()
    assert teach.main(asked(corpus, other, targets)) == 2
    assert f"teacher={other} is not what the folder was made with;" in said(capsys)


def test_more_tokens_than_there_are_and_a_teacher_that_is_none_are_refused(
    corpus, teacher, tmp_path, capsys
):
    output = tmp_path / "targets"
    assert teach.main(asked(corpus, teacher, output, "--k", "300")) == 2
    assert f"k=300 is above the {OUTCOMES} tokens" in said(capsys)
    run = tmp_path / "run"
    assert pretrain.main(["--corpus", corpus, "--output", str(run), *SHAPE, *STEPS]) == 0
    capsys.readouterr()
    assert teach.main(asked(corpus, str(run / "model"), output)) == 3
    assert "must be autoregressive" in said(capsys)
    assert not output.exists()


def lines(run: Path) -> list[dict]:
    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def student(corpus, output, *more) -> list[str]:
    words = ["--corpus", corpus, "--output", str(output), *SHAPE, *STEPS, *more]
    return [*words, "--model.block-size", "4", "--optimizer.peak-lr", "0.01"]


@pytest.mark.parametrize("padding", ["never", "eos"])
def test_a_student_cannot_tell_stored_targets_from_the_teacher(
    corpus, teacher, targets, tmp_path, padding
):
    """Every token is named, so only float16's rounding of the log-probabilities is left; one that
    is not taught is another matter."""
    sources = {"teacher": teacher, "targets": str(targets)}
    noise = ["--noise.padding", padding]
    for name, source in sources.items():
        assert distil.main(student(corpus, tmp_path / name, f"--{name}", source, *noise)) == 0
    alone = ["--teacher", teacher, "--alpha", "0", *noise]
    assert distil.main(student(corpus, tmp_path / "alone", *alone)) == 0
    online, stored, untaught = (lines(tmp_path / n) for n in ("teacher", "targets", "alone"))
    assert len(online) == 4
    for a, b, c in zip(online, stored, untaught, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-2)
        assert a["loss"] != pytest.approx(c["loss"], rel=1e-2)
    weights = [load_model(str(tmp_path / n / "model"))[0] for n in ("teacher", "targets")]
    for a, b in zip(*(model.parameters() for model in weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_targets_are_read_once_and_ahead_of_the_steps(
    corpus, teacher, targets, tmp_path, monkeypatch
):
    """And the run that reads them in its loss comes to the same bits."""
    read, rows = [], TeacherTargets.rows

    def watched(self, sequence_ids):
        read.append((threading.current_thread().name, [int(i) for i in sequence_ids]))
        return rows(self, sequence_ids)

    monkeypatch.setattr(TeacherTargets, "rows", watched)
    assert distil.main(student(corpus, tmp_path / "ahead", "--targets", str(targets))) == 0
    ahead = list(read)
    read.clear()
    assert {thread for thread, _ in ahead} == {"prefetch"}
    monkeypatch.setattr(Stored, "read_ahead", lambda self, batch: None)
    assert distil.main(student(corpus, tmp_path / "there", "--targets", str(targets))) == 0
    assert {thread for thread, _ in read} == {"MainThread"}
    assert [ids for _, ids in read] == [ids for _, ids in ahead]
    for path in (tmp_path / "ahead" / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / "model" / path.name).read_bytes()


def test_a_resumed_run_on_targets_is_bitwise_the_same(corpus, teacher, targets, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert distil.main(student(corpus, whole, "--targets", str(targets))) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    assert distil.main(student(corpus, again, "--targets", str(targets))) == 0
    names = [path.name for path in (whole / "model").iterdir()]
    for name in names:
        assert (again / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


def test_either_a_teacher_or_targets(corpus, teacher, targets, tmp_path, capsys):
    both = ["--teacher", teacher, "--targets", str(targets)]
    for more in ([], both):
        assert distil.main(student(corpus, tmp_path, *more)) == 2
        assert "give one of the two" in said(capsys)


def test_targets_at_another_temperature_or_of_another_corpus_are_refused(
    corpus, targets, tmp_path, capsys
):
    words = ["--targets", str(targets)]
    assert distil.main(student(corpus, tmp_path / "run", *words, "--temperature", "2")) == 3
    assert "temperature=1.0 and the student temperature=2.0" in said(capsys)
    other = make_corpus(tmp_path / "corpus", {"a": TEXTS["a"][:30]})
    assert distil.main(student(other, tmp_path / "run", *words)) == 3
    assert "corpus digest=" in said(capsys)
    assert not (tmp_path / "run").exists()
