"""A pass can be cut where no row sees behind the cut."""

from cascade_model.passes import Pass


def a_pass(limits: list[int], reads: list[int], start: int = 0) -> Pass:
    return Pass(
        tokens=list(range(len(limits))),
        start=start,
        limits=limits,
        visible=start + len(limits),
        reads=reads,
    )


def test_a_pass_is_cut_where_no_row_sees_behind_the_cut():
    blocks = a_pass([4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12], [9, 11])
    assert blocks.cuts(4) == [4, 8]
    first = blocks.chunk(10, 4)
    assert (len(first.tokens), first.visible, first.reads) == (8, 8, [])
    rest = blocks.behind(8)
    assert (rest.start, rest.tokens, rest.reads) == (8, [8, 9, 10, 11], [1, 3])
    assert blocks.chunk(1, 4).tokens == [0, 1, 2, 3]
    everything = a_pass([6] * 6, [2])
    assert everything.chunk(2, 4) is everything
    assert a_pass([5, 6, 7], [2], start=4).cuts(1) == [1, 2]
