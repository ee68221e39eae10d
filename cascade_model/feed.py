"""Which samples a rank takes in each step, cut into forward passes and read ahead.

The global batch of a step does not depend on the number of ranks. Each takes a run of it of equal
length, so where the shares are multiples of a forward pass, every number of ranks makes the same
passes.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence

from cascade_model import parallel
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Batch, Corpus
from cascade_model.phases import noise_at
from cascade_model.prefetch import ahead
from cascade_model.settings import check
from cascade_model.training_config import TrainerConfig


def require_shares(config: TrainerConfig, world_sizes: Sequence[int]) -> None:
    """Raise `InputError` unless a step can be shared by each of these numbers of ranks."""
    bad = [str(size) for size in world_sizes if config.sequences_per_step % size]
    check(
        not bad,
        f"trainer.sequences_per_step={config.sequences_per_step} cannot be shared by num_workers="
        f"{' or '.join(bad)}; use a multiple of {math.lcm(*world_sizes)}",
    )


def spans(step: int, config: TrainerConfig, rank: int, world_size: int) -> list[tuple[int, int]]:
    """First sample and size of each of a rank's forward passes in a step, counted from 0; raises
    as `require_shares`."""
    require_shares(config, [world_size])
    count, most = config.sequences_per_step // world_size, config.sequences_per_forward
    first = step * config.sequences_per_step + rank * count
    return [(first + offset, min(most, count - offset)) for offset in range(0, count, most)]


def nothing_else(batch: Batch) -> None:
    """For a loss that needs the batch alone."""


def feed(
    corpus: Corpus,
    noise: NoiseConfig,
    config: TrainerConfig,
    step: int,
    read_ahead: Callable[[Batch], None] = nothing_else,
) -> Generator[Batch, None, None]:
    """This rank's batches from a step, counted from 0, to the end of the run.

    A thread keeps those of two steps ready, and calls `read_ahead` with each for what the loss
    reads besides; close the iterator to end it.
    """
    rank, ranks, length = parallel.rank(), parallel.world_size(), corpus.sequence_length

    def batches() -> Iterator[Batch]:
        for number in range(step, config.num_steps):
            for first, count in spans(number, config, rank, ranks):
                batch = corpus.batch(first, count, noise_at(number, noise, config, length))
                read_ahead(batch)
                yield batch

    return ahead(batches(), 2 * len(spans(0, config, rank, ranks)))
