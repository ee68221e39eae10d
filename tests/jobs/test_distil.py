"""The distil command is pretraining with a teacher."""

import dataclasses
import json
import math

import pytest

from cascade_model.checkpoint import verify
from cascade_model.commit import Folder
from cascade_model.metrics import read_metrics
from cascade_model.weights import load_model, read_config, save_model, weights_digest
from jobs import distil, prepare, pretrain, teach

SHAPE = ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-heads", "2"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.intermediate-size", "32"]
STEPS = ["--trainer.num-steps", "3", "--trainer.sequences-per-step", "4"]
STEPS += ["--trainer.log-every", "1", "--num-workers", "0"]


@pytest.fixture(scope="module")
def teacher(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    words = ["--corpus", tiny_corpus, "--output", str(folder), *SHAPE, *STEPS]
    assert pretrain.main([*words, "--model.block-size", "1", "--model.logits", "shifted"]) == 0
    return folder / "model"


def flags(corpus, output, teacher, *more):
    words = ["--corpus", str(corpus), "--output", str(output), "--teacher", str(teacher)]
    return [*words, *SHAPE, *STEPS, *more]


def test_student_is_trained_and_the_teacher_recorded(tiny_corpus, tmp_path, teacher):
    assert distil.main(flags(tiny_corpus, tmp_path, teacher)) == 0
    assert load_model(str(tmp_path / "model"))[0].config.block_size == 4
    objective = verify(tmp_path / "checkpoints" / "step_00000003").facts["objective"]
    assert objective["teacher"] == weights_digest(teacher)
    assert objective["alpha"] == 0.5
    assert objective["teacher_weight"] == "right_context"


def test_student_may_start_from_a_model(tiny_corpus, tmp_path, teacher):
    assert distil.main(flags(tiny_corpus, tmp_path / "first", teacher)) == 0
    initial = ["--initial-model", str(tmp_path / "first" / "model")]
    assert distil.main(flags(tiny_corpus, tmp_path / "second", teacher, *initial)) == 0


def test_teacher_that_is_no_autoregressive_model_is_refused(tiny_corpus, tmp_path, teacher, capsys):
    assert distil.main(flags(tiny_corpus, tmp_path / "student", teacher)) == 0
    model = tmp_path / "student" / "model"
    assert distil.main(flags(tiny_corpus, tmp_path / "run", model)) == 3
    assert "must be autoregressive" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (tmp_path / "run").exists()


def test_a_corpus_longer_than_the_teachers_context_is_refused(
    tiny_corpus, tmp_path, teacher, capsys
):
    """By both commands that let a teacher speak; a corpus just as long is taken."""
    model, tokenizer = load_model(teacher)
    asked = ["--corpus", tiny_corpus, "--runner", "local", "--k", "3"]
    for most, code in ((63, 2), (64, 0)):
        model.config = dataclasses.replace(model.config, max_sequence_length=most)
        short, run = tmp_path / f"reads {most}", tmp_path / f"run {most}"
        save_model(short, model, tokenizer)
        told = f"teacher={short} has max_sequence_length=63 and corpus={tiny_corpus} has "
        told += "sequences of 64 tokens; prepare the corpus with --sequence-length 63"
        taught = [*asked, "--teacher", str(short), "--output", str(tmp_path / f"targets {most}")]
        for main, words in ((distil.main, flags(tiny_corpus, run, short)), (teach.main, taught)):
            assert main(words) == code
            shown = " ".join(capsys.readouterr().err.replace("│", "").split())
            assert (told in shown) == (code == 2)
    assert not (tmp_path / "run 63").exists()
    assert not (tmp_path / "targets 63").exists()


def test_student_of_rearranged_texts_learns_from_a_teacher_of_plain_ones(tmp_path):
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"Row {i} says that {i * i}."}) + "\n" for i in range(200))
    )
    words = ["--source.paths", str(tmp_path / "documents.jsonl"), "--sequence-length", "64"]
    words += ["--noise.block-size", "4", "--runner", "local"]
    texts = {"rearranged": ["--tokenizer", "train", "--vocab-size", "400", "--infill-rate", "0.5"]}
    texts["plain"] = ["--tokenizer", str(tmp_path / "rearranged" / "tokenizer.json")]
    for name, more in texts.items():
        assert prepare.main(["--output", str(tmp_path / name), *words, *more]) == 0
    run = ["--corpus", str(tmp_path / "plain"), "--output", str(tmp_path / "teacher")]
    kind = ["--model.block-size", "1", "--model.logits", "shifted"]
    assert pretrain.main([*run, *SHAPE, *STEPS, *kind]) == 0
    taught = flags(tmp_path / "rearranged", tmp_path / "run", tmp_path / "teacher" / "model")
    assert distil.main(taught) == 0
    assert read_config(tmp_path / "run" / "model").infill == "psm"
    losses = [line["loss"] for line in read_metrics(Folder(tmp_path / "run"))]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    asked = ["--teacher", str(tmp_path / "teacher" / "model"), "--runner", "local", "--k", "3"]
    for name in texts:
        words = [*asked, "--corpus", str(tmp_path / name), "--output", str(tmp_path / f"of {name}")]
        assert teach.main(words) == 0
    told = ["--corpus", str(tmp_path / "rearranged"), "--output", str(tmp_path / "stored")]
    told += [*SHAPE, *STEPS, "--targets", str(tmp_path / "of rearranged")]
    assert distil.main(told) == 0
    stored = [line["loss"] for line in read_metrics(Folder(tmp_path / "stored"))]
    assert stored == pytest.approx(losses, rel=0.05)  # k + 1 outcomes of the same teacher


@pytest.mark.parametrize("setting", ["corpus", "teacher", "initial-model", "targets"])
def test_a_path_that_is_not_there_is_refused_in_one_sentence(
    tiny_corpus, tmp_path, teacher, capsys, setting
):
    nowhere = tmp_path / "nowhere"
    words = flags(tiny_corpus, tmp_path / "run", teacher, f"--{setting}", str(nowhere))
    if setting == "targets":
        words = [word for word in words if word not in ("--teacher", str(teacher))]
    assert distil.main(words) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert f"{nowhere} does not exist" in told
    assert "check the path" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["teacher", "initial-model"])
def test_a_run_in_place_of_its_model_is_named(tiny_corpus, tmp_path, teacher, capsys, setting):
    words = flags(tiny_corpus, tmp_path / "run", teacher, f"--{setting}", str(teacher.parent))
    assert distil.main(words) == 3
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert f"it is a run; give {teacher}" in told


def test_run_with_another_objective_is_refused_and_keeps_its_settings(
    tiny_corpus, tmp_path, teacher, capsys
):
    assert distil.main(flags(tiny_corpus, tmp_path, teacher)) == 0
    settings = (tmp_path / "config.yaml").read_text()
    assert distil.main(flags(tiny_corpus, tmp_path, teacher, "--alpha", "0.25")) == 3
    error = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "objective.alpha=0.5 and this run has objective.alpha=0.25" in error
    words = ["--corpus", tiny_corpus, "--output", str(tmp_path), *SHAPE, *STEPS]
    assert pretrain.main(words) == 3
    assert "objective.alpha=0.5" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert (tmp_path / "config.yaml").read_text() == settings


def test_alpha_outside_its_range_is_refused(tiny_corpus, tmp_path, capsys):
    assert distil.main(flags(tiny_corpus, tmp_path, "x", "--alpha", "1.5")) == 2
    assert "alpha=1.5" in capsys.readouterr().err
