"""Kinds that compare losses at given noise."""

import torch
from torch import Tensor

from cascade_model.bounds import (
    bd3_bound,
    llada_loss,
    llada_rate,
    loglinear_noise,
    mdlm_bound,
    token_losses,
)
from tests.conformance.cases import Case, CaseError
from tests.conformance.checkpoints import Checkpoints
from tests.conformance.verdicts import LOSSES, Verdict, compare_losses


@torch.inference_mode()
def likelihood(case: Case, checkpoints: Checkpoints) -> Verdict:
    """LLaDA's Monte-Carlo log-likelihood: the masked answer tokens, divided by their ratio."""
    clean, noisy = _tokens(case)
    rates = case.inputs.tensor("p_mask", torch.float32)
    losses = token_losses(
        checkpoints.network(case),
        clean,
        noisy,
        rates.reciprocal(),
        outcomes="all",
        guidance=case.settings.get("cfg_scale", 0.0),
        is_given=(torch.arange(clean.shape[1]) < case.inputs["prompt_length"]).expand_as(clean),
    )
    found = {
        "token_loss": losses,
        "per_sample_loss": losses.sum(dim=1),
        "log_likelihood_estimate": -losses.sum(dim=1).mean(),
    }
    return compare_losses(found, _expected(case, *found))


@torch.inference_mode()
def pretrain_loss(case: Case, checkpoints: Checkpoints) -> Verdict:
    """LLaDA's pretraining loss."""
    loss, losses = llada_loss(checkpoints.network(case), *_tokens(case), _nominal_rates(case))
    return compare_losses({"loss": loss, "token_loss": losses}, _expected(case))


@torch.inference_mode()
def sft_loss(case: Case, checkpoints: Checkpoints) -> Verdict:
    """LLaDA's fine-tuning loss."""
    prompts = case.inputs.tensor("prompt_lengths")
    network = checkpoints.network(case)
    loss, losses = llada_loss(network, *_tokens(case), _nominal_rates(case), prompts)
    return compare_losses({"loss": loss, "token_loss": losses}, _expected(case))


@torch.inference_mode()
def bd3_loss(case: Case, checkpoints: Checkpoints) -> Verdict:
    """BD3-LM's bound."""
    clean, noisy = _tokens(case)
    case.settings.only("noise", "loglinear")
    case.settings.only("model_length", clean.shape[1])
    loss, losses = bd3_bound(
        checkpoints.network(case),
        clean,
        noisy,
        case.inputs.tensor("t", torch.float32),
        block_size=case.settings["block_size"],
        is_first_given=case.settings.get("ignore_bos", True),
    )
    return compare_losses({"loss": loss, "token_loss": losses}, _expected(case))


@torch.inference_mode()
def mdlm_loss(case: Case, checkpoints: Checkpoints) -> Verdict:
    """MDLM's bound, and the noise that belongs to its times."""
    case.settings.only("noise", "loglinear")
    t, eps = case.inputs.tensor("t", torch.float32), case.settings["eps"]
    for name, values in zip(("sigma", "dsigma"), loglinear_noise(t, eps), strict=True):
        _require_close(name, values, case.inputs.tensor(name, torch.float32))
    loss, losses = mdlm_bound(checkpoints.network(case), *_tokens(case), t, eps)
    return compare_losses({"loss": loss, "token_loss": losses}, _expected(case))


def _tokens(case: Case) -> tuple[Tensor, Tensor]:
    """Clean and noisy."""
    return case.inputs.tensor("input_ids"), case.inputs.tensor("masked_input_ids")


def _expected(case: Case, *names: str) -> dict[str, Tensor]:
    wanted = names or ("loss", "token_loss")
    return {name: case.expected.tensor(name, torch.float32) for name in wanted}


def _nominal_rates(case: Case) -> Tensor:
    """One mask rate a row, compared with that of the row's time."""
    rates = case.inputs.tensor("p_mask", torch.float32)
    own = llada_rate(case.inputs.tensor("t", torch.float32), case.settings["eps"])
    _require_close("p_mask", own[:, None].expand_as(rates), rates)
    return rates[:, 0]


def _require_close(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=LOSSES, atol=0):
        raise CaseError(f"{name} is not what its times give")
