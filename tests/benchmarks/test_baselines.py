"""The baselines are the published loops: they pass the conformance cases of their systems."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cascade_model.batch import TrainBatch
from cascade_model.families import read_checkpoint
from cascade_model.networks import build_network, fill
from tests.benchmarks import train_arms
from tests.benchmarks.baselines import block_causal_loop, llada_loop, sdar_loop
from tests.benchmarks.train_baselines import BASELINES

DATA = Path(__file__).parents[1] / "data" / "conformance"


def cases(system: str) -> list[dict]:
    found = json.loads((DATA / system / "cases.json").read_text())
    return [case for case in found if case["kind"] == "sample"]


def network(system: str, case: dict):
    folder = DATA / system
    folder = folder if case["weights"] == "main" else folder / case["weights"]
    overrides = {"mask_id": case["settings"]["mask_id"]}
    checkpoint = read_checkpoint(folder, dtype=torch.float32, device="cpu", overrides=overrides)
    model = build_network(checkpoint.config)
    fill(model, checkpoint.state, str(folder))
    return model.eval()


@pytest.mark.parametrize("case", cases("llada"), ids=lambda case: case["name"])
def test_the_llada_loop_is_the_published_one(case):
    settings = case["settings"]
    if settings["cfg_scale"] or settings["logits_eos_inf"] or settings["confidence_eos_eot_inf"]:
        pytest.skip("the baseline has no guidance and no way to hold EOS back")
    model = network("llada", case)
    masks = case.get("attention_mask") or [[1] * len(row) for row in case["input_ids"]]
    for row, mask, expected in zip(
        case["input_ids"], masks, case["expected"]["output_ids"], strict=True
    ):
        prompt = [token for token, real in zip(row, mask, strict=True) if real]
        found, _ = llada_loop(
            model,
            prompt,
            steps=settings["steps"],
            gen_length=settings["gen_length"],
            block_length=settings["block_length"],
            mask_id=settings["mask_id"],
        )
        assert found == expected[len(row) - len(prompt) :]


@pytest.mark.parametrize("case", cases("llada2"), ids=lambda case: case["name"])
@pytest.mark.parametrize("feeds_canvas", [True, False])
def test_the_block_causal_loop_is_the_published_one(case, feeds_canvas):
    settings = case["settings"]
    model = network("llada2", case)
    limit = settings["gen_length"] // settings["minimal_topk"]
    for row, expected in zip(case["input_ids"], case["expected"]["output_ids"], strict=True):
        found, _ = block_causal_loop(
            model,
            row,
            steps=min(settings["steps"], limit),
            gen_length=settings["gen_length"],
            block_length=settings["block_length"],
            threshold=settings["threshold"],
            mask_id=settings["mask_id"],
            feeds_canvas=feeds_canvas,
        )
        if settings["variant"] == "official":
            new = found[len(row) : len(row) + settings["gen_length"]]
            ends = [i for i, token in enumerate(new) if token == settings.get("eos_id")]
            found = new[: ends[0] + 1] if ends else new
        assert found == expected


@pytest.mark.parametrize("case", cases("sdar"), ids=lambda case: case["name"])
@pytest.mark.parametrize("prefills_every_block", [True, False])
def test_the_sdar_loop_is_the_published_one(case, prefills_every_block):
    settings = case["settings"]
    is_plain = settings["temperature"] == 1.0 and not settings["top_k"] and settings["top_p"] == 1.0
    if settings["remasking_strategy"] != "low_confidence_static" or not is_plain:
        pytest.skip("the baseline has the static rule without filters")
    model = network("sdar", case)
    [row], [expected] = case["input_ids"], case["expected"]["output_ids"]
    found, _ = sdar_loop(
        model,
        row,
        steps=settings["denoising_steps"],
        gen_length=settings["gen_length"],
        block_length=settings["block_length"],
        mask_id=settings["mask_id"],
        prefills_every_block=prefills_every_block,
    )
    stops = settings["stopping_criteria_idx"] or []
    whole = -(-(len(row) + 1) // settings["block_length"])
    for end in range(whole * settings["block_length"], len(found), settings["block_length"]):
        if any(token in stops for token in found[len(row) : end]):
            found[end:] = [settings["mask_id"]] * (len(found) - end)
    assert found == expected


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
}


def training_pair(tmp_path, **choices):
    """A batch of one-document sequences and a model whose every gradient can be compared."""
    corpus = train_arms.corpus_of(tmp_path / "corpus", 128, sequences=8)
    model = train_arms.model_of(corpus, TINY, **choices)
    noise = dataclasses.replace(corpus.manifest.noise, block_size=model.config.block_size)
    return model, TrainBatch.from_numpy(corpus.batch(0, 3, noise), "cpu")


def loss_and_gradients(model, batch, loss):
    model.zero_grad(set_to_none=True)
    parts = loss(model, batch)
    parts.sum.backward()
    return parts, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["causal", "dense"])
def test_a_training_baseline_gives_our_loss_and_gradients(tmp_path, name):
    choices = train_arms.AUTOREGRESSIVE if name == "causal" else {}
    model, batch = training_pair(tmp_path, **choices)
    ours, wanted = loss_and_gradients(model, batch, train_arms.elbo)
    theirs, found = loss_and_gradients(model, batch, BASELINES[name])
    assert theirs.count == ours.count
    torch.testing.assert_close(theirs.sum, ours.sum, rtol=1e-5, atol=0)
    for parameter, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_baseline_of_another_loss_is_found_out(tmp_path):
    model, batch = training_pair(tmp_path)
    ours, _ = loss_and_gradients(model, batch, train_arms.elbo)
    causal, _ = loss_and_gradients(model, batch, BASELINES["causal"])
    assert abs(float(causal.sum.detach() / ours.sum.detach()) - 1) > 1e-3


def test_every_timed_step_is_one_of_the_trainer(tmp_path):
    corpus = train_arms.corpus_of(tmp_path / "corpus", 128, sequences=8)
    seen = []

    def loss(model, batch):
        seen.append(batch.sequence_ids.tolist())
        return train_arms.elbo(model, batch)

    model = train_arms.model_of(corpus, TINY)
    (tmp_path / "run").mkdir()
    found = train_arms.timed_steps(model, corpus, loss, tmp_path / "run", steps=3, sequences=2)
    assert len(found) == 3
    assert len(seen) == 4  # and one to warm up
    wanted = corpus.batch(0, 8, corpus.manifest.noise).sequence_ids.tolist()
    assert [one for step in seen for one in step] == wanted
    assert all(step.wall > 0 and step.cpu > 0 for step in found)
    assert not (tmp_path / "run" / "model").exists()
