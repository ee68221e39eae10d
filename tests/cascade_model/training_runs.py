"""Small training runs for the tests: in this process, cut short, or on two real ranks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig
from cascade_model.loss import diffusion_loss
from cascade_model.metrics import read_metrics
from cascade_model.networks import build_network
from cascade_model.trainer import Trainer
from cascade_model.training_config import OptimizerConfig, TrainerConfig
from cascade_model.weights import load_model

STEPS = TrainerConfig(
    num_steps=6, sequences_per_step=4, sequences_per_forward=2, checkpoint_every=2, log_every=3
)


def elbo(model, batch):
    return diffusion_loss(model, batch, weight="elbo")


def make(corpus, folder, trainer=STEPS, loss_fn=elbo, more=None, **shape) -> Trainer:
    """A tiny model of one seed on a corpus; `more` are further fields of the trainer."""
    manifest = corpus.manifest
    config = ModelConfig(
        vocab_size=manifest.vocab_size,
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **{
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "intermediate_size": 32,
            "block_size": 4,
            **shape,
        },
    )
    model = build_network(config)
    model.init_weights(0)
    return Trainer(
        model=model,
        corpus=corpus,
        noise=manifest.noise,
        loss_fn=loss_fn,
        objective={"name": "diffusion", "weight": "elbo"},
        optimizer=OptimizerConfig(peak_lr=1e-2),
        trainer=trainer,
        folder=folder if isinstance(folder, Folder) else Folder(folder),
        **(more or {}),
    )


def weights(folder):
    return load_model(str(folder / "model"))[0].state_dict()


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_metrics(Folder(folder))]


class Killed(Exception):
    """Stands for the death of the process."""


def dying(after):
    """The loss, until it has been called `after` times."""
    calls = iter(range(after))

    def loss_fn(model, batch):
        if next(calls, None) is None:
            raise Killed
        return elbo(model, batch)

    return loss_fn


def run_ranks(
    folder: Path,
    corpus: str,
    body: str,
    code: int | None = 0,
    *,
    ranks: int = 2,
    meanwhile: Callable[[subprocess.Popen], None] = lambda process: None,
) -> str:
    """Run `body` on some ranks under torchrun, with this module's names and `corpus` at hand.

    Returns stderr. `code` is the exit code that is wanted, none for any; `meanwhile` may deal with
    the launcher while it runs.
    """
    script = folder / f"script_{len(list(folder.glob('script_*')))}.py"
    script.write_text(
        "import dataclasses, json, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from tests.cascade_model.training_runs import *\n"
        "from cascade_model import parallel\n"
        "from cascade_model.corpus import Corpus\n"
        f"folder, corpus = Path({str(folder)!r}), Corpus.open({corpus!r})\n"
        "rank = int(os.environ['RANK'])\n"
        f"{body}"
    )
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, *words, str(script)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        meanwhile(process)
        shown = process.communicate(timeout=280)[1]
    finally:
        process.kill()
    assert code is None or process.returncode == code, shown
    return shown
