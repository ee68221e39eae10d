"""The picture is a PNG, and what it shows is what the lines say."""

import io

import matplotlib.image
import numpy as np

from cascade_model.loss_curve import draw


def line(tokens, loss, held_out=None):
    found = {"tokens": tokens, "loss": loss, "held_out_loss": held_out}
    return found | {"held_out_standard_error": None if held_out is None else 0.1}


def pixels(lines):
    return matplotlib.image.imread(io.BytesIO(draw(lines)), format="png")


def count(picture, color):
    """Pixels near a colour, given as #rrggbb."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.05).sum())


TRAINING, HELD_OUT = "#4878a8", "#c8553d"


def test_both_curves_are_there_where_both_are_known():
    falling = [line(100 * i, 5 - i / 10) for i in range(1, 20)]
    only = pixels(falling)
    assert count(only, TRAINING) > 300
    assert count(only, HELD_OUT) == 0
    both = pixels([*falling, line(2000, 3.0, held_out=3.2)])
    assert count(both, HELD_OUT) > 20


def test_steps_without_a_loss_and_runs_without_steps_can_be_drawn():
    assert draw([]).startswith(b"\x89PNG")
    assert pixels([line(100, None), line(200, 2.0)]).shape == pixels([]).shape
    assert count(pixels([line(100, None), line(200, 2.0)]), TRAINING) > count(
        pixels([line(100, None)]), TRAINING
    )
