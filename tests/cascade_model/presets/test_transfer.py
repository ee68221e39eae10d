"""dllm's rounded schedule: published tables, and the law that everything is committed."""

import json
from pathlib import Path

import pytest

from cascade_model.errors import InputError
from cascade_model.presets.transfer import transfer_counts

CONFORMANCE = Path(__file__).parents[2] / "data" / "conformance"


def published_tables():
    """(masks, steps, scheduler, counts) of every case that records them."""
    for file in sorted(CONFORMANCE.glob("*/cases.json")):
        for case in json.loads(file.read_text()):
            settings, blocks = case["settings"], case["expected"].get("transfer_counts", [])
            size = settings.get("block_size") or settings.get("block_length")
            made = settings.get("max_new_tokens") or settings.get("gen_length")
            for row in (row for block in blocks for row in block):
                places = made or max(map(len, case["input_ids"]))
                shared = -(-settings["steps"] // -(-places // size))
                steps = settings.get("steps_per_block") or shared
                yield sum(row), steps, settings.get("scheduler", "linear"), [n for n in row if n]


def test_the_published_tables():
    tables = list(published_tables())
    assert len(tables) > 100
    for masks, steps, scheduler, counts in tables:
        assert transfer_counts(masks, steps, scheduler) == counts


@pytest.mark.parametrize(
    ("masks", "steps", "scheduler", "counts"),
    [
        (8, 3, "linear", [3, 2, 3]),
        (16, 8, "cosine", [1, 2, 2, 2, 3, 3, 3]),
        (5, 2, "linear", [2, 3]),
        (3, 9, "linear", [1, 1, 1]),
        (0, 4, "linear", []),
    ],
)
def test_halves_go_to_the_even_number_and_empty_steps_are_left_out(masks, steps, scheduler, counts):
    assert transfer_counts(masks, steps, scheduler) == counts


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_everything_is_committed_in_no_more_steps_than_given(scheduler):
    for masks in range(40):
        for steps in (1, 2, 3, 7, 32, 50):
            counts = transfer_counts(masks, steps, scheduler)
            assert sum(counts) == masks
            assert len(counts) <= steps
            assert min(counts, default=1) > 0


def test_a_table_may_be_changed_without_changing_the_next():
    transfer_counts(8, 3, "linear").clear()
    assert transfer_counts(8, 3, "linear") == [3, 2, 3]


def test_what_is_refused():
    with pytest.raises(InputError, match="scheduler=sine is unknown; use linear or cosine"):
        transfer_counts(8, 3, "sine")
    with pytest.raises(InputError, match="steps=0 must be at least 1"):
        transfer_counts(8, 0, "linear")
