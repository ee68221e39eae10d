"""Floating point operations of training, counted by hand from the model's shape.

Only matrix products are counted, two operations for each multiplication with its addition, and of
attention only the *useful pairs*: a query with a key that it sees. What a kernel computes beside
them (pairs under the mask, scores computed again in the backward pass, layers or logits that are
recomputed to save memory) is work but not use, so a model FLOPs utilisation from these numbers
rises when such work is left out (PaLM, arXiv 2204.02311, appendix B).

Per data token of a sequence of L tokens in blocks of B, in one layer:

    input                rows   pairs                                      last layer's queries
    noisy || clean        2     (L + B) / 2 noisy, the same clean          the noisy half alone
    bidirectional         1     L                                          all
    autoregressive        1     (L + 1) / 2                                all

With a token-causal clean half its pairs are (L + 1) / 2. The output head meets the masked rows,
or all rows of an autoregressive model; the autoregressive term of the loss adds one row a token,
and the last layer's clean queries. The backward pass is two products for each one of the
forward pass. A sequence counts as one document: shorter ones see fewer pairs, so for packed short
documents the attention's part is an upper bound.
"""

import functools
import re
import time
from dataclasses import dataclass

import torch

from cascade_model.config import ModelConfig

_PRODUCT = 1024
_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Gpu:
    """Of NVIDIA's data sheets: dense products without sparsity, float32 without tensor cores.

    A10G: "NVIDIA A10G for AWS", 02/2022; L40: "NVIDIA L40 and L40S"; GB200 and B200: "GB200 NVL72 |
    HGX B200", per GPU.
    """

    bfloat16: float
    """FLOP/s."""
    float32: float
    """FLOP/s."""
    memory: float
    """Bytes; of the smaller one where a name has two."""


GPUS = {
    "GB200": Gpu(2500e12, 80e12, 186e9),
    "B200": Gpu(2250e12, 75e12, 180e9),
    "GH200": Gpu(989.4e12, 66.9e12, 96e9),
    "H200": Gpu(989.4e12, 66.9e12, 141e9),
    "H100 PCIe": Gpu(756e12, 51.2e12, 80e9),
    "H100": Gpu(989.4e12, 66.9e12, 80e9),
    "A100": Gpu(312e12, 19.5e12, 40e9),
    "L40S": Gpu(362e12, 91.6e12, 48e9),
    "L40": Gpu(181.05e12, 90.5e12, 48e9),
    "A10G": Gpu(70e12, 35e12, 24e9),
    "A10": Gpu(125e12, 31.2e12, 24e9),
    "L4": Gpu(121e12, 30.3e12, 24e9),
}
"""The first name whose words are all in the device's own counts, so H100 PCIe is before H100."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Operations per data token of the forward pass, by part."""

    linear: float
    """Projections and feed-forward, the router's included."""
    attention: float
    """Scores and their product with the values."""
    head: float
    """Logits of the supervised rows."""

    @property
    def forward(self) -> float:
        """All of the forward pass."""
        return self.linear + self.attention + self.head

    @property
    def backward(self) -> float:
        """For each product of the forward pass one for its input and one for its weight."""
        return 2.0 * self.forward

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def training_flops(
    config: ModelConfig,
    *,
    sequence_length: int,
    block_size: int | None = None,
    mask_rate: float = 0.5,
    has_next_tokens: bool = False,
) -> Flops:
    """Operations per data token of one training step, or of `forward` alone.

    `block_size` replaces the model's own, `mask_rate` is the mean share of the tokens that is
    masked, `has_next_tokens` whether the clean half predicts its next tokens too (`ar_weight`), as
    an autoregressive model does anyhow. Adds nothing for norms, the optimiser, or the conditioning
    of a `dit`, which is computed once per pass.
    """
    length, layers = sequence_length, config.num_layers
    block = min(block_size or config.block_size, length)
    if config.is_autoregressive:
        halves, head_rows = [(length + 1) / 2], 1.0
    elif config.attention == "bidirectional":
        halves, head_rows = [float(length)], mask_rate
    else:
        clean = 1 if config.clean_half == "token_causal" else block
        halves, head_rows = [(length + block) / 2, (length + clean) / 2], mask_rate
    rows, pairs = len(halves), sum(halves)
    is_trimmed = is_last_trimmed(config)
    if has_next_tokens and rows == 2:
        head_rows, is_trimmed = head_rows + 1.0, False
    queries, keys = _projections(config)
    kept_rows = 1 if is_trimmed else rows
    kept_pairs = halves[0] if is_trimmed else pairs
    linear = sum(
        (rows if layer < layers - 1 else kept_rows) * (queries + _feed_forward(config, layer))
        for layer in range(layers)
    )
    linear += layers * rows * keys
    per_pair = 4.0 * config.num_heads * config.head_dim
    return Flops(
        linear=float(linear),
        attention=per_pair * ((layers - 1) * pairs + kept_pairs),
        head=2.0 * config.hidden_size * config.vocab_size * head_rows,
    )


def is_last_trimmed(config: ModelConfig) -> bool:
    """Whether no clean row is read, so that the last layer has no queries there (`Keep`)."""
    reads_clean = config.logits == "shifted" and config.first_place == "clean"
    return config.attention == "block_causal" and not reads_clean


def device_peak(device: torch.device | str, precision: str) -> float | None:
    """Operations per second that a device can reach at most, by its maker's figure for dense
    products; none for a GPU that is not known and for a CPU.

    `precision` is float32 or bfloat16. A CPU's speed is measured instead (`cpu_speed`), which is
    no peak: what else runs at that moment lowers it, and a run would then use more than all of it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return None if gpu is None else getattr(gpu, precision)


def cpu_speed(precision: str) -> float:
    """Operations per second of one product of 1024 x 1024 matrices with this process's threads, the
    best of a few, measured once; `precision` as in `device_peak`."""
    return _measured(precision, torch.get_num_threads())


def gpu_of(name: str) -> Gpu | None:
    """The maker's figures for a GPU of this name; none if it is not known."""
    words = set(re.findall(r"\w+", name))
    return next((gpu for known, gpu in GPUS.items() if words.issuperset(known.split())), None)


def _projections(config: ModelConfig) -> tuple[float, float]:
    """Operations per row for queries and output, and for keys and values."""
    width, head = config.hidden_size, config.head_dim
    return 4.0 * width * config.num_heads * head, 4.0 * width * config.num_kv_heads * head


def _feed_forward(config: ModelConfig, layer: int) -> float:
    """Operations per row of one layer's feed-forward."""
    products = 6.0 if config.network == "transformer" else 4.0
    router = config.experts.num_experts if config.experts and has_experts(config, layer) else 0
    return config.hidden_size * (products * active_width(config, layer) + 2.0 * router)


def active_width(config: ModelConfig, layer: int) -> int:
    """Inner width of everything that one token passes in a layer's feed-forward."""
    experts = config.experts
    if experts is None or not has_experts(config, layer):
        return config.intermediate_size
    return experts.experts_per_token * experts.intermediate_size + experts.shared_intermediate_size


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether the layer, counted from 0, is a mixture of experts."""
    return config.experts is not None and layer >= config.experts.first_dense_layers


@functools.cache
def _measured(precision: str, threads: int) -> float:
    """The fastest of a few products; `threads` is part of the question."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(_PRODUCT, _PRODUCT).to(kind) for _ in range(2))
    best = float("inf")
    with torch.no_grad():
        for _ in range(_TRIALS):
            started = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - started)
    return 2.0 * _PRODUCT**3 / best
