"""Where a pass may be cut, and what is left of it."""

import torch

from cascade_model.chunks import behind, chunk, cuts
from cascade_model.passes import Pass


def a_pass(limits: list[int], reads: list[int], start: int = 0) -> Pass:
    return Pass(
        tokens=torch.arange(len(limits)),
        start=start,
        limits=torch.tensor(limits),
        visible=start + len(limits),
        reads=torch.tensor(reads, dtype=torch.int64),
    )


BLOCKS = a_pass([4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12], [9, 11])


def test_a_pass_is_cut_where_no_row_sees_behind_the_cut():
    assert cuts(BLOCKS, 4).tolist() == [4, 8]
    assert cuts(a_pass([5, 6, 7], [2], start=4), 1).tolist() == [1, 2]
    assert cuts(a_pass([6] * 6, [2]), 1).tolist() == []


def test_nothing_behind_the_first_row_that_is_read_is_cut():
    assert cuts(a_pass(BLOCKS.limits.tolist(), [7, 9]), 4).tolist() == [4]


def test_a_chunk_is_as_long_as_the_budget_lets_it_and_at_least_to_the_first_cut():
    first = chunk(BLOCKS, 10, 4)
    assert (len(first.tokens), first.visible, first.reads.tolist()) == (8, 8, [])
    assert chunk(BLOCKS, 1, 4).tokens.tolist() == [0, 1, 2, 3]
    assert chunk(BLOCKS, 12, 4) is BLOCKS
    everything = a_pass([6] * 6, [2])
    assert chunk(everything, 2, 4) is everything


def test_the_rest_of_a_pass_reads_the_same_rows():
    rest = behind(BLOCKS, 8)
    assert (rest.start, rest.tokens.tolist(), rest.reads.tolist()) == (8, [8, 9, 10, 11], [1, 3])
    assert behind(rest, 4).tokens.tolist() == rest.tokens.tolist()
