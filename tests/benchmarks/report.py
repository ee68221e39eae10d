"""The table of a benchmark or fault run, for people and as JSON."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ok` follows from the bar: at least it, or with `is_limit` at most."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    is_limit: bool = False

    @property
    def ok(self) -> bool:
        """Whether the bar is met; a row without one is a result, not a test."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.is_limit else self.value >= self.bar


def publish(area: str, rows: Sequence[Row], kind: str = "bench", **config: Any) -> int:
    """Print the table, write build/<kind>/<area>.json; the exit code: 1 where a bar is missed."""
    where = {"machine": machine(), "commit": commit(), "config": config}
    for name, value in where.items():
        print(f"{name}: {value}")
    width = max(len(row.name) for row in rows)
    for row in rows:
        sign = "<=" if row.is_limit else ">="
        bar = "" if row.bar is None else f"  {sign} {row.bar:g} {'ok' if row.ok else 'MISSED'}"
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.4g}"
        print(f"{row.name.ljust(width)}  {value:>10} {row.unit}{bar}")
    target = Path("build") / kind / f"{area}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    cells = [{**asdict(row), "ok": row.ok} for row in rows]
    target.write_text(json.dumps({**where, "rows": cells}, indent=1) + "\n")
    return 0 if all(row.ok for row in rows) else 1


def machine() -> str:
    """Processor, cores in use, Python and torch."""
    import os

    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{name}, {os.cpu_count()} cores, Python {python}, torch {torch.__version__}"


def commit() -> str:
    """The commit in short, with + where the tree has changes."""
    words = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
