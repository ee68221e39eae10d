"""bench-train: what the training loop adds to forward and backward; how near they are to a GEMM.

    make bench-train

`cascade pretrain` in this process with the demo's model and rows, against a bare loop: the same
model, loss, rows and precision, one batch in memory, forward and backward only (no data, optimiser,
clipping, metrics). In turns; a row is the median of all rounds.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_model.batch import TrainBatch
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.loss import diffusion_loss
from cascade_model.metrics import read_metrics
from cascade_model.model import Transformer
from cascade_model.weights import load_model
from jobs import prepare, pretrain
from pipelines.cluster import cores
from tests.benchmarks.report import Row, publish

RECIPES = Path(__file__).parents[2] / "jobs/recipes/demo"
STEPS, PER_STEP, PER_FORWARD = 12, 32, 16


def trainer_speed(corpus: str, run: Path) -> float:
    """Data tokens/s that the run's own metrics report, without the first lines."""
    words = ["--config", str(RECIPES / "pretrain.yaml"), "--corpus", corpus, "--output", str(run)]
    words += ["--num-workers", "0", "--trainer.num-steps", str(STEPS), "--trainer.log-every", "3"]
    words += ["--trainer.sequences-per-step", str(PER_STEP)]
    words += ["--trainer.sequences-per-forward", str(PER_FORWARD)]
    words += ["--trainer.precision", "bfloat16", "--trainer.checkpoint-every", "1000"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pretrain.main(words)
    if code:
        raise SystemExit(code)
    lines = read_metrics(Folder(run))[1:]
    return statistics.median(line["tokens_per_second"] for line in lines)


def forward_and_backward(model: Transformer, batch: TrainBatch) -> None:
    """One pass over one micro-batch."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion_loss(model, batch, weight="elbo").sum
    (loss / batch.clean_tokens.numel()).backward()


def bare_speed(model: Transformer, batch: TrainBatch) -> float:
    """Data tokens/s of the loop that does nothing else."""
    forward_and_backward(model, batch)
    passes = STEPS * PER_STEP // PER_FORWARD
    began = time.perf_counter()
    for _ in range(passes):
        forward_and_backward(model, batch)
    return passes * batch.clean_tokens.numel() / (time.perf_counter() - began)


def flops_per_token(model: Transformer, batch: TrainBatch) -> float:
    """Matrix products of forward and backward per data token, attention with its whole mask."""
    # Spelt out as products: the counter knows no fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward_and_backward(model, batch)
    return counter.get_total_flops() / batch.clean_tokens.numel()


def best_gemm() -> float:
    """The most FLOP/s of any square product tried here, in either precision of the loop."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for size in (512, 1024, 2048):
            a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
            a @ b
            for _ in range(5):
                began = time.perf_counter()
                a @ b
                best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def main(rounds: int = 3) -> int:
    """Prepare, run both in turns, print the table."""
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = str(folder / "corpus")
        words = ["--config", str(RECIPES / "prepare.yaml"), "--output", shards, "--runner", "local"]
        with contextlib.redirect_stdout(io.StringIO()):
            if prepare.main(words):
                return 1
        corpus = Corpus.open(shards)
        batch = TrainBatch.from_numpy(corpus.batch(0, PER_FORWARD, corpus.manifest.noise), "cpu")
        trained, bare, gemm = [], [], []
        for number in range(rounds):
            trained.append(trainer_speed(shards, folder / f"run-{number}"))
            model = load_model(str(folder / f"run-{number}/model"))[0].train()
            bare.append(bare_speed(model, batch))
            gemm.append(best_gemm())
        work = flops_per_token(model, batch)
    ratio = statistics.median(a / b for a, b in zip(trained, bare, strict=True))
    share = statistics.median(work * a / b for a, b in zip(trained, gemm, strict=True))
    rows = [
        Row("trainer", statistics.median(trained), "data tokens/s"),
        Row("bare forward and backward", statistics.median(bare), "data tokens/s"),
        Row("trainer / bare", ratio, "x"),
        Row("matrix products per data token", work / 1e6, "MFLOP"),
        Row("best GEMM", statistics.median(gemm) / 1e9, "GFLOP/s"),
        Row("trainer / best GEMM", 100 * share, "%"),
    ]
    config = {"recipe": "demo/pretrain", "steps": STEPS, "sequences_per_forward": PER_FORWARD}
    config |= {"precision": "bfloat16", "threads": torch.get_num_threads(), "rounds": rounds}
    return publish("train", rows, **config)


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
