"""What a run tells while it goes: metrics.jsonl, TensorBoard, and the sums between two lines."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_model.commit import replace_file


@dataclass(kw_only=True)
class Window:
    """Sums since the last line of metrics.

    It travels in the checkpoint, so that a resumed run writes the same lines.
    """

    sums: list[float] = field(default_factory=list)
    """Loss sum, maskable tokens, then per mask-rate band: loss sums, row counts."""
    norm: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def add(self, sums: list[float], norm: float, waited: float, seconds: float) -> None:
        """Add one step: its sums over all ranks, gradient norm, and this rank's seconds."""
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(sums), sums, strict=True)]
        self.norm += norm
        self.waited += waited
        self.seconds += seconds
        self.steps += 1

    def means(self, tokens_per_step: int) -> dict[str, Any]:
        """Loss per maskable token, mean cross entropy of the masked rows by band, speeds."""
        bands = (len(self.sums) - 2) // 2
        totals, counts = self.sums[2 : 2 + bands], self.sums[2 + bands :]
        return {
            "loss": self.sums[0] / max(self.sums[1], 1.0),
            "loss_by_mask_rate": [
                total / count if count else None
                for total, count in zip(totals, counts, strict=True)
            ],
            "grad_norm": self.norm / self.steps,
            "tokens_per_second": self.steps * tokens_per_step / max(self.seconds, 1e-9),
            "data_wait_rate": self.waited / max(self.seconds, 1e-9),
            "seconds": self.seconds,
        }


class MetricsLog:
    """metrics.jsonl and tensorboard/ in a run folder; one writer, the first rank."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open for the steps after `step`; lines beyond it, of an attempt that died, are cut."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._lines = [line for line in read_metrics(self._path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        replace_file(self._path, text.encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and the same values as TensorBoard scalars."""
        self._lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(name, value, line["step"])
        for number, value in enumerate(line["loss_by_mask_rate"]):
            if value is not None:
                self._board.add_scalar(f"loss_by_mask_rate/{number}", value, line["step"])

    def close(self) -> list[dict[str, Any]]:
        """Flush both and return all lines of the run."""
        self._file.close()
        self._board.close()
        return self._lines


def progress_line(line: dict[str, Any]) -> str:
    """One line of metrics for a person."""
    return (
        f"step {line['step']:>6}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
        f"grad norm {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} data tokens/s  "
        f"data wait {100 * line['data_wait_rate']:.1f} %"
    )


def speed(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds spent in the steps of a run, and their tokens per second.

    From all lines, so that it is the same however often the run was interrupted.
    """
    seconds = sum(line["seconds"] for line in lines)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in lines)
    return seconds, tokens / max(seconds, 1e-9)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
