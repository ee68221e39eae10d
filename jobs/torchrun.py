"""Training in the processes of `torchrun`: joining them, and one voice for all at the end."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cascade_model.errors import InputError
from jobs.cli import show_error

if TYPE_CHECKING:
    from jobs.launch import Placement


def join(placement: "Placement") -> None:
    """Join the processes that `torchrun` started, each on a GPU of its own."""
    import torch

    from cascade_model import parallel

    number = int(os.environ.get("LOCAL_RANK", "0"))
    if placement.use_gpu and number < torch.cuda.device_count():
        torch.cuda.set_device(number)
    parallel.join_group(torch.device(placement.device), placement.collective_timeout_s)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let the first of several ranks tell of an end that all of them share, and all leave with its
    exit code.

    They leave together: `torchrun` ends those that are still there when the first one has left.
    """
    from cascade_model import parallel

    try:
        yield
    except InputError as error:
        if parallel.world_size() == 1 or not error.is_shared:
            raise
        if parallel.rank() == 0:
            show_error(error)
        parallel.barrier()
        raise SystemExit(error.exit_code) from None
