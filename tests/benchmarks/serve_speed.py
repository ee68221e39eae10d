"""bench-serve: streams over HTTP against the engine alone.

    make bench-serve

Both arms have the same weights, prompts, settings and threads, run in turns and must give the same
texts. Server and clients share the machine's cores with each other but not with the other arm,
which waits meanwhile. What the clients spend is told apart: on a machine with few cores they take
from the server what they would not take from another machine.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.report import Row, publish
from tests.benchmarks.serve_speed_arms import (
    BLOCK,
    PROMPT,
    SHAPES,
    THREADS,
    TOKENS,
    HttpArm,
    Run,
    engine_arm,
    write_speed_model,
)
from tests.benchmarks.served import cascade_serve

STREAMS = (8, 16)
SHARE = 0.9
"""Of the engine's throughput, how much must come out of the HTTP path at 135M."""
ROLES = {
    "sampler": "sampler beyond the engine's own",
    "ingress": "ingress: handle, text, JSON",
    "proxy": "HTTP server",
    "Ray": "Ray itself: daemons, controller",
    "client": "clients",
}


def rows_of(shape: str, streams: int, engine: list[Run], http: list[Run]) -> Iterator[Row]:
    """What the runs of one shape and number of streams say."""
    name, blocks = f"{shape}, {streams} streams", streams * TOKENS // BLOCK
    ours, theirs = (statistics.median(r.tokens_per_second for r in runs) for runs in (http, engine))
    yield Row(f"{name}: engine alone", theirs, "tokens/s")
    yield Row(f"{name}: over HTTP", ours, "tokens/s")
    yield Row(f"{name}: over HTTP / engine", ours / theirs, "x", SHARE if shape == "135M" else None)
    first = statistics.median(run.first_block for run in http)
    yield Row(f"{name}: time to first block, median stream", first * 1e3, "ms")
    own = statistics.median(run.cpu["engine"] for run in engine)
    yield Row(f"{name}: engine alone", own / blocks * 1e6, "CPU-us/block")
    for role, told in ROLES.items():
        spent = statistics.median(run.cpu.get(role, 0.0) for run in http)
        spent -= own if role == "sampler" else 0.0
        yield Row(f"{name}: {told}", spent / blocks * 1e6, "CPU-us/block")


def measured(shape: str, rounds: int, folder: Path) -> Iterator[Row]:
    """One shape: a server and an engine side by side, asked in turns."""
    model = write_speed_model(folder / shape, shape)
    places = ("--streams-per-replica", str(max(STREAMS)), "--threads-per-replica", str(THREADS))
    log = folder / f"{shape}.log"
    with engine_arm(model) as engine, cascade_serve(model, log, *places) as server:
        http = HttpArm(server.port, server.pid)
        for streams in STREAMS:
            runs: dict[str, list[Run]] = {"engine": [], "http": []}
            for number in range(rounds + 1):
                alone, served_run = engine.run(streams), http.run(streams)
                require_same_texts(alone, served_run)
                if number:  # the first one warms up
                    runs["engine"].append(alone)
                    runs["http"].append(served_run)
                told = f"{alone.tokens_per_second:.0f} and {served_run.tokens_per_second:.0f}"
                print(f"{shape}, {streams} streams: {told} tokens/s", file=sys.stderr)
            yield from rows_of(shape, streams, **runs)
        rest = sum(http.at_rest.values())
        yield Row(f"{shape}: all of the server at rest", rest * 1e3, "CPU-ms/s")


def require_same_texts(one: Run, other: Run) -> None:
    """The arms did the same work, or the run is worth nothing."""
    if one.texts != other.texts:
        raise SystemExit("the two arms gave different texts")


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="speed", dir="/tmp") as folder:
        rows = [
            row for shape in given.shapes for row in measured(shape, given.rounds, Path(folder))
        ]
    settings = {"prompt": PROMPT, "tokens": TOKENS, "block": BLOCK, "threads": THREADS}
    return publish("serve", rows, rounds=given.rounds, **settings)


if __name__ == "__main__":
    raise SystemExit(main())
