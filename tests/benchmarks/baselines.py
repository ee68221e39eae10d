"""Published decoding loops, written as they are published: what the sampler is measured against.

Each feeds a whole canvas and computes logits of every row over the whole vocabulary in every step.
So that they are no straw men they must pass the conformance cases of their systems
(`test_baselines.py`). Temperature 0, one row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import dense, grouped_clean, prefix_mask
from cascade_model.kv_cache import KVCache


@torch.inference_mode()
def llada_loop(
    model: nn.Module,
    prompt: list[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
) -> tuple[list[int], int]:
    """ML-GSAI/LLaDA `generate.py`: the canvas and the number of forward passes."""
    canvas = torch.tensor([*prompt, *[mask_id] * gen_length])[None]
    positions = torch.arange(canvas.shape[1])[None]
    num_blocks = gen_length // block_length
    block_steps, passes = steps // num_blocks, 0
    for block in range(num_blocks):
        start = len(prompt) + block * block_length
        end = start + block_length
        masks = int((canvas[0, start:end] == mask_id).sum())
        for step in range(block_steps):
            count = masks // block_steps + (step < masks % block_steps)
            is_masked = canvas == mask_id
            logits = model(canvas, positions, dense(None), _all_logits)
            passes += 1
            predicted = logits.argmax(dim=-1)
            shares = F.softmax(logits, dim=-1)
            confidence = shares.gather(-1, predicted[..., None])[..., 0]
            confidence[:, end:] = float("-inf")
            predicted = torch.where(is_masked, predicted, canvas)
            confidence = torch.where(is_masked, confidence, float("-inf"))
            taken = confidence[0].topk(count).indices
            canvas[0, taken] = predicted[0, taken]
    return canvas[0].tolist(), passes


@torch.inference_mode()
def block_causal_loop(
    model: nn.Module,
    prompt: list[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    threshold: float,
    mask_id: int,
    feeds_canvas: bool = True,
) -> tuple[list[int], int]:
    """LLaDA2's routine without a cache (inclusionAI/LLaDA2.X `modeling_llada2_moe.py`).

    It feeds everything up to the end of the block in progress; with `feeds_canvas` the whole
    canvas, as the full-canvas loops do. Gives the canvas and the number of forward passes.
    """
    num_blocks = -(-(len(prompt) + gen_length) // block_length)
    canvas = torch.full((1, num_blocks * block_length), mask_id)
    canvas[0, : len(prompt)] = torch.tensor(prompt)
    passes = 0
    for block in range(len(prompt) // block_length, num_blocks):
        start, end = block * block_length, (block + 1) * block_length
        fed = canvas.shape[1] if feeds_canvas else end
        positions = torch.arange(fed)[None]
        attend = grouped_clean(torch.zeros(1, fed, dtype=torch.int32), block_length, "block_causal")
        for step in range(steps):
            quota = block_length // steps + (step < block_length % steps)
            is_masked = canvas[0, start:end] == mask_id
            if not bool(is_masked.any()):
                break
            logits = model(canvas[:, :fed], positions, attend, _all_logits)[0, start:end]
            passes += 1
            predicted = logits.argmax(dim=-1)
            confidence = F.softmax(logits, dim=-1).gather(-1, predicted[:, None])[:, 0]
            confidence = torch.where(is_masked, confidence, float("-inf"))
            taken = confidence > threshold
            if int(taken.sum()) < quota:
                count = min(quota, int(is_masked.sum()))
                taken = torch.zeros_like(taken)
                taken[confidence.topk(count).indices] = True
            canvas[0, start:end] = torch.where(taken, predicted, canvas[0, start:end])
    return canvas[0].tolist(), passes


def _all_logits(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return head(hidden)


@torch.inference_mode()
def sdar_loop(
    model: nn.Module,
    prompt: list[int],
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    prefills_every_block: bool = False,
) -> tuple[list[int], int]:
    """SDAR's `generate.py` with the static rule: cached blocks, a commit pass each, full logits.

    With `prefills_every_block` nothing is cached across blocks, as in dllm's block sampler. Gives
    the canvas and the number of forward passes.
    """
    num_blocks = -(-(len(prompt) + gen_length) // block_length)
    canvas = torch.full((num_blocks * block_length,), mask_id)
    canvas[: len(prompt)] = torch.tensor(prompt)
    config = model.config
    cache = KVCache(config, len(canvas), model.embed.weight.dtype, torch.device("cpu"))
    first, passes = len(prompt) // block_length, 0

    def feed(start: int, end: int) -> Tensor:
        """Rows start..end-1 against everything before them, block-causally; all logits."""
        nonlocal passes
        passes += 1
        place = torch.arange(start, end)
        limits = (place // block_length + 1) * block_length
        mask = prefix_mask(limits.clamp(max=end), end)
        slot = cache.slot(start, end - start, end)
        return model(canvas[None, start:end], place[None], dense(mask), _all_logits, slot)[0]

    if first:
        feed(0, first * block_length)
    for block in range(first, num_blocks):
        start, end = block * block_length, (block + 1) * block_length
        if prefills_every_block and start:
            feed(0, start)
        for step in range(steps):
            is_masked = canvas[start:end] == mask_id
            if not bool(is_masked.any()):
                break
            logits = feed(start, end)
            predicted = logits.argmax(dim=-1)
            confidence = F.softmax(logits.float(), dim=-1).gather(-1, predicted[:, None])[:, 0]
            confidence = torch.where(is_masked, confidence, float("-inf"))
            quota = block_length // steps + (step < block_length % steps)
            taken = confidence.topk(min(quota, int(is_masked.sum()))).indices
            canvas[start + taken] = predicted[taken]
        if not prefills_every_block:
            feed(start, end)
    return canvas.tolist(), passes
