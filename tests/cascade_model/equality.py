"""`python -m tests.cascade_model.equality`: a request gives the same to the bit, whatever happens.

Eight requests of different rules, whose thresholds lie in the middle of the scores that occur, are
decoded alone; then again under every condition of an engine that could change something. A row
says how many gave the same tokens, how many the same logits in every pass, bit for bit, and how
close the closest decision was. The exit code is 0 when every float32 row is equal and 1 when not;
bfloat16 is stated as found.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade_model.config import ModelConfig
from cascade_model.model import Transformer
from cascade_model.networks import Network
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from cascade_model.weights import load_model
from tests.benchmarks.report import commit, machine
from tests.cascade_model.traces import (
    Ask,
    Trace,
    Watch,
    finish,
    page_tokens,
    run,
    scheduler_of,
)

ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "intermediate_size": 352, "max_sequence_length": 512, "block_size": 8,
    "vocab_size": 1000, "mask_id": 999, "pad_id": 998, "eos_id": 997,
}  # fmt: skip

# Models and requests


def random_model(dtype: torch.dtype = torch.float32, **axes: Any) -> Network:
    """The same weights for the same shape in every process, with logits that spread."""
    model = Transformer(ModelConfig(**(SHAPE | axes)))
    model.init_weights(1)
    with torch.no_grad():
        model.embed.weight.mul_(8)
    return model.to(dtype).eval()


def model_of(folder: str | None, dtype: str) -> Network:
    """That of a folder, or the random one."""
    wanted = getattr(torch, dtype)
    return random_model(wanted) if folder is None else load_model(folder, wanted)[0].eval()


Medians = tuple[float, float, float]
KINDS: list[Callable[[float, float, float], dict[str, Any]]] = [
    lambda best, drawn, entropy: {"confidence_threshold": best},
    lambda best, drawn, entropy: {"confidence_threshold": drawn, "temperature": 1.0, "seed": 1},
    lambda best, drawn, entropy: {"rule": "factor", "factor": 2 * (1 - best)},
    lambda best, drawn, entropy: {"rule": "entropy_bound", "entropy_bound": entropy},
    lambda best, drawn, entropy: {"confidence_threshold": best, "remask_threshold": best},
    lambda best, drawn, entropy: {"editing_threshold": best, "temperature": 1.0, "seed": 2},
    lambda best, drawn, entropy: {"rule": "margin", "steps_per_block": 3, "schedule": "cosine"},
    lambda best, drawn, entropy: {
        "guidance_scale": 1.0, "confidence_threshold": drawn, "temperature": 1.0, "seed": 3,
    },
]  # fmt: skip
"""By medians of what a request predicts: the probabilities of the best token and of a drawn one,
and the entropy."""


def requests(model: Network, count: int, tokens: int) -> list[Ask]:
    """Prompts of 24 tokens and more with a ragged rest, rules whose thresholds lie close."""
    asks = []
    for number in range(count):
        prompt = some_text(model.config, 24 + 8 * number + number % 3, number)
        one_by_one = SamplingParams(rule="low_confidence", max_tokens=tokens, stop_at_eos=False)
        _, [watch] = run(model, [Ask(prompt, one_by_one)])
        settings = KINDS[number % len(KINDS)](*medians(torch.cat(watch.plan.replies)))
        fixed = {"max_tokens": tokens, "stop_at_eos": False, "report_margin": True}
        params = SamplingParams(**(settings | fixed))
        asks.append(Ask(prompt, params))
    return asks


def medians(logits: torch.Tensor) -> Medians:
    """See KINDS; logits [m, vocabulary]."""
    logs = logits.double().log_softmax(dim=-1)
    shares = logs.exp()
    token = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(0))
    drawn, best = shares.gather(-1, token), shares.max(dim=-1).values
    return float(best.median()), float(drawn.median()), float(-(shares * logs).sum(-1).median())


def company(model: Network, count: int, tokens: int) -> list[Ask]:
    """Other requests, of all kinds."""
    asks = []
    for number in range(count):
        settings = KINDS[-number % len(KINDS)](0.5, 0.5, 1.0)
        prompt = some_text(model.config, 2 + 5 * number % 70, 100 + number)
        params = SamplingParams(**settings, max_tokens=tokens + 8, stop_at_eos=False)
        asks.append(Ask(prompt, params))
    return asks


def some_text(config: ModelConfig, length: int, seed: int) -> tuple[int, ...]:
    """Tokens, none of them special."""
    special = {config.mask_id, config.pad_id, *config.end_ids}
    usual = [token for token in range(config.vocab_size) if token not in special]
    return tuple(random.Random(seed).choices(usual, k=length))


# Conditions

Found = list[Trace | str | None]
"""One for each request; none where the condition should have come about and did not."""
CANNOT = "the condition is not for this request"


def alone(model: Network, asks: Sequence[Ask]) -> Found:
    """Each in an engine of its own."""
    return [run(model, [ask])[1][0].trace() for ask in asks]


def batches(model: Network, asks: Sequence[Ask], size: int) -> Found:
    """Together with others, half and half, until `size` run at once."""
    found: Found = []
    step = min(max(1, size // 2), len(asks))
    for first in range(0, len(asks), step):
        part = asks[first : first + step]
        others = company(model, size - len(part), part[0].params.max_tokens)
        _, watches = run(model, part, others, max_sequences=size)
        found += [watch.trace() if watch.company == size else None for watch in watches]
    return found


def known_prefix(model: Network, asks: Sequence[Ask]) -> Found:
    """Each after itself, whose pages it finds."""
    found: Found = []
    for ask in asks:
        scheduler = scheduler_of(model)
        finish(scheduler, [Watch(scheduler, ask)])
        again = Watch(scheduler, ask)
        finish(scheduler, [again])
        found.append(CANNOT if is_guided(ask) else again.trace() if hits(scheduler) == 1 else None)
    return found


def same_moment(model: Network, asks: Sequence[Ask]) -> Found:
    """Each three times at once: the last copies what the first is just computing."""
    found: Found = []
    for ask in asks:
        scheduler, watches = run(model, [ask] * 3)
        last = watches[-1].trace()
        found.append(CANNOT if is_guided(ask) else last if hits(scheduler) == 2 else None)
    return found


def is_guided(ask: Ask) -> bool:
    """Two streams share nothing with others."""
    return ask.params.guidance_scale > 0


def hits(scheduler: Scheduler) -> int:
    """Requests that took a beginning over."""
    return scheduler.counters.prefix_hits


def preempted(model: Network, asks: Sequence[Ask]) -> Found:
    """Each beside an older one that grows, block by block, until it needs the whole arena."""
    found: Found = []
    size, page = model.config.block_size, page_tokens(model)
    for ask in asks:
        streams = 2 if ask.params.guidance_scale else 1
        own = streams * -(-(len(ask.prompt) + ask.params.max_tokens + size) // page)
        length = (own + 2) * page
        prompt = some_text(model.config, page - size, 7)
        grows = SamplingParams(
            max_tokens=length - len(prompt), steps_per_block=1, stop_at_eos=False
        )
        share = {"pages": own + 2, "prefix_share": 0.0}
        _, [watch] = run(model, [ask], [Ask(prompt, grows)], **share)
        found.append(watch.trace() if watch.was_preempted else None)
    return found


def chunks(model: Network, asks: Sequence[Ask]) -> Found:
    """Prompts cut into pieces, with others between them."""
    found: Found = []
    rows = 2 * model.config.block_size
    for ask in asks:
        others = company(model, 3, ask.params.max_tokens)
        _, [watch] = run(model, [ask], others, rows_per_round=rows, prefix_share=0.0)
        found.append(watch.trace() if len(ask.prompt) > rows else CANNOT)
    return found


def continued(model: Network, asks: Sequence[Ask]) -> Found:
    """Each begun by one engine and taken up by another behind its first blocks."""
    found: Found = []
    for ask in asks:
        _, [first] = run(model, [ask])
        half = first.blocks[: len(first.blocks) // 2]
        committed = [token for block in half for token in block.tokens]
        scheduler = scheduler_of(model)
        second = Watch(scheduler, ask, committed, sum(block.steps for block in half))
        finish(scheduler, [second])
        whole, rest = first.trace(), second.trace()
        before = len(whole.logits) - len(rest.logits)
        margins = [block.margin for block in half if block.margin is not None]
        joined = Trace(
            tokens=(*committed, *rest.tokens),
            logits=whole.logits[:before] + rest.logits,
            margin=min([rest.margin, *margins]),
        )
        found.append(joined if half and rest.logits else None)
    return found


EVERYWHERE = {
    "alone, once more": alone,
    "in a batch of 2": partial(batches, size=2),
    "in a batch of 8": partial(batches, size=8),
    "in a batch of 32": partial(batches, size=32),
    "on behind half of it": continued,
}
BLOCK_CAUSAL = {
    "behind a known prefix": known_prefix,
    "three times at once": same_moment,
    "after preemption": preempted,
    "prompt cut into chunks": chunks,
}
"""A bidirectional pass depends on everything: none of it is known, cut or computed again."""


def conditions(model: Network) -> dict[str, Callable[[Network, Sequence[Ask]], Found]]:
    """Those that can come about."""
    return EVERYWHERE | (BLOCK_CAUSAL if model.config.attention == "block_causal" else {})


# Another process


def work(job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """In a process of its own: all requests in one engine; says so after each round."""
    torch.set_num_threads(job["threads"])
    traces = {}
    for dtype, asks in job["asks"].items():
        scheduler = scheduler_of(model_of(job["model"], dtype))
        watches = [Watch(scheduler, ask_from(ask)) for ask in asks]
        while scheduler.step():
            print("a round", flush=True)
        traces[dtype] = [asdict(watch.trace()) for watch in watches]
    return traces


def ask_from(values: dict[str, Any]) -> Ask:
    """Back from JSON, which knows no tuples."""
    params: dict[str, Any] = dict(values["params"])
    params["stop_ids"] = tuple(params["stop_ids"])
    return Ask(tuple(values["prompt"]), SamplingParams(**params))


def elsewhere(job: dict[str, Any], *, is_killed_first: bool) -> dict[str, Found]:
    """The traces of another process, perhaps of one that follows a killed one."""
    if is_killed_first:
        with begun(job) as first:
            assert first.stdout is not None
            for _ in range(5):
                assert first.stdout.readline() == "a round\n"
            first.kill()
    with begun(job) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0
    return {
        dtype: [Trace(tuple(t["tokens"]), tuple(t["logits"]), t["margin"]) for t in traces]
        for dtype, traces in json.loads(printed.splitlines()[-1]).items()
    }


def begun(job: dict[str, Any]) -> subprocess.Popen[str]:
    """Another process, at work."""
    command = [sys.executable, "-m", "tests.cascade_model.equality", "--worker", json.dumps(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


# The table


@dataclass(frozen=True, slots=True)
class Row:
    """One condition."""

    dtype: str
    condition: str
    wanted: int
    """Requests to which it should have come about."""
    requests: int
    """To which it did."""
    equal_tokens: int
    equal_logits: int
    margin: float
    """Of the closest decision of all."""

    @property
    def ok(self) -> bool:
        """Whether what is promised holds: float32 to the bit."""
        counts = {self.wanted, self.requests, self.equal_tokens, self.equal_logits}
        is_equal = len(counts) == 1 and self.wanted > 0
        return is_equal or self.dtype != "float32"


def compared(dtype: str, condition: str, expected: Found, found: Found) -> Row:
    """What each request gave against what it gave alone."""
    meant = [(a, b) for a, b in zip(expected, found, strict=True) if b != CANNOT]
    pairs = [(a, b) for a, b in meant if isinstance(a, Trace) and isinstance(b, Trace)]
    return Row(
        dtype=dtype,
        condition=condition,
        wanted=len(meant),
        requests=len(pairs),
        equal_tokens=sum(a.tokens == b.tokens for a, b in pairs),
        equal_logits=sum(a.logits == b.logits for a, b in pairs),
        margin=min((b.margin for _, b in pairs), default=float("nan")),
    )


def table(folder: str | None, dtypes: Sequence[str], count: int, tokens: int) -> Iterator[Row]:
    """All rows: in this process first, then in others."""
    expected: dict[str, Found] = {}
    job = {"model": folder, "threads": torch.get_num_threads(), "asks": {}}
    for dtype in dtypes:
        model = model_of(folder, dtype)
        asks = requests(model, count, tokens)
        expected[dtype] = alone(model, asks)
        job["asks"][dtype] = [asdict(ask) for ask in asks]
        for name, condition in conditions(model).items():
            yield compared(dtype, name, expected[dtype], condition(model, asks))
    for name, is_killed_first in (("in another process", False), ("after kill -9", True)):
        found = elsewhere(job, is_killed_first=is_killed_first)
        for dtype in dtypes:
            yield compared(dtype, name, expected[dtype], found[dtype])


HEADS = ("dtype", "condition", "requests", "equal tokens", "equal logits", "smallest margin")
WIDTHS = (8, 24, 8, 12, 12, 15)


def line(cells: Sequence[str]) -> str:
    """Words to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if number < 2 else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as it grows; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cascade_model.equality")
    parser.add_argument("--model", metavar="DIR", help="a model folder; else random weights")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="of each request")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--worker", metavar="JOB", help="be the other process of the last rows")
    given = parser.parse_args(arguments)
    if given.worker:
        print(json.dumps(work(json.loads(given.worker))))
        return 0
    torch.set_num_threads(given.threads)
    print(f"{machine()}, {torch.get_num_threads()} threads, commit {commit()}")
    print(line(HEADS))
    print(line(["-" * width for width in WIDTHS]))
    are_ok = []
    for row in table(given.model, ("float32", "bfloat16"), given.requests, given.tokens):
        numbers = (row.requests, row.equal_tokens, row.equal_logits, f"{row.margin:.1e}")
        print(line((row.dtype, row.condition, *map(str, numbers))), flush=True)
        are_ok.append(row.ok)
    return 0 if all(are_ok) else 1


if __name__ == "__main__":
    sys.exit(main())
