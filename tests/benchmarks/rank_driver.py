"""`cascade pretrain` on Ray Train whose ranks have the points of `rank_points`.

python -m tests.benchmarks.rank_driver EVENTS PHASE NUMBER [flags of cascade pretrain]
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import rank_points


def train_with_points(
    train: Any, events: Path, target: tuple[str, int], config: Any, *rest: Any
) -> Any:
    """One rank's part, in whatever process it runs."""
    import ray.train

    rank_points.install(events, target, ray.train.get_context().get_world_rank())
    return train(config, *rest)


def main(words: list[str]) -> int:
    """The command, with its points."""
    from jobs import pretrain

    events = Path(words[0])
    events.mkdir(parents=True, exist_ok=True)
    target = (words[1], int(words[2]))
    pretrain.train = partial(train_with_points, pretrain.train, events, target)
    return pretrain.main(words[3:])


if __name__ == "__main__":
    from tests.benchmarks import rank_driver

    # By its own name, not as __main__, so that a rank finds the same functions elsewhere.
    raise SystemExit(rank_driver.main(sys.argv[1:]))
