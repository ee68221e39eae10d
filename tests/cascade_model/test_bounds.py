"""The published losses on the published inputs, and their weights against closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade_model import bounds
from cascade_model.config import ModelConfig
from cascade_model.dit import DiT
from cascade_model.errors import InputError
from cascade_model.model import Transformer
from tests.tiny_models import MASK, lively_model

DATA = Path(__file__).parent.parent / "data" / "conformance"
LLADA_NAMES = {
    "attn_norm": "attention_norm",
    "attn_out": "o_proj",
    "ff_norm": "mlp_norm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
DIT_NAMES = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn_qkv": "qkv",
    "attn_out": "o_proj",
    "mlp.0": "up_proj",
    "mlp.2": "down_proj",
    "adaLN_modulation": "modulation",
}
DIT_TOP = {
    "vocab_embed.embedding": "embed.weight",
    "sigma_map.mlp.0.weight": "time_in.weight",
    "sigma_map.mlp.0.bias": "time_in.bias",
    "sigma_map.mlp.2.weight": "time_out.weight",
    "sigma_map.mlp.2.bias": "time_out.bias",
    "output_layer.norm_final.weight": "final_norm.weight",
    "output_layer.adaLN_modulation.weight": "final_modulation.weight",
    "output_layer.adaLN_modulation.bias": "final_modulation.bias",
    "output_layer.linear.weight": "head.weight",
    "output_layer.linear.bias": "head.bias",
}


def cases(system: str, kind: str) -> list:
    found = json.loads((DATA / system / "cases.json").read_text())
    return [pytest.param(case, id=case["name"]) for case in found if case["kind"] == kind]


def renamed(name: str, names: dict[str, str]) -> str:
    index, _, rest = name.partition(".")
    part, _, kind = rest.rpartition(".")
    return f"layers.{index}.{names.get(part, part)}.{kind}"


def llada() -> Transformer:
    config = ModelConfig(
        vocab_size=384, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
        intermediate_size=128, rope_theta=500000.0, tied_head=False, attention="bidirectional",
        mask_id=383, pad_id=381, eos_id=381,
    )  # fmt: skip
    top = {"wte": "embed", "ln_f": "final_norm", "ff_out": "head"}
    state = {}
    for name, value in load_file(DATA / "llada" / "model.safetensors").items():
        short = name.removeprefix("model.transformer.")
        if short.startswith("blocks."):
            state[renamed(short.removeprefix("blocks."), LLADA_NAMES)] = value
        else:
            state[top[short.removesuffix(".weight")] + ".weight"] = value
    model = Transformer(config)
    model.load_state_dict(state)
    return model


def dit(system: str) -> DiT:
    config = ModelConfig(
        network="dit", vocab_size=384, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=4,
        head_dim=12, intermediate_size=192, conditioning_size=16, tied_head=False, block_size=4,
        attention="block_causal" if system == "bd3lm_dit" else "bidirectional",
        mask_id=383, pad_id=382, eos_id=381,
    )  # fmt: skip
    state = {}
    for name, value in load_file(DATA / system / "model.safetensors").items():
        short = name.removeprefix("backbone.")
        if short.startswith("blocks."):
            state[renamed(short.removeprefix("blocks."), DIT_NAMES)] = value
        elif short in DIT_TOP:
            state[DIT_TOP[short]] = value
    model = DiT(config)
    model.load_state_dict(state)
    return model


def check(system: str, case: dict, found: torch.Tensor, losses: torch.Tensor, name: str) -> None:
    arrays = load_file(DATA / system / "arrays.safetensors")
    key = case["expected"]["token_loss"]["array"]
    torch.testing.assert_close(losses, arrays[key].float(), rtol=1e-4, atol=1e-3)
    assert float(found) == pytest.approx(case["expected"][name], rel=1e-4)


def tokens_of(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(case["input_ids"]), torch.tensor(case["masked_input_ids"])


@pytest.mark.parametrize("case", cases("llada_likelihood", "pretrain_loss"))
@torch.no_grad()
def test_pretraining_loss_of_llada(case):
    rates = bounds.llada_rate(torch.tensor(case["t"]), case["settings"]["eps"])
    torch.testing.assert_close(rates, torch.tensor(case["p_mask"])[:, 0])
    found, losses = bounds.llada_loss(llada(), *tokens_of(case), rates)
    check("llada_likelihood", case, found, losses, "loss")


@pytest.mark.parametrize("case", cases("llada_likelihood", "sft_loss"))
@torch.no_grad()
def test_fine_tuning_loss_of_llada(case):
    rates = bounds.llada_rate(torch.tensor(case["t"]), case["settings"]["eps"])
    prompts = torch.tensor(case["prompt_lengths"])
    found, losses = bounds.llada_loss(llada(), *tokens_of(case), rates, prompts)
    check("llada_likelihood", case, found, losses, "loss")


@pytest.mark.parametrize("case", cases("llada_likelihood", "likelihood"))
@torch.no_grad()
def test_likelihood_of_llada(case):
    clean, noisy = tokens_of(case)
    is_given = (torch.arange(clean.shape[1]) < case["prompt_length"]).expand(clean.shape)
    losses = bounds.token_losses(
        llada(),
        clean,
        noisy,
        torch.tensor(case["p_mask"]).reciprocal(),
        outcomes="all",
        guidance=case["settings"].get("cfg_scale", 0.0),
        is_given=is_given,
    )
    per_sample = torch.tensor(case["expected"]["per_sample_loss"])
    torch.testing.assert_close(losses.sum(dim=1), per_sample, rtol=1e-4, atol=0)
    estimate = -losses.sum(dim=1).mean()
    check("llada_likelihood", case, estimate, losses, "log_likelihood_estimate")


@pytest.mark.parametrize("case", cases("mdlm_dit", "mdlm_loss"))
@torch.no_grad()
def test_bound_of_mdlm(case):
    t, eps = torch.tensor(case["t"]), case["settings"]["eps"]
    sigma, slope = bounds.loglinear_noise(t, eps)
    torch.testing.assert_close(sigma, torch.tensor(case["sigma"]))
    torch.testing.assert_close(slope, torch.tensor(case["dsigma"]))
    found, losses = bounds.mdlm_bound(dit("mdlm_dit"), *tokens_of(case), t, eps)
    check("mdlm_dit", case, found, losses, "loss")


@pytest.mark.parametrize("case", cases("bd3lm_dit", "bd3_loss"))
@torch.no_grad()
def test_bound_of_bd3lm(case):
    found, losses = bounds.bd3_bound(
        dit("bd3lm_dit"),
        *tokens_of(case),
        torch.tensor(case["t"]),
        block_size=case["settings"]["block_size"],
        is_first_given=case["settings"]["ignore_bos"],
    )
    check("bd3lm_dit", case, found, losses, "loss")


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_log_linear_weight_is_one_over_t(t):
    weight = bounds.loglinear_weight(torch.tensor(t, dtype=torch.float64))
    assert float(weight) == pytest.approx(1 / t, rel=1e-12)


def test_md4_weights_and_rates_are_its_schedule_and_slope():
    t = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
    rate = bounds.md4_rate(t)
    torch.testing.assert_close(rate, 1e-4 + (1 - 2e-4) * t)
    (slope,) = torch.autograd.grad(rate.sum(), t)
    torch.testing.assert_close(bounds.md4_weight(t), slope / rate)


def test_md4_adds_its_constant_for_time_zero():
    model = lively_model(attention="bidirectional")
    clean = torch.randint(0, 12, (2, 6))
    found, losses = bounds.md4_bound(model, clean, clean, torch.full((2,), 0.5))
    assert float(losses.detach().abs().sum()) == 0
    assert float(found.detach()) == pytest.approx(6 * 1e-4 * math.log(16))


def test_noise_that_does_more_than_mask_is_refused():
    model = lively_model(attention="bidirectional")
    clean = torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match=f"mask_id={MASK}"):
        bounds.token_losses(
            model, clean, torch.tensor([[1, 4, MASK]]), torch.ones(1, 1), outcomes="all"
        )
    bounds.token_losses(model, clean, torch.tensor([[1, 2, MASK]]), torch.ones(1), outcomes="all")


def test_the_three_sets_of_outcomes_differ_by_what_is_banned():
    model = lively_model(attention="bidirectional")
    clean, noisy = torch.tensor([[1, 2, 3, 4]]), torch.full((1, 4), MASK)

    def total(outcomes):
        return float(
            bounds.token_losses(model, clean, noisy, torch.ones(1), outcomes=outcomes).sum()
        )

    assert total("text") < total("all_but_mask") < total("all")
