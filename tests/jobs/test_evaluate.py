"""The evaluate command: a model folder, a checkpoint or a run folder."""

import json

import pytest

from jobs import evaluate, pretrain

SHAPE = ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.num-heads", "2"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "8", "--model.intermediate-size", "32"]


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["--corpus", tiny_corpus, "--output", str(folder), "--num-workers", "0", *SHAPE]
    words += ["--trainer.num-steps", "60", "--trainer.sequences-per-step", "8"]
    assert pretrain.main([*words, "--optimizer.peak-lr", "0.01"]) == 0
    return folder


def measure(model, corpus, output, *more):
    words = ["--model", str(model), "--corpus", corpus, "--output", str(output)]
    assert evaluate.main([*words, "--max-sequences", "16", "--draws", "2", *more]) == 0
    return json.loads(output.read_text())


def test_trained_model_is_better_than_the_untrained(run, tiny_corpus, tmp_path, capsys):
    report = measure(run, tiny_corpus, tmp_path / "report.json")
    assert report["nats_per_token"] < report["untrained"]["nats_per_token"] - 0.3
    assert report["below_unigram"] == pytest.approx(
        report["unigram_nats_per_token"] - report["nats_per_token"]
    )
    printed = capsys.readouterr().out
    assert "±" in printed
    assert "unigram, add-one" in printed
    assert "untrained model" in printed


def test_run_model_and_checkpoint_give_the_same_values(run, tiny_corpus, tmp_path):
    paths = [run, run / "model", run / "checkpoints" / "step_00000060"]
    reports = [measure(p, tiny_corpus, tmp_path / "r.json", "--untrained", "False") for p in paths]
    assert len({report["nats_per_token"] for report in reports}) == 1
    assert reports[0]["untrained"] is None


def test_sequential_likelihood_is_another_measure(run, tiny_corpus, tmp_path, capsys):
    bound = measure(run, tiny_corpus, tmp_path / "a.json", "--untrained", "False")
    exact = measure(
        run, tiny_corpus, tmp_path / "b.json", "--untrained", "False", "--measure", "sequential"
    )
    assert (bound["measure"], exact["measure"]) == ("bound", "sequential")
    assert exact["is_exact"]
    assert exact["nats_per_token"] == pytest.approx(bound["nats_per_token"], rel=0.2)
    assert "negative log likelihood" in capsys.readouterr().out


def test_what_can_be_predicted_is_recorded(run, tiny_corpus, tmp_path):
    words = ["--untrained", "False", "--outcomes"]
    text, everything = (
        measure(run, tiny_corpus, tmp_path / f"{name}.json", *words, name)
        for name in ("text", "all")
    )
    assert everything["outcomes"] == "all"
    assert everything["nats_per_token"] > text["nats_per_token"]


def test_path_that_is_no_model_is_refused(tiny_corpus, tmp_path, capsys):
    assert evaluate.main(["--model", str(tmp_path), "--corpus", tiny_corpus]) == 2
    assert "no model folder, checkpoint or run folder" in " ".join(
        capsys.readouterr().err.replace("│", "").split()
    )


def test_damaged_checkpoint_is_refused(run, tiny_corpus, tmp_path, capsys):
    import shutil

    copy = tmp_path / "step_00000060"
    shutil.copytree(run / "checkpoints" / "step_00000060", copy)
    (copy / "COMMIT").write_text("{}")
    assert evaluate.main(["--model", str(copy), "--corpus", tiny_corpus]) == 3
    assert "damaged" in capsys.readouterr().err


def test_too_few_strata_are_refused(tiny_corpus, capsys):
    assert evaluate.main(["--model", "x", "--corpus", tiny_corpus, "--strata", "4"]) == 2
    assert "strata=4 must be at least 8" in capsys.readouterr().err
