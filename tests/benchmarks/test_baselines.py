"""The baselines are the published loops: they pass the conformance cases of their systems."""

import json
from pathlib import Path

import pytest
import torch

from cascade_model.families import read_checkpoint
from cascade_model.networks import build_network, fill
from tests.benchmarks.baselines import block_causal_loop, llada_loop, sdar_loop

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
