"""`cascade generate` that stops at a chosen point of its work and waits to be killed there.

    python -m tests.benchmarks.fault_points_generate EVENTS PHASE NUMBER [flags of cascade generate]

The points are those of `fault_points`, passed by the driver and by the actors, which get them
through their environment.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipelines.completions import PartRecord
from pipelines.generation import PartWorker, Work
from pipelines.prompts import Part
from tests.benchmarks.fault_points import install, pass_point, unprotect

_EVENTS, _PHASE, _NUMBER = "CASCADE_FAULTS_EVENTS", "CASCADE_FAULTS_PHASE", "CASCADE_FAULTS_NUMBER"


class StoppingWorker(PartWorker):
    """A worker whose process has the points."""

    def __init__(self, work: Work) -> None:
        prepare_process()
        super().__init__(work)

    def answer(self, part: Part) -> PartRecord:
        """The part, begun at a point."""
        pass_point(*_chosen(), "task begun")
        return super().answer(part)


def _chosen() -> tuple[Path, tuple[str, int]]:
    return Path(os.environ[_EVENTS]), (os.environ[_PHASE], int(os.environ[_NUMBER]))


def prepare_process() -> None:
    """Put the points in, and take the protection out where the control asks for that."""
    events, target = _chosen()
    install(events, target)
    if os.environ.get("CASCADE_FAULTS_UNPROTECTED"):
        unprotect(partial(pass_point, events, target))


def main(words: Sequence[str]) -> int:
    """The job, with its points."""
    from jobs import generate
    from pipelines import generation

    os.environ |= {_EVENTS: words[0], _PHASE: words[1], _NUMBER: words[2]}
    Path(words[0]).mkdir(parents=True, exist_ok=True)
    prepare_process()
    generation.PartWorker = StoppingWorker  # type: ignore[misc]
    return generate.main(list(words[3:]))


if __name__ == "__main__":
    from tests.benchmarks import fault_points_generate

    # By its own name, not as __main__, so that an actor finds the same class elsewhere.
    raise SystemExit(fault_points_generate.main(sys.argv[1:]))
