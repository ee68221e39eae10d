"""A step whose loss or gradient is NaN or infinite: what is written of it, and when it is the end.

Such a step never moves a weight. A batch that does it by itself is skipped; a run that has diverged
does it again and again, and no patience helps.
"""

import json

from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus
from cascade_model.errors import InputError, shared
from cascade_model.progress import Progress
from cascade_model.training_config import OptimizerConfig, TrainerConfig


def write_down(
    folder: Folder,
    corpus: Corpus,
    noise: NoiseConfig,
    trainer: TrainerConfig,
    at: Progress,
    loss: float,
    norm: float,
) -> str:
    """Keep the sequences of the step that begins `at` in a file; returns the sentence that tells.

    `loss` is the sum over the step's tokens, `norm` that of its gradient.
    """
    step, size = at.step + 1, trainer.sequences_per_step
    record = {
        "step": step,
        "first_sample": at.samples,
        "num_samples": size,
        "sequence_ids": [int(i) for i in corpus.batch(at.samples, size, noise).sequence_ids],
        "loss_sum": repr(loss),
        "grad_norm": repr(norm),
    }
    name = f"not_finite_step_{step:08d}.json"
    folder.replace(name, (json.dumps(record, indent=1) + "\n").encode())
    return (
        f"the loss or its gradient is not finite at step {step} (sample ids in {folder.path(name)})"
    )


def require_patience(
    at: Progress, trainer: TrainerConfig, optimizer: OptimizerConfig, told: str
) -> None:
    """Raise `InputError` unless the settings let the run go on after this step."""
    count = at.skipped_in_a_row
    if trainer.not_finite == "skip" and count <= trainer.max_skipped_in_a_row:
        return
    many = f" and {count - 1} before it" if count > 1 else ""
    raise shared(
        InputError(
            f"{told}{many}; lower optimizer.peak_lr={optimizer.peak_lr} and run again, which goes "
            "on from the newest checkpoint, or begins anew where none was saved"
        )
    )
