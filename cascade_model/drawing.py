"""Which token a row of logits gives: arg-max, or drawn at a temperature from keyed randomness.

Every number drawn is a pure function of (seed, choice, block, step, place), so a request gives the
same tokens whatever else is decoded beside it. Banned ids (-inf) have probability 0 and are never
drawn.
"""

import numpy as np
import torch
from torch import Tensor

from cascade_model.noise import POSITION, TOKEN, VOCABULARY, counters, key_of, philox4x32
from cascade_model.sampling import SamplingParams

_LARGEST = 1.0 - 2.0**-53


def draw_tokens(
    logits: Tensor, params: SamplingParams, choice: int, block: int, step: int, places: list[int]
) -> Tensor:
    """A token for each row: logits [m, vocabulary] of the block's `places` -> int64 [m]."""
    if params.temperature == 0.0:
        return most_probable(logits)
    if params.token_draw == "gumbel":
        drawn = vocabulary_uniforms(params.seed, choice, block, step, places, logits.shape[-1])
        kept = keep_most_probable(logits.double() / params.temperature, params.top_k, params.top_p)
        return by_gumbel(kept, torch.from_numpy(drawn).to(logits.device))
    uniform = torch.from_numpy(uniforms(TOKEN, params.seed, choice, block, step, places))
    scaled = logits.double() / params.temperature
    return by_inverse(
        keep_most_probable(scaled, params.top_k, params.top_p).softmax(dim=-1),
        uniform.to(logits.device),
    )


def most_probable(logits: Tensor) -> Tensor:
    """The best token of each row, ties to the left; NumPy finds it in a tenth of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def keep_most_probable(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [m, vocabulary] with all but the `top_k` best, and all outside the smallest set whose
    probability reaches `top_p`, at -inf; 0 and 1.0 keep everything."""
    if top_k and top_k < logits.shape[-1]:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        logits = logits.scatter(-1, order[:, top_k:], float("-inf"))
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        shares = ranked.softmax(dim=-1)
        outside = shares.cumsum(dim=-1) - shares >= top_p
        logits = torch.scatter(logits, -1, order, ranked.masked_fill(outside, float("-inf")))
    return logits


def by_inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `uniform` float64 [m] in [0, 1).

    A token of probability 0 never is: the comparison is strict, and the product of the cumulative
    sum's last value and a float64 below 1 is rounded to a number below that value.
    """
    cumulative = probabilities.cumsum(dim=-1)
    wanted = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def by_gumbel(logits: Tensor, uniform: Tensor) -> Tensor:
    """The maximum of float64 logits plus Gumbel noise from `uniform` [m, vocabulary] in (0, 1).

    Equal in distribution to softmax(logits). LLaDA writes it as exp(logits) / (-ln U)^temperature.
    """
    return perturbed(logits, uniform).argmax(dim=-1)


def perturbed(logits: Tensor, uniform: Tensor) -> Tensor:
    """Logits plus Gumbel noise."""
    return logits - torch.log(-torch.log(uniform))


def uniforms(
    purpose: int, seed: int, choice: int, block: int, step: int, places: list[int]
) -> np.ndarray:
    """One number in [0, 1) for each place of a block, float64 [m]."""
    words = counters(places, block, (purpose << 24) + step, choice)
    return _fractions(philox4x32(words, key_of(seed)))


def position_noise(seed: int, choice: int, block: int, step: int, places: list[int]) -> np.ndarray:
    """One standard Gumbel number for each place of a block, float64 [m]."""
    drawn = uniforms(POSITION, seed, choice, block, step, places)
    return -np.log(-np.log(np.clip(drawn, 2.0**-53, _LARGEST)))


def vocabulary_uniforms(
    seed: int, choice: int, block: int, step: int, places: list[int], vocabulary: int
) -> np.ndarray:
    """A number in (0, 1) for each place and token, float64 [m, vocabulary]."""
    token = np.arange(vocabulary, dtype=np.uint64) << np.uint64(12)
    first = token[None, :] + np.asarray(places, dtype=np.uint64)[:, None]
    words = counters(first, block, (VOCABULARY << 24) + step, choice)
    return np.clip(_fractions(philox4x32(words, key_of(seed))), 2.0**-53, _LARGEST)


def _fractions(words: np.ndarray) -> np.ndarray:
    """53 bits of uint32 [..., 4] as float64 [...] in [0, 1)."""
    wide = words.astype(np.uint64)
    high, low = wide[..., 0] >> np.uint64(5), wide[..., 1] >> np.uint64(6)
    return (high * np.uint64(2**26) + low) / float(2**53)
