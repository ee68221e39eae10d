"""The recorded systems: their folders, their logit cases, and how our network is asked for them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cascade_model.attention import clean_mask, dense, training_mask
from cascade_model.families import Checkpoint, read_checkpoint
from cascade_model.networks import Network, network_with

DATA = Path(__file__).parents[2] / "data/conformance"
KINDS = ("logits", "logits_bd3_train", "logits_block_causal")
# These record no mask token or no end of text, and their vocabulary is too small for the published
# numbers; the recorded cases name 383 and 381.
SILENT = {"mask_id": 383, "eos_id": 381}
OVERRIDES = {
    **{name: {"mask_id": 383} for name in ("a2d_llama", "a2d_qwen2", "a2d_qwen3")},
    **dict.fromkeys(("llada_moe", "llada2", "llada21", "fast_dllm_v2"), SILENT),
    **dict.fromkeys(("mdlm_dit", "bd3lm_dit"), SILENT),
}
SYSTEMS = (
    "a2d_llama", "a2d_qwen2", "a2d_qwen3", "ar/gpt2", "ar/llama", "ar/qwen2", "ar/qwen3",
    "bd3lm_dit", "dream", "fast_dllm_v2", "llada", "llada2", "llada21", "llada_moe", "mdlm_dit",
    "sdar",
)  # fmt: skip


def folder_of(system: str, weights: str) -> str:
    """The sub-folder of a case's weights."""
    return system if weights == "main" else f"{system}/{weights}"


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Every recorded case of logits with the system it belongs to."""
    found = []
    for file in sorted(DATA.glob("*/cases.json")):
        each = json.loads(file.read_text())
        found += [(file.parent.name, case) for case in each if case["kind"] in KINDS]
    return found


def read(system: str, **arguments: Any) -> Checkpoint:
    """A recorded checkpoint."""
    return read_checkpoint(DATA / system, overrides=OVERRIDES.get(system), **arguments)


def network_of(system: str) -> tuple[Network, Checkpoint]:
    """A recorded checkpoint in our network."""
    checkpoint = read(system)
    return network_with(checkpoint.config, checkpoint.state, system).eval(), checkpoint


def expected_logits(system: str, case: dict[str, Any]) -> Tensor:
    """What the published code gave."""
    return load_file(DATA / system / "arrays.safetensors")[case["expected"]["logits"]["array"]]


@torch.inference_mode()
def logits(network: Network, case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [n, r, vocabulary] of a case, and which of its places are real, bool [n, r]."""
    tokens, real = torch.tensor(case["input_ids"]), real_places(case)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    if case.get("position_ids") is not None:
        positions = torch.tensor(case["position_ids"])
    elif case["kind"] == "logits_bd3_train":
        positions = torch.cat([positions[:, : tokens.shape[1] // 2]] * 2, dim=1)
    levels = {}
    if "sigma_conditioning" in case:
        levels["noise_level"] = torch.tensor(case["sigma_conditioning"])
    seen = dense(visible(network, case, real))
    found = network(tokens, positions, seen, lambda hidden, head: head(hidden), **levels)
    half = tokens.shape[1] // (2 if case["kind"] == "logits_bd3_train" else 1)
    return found[:, :half], real[:, :half]


def real_places(case: dict[str, Any]) -> Tensor:
    """Which places are no padding."""
    tokens = torch.tensor(case["input_ids"])
    mask = case.get("attention_mask")
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()


def visible(network: Network, case: dict[str, Any], real: Tensor) -> Tensor:
    """Who sees whom, [n, 1, r, r], as the case's settings say, else as the checkpoint records."""
    settings, config = case["settings"], network.config
    size = settings.get("block_size") or settings.get("block_length") or config.block_size
    segments = torch.zeros_like(real, dtype=torch.int32)
    kind = settings.get("mask", config.attention)
    if case["kind"] == "logits_bd3_train":
        return training_mask(segments[:, : real.shape[1] // 2], size, "block_causal")
    whole = torch.ones(*real.shape, real.shape[1], dtype=torch.bool)[:, None]
    rule = whole if kind == "bidirectional" else clean_mask(segments, size, config.clean_half)
    return (rule & real[:, None, None, :]) | torch.eye(real.shape[1], dtype=torch.bool)


def copied(system: str, folder: Path, **changes: Any) -> Path:
    """A copy of a recorded checkpoint with some fields of its config changed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DATA / system / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(DATA / system / "model.safetensors", folder)
    return folder


def file_contents(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor in a file."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), _bytes(tensor))
        for name, tensor in load_file(file).items()
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()
