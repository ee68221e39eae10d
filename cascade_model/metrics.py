"""What a run tells while it goes: metrics.jsonl, TensorBoard and the loss curve in its folder.

Telling never ends a run: what cannot be written is told on stderr once, kept, and written with what
follows. In an object store, which has no appending, the whole file is put anew at a bounded rate.
Only a run that lost its folder to another ends here: it must write nothing more.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from cascade_model.commit import Folder, reason_of
from cascade_model.lease import LeaseLost
from cascade_model.status_line import end_line, redraw, tell

METRICS = "metrics.jsonl"
BOARD = "tensorboard"
CURVE = "loss.png"
PUT_EVERY = 30.0
"""Seconds between two puts of the metrics to a store."""
DRAW_EVERY = 60.0
"""Seconds between two drawings of the curve while the run goes on."""


class MetricsLog:
    """The metrics of a run; one writer, the first rank."""

    def __init__(self, folder: Folder, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Open for the steps after `step`; lines beyond it, of an attempt that died, are cut.

        `check` is asked before each writing and raises `LeaseLost` where this process may not
        (`Attempt.check`), which every method here then raises; if it fails otherwise, nothing is
        written that time.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._check = folder, check
        self._lines = [line for line in read_metrics(folder) if line["step"] <= step]
        self._written = 0
        self._file: BinaryIO | None = None
        self._due = {METRICS: 0.0, CURVE: 0.0}
        self._painter = ThreadPoolExecutor(1, thread_name_prefix="curve")
        self._curve: Future[bytes] | None = None
        self._failing: set[str] = set()
        with contextlib.ExitStack() as kept:
            place = folder.path(BOARD)
            if not folder.is_local:
                place = kept.enter_context(tempfile.TemporaryDirectory())
            self._place, self._kept = Path(place), kept.pop_all()
        self._board: SummaryWriter | None = SummaryWriter(str(self._place), purge_step=step + 1)
        self._try(METRICS, self._put)

    def write(self, line: dict[str, Any], tokens_left: int) -> None:
        """Append one line, and the same values as TensorBoard scalars; show it to the user.

        `tokens_left` says how long the run will still take at this line's speed.
        """
        line["seconds_left"] = tokens_left / max(line["tokens_per_second"], 1e-9)
        self._lines.append(line)
        self._try(METRICS, self._append)
        self._try(BOARD, lambda: self._scalars(line))
        show(line)

    def save(self) -> None:
        """Bring everything to the folder, as a checkpoint is being written there."""
        self._try(METRICS, self._append if self._file else self._put)
        self._try(BOARD, self._save_board)

    def draw(self) -> None:
        """Bring the curve that was drawn since to the folder, and begin another when it is time.

        A drawing takes as long as some steps, so it is made in a thread beside them.
        """
        if self._curve is not None and self._curve.done():
            drawn, self._curve = self._curve, None
            self._try(CURVE, lambda: self._folder.replace(CURVE, drawn.result()))
        if self._curve is None and time.monotonic() >= self._due[CURVE]:
            self._due[CURVE] = time.monotonic() + DRAW_EVERY
            self._curve = self._painter.submit(_drawn, list(self._lines))

    def close(self) -> list[dict[str, Any]]:
        """Bring everything to the folder, the newest curve too, and return all lines of the run."""
        self.save()
        self._try(CURVE, lambda: self._folder.replace(CURVE, _drawn(self._lines)))
        self.abandon()
        return self._lines

    def abandon(self) -> None:
        """Let go of the files, with nothing more written; harmless after `close`."""
        end_line()
        self._painter.shutdown(wait=False, cancel_futures=True)
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None
        self._kept.close()

    def _append(self) -> None:
        """Bring the lines that are not there to the folder: at once where that is appending, else
        if due."""
        if self._file is None:
            if self._folder.is_local or time.monotonic() >= self._due[METRICS]:
                self._put()
            return
        try:
            self._file.write(_text(self._lines[self._written :]))
            self._written = len(self._lines)
        except OSError:
            self._file.close()
            self._file = None  # all lines are written the next time
            raise

    def _put(self) -> None:
        """Write all lines anew; a local file is then open for the next ones."""
        self._folder.replace(METRICS, _text(self._lines))
        self._written = len(self._lines)
        self._due[METRICS] = time.monotonic() + PUT_EVERY
        if self._folder.is_local:
            self._file = Path(self._folder.path(METRICS)).open("ab", buffering=0)  # noqa: SIM115

    def _scalars(self, line: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(name, value, line["step"])
        for number, value in enumerate(line["loss_by_mask_rate"]):
            if value is not None:
                self._board.add_scalar(f"loss_by_mask_rate/{number}", value, line["step"])

    def _save_board(self) -> None:
        if self._board is None:
            return
        self._board.flush()
        if not self._folder.is_local:
            for path in self._place.iterdir():
                (self._folder / BOARD).replace(path.name, path.read_bytes())

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Write if the folder is still ours.

        A disk that is full or a store that does not answer is told, once in a row.
        """
        try:
            self._check()
            write()
        except LeaseLost:
            raise
        except Exception as error:  # each store has errors of its own
            if name not in self._failing:
                tell(f"{self._folder.path(name)} cannot be written: {reason_of(error)}")
            self._failing.add(name)
        else:
            self._failing.discard(name)


def show(line: dict[str, Any]) -> None:
    """Show a line of metrics as progress; one with a held-out value stays."""
    is_evaluated = line.get("held_out_loss") is not None
    (tell if is_evaluated else redraw)(progress_line(line))


def progress_line(line: dict[str, Any]) -> str:
    """One line of metrics for a person."""
    parts = [
        f"step {line['step']:>6}",
        f"loss {_number(line['loss'], '.4f')}",
        f"lr {line['lr']:.2e}",
        f"grad norm {_number(line['grad_norm'], '.2f')}",
        f"{line['tokens_per_second']:,.0f} data tokens/s",
        f"data wait {100 * line['data_wait_rate']:.1f} %",
    ]
    if line.get("mfu") is not None:
        parts.append(f"MFU {100 * line['mfu']:.0f} %")
    if line.get("skipped_steps"):
        parts.append(f"{line['skipped_steps']} steps skipped")
    if line.get("held_out_loss") is not None:
        parts.append(f"held out {line['held_out_loss']:.4f}")
    if line.get("seconds_left"):
        parts.append(f"{duration(line['seconds_left'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds for a person, in the two largest of days, hours, minutes and seconds: 2 d 3 h."""
    left, parts = round(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count or (parts and unit != "s") or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def speed(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds spent in the steps of a run, and their tokens per second.

    From all lines, so that it is the same however often the run was interrupted.
    """
    seconds = sum(line["seconds"] for line in lines)
    tokens = sum(line["tokens_per_second"] * line["seconds"] for line in lines)
    return seconds, tokens / max(seconds, 1e-9)


def read_metrics(folder: Folder) -> list[dict[str, Any]]:
    """The whole lines of a run folder's metrics; a last line cut by a crash is left out."""
    try:
        text = folder.read_bytes(METRICS).decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for each in text.splitlines():
        try:
            lines.append(json.loads(each))
        except ValueError:
            break
    return lines


def _drawn(lines: list[dict[str, Any]]) -> bytes:
    from cascade_model.loss_curve import draw  # loads matplotlib, at its first use

    return draw(lines)


def _text(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
