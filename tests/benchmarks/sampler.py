"""`make bench-sampler`: this project's decoding against the published loops, in one run.

Both arms use the same weights, dtype and threads and must give identical tokens; they are run in
turns and each row holds the ratio of the medians. Random weights: the figures say what a step
costs, not how good a text is.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cascade_model.canvas import Window
from cascade_model.config import ModelConfig
from cascade_model.contexts import BlockCausal
from cascade_model.model import Transformer, never_emitted
from cascade_model.passes import Pass, Runner
from cascade_model.sampler import denoise, plan_completion
from cascade_model.sampling import SamplingParams
from tests.benchmarks import engine
from tests.benchmarks.baselines import block_causal_loop, llada_loop
from tests.benchmarks.report import Row, publish

PROMPT = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """One decoding."""

    tokens: list[int]
    passes: int
    rows: int
    """Rows fed to the network, all passes together."""


def model_of(*, vocab_size: int, attention: str, block_size: int, seed: int = 0) -> Transformer:
    """d = 256, 4 layers: the shape of all comparisons; the mask token is never the best one."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=768,
        tied_head=False,
        attention=attention,  # type: ignore[arg-type]
        block_size=block_size,
        max_sequence_length=4096,
        mask_id=vocab_size - 1,
        pad_id=vocab_size - 2,
        eos_id=vocab_size - 3,
    )
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        model.head.weight[never_emitted(config)] = 0.0  # the published loops do not ban it
        model.embed.weight.mul_(30)
    return model.eval()


def ours(
    model: Transformer, prompt: list[int], params: SamplingParams, *, is_fused: bool = True
) -> Outcome:
    """The project's own loop."""
    plan = plan_completion(model.config, prompt, params)
    if isinstance(plan.context, BlockCausal):
        plan.context.is_fused = is_fused
    runner, reply, rows, passes = Runner(model, len(plan.canvas)), None, 0, 0
    loop = denoise(plan.context, plan.canvas, plan.windows, plan.strategy)
    while True:
        try:
            event: Pass | Window = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            return Outcome(plan.canvas.tolist(), passes, rows)
        reply = None
        if isinstance(event, Pass):
            reply, passes, rows = runner.run(event), passes + 1, rows + len(event.tokens)


def compare(
    name: str, bar: float | None, rounds: int, fast: Callable[[], Outcome], slow: Callable
) -> Iterator[Row]:
    """Run both in turns; rows for the ratio, both times, passes and fed rows."""
    times: dict[str, list[float]] = {"fast": [], "slow": []}
    results = {}
    for _ in range(rounds):
        for arm, call in (("fast", fast), ("slow", slow)):
            began = time.perf_counter()
            results[arm] = call()
            times[arm].append(time.perf_counter() - began)
    a, b = results["fast"], results["slow"]
    if a.tokens != b.tokens:
        raise SystemExit(f"{name}: the two arms gave different tokens")
    quick, long = (statistics.median(times[arm]) for arm in ("fast", "slow"))
    yield Row(f"{name}: baseline / ours", long / quick, "x", bar)
    yield Row(f"{name}: ours", quick, "s")
    yield Row(f"{name}: baseline", long, "s")
    yield Row(f"{name}: passes ours / baseline", a.passes / b.passes, f"{a.passes}/{b.passes}")
    yield Row(f"{name}: rows ours / baseline", a.rows / b.rows, f"{a.rows}/{b.rows}")


def exact_llada(vocab_size: int, bar: float | None, rounds: int, gen: int = 256) -> Iterator[Row]:
    """The exact LLaDA loop: whole canvas fed by both, but logits of the block's masks alone."""
    model = model_of(vocab_size=vocab_size, attention="bidirectional", block_size=32)
    prompt = _prompt(vocab_size)
    params = SamplingParams(
        max_tokens=gen, rule="low_confidence", block_length=32, stop_at_eos=False
    )

    def baseline() -> Outcome:
        tokens, passes = llada_loop(
            model, prompt, steps=gen, gen_length=gen, block_length=32, mask_id=model.config.mask_id
        )
        return Outcome(tokens, passes, passes * len(tokens))

    name = f"sampler.llada head {vocab_size:,}, gen {gen}"
    yield from compare(name, bar, rounds, lambda: ours(model, prompt, params), baseline)


def cached_against_canvas(rounds: int, gen: int = 512) -> Iterator[Row]:
    """Block-causal, B = 8, K = 8, threshold 0.9: exact cache against the whole canvas each step."""
    model = model_of(vocab_size=8192, attention="block_causal", block_size=8)
    prompt = _prompt(8192)
    params = SamplingParams(max_tokens=gen, confidence_threshold=0.9, stop_at_eos=False)

    def baseline() -> Outcome:
        tokens, passes = block_causal_loop(
            model,
            prompt,
            steps=8,
            gen_length=gen,
            block_length=8,
            threshold=0.9,
            mask_id=model.config.mask_id,
        )
        return Outcome(tokens, passes, passes * len(tokens))

    name = f"sampler.cached B=8 K=8, gen {gen}"
    yield from compare(name, 10.0, rounds, lambda: ours(model, prompt, params), baseline)


def fused_against_separate(rounds: int, gen: int = 256) -> Iterator[Row]:
    """B = 4 with K = 1, 2, 4: the commit pass fused with the next step, or made alone."""
    model = model_of(vocab_size=8192, attention="block_causal", block_size=4)
    prompt = _prompt(8192)
    for steps in (1, 2, 4):
        params = SamplingParams(
            max_tokens=gen, rule="low_confidence", steps_per_block=steps, stop_at_eos=False
        )
        yield from compare(
            f"sampler.fused B=4 K={steps}",
            None,
            rounds,
            lambda params=params: ours(model, prompt, params),
            lambda params=params: ours(model, prompt, params, is_fused=False),
        )


def growth(rounds: int) -> Iterator[Row]:
    """The test that decides the idea: tokens/s of cached blocks and of LLaDA, by length."""
    causal = model_of(vocab_size=8192, attention="block_causal", block_size=8)
    full = model_of(vocab_size=8192, attention="bidirectional", block_size=8)
    prompt = _prompt(8192)
    for length in (128, 256, 512, 1024):
        params = SamplingParams(max_tokens=length, rule="low_confidence", stop_at_eos=False)
        times: dict[str, list[float]] = {"causal": [], "full": []}
        for _ in range(rounds):
            began = time.perf_counter()
            ours(causal, prompt, params)
            middle = time.perf_counter()
            llada_loop(
                full,
                prompt,
                steps=length,
                gen_length=length,
                block_length=8,
                mask_id=full.config.mask_id,
            )
            times["causal"].append(middle - began)
            times["full"].append(time.perf_counter() - middle)
        quick, long = (statistics.median(times[arm]) for arm in ("causal", "full"))
        name = f"sampler.growth length {length}"
        yield Row(f"{name}: block-causal, cached", length / quick, "tokens/s")
        yield Row(f"{name}: LLaDA loop, full canvas", length / long, "tokens/s")
        yield Row(f"{name}: ratio", long / quick, "x")


def _prompt(vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocab_size - 3, (PROMPT,), generator=generator).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short texts, to see that it runs")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    gen = {"gen": 64} if options.quick else {}
    rows = [
        *exact_llada(126_464, 3.0, rounds, **gen),
        *exact_llada(8192, None, rounds, **gen),
        *cached_against_canvas(rounds, **gen),
        *fused_against_separate(rounds, **gen),
    ]
    if not options.quick:
        rows += growth(max(1, rounds - 2))
        rows += engine.rows(rounds)
    return publish("sampler", rows, threads=torch.get_num_threads(), dtype="float32", seed=0)


if __name__ == "__main__":
    raise SystemExit(main())
