"""Where a pass may be cut, and what is left of it."""

from cascade_model.passes import Pass


def a_pass(limits: list[int], reads: list[int], start: int = 0) -> Pass:
    return Pass(
        tokens=list(range(len(limits))),
        start=start,
        limits=limits,
        visible=start + len(limits),
        reads=reads,
    )


BLOCKS = a_pass([4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12], [9, 11])


def test_a_pass_is_cut_where_no_row_sees_behind_the_cut():
    assert list(BLOCKS.cuts(4)) == [4, 8]
    assert list(a_pass([5, 6, 7], [2], start=4).cuts(1)) == [1, 2]
    assert list(a_pass([6] * 6, [2]).cuts(1)) == []


def test_nothing_behind_the_first_row_that_is_read_is_cut():
    assert list(a_pass(BLOCKS.limits, [7, 9]).cuts(4)) == [4]


def test_a_chunk_is_as_long_as_the_budget_lets_it_and_at_least_to_the_first_cut():
    first = BLOCKS.chunk(10, 4)
    assert (len(first.tokens), first.visible, first.reads) == (8, 8, [])
    assert BLOCKS.chunk(1, 4).tokens == [0, 1, 2, 3]
    assert BLOCKS.chunk(12, 4) is BLOCKS
    everything = a_pass([6] * 6, [2])
    assert everything.chunk(2, 4) is everything


def test_the_rest_of_a_pass_reads_the_same_rows():
    rest = BLOCKS.behind(8)
    assert (rest.start, rest.tokens, rest.reads) == (8, [8, 9, 10, 11], [1, 3])
    assert rest.behind(4) == rest
