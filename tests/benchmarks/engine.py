"""The engine's rows of `make bench-sampler`: what a pass costs, and what the scheduler makes of it.

`python -m tests.benchmarks.engine [ROUNDS]` runs them alone.

Random weights of known shapes: these rows say what passes cost, not how good a text is. Arms run in
turns; each figure is the median of its rounds.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from cascade_model.config import ModelConfig
from cascade_model.families import read_checkpoint
from cascade_model.model import Transformer, never_emitted
from cascade_model.networks import network_with
from cascade_model.packed import Product, pack
from cascade_model.pages import PageArena
from cascade_model.passes import Pass
from cascade_model.ragged import Job, run_together
from cascade_model.ragged_attention import Piece, attention_of
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from tests.benchmarks.baselines import sdar_loop
from tests.benchmarks.report import Row, publish

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
         "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 49152,
         "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
         "rope_theta": 100000.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def llama_pair(dtype: torch.dtype):
    """transformers' Llama at SmolLM2-135M's shape and our network with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        read = read_checkpoint(folder, dtype=dtype)
    ours = network_with(read.config, read.state, "llama").eval()
    assert isinstance(ours, Transformer)
    pack(ours)
    return theirs, ours


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(rounds: int, **arms: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each arm, run in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, call in arms.items():
            seconds = timed(call)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def a_pass(model: Transformer, rows: int, context: int) -> Callable[[], object]:
    """One pass of `rows` rows, all read, behind `context` cached tokens."""
    weight, pages = next(model.parameters()), context + rows
    arena = PageArena(
        model.config, num_pages=1, page_tokens=pages, dtype=weight.dtype, device="cpu"
    )
    run = arena.take(1)
    assert run is not None
    wanted = Pass(
        tokens=torch.randint(0, 1000, (rows,)).tolist(),
        start=context,
        limits=[pages] * rows,
        visible=pages,
        reads=list(range(rows)),
    )
    return lambda: run_together(model, arena, [Job(wanted, run)])


def bare_products(model: Transformer, rows: int) -> Callable[[], object]:
    """The matrix products of a pass, as the pass makes them, and nothing else."""
    products = [m for m in model.modules() if isinstance(m, Product)]
    dtype = next(model.parameters()).dtype
    inputs = {
        size: torch.randn(1, rows, size, dtype=dtype) for size in {p.inputs for p in products}
    }

    @torch.inference_mode()
    def call() -> None:
        for product in products:
            product(inputs[product.inputs])

    return call


def cost_per_pass(rounds: int) -> Iterator[Row]:
    """(a), (d) and (f): a pass against an AR token of transformers, and against its products."""
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = llama_pair(dtype)
        ids = torch.randint(0, 1000, (1, 256))
        tokens = 16

        @torch.inference_mode()
        def generate(n: int, theirs=theirs, ids=ids) -> None:
            theirs.generate(
                ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
            )

        calls = {f"rows {n}": a_pass(ours, n, 256) for n in (1, 4, 8, 16, 32)}
        bare = {f"bare {n}": bare_products(ours, n) for n in (4, 16)}
        found = in_turns(
            rounds, long=partial(generate, tokens + 1), short=partial(generate, 1), **calls, **bare
        )
        token = (found["long"] - found["short"]) / tokens
        name = f"engine.{str(dtype).removeprefix('torch.')}"
        yield Row(f"{name}: AR token of transformers, context 256", token * 1e3, "ms")
        bars = {4: 1.0, 16: 1.3}
        for n in (4, 8, 16, 32):
            ratio = found[f"rows {n}"] / token
            yield Row(f"{name}: pass of {n} rows / AR token", ratio, "x", bars.get(n), True)
        yield Row(
            f"{name}: pass of 1 row (AR, B = 1) / AR token", found["rows 1"] / token, "x", 1.0, True
        )
        for n in (4, 16):
            ratio = found[f"rows {n}"] / found[f"bare {n}"]
            yield Row(f"{name}: pass of {n} rows / its bare products", ratio, "x", 1.3, True)
        yield from roofline(name, ours, {n: found[f"rows {n}"] for n in (4, 16)})


def roofline(name: str, model: Transformer, passes: dict[int, float]) -> Iterator[Row]:
    """What the machine allows at best: the weights read once, or their multiplications done."""
    products = [part for part in model.modules() if isinstance(part, Product)]
    numbers = sum(part.inputs * part.outputs for part in products)
    dtype = next(model.parameters()).dtype
    block = torch.ones(64 << 20, dtype=torch.float32)  # written: untouched pages cost nothing
    square = torch.randn(2048, 2048, dtype=dtype)
    read = min(timed(lambda: block.sum()) for _ in range(9))
    multiply = min(timed(lambda: square @ square) for _ in range(5))
    bandwidth, rate = block.numel() * 4 / read, 2 * 2048**3 / multiply
    yield Row(f"{name}: best read", bandwidth / 1e9, "GB/s")
    yield Row(f"{name}: best product", rate / 1e9, "GFLOP/s")
    for rows, seconds in passes.items():
        size = numbers * dtype.itemsize
        yield Row(f"{name}: pass of {rows} rows / weights read", seconds * bandwidth / size, "x")
        floor = 2 * rows * numbers / rate
        yield Row(f"{name}: pass of {rows} rows / its FLOPs", seconds / floor, "x")


def context_slope(rounds: int) -> Iterator[Row]:
    """(g): the cost of a 4-row pass by context, and of its attention calls alone."""
    model = llama_pair(torch.float32)[1]
    lengths = (256, 1024, 2048, 4096)
    arms = {f"pass {n}": a_pass(model, 4, n) for n in lengths}
    arms |= {f"attention {n}": bare_attention(model, 4, n) for n in (256, 4096)}
    found = in_turns(rounds, **arms)
    for length in lengths:
        yield Row(f"engine.context {length}: pass of 4 rows", found[f"pass {length}"] * 1e3, "ms")
    config = model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    slope, bare = (
        (found[f"{kind} 4096"] - found[f"{kind} 256"]) / (4096 - 256)
        for kind in ("pass", "attention")
    )
    yield Row("engine.context: cache read per time of the slope", per_token / slope / 1e9, "GB/s")
    yield Row("engine.context: slope / slope of the attention calls alone", slope / bare, "x")


def bare_attention(model: Transformer, rows: int, context: int) -> Callable[[], object]:
    """The attention calls of such a pass and nothing else."""
    config, tokens = model.config, context + rows
    arena = PageArena(config, num_pages=1, page_tokens=tokens, dtype=torch.float32, device="cpu")
    arena.entries.normal_()
    run = arena.take(1)
    assert run is not None
    attend = attention_of(arena, [Piece(run, [tokens] * rows)])
    queries = torch.randn(1, config.num_heads, rows, config.head_dim)

    @torch.inference_mode()
    def call() -> None:
        for layer in range(config.num_layers):
            attend(queries, layer)

    return call


def block_model(**shape) -> Transformer:
    """A block-causal model that never predicts its mask token."""
    config = ModelConfig(**({"mask_id": 8191, "pad_id": 8190, "eos_id": 8189, "vocab_size": 8192,
                             "block_size": 4, "tied_head": False, "max_sequence_length": 4096}
                            | shape))  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    with torch.no_grad():
        model.head.weight[never_emitted(config)] = 0.0
        model.embed.weight.mul_(30)
    return model.eval()


def decode_all(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list:
    """Tokens of all prompts, decoding together."""
    scheduler, found = Scheduler(model), [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        plan = plan_completion(model.config, prompt, replace(params, seed=number))
        scheduler.submit(plan, lambda block, n=number: found[n].extend(block.tokens))
    while scheduler.step():
        pass
    return found


def against_published(rounds: int, gen: int = 512) -> Iterator[Row]:
    """(c): the cached published loop, and one that prefills every block again; B = 4."""
    model = block_model(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64,
                        intermediate_size=768)  # fmt: skip
    plain = copy.deepcopy(model)  # the scheduler packs its own
    prompt = torch.randint(0, 8000, (64,), generator=torch.Generator().manual_seed(7)).tolist()
    bars = {1: 2.0, 2: 1.4, 4: 1.25}
    for steps, bar in bars.items():
        params = SamplingParams(
            max_tokens=gen, rule="low_confidence", steps_per_block=steps, stop_at_eos=False
        )
        outcome: dict[str, list[int]] = {}

        def ours(params=params, outcome=outcome) -> None:
            outcome["ours"] = decode_all(model, [prompt], params)[0]

        def published(network, again: bool, steps=steps, outcome=outcome) -> None:
            tokens, _ = sdar_loop(network, prompt, steps=steps, gen_length=gen, block_length=4,
                                  mask_id=8191, prefills_every_block=again)  # fmt: skip
            outcome["published"] = tokens[64:]

        ours()
        arms = {
            "ours": ours,
            "packed": partial(published, model, False),
            "cached": partial(published, plain, False),
        }
        if steps == 1:
            arms["again"] = partial(published, plain, True)
        found = in_turns(rounds, **arms)
        if outcome["ours"] != outcome["published"]:
            raise SystemExit(f"K={steps}: the two arms gave different tokens")
        name = f"engine.published B=4 K={steps}, {gen} tokens"
        yield Row(f"{name}: cached loop / ours", found["cached"] / found["ours"], "x", bar)
        ratio = found["packed"] / found["ours"]
        yield Row(f"{name}: cached loop on our packed weights / ours", ratio, "x")
        if steps == 1:
            yield Row(f"{name}: prefilling loop / ours", found["again"] / found["ours"], "x", 6.0)


def concurrency(rounds: int, gen: int = 64) -> Iterator[Row]:
    """(e): throughput by the number of requests that decode together, a 10M shape at B = 4."""
    model = block_model(hidden_size=320, num_layers=6, num_heads=5, num_kv_heads=5, head_dim=64,
                        intermediate_size=960)  # fmt: skip
    size = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(0, 8000, (16, 32), generator=generator).tolist()
    params = SamplingParams(max_tokens=gen, rule="low_confidence", stop_at_eos=False)
    arms = {str(n): (lambda n=n: decode_all(model, prompts[:n], params)) for n in (1, 4, 8, 16)}
    found = in_turns(rounds, **arms)
    alone = gen / found["1"]
    yield Row(f"engine.concurrency 1 ({size / 1e6:.0f}M)", alone, "tokens/s")
    for n in (4, 8, 16):
        speed = n * gen / found[str(n)]
        bar = 3.0 if n == 8 else 1.0
        yield Row(f"engine.concurrency {n} / 1", speed / alone, "x", bar)


def rows(rounds: int) -> list[Row]:
    """All of them."""
    return [
        *cost_per_pass(rounds),
        *context_slope(rounds),
        *against_published(rounds),
        *concurrency(rounds),
    ]


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    raise SystemExit(publish("engine", rows(count), threads=torch.get_num_threads(), seed=0))
