"""The loop resumes bit for bit, counts globally, and stops on what is not finite."""

import dataclasses
import json
import shutil

import pytest
import torch

from cascade_model import trainer
from cascade_model.commit import Folder
from cascade_model.config import ModelConfig
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.metrics import read_metrics
from cascade_model.run_record import facts_of
from cascade_model.weights import save_model
from tests.cascade_model.training_runs import STEPS, Killed, dying, elbo, losses, make, weights


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return Corpus.open(tiny_corpus)


@pytest.mark.parametrize("forwards", [5, 8, 11])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(corpus, tmp_path, forwards):
    make(corpus, tmp_path / "whole").fit()
    with pytest.raises(Killed):
        make(corpus, tmp_path / "cut", loss_fn=dying(forwards)).fit()
    summary = make(corpus, tmp_path / "cut").fit()
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert summary["steps"] == 6


def test_micro_batches_do_not_change_the_step(corpus, tmp_path):
    make(corpus, tmp_path / "two").fit()
    whole = dataclasses.replace(STEPS, sequences_per_forward=4)
    make(corpus, tmp_path / "one", trainer=whole).fit()
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_loss_falls_and_the_run_folder_explains_itself(corpus, tmp_path):
    steps = dataclasses.replace(STEPS, num_steps=40, log_every=10, checkpoint_every=40)
    summary = make(corpus, tmp_path, trainer=steps).fit()
    assert summary["last_loss"] < summary["first_loss"] - 0.3
    assert summary["tokens"] == 40 * 4 * corpus.sequence_length
    line = read_metrics(Folder(tmp_path))[-1]
    assert {"loss", "loss_by_mask_rate", "lr", "grad_norm", "tokens_per_second"} <= set(line)
    assert 0 <= line["data_wait_rate"] <= 1
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_model_folder_is_written_from_the_weights_themselves(corpus, tmp_path, monkeypatch):
    """Memory never holds them twice."""
    written = []

    def keep(folder, model, *words, **named):
        written.append(model)
        save_model(folder, model, *words, **named)

    monkeypatch.setattr(trainer, "save_model", keep)
    run = make(corpus, tmp_path)
    run.fit()
    (exported,) = written
    for one, two in zip(exported.parameters(), run.model.parameters(), strict=True):
        assert one.data_ptr() == two.data_ptr()
    assert weights(tmp_path).keys() == run.model.state_dict().keys()


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith("lease-")}


def test_finished_run_is_left_as_it_is(corpus, tmp_path):
    summary = make(corpus, tmp_path).fit()
    before = contents(tmp_path)
    assert make(corpus, tmp_path, loss_fn=dying(0)).fit() == summary
    assert contents(tmp_path) == before


@pytest.mark.parametrize("missing", ["summary.json", "model"])
def test_run_that_died_before_its_end_was_told_gets_the_same_summary(corpus, tmp_path, missing):
    summary = make(corpus, tmp_path).fit()
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert make(corpus, tmp_path, loss_fn=dying(0)).fit() == summary
    assert summary["tokens_per_second"] > 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "model" / "manifest.json").exists()


def test_finished_run_goes_on_when_it_is_given_more_steps(corpus, tmp_path):
    make(corpus, tmp_path).fit()
    longer = dataclasses.replace(STEPS, num_steps=8)
    assert make(corpus, tmp_path, trainer=longer).fit()["steps"] == 8
    assert make(corpus, tmp_path).fit()["steps"] == 8


def test_facts_differ_with_everything_a_run_cannot_change(corpus):
    model = ModelConfig(vocab_size=9, mask_id=1, pad_id=2, eos_id=3)
    noise, objective = corpus.manifest.noise, {"name": "diffusion", "weight": "elbo"}
    facts = facts_of(model, corpus, noise, objective, STEPS)
    others = [
        facts_of(dataclasses.replace(model, num_layers=9), corpus, noise, objective, STEPS),
        facts_of(model, corpus, dataclasses.replace(noise, seed=9), objective, STEPS),
        facts_of(model, corpus, noise, objective | {"weight": "unit"}, STEPS),
        facts_of(model, corpus, noise, objective, dataclasses.replace(STEPS, sequences_per_step=8)),
        facts_of(model, corpus, noise, objective, STEPS, initial_weights="0f"),
        facts_of(model, corpus, noise, objective, dataclasses.replace(STEPS, seed=1)),
    ]
    assert all(other != facts for other in others)
    free = dataclasses.replace(STEPS, num_steps=99, sequences_per_forward=1, log_every=1)
    assert facts_of(model, corpus, noise, objective, free) == facts


def test_another_model_is_refused_with_both_values(corpus, tmp_path):
    make(corpus, tmp_path).fit()
    with pytest.raises(CheckpointMismatch, match=r"model.num_layers=2 .* model.num_layers=3"):
        make(corpus, tmp_path, num_layers=3).fit()


def test_another_corpus_is_refused_with_both_values(corpus, tmp_path, tiny_corpus):
    make(corpus, tmp_path).fit()
    other = Corpus.open(tiny_corpus, split="held_out")
    other.manifest = dataclasses.replace(other.manifest, counts={})
    with pytest.raises(CheckpointMismatch, match=f"'{corpus.digest[:12]}'.*'{other.digest[:12]}'"):
        make(other, tmp_path).fit()


def test_nan_stops_the_run_and_names_the_samples(corpus, tmp_path):
    calls = iter(range(100))

    def poisoned(model, batch):
        parts = elbo(model, batch)
        bad = next(calls) == 5
        return dataclasses.replace(parts, sum=parts.sum * float("nan")) if bad else parts

    with pytest.raises(InputError, match="not finite at step 3"):
        make(corpus, tmp_path, loss_fn=poisoned).fit()
    record = json.loads((tmp_path / "not_finite_step_00000003.json").read_text())
    expected = corpus.batch(8, 4, corpus.manifest.noise).sequence_ids
    assert record["sequence_ids"] == [int(i) for i in expected]
    assert (tmp_path / "checkpoints" / "step_00000002" / "COMMIT").exists()


def test_flex_attention_without_a_gpu_is_refused(corpus, tmp_path):
    trainer = make(corpus, tmp_path, trainer=dataclasses.replace(STEPS, attention="flex"))
    with pytest.raises(InputError, match=r"trainer\.attention=flex needs a GPU"):
        trainer.fit()


def test_a_whole_run_in_a_store_is_that_on_a_disk_and_is_left_when_finished(
    corpus, tmp_path, s3_url
):
    make(corpus, tmp_path / "disk").fit()
    summary = make(corpus, Folder(s3_url)).fit()
    assert summary["model"] == f"{s3_url}/model"
    (tmp_path / "copy" / "model").mkdir(parents=True)
    for name in (Folder(s3_url) / "model").list():
        data = (Folder(s3_url) / "model").read_bytes(name)
        (tmp_path / "copy" / "model" / name).write_bytes(data)
    one, two = weights(tmp_path / "disk"), weights(tmp_path / "copy")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert make(corpus, Folder(s3_url), loss_fn=dying(0)).fit() == summary
