"""Every prefix of a mixture is within one sample of its shares, and each source is shown evenly."""

import itertools

import numpy as np
import pytest

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.manifest import SourceEntry
from cascade_model.mixing import UNITS, Mixture, period, shares
from cascade_model.noise import rank_of, sequence_at

NOISE = NoiseConfig(seed=3)
WEIGHTS = [
    [1.0],
    [1, 1],
    [3, 1],
    [0.7, 0.2, 0.1],
    [1000, 1, 1],
    [1] * 7,
    [2.0**-i for i in range(12)],
    [1] * 1024,
    list(range(1, 60)),
]


def mixture(sizes, given) -> Mixture:
    firsts = [0, *itertools.accumulate(sizes)]
    sources = [
        SourceEntry(name=str(i), first_sequence=first, num_sequences=size, num_tokens=1, share=s)
        for i, (first, size, s) in enumerate(zip(firsts, sizes, given, strict=False))
    ]
    return Mixture(sources, sum(sizes))


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{len(w)} sources")
def test_shares_are_whole_and_next_to_the_weights(weights):
    given = shares(weights)
    assert sum(given) == UNITS
    assert min(given) >= 1
    exact = [UNITS * w / sum(weights) for w in weights]
    if min(exact) >= 1:
        assert all(abs(s - e) < 1 for s, e in zip(given, exact, strict=True))
    by_weight = [share for _, share in sorted(zip(weights, given, strict=True))]
    assert by_weight == sorted(by_weight)


def test_a_source_of_next_to_no_weight_still_gets_a_share():
    assert shares([1e9, 1e-9, 1]) == [1022, 1, 1]
    assert shares([1 / 3, 1 / 3, 1 / 3]) == [342, 341, 341]


@pytest.mark.parametrize(
    ("weights", "named"),
    [([], "0 sources"), ([1] * 1025, "1025 sources"), ([1, 0], "weight=0"), ([1, -2], "weight=-2"),
     ([1, float("nan")], "weight=nan"), ([float("inf"), 1], "weight=inf")],
)  # fmt: skip
def test_weights_that_cannot_be_are_refused(weights, named):
    with pytest.raises(InputError, match=named):
        shares(weights)


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"{len(w)} sources")
def test_every_prefix_is_within_one_sample_of_each_share(weights):
    given = shares(weights)
    drawn = mixture([5] * len(given), given).sources_of(np.arange(3 * UNITS, dtype=np.uint64))
    had = np.cumsum(drawn[:, None] == np.arange(len(given)), axis=0)
    due = np.arange(1, 3 * UNITS + 1)[:, None] * np.array(given) / UNITS
    bound = 1 - 1 / (2 * len(given) - 2) if len(given) > 1 else 0
    assert np.abs(had - due).max() <= bound < 1


def test_the_bound_is_not_met_by_drawing_sources_at_random():
    """The control: what many loaders do is right on average and astray at a prefix."""
    drawn = np.random.default_rng(0).random(3 * UNITS) < 0.25
    assert np.abs(np.cumsum(drawn) - 0.25 * np.arange(1, 3 * UNITS + 1)).max() > 5


def test_one_source_is_the_order_of_the_draw_as_it_always_was():
    samples = np.arange(3000, dtype=np.uint64)
    ids, ranks, draws = mixture([1000], [UNITS]).places(samples, NOISE)
    assert np.array_equal(draws, samples // 1000)
    assert np.array_equal(ranks, samples % 1000)
    for draw in range(3):
        mine = slice(1000 * draw, 1000 * draw + 1000)
        assert np.array_equal(ids[mine], sequence_at(ranks[mine], 1000, NOISE, draw))


@pytest.mark.parametrize("sizes", [[7, 200, 1], [50, 50, 50]])
def test_each_source_shows_each_sequence_once_in_each_of_its_own_draws(sizes):
    given = shares([5, 3, 2])
    ids, ranks, draws = mixture(sizes, given).places(np.arange(4000, dtype=np.uint64), NOISE)
    firsts = np.cumsum([0, *sizes])
    for source, size in enumerate(sizes):
        mine = (ids >= firsts[source]) & (ids < firsts[source + 1])
        own, drawn = ids[mine] - firsts[source], draws[mine]
        assert np.array_equal(drawn, np.arange(len(own)) // size)  # draws follow one another
        for draw in range(int(drawn.max())):  # all but the last are complete
            assert sorted(own[drawn == draw].tolist()) == list(range(size))
        assert ((ranks[mine] >= firsts[source]) & (ranks[mine] < firsts[source + 1])).all()


def test_no_two_sequences_share_a_rank_in_a_draw():
    ids, ranks, draws = mixture([40, 60], [300, 724]).places(
        np.arange(2000, dtype=np.uint64), NOISE
    )
    assert len(set(zip(draws.tolist(), ranks.tolist(), strict=True))) == 2000
    assert len(set(zip(draws.tolist(), ids.tolist(), strict=True))) == 2000


def test_ranks_of_is_the_way_back():
    both = mixture([40, 60], [300, 724])
    ids, ranks, draws = both.places(np.arange(500, dtype=np.uint64), NOISE)
    for draw in np.unique(draws).tolist():
        mine = draws == draw
        assert np.array_equal(both.ranks_of(ids[mine], NOISE, draw), ranks[mine])
    one = mixture([90], [UNITS])
    every = np.arange(90, dtype=np.uint64)
    assert np.array_equal(one.ranks_of(every, NOISE, 1), rank_of(every, 90, NOISE, 1))


def test_a_sample_does_not_depend_on_its_company():
    both = mixture([40, 60], [300, 724])
    far = np.array([10**15 + 3, 5, 10**9], dtype=np.uint64)
    together = np.stack(both.places(far, NOISE))
    for at in range(3):
        assert np.array_equal(np.stack(both.places(far[at : at + 1], NOISE)), together[:, [at]])


@pytest.mark.parametrize("given", [(1000, 23), (1024, 0), (0, 1024), (-1, 1025)])
def test_sources_that_do_not_share_all_samples_are_refused(given):
    with pytest.raises(CorpusMismatch, match="in shares of 1024"):
        mixture([3, 4], given)


def test_sources_that_do_not_hold_all_sequences_are_refused():
    entry = SourceEntry(name="a", first_sequence=0, num_sequences=3, num_tokens=1, share=UNITS)
    with pytest.raises(CorpusMismatch, match="do not hold its 4 sequences"):
        Mixture([entry], 4)
    with pytest.raises(CorpusMismatch, match="do not hold its 0 sequences"):
        Mixture([], 0)
    with pytest.raises(CorpusMismatch, match="shares of 1024"):
        mixture([3, 0], [512, 512])


def test_the_order_of_a_period_is_written_down():
    """It is part of the format: a change of it changes every mixed run."""
    assert period((512, 512))[:4].tolist() == [0, 1, 0, 1]
    assert period((768, 256))[:8].tolist() == [0, 0, 1, 0, 0, 0, 1, 0]
