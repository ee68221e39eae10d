"""Kinds that compare the logits of one pass, or a mask: who sees whom is said by the settings."""

from collections.abc import Callable

import torch
from torch import Tensor

from cascade_model.attention import clean_mask, dense, training_mask
from cascade_model.networks import Network
from tests.conformance.cases import Case, CaseError, Record
from tests.conformance.checkpoints import Checkpoints
from tests.conformance.verdicts import Verdict, compare_logits


def logits(case: Case, checkpoints: Checkpoints) -> Verdict:
    """One sequence a row, seen as the system does."""
    if case.system not in _BLOCK_SIZES:
        raise CaseError(f"kind={case.kind} is not known for the system {case.system}")
    tokens, is_real = case.inputs.tensor("input_ids"), _is_real(case)
    block_size = _BLOCK_SIZES[case.system](case.settings)
    levels = None
    if case.system == "mdlm_dit":
        levels = case.inputs.tensor("sigma_conditioning", torch.float32)
    if case.system == "ar":
        network = checkpoints.autoregressive(case)[1]
    else:
        network = checkpoints.network(case)
    mask = _visible(tokens, block_size, is_real)
    found = run(network, tokens, _positions(case, tokens), mask, levels)
    return compare_logits(found, case.expected.tensor("logits", torch.float32), is_real)


def logits_block_causal(case: Case, checkpoints: Checkpoints) -> Verdict:
    """BD3-LM as it is fed in sampling: one sequence a row."""
    case.settings.inform("model_length")
    tokens = case.inputs.tensor("input_ids")
    mask = _visible(tokens, case.settings["block_size"], None)
    found = run(checkpoints.network(case), tokens, _positions(case, tokens), mask)
    return compare_logits(found, case.expected.tensor("logits", torch.float32))


def logits_bd3_train(case: Case, checkpoints: Checkpoints) -> Verdict:
    """The noisy half's logits of noisy || clean."""
    case.settings.only("mask", "bd3_train")
    tokens = case.inputs.tensor("input_ids")
    length = tokens.shape[1] // 2
    case.settings.only("model_length", length)
    positions = torch.arange(length).repeat(2).expand_as(tokens)
    if "position_ids" in case.inputs:
        positions = case.inputs.tensor("position_ids").expand_as(tokens)
    mask = _training_mask(len(tokens), length, case.settings["block_size"])
    found = run(checkpoints.network(case), tokens, positions, mask)
    return compare_logits(found[:, :length], case.expected.tensor("logits", torch.float32))


def block_diff_mask(case: Case, checkpoints: Checkpoints) -> Verdict:
    """The mask of noisy || clean itself."""
    case.inputs.inform("input_ids")
    found = _training_mask(1, case.settings["n"], case.settings["block_size"])[0, 0]
    expected = case.expected.tensor("mask", torch.bool)
    if found.shape != expected.shape:
        return Verdict(f"the mask is {list(found.shape)}, expected {list(expected.shape)}")
    wrong = int((found != expected).sum())
    return Verdict(f"the mask differs at {wrong} pairs" if wrong else "")


@torch.inference_mode()
def run(
    network: Network,
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor,
    noise_levels: Tensor | None = None,
) -> Tensor:
    """Logits of all rows, [n, L, vocabulary]."""
    extra = {} if noise_levels is None else {"noise_level": noise_levels}
    return network(tokens, positions, dense(mask), lambda hidden, head: head(hidden), **extra)


def _visible(tokens: Tensor, block_size: int | None, is_real: Tensor | None) -> Tensor:
    """Who sees whom, bool [n, 1, L, L]: everyone, or block-causally; no one padding but itself."""
    n, length = tokens.shape
    segments = torch.zeros(n, length, dtype=torch.int32)
    mask = clean_mask(segments, block_size or length, "block_causal")
    if is_real is not None:
        mask = mask & is_real[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    return mask


def _training_mask(rows: int, length: int, block_size: int) -> Tensor:
    segments = torch.zeros(rows, length, dtype=torch.int32)
    return training_mask(segments, block_size, "block_causal")


def _is_real(case: Case) -> Tensor | None:
    if "attention_mask" not in case.inputs:
        return None
    return case.inputs.tensor("attention_mask", torch.bool)


def _positions(case: Case, tokens: Tensor) -> Tensor:
    if "position_ids" in case.inputs:
        return case.inputs.tensor("position_ids").expand_as(tokens)
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def _a2d_block_size(settings: Record) -> int | None:
    settings.only("mask", "bidirectional", "block_causal")
    return settings["block_size"] if settings["mask"] == "block_causal" else None


def _everyone(settings: Record) -> int | None:
    return None


_BLOCK_SIZES: dict[str, Callable[[Record], int | None]] = {
    "llada": _everyone,
    "llada_moe": _everyone,
    "dream": _everyone,
    "mdlm_dit": _everyone,
    "sdar": lambda settings: settings["block_length"],
    "llada2": lambda settings: settings["block_length"],
    "llada21": lambda settings: settings["block_length"],
    "fast_dllm_v2": lambda settings: settings["block_size"],
    "a2d_llama": _a2d_block_size,
    "a2d_qwen2": _a2d_block_size,
    "a2d_qwen3": _a2d_block_size,
    "ar": lambda settings: 1,
}
