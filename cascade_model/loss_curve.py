"""The loss curve of a run as a picture, drawn from its metrics."""

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TRAINING, _HELD_OUT = "#4878a8", "#c8553d"


def draw(lines: list[dict[str, Any]]) -> bytes:
    """A PNG of the training loss and the held-out bound against tokens.

    The bound has a bar of two standard errors up and down. Both are in nats per token; with another
    normaliser or weight the training loss has a scale of its own.
    """
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [line for line in lines if line["loss"] is not None]
    axes.plot(
        [line["tokens"] for line in trained],
        [line["loss"] for line in trained],
        color=_TRAINING,
        linewidth=1.2,
        marker="." if len(trained) < 3 else None,
        label="training loss",
    )
    evaluated = [line for line in lines if line.get("held_out_loss") is not None]
    if evaluated:
        axes.errorbar(
            [line["tokens"] for line in evaluated],
            [line["held_out_loss"] for line in evaluated],
            yerr=[2 * line["held_out_standard_error"] for line in evaluated],
            color=_HELD_OUT,
            linewidth=1.2,
            marker="o",
            markersize=3,
            capsize=2,
            label="held-out bound, 2 standard errors",
        )
    axes.set_xlabel("data tokens")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
