"""The arms of `make bench-serve`: the engine alone in a process of its own, and clients over HTTP
that do no more than read.

`python -m tests.benchmarks.serve_speed_arms MODEL` is the engine's process: each line on its input
asks for so many streams, each line of its output tells of them.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.serve_client import KEY

PROMPT, TOKENS, BLOCK = 64, 128, 4
SETTINGS = {"max_tokens": TOKENS, "temperature": 0.0, "stop_at_eos": False}
THREADS = 1
SHAPES: dict[str, dict[str, int]] = {
    "10M": {"hidden_size": 320, "num_layers": 6, "num_heads": 5, "num_kv_heads": 5,
            "head_dim": 64, "intermediate_size": 960, "vocab_size": 8192},
    "135M": {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
             "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152},
}  # fmt: skip


@dataclass
class Run:
    """What one run of so many streams gave."""

    seconds: float
    texts: list[str]
    cpu: dict[str, float] = field(default_factory=dict)
    """Seconds of processor time, by who spent them."""
    first_block: float = 0.0
    """Seconds until a stream's first block, the median."""

    @property
    def tokens_per_second(self) -> float:
        """All streams together."""
        return len(self.texts) * TOKENS / self.seconds


def write_speed_model(folder: Path, shape: str) -> str:
    """A model folder of a shape: random weights, and a tokenizer with as many tokens as the head
    has rows, so that text costs what it costs."""
    from cascade_model.config import ModelConfig
    from cascade_model.model import Transformer
    from cascade_model.weights import save_model

    size = SHAPES[shape]
    tokenizer = letters_tokenizer(size["vocab_size"])
    config = ModelConfig(
        **size,
        block_size=BLOCK,
        tied_head=True,
        max_sequence_length=1024,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
    )
    model = Transformer(config)
    model.init_weights(0)
    save_model(folder, model, tokenizer)
    return str(folder)


def letters_tokenizer(size: int) -> Any:
    """Byte-level BPE whose further tokens are two and three printable characters."""
    from cascade_model.tokenizer import Tokenizer, byte_tokenizer

    document = json.loads(byte_tokenizer().to_bytes())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    letters = [chr(code) for code in range(33, 127)]
    pairs = ((a, b) for a in letters for b in letters)
    triples = ((a + b, c) for a in letters for b in letters for c in letters)
    for merged in (pair for group in (pairs, triples) for pair in group):
        if len(vocabulary) + 3 == size:
            break
        merges.append(list(merged))
        vocabulary["".join(merged)] = len(vocabulary) + 3
    return Tokenizer(json.dumps(document).encode())


def prompts(count: int) -> list[list[int]]:
    """Token ids below any shape's vocabulary."""
    return [[300 + (n * 131 + place * 17) % 7000 for place in range(PROMPT)] for n in range(count)]


class EngineArm:
    """The engine alone, in a process of its own."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def run(self, streams: int) -> Run:
        """So many streams, decoded together."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{streams}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Run(told["seconds"], told["texts"], {"engine": told["cpu"]})


@contextlib.contextmanager
def engine_arm(model: str) -> Iterator[EngineArm]:
    """A process with the weights, which ends on leaving."""
    words = [sys.executable, "-m", "tests.benchmarks.serve_speed_arms", model]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS)},
    ) as process:
        yield EngineArm(process)
        process.stdin.close()  # type: ignore[union-attr]


def serve_engine(model: str) -> None:
    """Decode as many streams as each line asks for."""
    import torch

    from cascade_model.llm import LLM
    from cascade_model.sampling import SamplingParams

    torch.set_num_threads(THREADS)
    with LLM.load(model) as llm:
        for line in sys.stdin:
            each = [SamplingParams(**SETTINGS, seed=n) for n in range(int(line))]
            began, cpu = time.perf_counter(), time.process_time()
            answers = llm.generate(prompts(int(line)), each)
            told = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            print(json.dumps({**told, "texts": [answer.text for answer in answers]}), flush=True)


class HttpArm:
    """Streams from a server on this machine, and what its processes spend on them."""

    def __init__(self, port: int, pid: int, rest_seconds: float = 10.0) -> None:
        self._port, self._server = port, psutil.Process(pid)
        self.at_rest: dict[str, float] = {}
        """Processor seconds a second, by who spends them, while nobody asks."""
        before = self._spent()
        time.sleep(rest_seconds)
        for name, spent in self._spent().items():
            self.at_rest[name] = (spent - before.get(name, 0.0)) / rest_seconds

    def run(self, streams: int) -> Run:
        """So many streams at once."""
        bodies = [
            {"model": "served", "prompt": prompt, "stream": True, "seed": n, **SETTINGS}
            for n, prompt in enumerate(prompts(streams))
        ]
        before, own = self._spent(), time.process_time()
        began = time.perf_counter()
        found = asyncio.run(self._read(bodies))
        seconds = time.perf_counter() - began
        cpu = {"client": time.process_time() - own}
        for name, spent in self._spent().items():
            rest = seconds * self.at_rest.get(name, 0.0)
            cpu[name] = max(spent - before.get(name, 0.0) - rest, 0.0)
        firsts = sorted(first for first, _ in found)
        return Run(seconds, [text_of(raw) for _, raw in found], cpu, firsts[len(firsts) // 2])

    async def _read(self, bodies: list[dict[str, Any]]) -> list[tuple[float, bytes]]:
        return list(await asyncio.gather(*(self._stream(body) for body in bodies)))

    async def _stream(self, body: dict[str, Any]) -> tuple[float, bytes]:
        """Seconds to the first event, and all bytes of the answer."""
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        )
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        began, first, raw = time.perf_counter(), 0.0, b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
        while chunk := await reader.read(65536):
            raw += chunk
            if not first and b"data: " in raw:
                first = time.perf_counter() - began
        writer.close()
        return first, raw

    def _spent(self) -> dict[str, float]:
        """Processor time of the server's processes so far, by what they are."""
        found: dict[str, float] = {}
        for each in [self._server, *self._server.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                name = role_of(each.name(), " ".join(each.cmdline()[:1]))
                found[name] = found.get(name, 0.0) + times.user + times.system
        return found


def role_of(name: str, command: str) -> str:
    """What a process of a server is."""
    words = f"{name} {command}"
    for role, mark in (("sampler", "sampler"), ("ingress", "ingress"), ("proxy", "Proxy")):
        if mark in words:
            return role
    return "Ray"


def text_of(raw: bytes) -> str:
    """The text of one stream of events; `RuntimeError` where it is not whole."""
    events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise RuntimeError(f"a stream was not whole: {raw[-500:]!r}")
    pieces = [json.loads(event)["choices"] for event in events[:-1]]
    return "".join(choice["text"] for piece in pieces for choice in piece)


if __name__ == "__main__":
    serve_engine(sys.argv[1])
