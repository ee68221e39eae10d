"""`python -m tests.benchmarks.pass_profile`: where the time of one forward pass goes.

Torch's profiler, by kind of operation, beside the pass without it; a 135M Llama shape, 4 rows
behind 256 cached tokens. The profiler itself slows small operations down, so shares count.
"""

import sys
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.engine import a_pass, in_turns, llama_pair

KINDS = {
    "matrix products": ("linear", "mm"),
    "attention": ("scaled_dot_product", "softmax"),
    "norms": ("norm", "rsqrt", "pow", "mean", "sum", "div"),
    "rotation and gates": ("roll", "silu", "mul", "sin", "cos", "neg"),
    "cache writes and copies": ("index", "copy", "cat", "embedding", "clone"),
    "residual sums": ("add",),
}


def kind_of(operation: str) -> str:
    """The first kind that has a part of the operation's name."""
    name = operation.split("::")[-1]
    found = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, "views, allocation, rest")


def shares(passes: int, dtype: torch.dtype, rows: int = 4, context: int = 256) -> None:
    """Print the shares of one kind of pass."""
    run = a_pass(llama_pair(dtype)[1], rows, context)
    plain = in_turns(passes, run=run)["run"]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(passes):
            run()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
        calls[kind_of(event.key)] += event.count
    total = sum(times.values())
    name = str(dtype).removeprefix("torch.")
    print(f"{name}, {rows} rows, context {context}: {plain * 1e3:.1f} ms a pass")
    for kind, spent in times.most_common():
        print(f"  {kind:26}{spent / total:7.1%}  {calls[kind] // passes:5} calls")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    for dtype in (torch.float32, torch.bfloat16):
        shares(8, dtype)
