"""The block-size schedule: which block size a step trains with, as a function of its number.

A run may begin with small blocks (1 is autoregressive) and grow them, or go up to whole sequences
and down again (warm-up, stable, decay of LLaDA2, arXiv 2512.15745). The steps of each size follow
from the settings alone, so that a resumed run and any number of ranks agree.
"""

import dataclasses
import math
from bisect import bisect_right
from itertools import accumulate

from cascade_model.config import ModelConfig, NoiseConfig, TrainingNoise
from cascade_model.settings import check
from cascade_model.training_config import TrainerConfig


def phase_starts(config: TrainerConfig) -> list[list[int]]:
    """[first step, block size] of each phase, steps counted from 0; empty without a schedule.

    Borders are rounded to whole steps, so a phase may be half a step off its share.
    """
    ends = accumulate(phase.share for phase in config.block_sizes)
    starts = [0, *(round(end * config.num_steps) for end in ends)]
    sizes = [phase.block_size for phase in config.block_sizes]
    return [[start, size] for start, size in zip(starts, sizes, strict=False)]


def block_size_at(step: int, config: TrainerConfig) -> int | None:
    """The block size of a step, counted from 0; none without a schedule."""
    starts = phase_starts(config)
    if not starts:
        return None
    return starts[bisect_right(starts, step, key=lambda start: start[0]) - 1][1]


def noise_at(step: int, noise: NoiseConfig, config: TrainerConfig, length: int) -> NoiseConfig:
    """The noise of a step, counted from 0: the run's, in the blocks of the step's phase.

    A block of the whole sequence, `length` tokens, has one mask rate, which is also what a sequence
    cut short then has. In other phases a cut falls between two blocks, be they larger than the
    run's own.
    """
    size = block_size_at(step, config)
    if size is None or size == noise.block_size:
        return noise
    if size == length:
        return dataclasses.replace(noise, block_size=size, per="sequence")
    if isinstance(noise, TrainingNoise):
        multiple = math.lcm(noise.short_multiple, size)
        return dataclasses.replace(noise, block_size=size, short_multiple=multiple)
    return dataclasses.replace(noise, block_size=size)


def require_phases(
    config: TrainerConfig, model: ModelConfig, corpus_block_size: int, length: int
) -> None:
    """Raise `InputError` for a schedule that this model or corpus cannot have."""
    if not config.block_sizes:
        return
    sizes = [phase.block_size for phase in config.block_sizes]
    check(
        model.attention == "block_causal",
        "trainer.block_sizes needs model.attention=block_causal, where blocks decide who sees whom",
    )
    check(
        sizes[-1] == model.block_size,
        f"trainer.block_sizes[{len(sizes) - 1}].block_size={sizes[-1]} is the last and decoding "
        f"will use model.block_size={model.block_size}; let the last phase have that",
    )
    for index, size in enumerate(sizes):
        is_power = size >= 1 and size & (size - 1) == 0
        check(
            is_power and (size == length or corpus_block_size % size == 0),
            f"trainer.block_sizes[{index}].block_size={size} does not divide the corpus's block "
            f"size {corpus_block_size}; use a divisor, or the sequence length {length} if that is "
            "a power of two",
        )
