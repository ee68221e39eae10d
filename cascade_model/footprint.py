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

from cascade_model.config import ModelConfig
from cascade_model.flops import active_width, is_last_trimmed
from cascade_model.loss import LOGITS_PER_CHUNK
from cascade_model.networks import build_network
from cascade_model.progress import NOTHING_BESIDE, Beside
from cascade_model.training_config import TrainerConfig

FLOAT32 = 4
_GROUP_TOKENS = 64
_ADAM_MOMENTS = 2
# Tensors as large as the logits that the cross entropy has at a time: the logits, their logarithm
# and the gradient of either. Then what each comparison of distributions adds to them.
_OF_CROSS_ENTROPY = 3
_OF_TEACHER = 7
_OF_TARGETS = 3
_OF_ENTROPY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes on one rank at the peak of a step, and those of the host beside it."""

    parameters: int
    gradients: int
    optimizer: int
    """Both moments of AdamW."""
    gathered: int
    """Weights of other ranks that a pass needs at once, and weights cast to bfloat16."""
    activations: int
    """What the layers keep for the backward pass of one forward pass of the rank."""
    logits: int
    """Logits of the supervised rows, or of a chunk of them, and what a loss makes of them."""
    teacher: int
    """A teacher beside the student: its weights, whole on every rank, and its pass."""
    staging: int
    """The copy in the host's memory that is saved while training goes on."""
    export: int
    """The whole model in the host's memory, on the first rank, when the run ends."""

    @property
    def on_device(self) -> int:
        """Of a GPU: a step."""
        return self._state + self._step

    @property
    def on_host(self) -> int:
        """Of a rank that has no GPU: a step while a copy is saved, or the end of the run."""
        return self._state + self.staging + max(self._step, self.export)

    @property
    def _state(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.teacher

    @property
    def _step(self) -> int:
        return self.gathered + self.activations + self.logits


def footprint(
    config: ModelConfig,
    trainer: TrainerConfig,
    *,
    sequence_length: int,
    ranks: int = 1,
    mask_rate: float = 0.5,
    beside: Beside = NOTHING_BESIDE,
) -> Footprint:
    """The memory of one of `ranks` ranks; `beside` is what the loss computes besides."""
    shards = max(ranks // trainer.replicas, 1)
    sizes = tensors_of(config)
    own = sum(_share(shape, shards) for shape, _ in sizes.values())
    trained = sum(_share(shape, shards) for shape, moves in sizes.values() if moves)
    batch = min(trainer.sequences_per_forward, max(trainer.sequences_per_step // ranks, 1))
    tokens = batch * sequence_length
    has_next = beside.has_next_tokens and not config.is_autoregressive
    return Footprint(
        parameters=FLOAT32 * own,
        gradients=FLOAT32 * trained,
        optimizer=_ADAM_MOMENTS * FLOAT32 * trained,
        gathered=_gathered(config, trainer, sizes, shards),
        activations=batch * _activations(config, trainer, sequence_length, has_next),
        logits=FLOAT32 * _logits(config, tokens, mask_rate, has_next, beside),
        teacher=_teacher(beside.teacher, trainer, batch, sequence_length) if beside.teacher else 0,
        staging=FLOAT32 * (own + _ADAM_MOMENTS * trained),
        export=FLOAT32 * parameter_count(config),
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
    """Sharded: the root's tensors in float32, and the matrices of two layers as one is fetched
    ahead. In bfloat16 beside that autocast's copies of what is not gathered so."""
    is_half = trainer.precision == "bfloat16"
    counts = {name: math.prod(shape) for name, (shape, _) in sizes.items()}
    layers = [0] * config.num_layers
    for name, count in counts.items():
        if name.startswith("layers.") and len(sizes[name][0]) > 1:
            layers[int(name.split(".")[1])] += count
    width = 2 if is_half else FLOAT32
    if shards == 1:
        return width * sum(counts.values()) if is_half else 0
    root = sum(counts.values()) - sum(layers)
    # The gradients of what is gathered are whole too, until they are summed over ranks.
    copies = width * root if is_half else 0
    return 2 * FLOAT32 * root + copies + (width + FLOAT32) * sum(sorted(layers)[-2:])


def _logits(
    config: ModelConfig, tokens: int, mask_rate: float, has_next: bool, beside: Beside
) -> int:
    """Numbers as large as the vocabulary, of masked rows and of next tokens, each by chunks."""
    masked = tokens if config.is_autoregressive else round(tokens * mask_rate)
    at_once = _OF_CROSS_ENTROPY + (_OF_TEACHER if beside.teacher else 0)
    at_once += _OF_TARGETS if beside.has_targets else 0
    at_once += _OF_ENTROPY if beside.has_entropy else 0
    following = tokens if has_next else 0
    return at_once * min(masked * config.vocab_size, LOGITS_PER_CHUNK) + (
        _OF_CROSS_ENTROPY * min(following * config.vocab_size, LOGITS_PER_CHUNK)
    )


def _teacher(config: ModelConfig, trainer: TrainerConfig, batch: int, length: int) -> int:
    """Bytes of a teacher that keeps nothing for a backward pass: its weights in float32, the widest
    of its layers with what goes in and out, and in bfloat16 the largest weight once more."""
    layers = range(config.num_layers)
    one = max(_layer(config, trainer, length, length, length, layer) for layer in layers)
    around = 2 * FLOAT32 * length * config.hidden_size
    cast = 0
    if trainer.precision == "bfloat16":
        cast = 2 * max(math.prod(shape) for shape, _ in tensors_of(config).values())
    return FLOAT32 * parameter_count(config) + batch * (one + around) + cast


def _activations(config: ModelConfig, trainer: TrainerConfig, length: int, has_next: bool) -> int:
    """Bytes that the layers keep of one sequence."""
    is_doubled = config.attention == "block_causal" and not config.is_autoregressive
    rows = 2 * length if is_doubled else length
    kept = length if is_doubled and is_last_trimmed(config) and not has_next else rows
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
