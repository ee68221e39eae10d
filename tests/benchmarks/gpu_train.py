"""bench-train-gpu: how much of one GPU a step of training uses, and how much it could.

    make bench-train-gpu

The real trainer with bfloat16, compiled layers and flex attention, on a 135M and a 1.5B shape.
Utilisation counts useful operations only (`flops.training_flops`) against the maker's peak. Beside
it stands a roofline from what this GPU reaches in the same run: all useful operations at the speed
of the best GEMM, then the optimiser's bytes at the speed of the best copy, nothing overlapping.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade_model.flops import device_peak, training_flops
from cascade_model.model import Transformer
from tests.benchmarks.report import Row, publish
from tests.benchmarks.train_arms import SMOLLM2, corpus_of, elbo, model_of, timed_steps

REFUSAL = "bench-train-gpu needs a CUDA device and this machine has none; run it where one is"
AIM = 45.0
QWEN_1_5B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_layers": 28,
    "num_heads": 12,
    "num_kv_heads": 2,
    "head_dim": 128,
    "intermediate_size": 8960,
    "qkv_bias": True,
}
"""The shape of Qwen2.5-1.5B."""
_ADAM_BYTES = 4 * 8
"""Of one parameter in float32: weight, gradient and both moments are read; weight and moments are
written, and the gradient once more by the clipping."""


@dataclass(frozen=True, slots=True)
class Case:
    """A shape with the rows of one forward pass, which is a step."""

    name: str
    shape: dict[str, Any]
    length: int
    sequences: int
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device reaches in this run."""

    flops: float
    """Of the best square product in bfloat16, FLOP/s."""
    bandwidth: float
    """Bytes read and written by the best copy, per second."""
    peak: float | None = None
    """What the maker tells, in bfloat16, FLOP/s; none for a device whose figure is not known."""


FAST = {"attention": "flex", "precision": "bfloat16", "compile": True}
CASES = (
    Case("135M", SMOLLM2, 2048, 32, FAST),
    Case("1.5B", QWEN_1_5B, 2048, 8, FAST | {"recompute": True}),
)


def best_time(work: Callable[[], Any], device: str, trials: int = 20) -> float:
    """The shortest of some runs, seconds, after one to warm up."""
    times = []
    for _ in range(trials + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def limits_of(device: str, sizes: tuple[int, ...], copied: int) -> Limits:
    """Measure the best product of these sizes, and a copy of so many bytes."""
    flops = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        seconds = best_time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        flops = max(flops, 2.0 * size**3 / seconds)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / best_time(lambda: target.copy_(source), device)
    return Limits(flops, bandwidth, device_peak(device, "bfloat16"))


def bound(model: Transformer, tokens: int, length: int, limits: Limits) -> float:
    """The least seconds of a step: its useful operations, then the optimiser's bytes."""
    work = tokens * training_flops(model.config, sequence_length=length).total
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return work / limits.flops + parameters * _ADAM_BYTES / limits.bandwidth


def rows_of(case: Case, folder: Path, device: str, limits: Limits, steps: int) -> Iterator[Row]:
    """One shape."""
    corpus = corpus_of(folder / "corpus", case.length, sequences=4 * case.sequences)
    model = model_of(corpus, case.shape)
    least = bound(model, case.sequences * case.length, case.length, limits)
    run = folder / "run"
    run.mkdir()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = timed_steps(
        model,
        corpus,
        elbo,
        run,
        steps=steps,
        sequences=case.sequences,
        warm=3,
        device=device,
        **case.settings,
    )
    seconds = statistics.median(step.wall for step in found)
    tokens = case.sequences * case.length
    work = tokens * training_flops(model.config, sequence_length=case.length).total
    yield Row(f"{case.name}: step", 1e3 * seconds, "ms")
    yield Row(f"{case.name}: speed", tokens / seconds, "data tokens/s")
    yield Row(f"{case.name}: useful operations per data token", work / tokens / 1e9, "GFLOP")
    if limits.peak is not None:
        yield Row(f"{case.name}: MFU", 100 * work / seconds / limits.peak, "%", AIM)
        yield Row(f"{case.name}: MFU on the roofline", 100 * work / least / limits.peak, "%")
    yield Row(f"{case.name}: step / roofline", seconds / least, "x")
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
        yield Row(f"{case.name}: peak memory", memory, "GiB")


def all_rows(
    cases: tuple[Case, ...], folder: Path, device: str, limits: Limits, steps: int
) -> list[Row]:
    """What the device reaches, then every shape."""
    rows = [
        Row("best GEMM, bfloat16", limits.flops / 1e12, "TFLOP/s"),
        Row("best copy", limits.bandwidth / 1e9, "GB/s"),
    ]
    for number, case in enumerate(cases):
        rows += rows_of(case, folder / str(number), device, limits, steps)
    return rows


def main() -> int:
    """Measure on the first GPU; 2 where there is none."""
    parser = argparse.ArgumentParser(prog="bench-train-gpu")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each shape")
    settings = parser.parse_args()
    if not torch.cuda.is_available():
        print(REFUSAL, file=sys.stderr)
        return 2
    limits = limits_of("cuda", sizes=(4096, 8192), copied=2**31)
    with tempfile.TemporaryDirectory() as folder:
        rows = all_rows(CASES, Path(folder), "cuda", limits, settings.steps)
    config = {case.name: f"L {case.length} x {case.sequences}, {case.settings}" for case in CASES}
    return publish("train-gpu", rows, gpu=torch.cuda.get_device_name(), **config, **vars(settings))


if __name__ == "__main__":
    raise SystemExit(main())
