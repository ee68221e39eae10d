"""What the training loop adds to forward and backward, how near both are to a GEMM, data waits.

`cascade pretrain` in this process with the demo's model and rows, against a bare loop: the same
model, loss, rows and precision, one batch in memory, forward and backward only (no data, optimiser,
clipping, metrics). In turns; a row is the median of all rounds.
"""

import contextlib
import io
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_model.batch import TrainBatch
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.flops import training_flops
from cascade_model.loss import diffusion_loss
from cascade_model.metrics import read_metrics
from cascade_model.networks import Network
from cascade_model.weights import load_model
from jobs import prepare, pretrain
from tests.benchmarks.report import Row

RECIPES = Path(__file__).parents[2] / "jobs/recipes/demo"
STEPS, PER_STEP, PER_FORWARD = 12, 32, 16
WAIT_LIMIT = 2.0


def trained_lines(corpus: str, run: Path) -> list[dict[str, Any]]:
    """The run's own metrics, without the first line."""
    words = ["--config", str(RECIPES / "pretrain.yaml"), "--corpus", corpus, "--output", str(run)]
    words += ["--num-workers", "0", "--trainer.num-steps", str(STEPS), "--trainer.log-every", "3"]
    words += ["--trainer.sequences-per-step", str(PER_STEP)]
    words += ["--trainer.sequences-per-forward", str(PER_FORWARD)]
    words += ["--trainer.precision", "bfloat16", "--trainer.checkpoint-every", "1000"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pretrain.main(words)
    if code:
        raise SystemExit(code)
    return read_metrics(Folder(run))[1:]


def forward_and_backward(model: Network, batch: TrainBatch) -> None:
    """One pass over one micro-batch."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion_loss(model, batch, weight="elbo").sum
    (loss / batch.clean_tokens.numel()).backward()


def bare_speed(model: Network, batch: TrainBatch) -> float:
    """Data tokens/s of the loop that does nothing else."""
    forward_and_backward(model, batch)
    passes = STEPS * PER_STEP // PER_FORWARD
    began = time.perf_counter()
    for _ in range(passes):
        forward_and_backward(model, batch)
    return passes * batch.clean_tokens.numel() / (time.perf_counter() - began)


def flops_per_token(model: Network, batch: TrainBatch) -> float:
    """Matrix products that are computed per data token, forward and backward, those of attention
    where nothing is visible included."""
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
            torch.mm(a, b)
            for _ in range(5):
                began = time.perf_counter()
                torch.mm(a, b)
                best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def prepared(folder: Path) -> str:
    """The demo's corpus."""
    shards = str(folder / "corpus")
    words = ["--config", str(RECIPES / "prepare.yaml"), "--output", shards, "--runner", "local"]
    with contextlib.redirect_stdout(io.StringIO()):
        if code := prepare.main(words):
            raise SystemExit(code)
    return shards


def loop_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Prepare, run both in turns."""
    shards = prepared(folder)
    corpus = Corpus.open(shards)
    batch = TrainBatch.from_numpy(corpus.batch(0, PER_FORWARD, corpus.manifest.noise), "cpu")
    trained, waits, bare, gemm = [], [], [], []
    for number in range(rounds):
        lines = trained_lines(shards, folder / f"run-{number}")
        trained.append(statistics.median(line["tokens_per_second"] for line in lines))
        waits += [line["data_wait_rate"] for line in lines]
        model = load_model(str(folder / f"run-{number}/model"))[0].train()
        bare.append(bare_speed(model, batch))
        gemm.append(best_gemm())
    model = load_model(str(folder / "run-0/model"))[0].train()
    work = flops_per_token(model, batch)
    useful = training_flops(model.config, sequence_length=corpus.sequence_length).total
    ratio = statistics.median(a / b for a, b in zip(trained, bare, strict=True))
    gemms = statistics.median(a / b for a, b in zip(trained, gemm, strict=True))
    wait = 100 * statistics.median(waits)
    yield Row("trainer", statistics.median(trained), "data tokens/s")
    yield Row("bare forward and backward", statistics.median(bare), "data tokens/s")
    yield Row("trainer / bare", ratio, "x")
    yield Row("share of a step that waits for data", wait, "%", WAIT_LIMIT, is_limit=True)
    yield Row("matrix products per data token, computed", work / 1e6, "MFLOP")
    yield Row("matrix products per data token, useful pairs", useful / 1e6, "MFLOP")
    yield Row("best GEMM", statistics.median(gemm) / 1e9, "GFLOP/s")
    yield Row("trainer / best GEMM, computed", 100 * work * gemms, "%")
    yield Row("trainer / best GEMM, useful (MFU)", 100 * useful * gemms, "%")
