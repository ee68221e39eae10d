"""What a training run takes on each rank and on disk, from the model's shape alone.

Weights, gradients, moments and checkpoints are counted exactly, from the network without its
values. Activations are what autograd keeps of `model` under the grouped attention, tensor by
tensor; of the other networks, whose layers differ a little, they are near. One rank keeps of every
tensor the share that FSDP2 gives to the first one, the largest.

Tensors in use are counted, and nothing that an allocator keeps when they are freed: on a CPU glibc
may hold half as much again, which MALLOC_MMAP_THRESHOLD_=65536 in the environment gives back.
"""

import functools
import math
from dataclasses import dataclass

import torch

from cascade_model.config import ModelConfig, TrainerConfig
from cascade_model.flops import active_width, is_last_trimmed
from cascade_model.loss import LOGITS_PER_CHUNK
from cascade_model.networks import build_network

FLOAT32 = 4
_GROUP_TOKENS = 64
_ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes on one rank at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    """Both moments of AdamW."""
    gathered: int
    """Weights of other ranks that a pass needs at once, and weights cast to bfloat16."""
    activations: int
    """What the layers keep for the backward pass of one forward pass of the rank."""
    logits: int
    """Logits of the masked rows, with their gradient, or of a chunk of them."""
    staging: int
    """The copy in the host's memory that is saved while training goes on."""

    @property
    def on_device(self) -> int:
        """All but the copy that is being saved."""
        state = self.parameters + self.gradients + self.optimizer + self.gathered
        return state + self.activations + self.logits


def footprint(
    config: ModelConfig,
    trainer: TrainerConfig,
    *,
    sequence_length: int,
    ranks: int = 1,
    mask_rate: float = 0.5,
) -> Footprint:
    """The memory of one of `ranks` ranks."""
    shards = max(ranks // trainer.replicas, 1)
    sizes = tensors_of(config)
    own = sum(_share(shape, shards) for shape, _ in sizes.values())
    trained = sum(_share(shape, shards) for shape, moves in sizes.values() if moves)
    batch = min(trainer.sequences_per_forward, max(trainer.sequences_per_step // ranks, 1))
    tokens = batch * sequence_length
    rate = 1.0 if config.is_autoregressive else mask_rate
    # Logits, their logarithm and the gradient of either: three at a time.
    logits = 3 * FLOAT32 * min(round(tokens * rate) * config.vocab_size, LOGITS_PER_CHUNK)
    return Footprint(
        parameters=FLOAT32 * own,
        gradients=FLOAT32 * trained,
        optimizer=_ADAM_MOMENTS * FLOAT32 * trained,
        gathered=_gathered(config, trainer, sizes, shards),
        activations=batch * _activations(config, trainer, sequence_length),
        logits=logits,
        staging=FLOAT32 * (own + _ADAM_MOMENTS * trained),
    )


def parameter_count(config: ModelConfig) -> int:
    """Numbers of the network, a tied head once."""
    return sum(math.prod(shape) for shape, _ in tensors_of(config).values())


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the tensors of one checkpoint, over all ranks' files: weights, moments, steps."""
    sizes = tensors_of(config).values()
    moved = [math.prod(shape) for shape, moves in sizes if moves]
    return FLOAT32 * (parameter_count(config) + _ADAM_MOMENTS * sum(moved) + len(moved))


@functools.cache
def tensors_of(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each parameter, and whether the optimiser moves it; nothing is allocated."""
    with torch.device("meta"):
        network = build_network(config)
    return {n: (tuple(p.shape), p.requires_grad) for n, p in network.named_parameters()}


def _share(shape: tuple[int, ...], shards: int) -> int:
    """Numbers of a tensor on the first rank: FSDP2 cuts the first dimension, rounding up."""
    return math.prod((-(-shape[0] // shards), *shape[1:])) if shape else 1


def _gathered(
    config: ModelConfig,
    trainer: TrainerConfig,
    sizes: dict[str, tuple[tuple[int, ...], bool]],
    shards: int,
) -> int:
    """Sharded: the root's tensors, and two layers as one is fetched ahead. Alone in bfloat16:
    autocast's copies of the weights."""
    is_half = trainer.precision == "bfloat16"
    counts = {name: math.prod(shape) for name, (shape, _) in sizes.items()}
    layers = [0] * config.num_layers
    for name, count in counts.items():
        if name.startswith("layers."):
            layers[int(name.split(".")[1])] += count
    width = 2 if is_half else FLOAT32
    if shards == 1:
        return width * sum(counts.values()) if is_half else 0
    root = sum(counts.values()) - sum(layers)
    # The gradients of what is gathered are whole too, until they are summed over ranks.
    return (width + FLOAT32) * (root + sum(sorted(layers)[-2:]))


def _activations(config: ModelConfig, trainer: TrainerConfig, length: int) -> int:
    """Bytes that the layers keep of one sequence."""
    is_doubled = config.attention == "block_causal" and not config.is_autoregressive
    rows = 2 * length if is_doubled else length
    kept = length if is_doubled and is_last_trimmed(config) else rows
    last = config.num_layers - 1
    layers = [
        _layer(config, trainer, length, rows, kept if layer == last else rows, layer)
        for layer in range(config.num_layers)
    ]
    if trainer.recompute:
        return FLOAT32 * config.num_layers * rows * config.hidden_size + max(layers)
    return sum(layers)


def _layer(
    config: ModelConfig, trainer: TrainerConfig, length: int, rows: int, kept: int, layer: int
) -> int:
    """One layer with `rows` inputs and `kept` outputs.

    float32 always: both norms' inputs and normalised rows. In the type of the products: the norms'
    results, which autocast turns into bfloat16 anew for each of the three projections and for gate
    and up; queries, attention's result and its copy for the output projection; keys and values;
    gate, its SiLU, up and their product. Grouped attention keeps a copy of the keys and values that
    each group of noisy rows sees, and every group's mask as numbers.
    """
    half = 2 if trainer.precision == "bfloat16" else FLOAT32
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    is_half = trainer.precision == "bfloat16"
    results = width * (2 * rows + kept + 2 * kept if is_half else rows + kept)
    inner = (4 if config.network == "transformer" else 7) * active_width(config, layer)
    bytes_kept = 2 * FLOAT32 * width * (rows + kept) + half * results
    bytes_kept += half * (kept * (3 * queries + inner) + 2 * rows * keys)
    if trainer.attention == "grouped" and config.attention == "block_causal":
        is_doubled = not config.is_autoregressive
        bytes_kept += half * _groups(config, length, keys, is_doubled, kept > length)
    return bytes_kept


def _groups(config: ModelConfig, length: int, keys: int, noisy: bool, clean: bool) -> int:
    """Numbers that the groups of grouped attention keep beside the rows' own."""
    block = 1 if config.is_autoregressive else config.block_size
    size = max(1, _GROUP_TOKENS // block) * block
    total = 0
    for start in range(0, length, size):
        end = min(start + size, length)
        group = end - start
        if noisy:
            total += (group + end) * 2 * keys + group * (group + end)
        if clean or not noisy:
            total += group * end
    return total
