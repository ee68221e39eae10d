"""Laws of the recipe: published vectors, permutations, strata, statistics."""

import itertools

import numpy as np
import pytest

from cascade_model.config import NoiseConfig, TrainingNoise
from cascade_model.errors import InputError
from cascade_model.noise import (
    FULL,
    STRATUM,
    complement,
    counters,
    cut_length,
    mask_bits,
    permute,
    permute_rows,
    philox4x32,
    rank_of,
    sequence_at,
    thresholds,
)
from cascade_model.settings import digest, to_dict

NOISE = NoiseConfig(seed=7, block_size=8, strata=32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_vectors_of_random123(counter, key, expected):
    assert tuple(philox4x32(counters(*counter), key)) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_each_draw_is_a_permutation_and_rank_of_is_its_inverse(size):
    ranks = np.arange(size, dtype=np.uint64)
    for draw in (0, 1, 2**31):
        order = sequence_at(ranks, size, NOISE, draw)
        assert sorted(order) == list(range(size))
        assert (rank_of(order, size, NOISE, draw) == ranks).all()


@pytest.mark.parametrize(("index", "size"), [(1, 1), (5, 5), (2**40, 7), (0, 0)])
def test_an_index_outside_is_refused_as_its_walk_might_never_end(index, size):
    for way in (sequence_at, rank_of):
        with pytest.raises(IndexError, match=f"index {index} of a permutation of {size}"):
            way(np.array([0, index], dtype=np.uint64), size, NOISE, 0)


def test_draws_and_seeds_differ():
    ranks = np.arange(100, dtype=np.uint64)
    other = NoiseConfig(seed=8)
    orders = [sequence_at(ranks, 100, NOISE, 0), sequence_at(ranks, 100, NOISE, 1)]
    orders.append(sequence_at(ranks, 100, other, 0))
    assert not any((a == b).all() for a, b in itertools.pairwise(orders))


@pytest.mark.parametrize("num_blocks", [1, 3, 16, 64, 128, 512, 1024])
@pytest.mark.parametrize("draw", [0, 5])
def test_a_group_of_ranks_takes_every_stratum_once(num_blocks, draw):
    noise = NoiseConfig(min_rate=2**-32, max_rate=1.0)
    table = thresholds(noise, draw, np.arange(64, 96), num_blocks)
    cells = 32 * num_blocks
    strata = np.sort((table.astype(np.uint64) * cells >> np.uint64(32)).ravel())
    assert (np.abs(strata.astype(int) - np.arange(cells)) <= 1).all()


def test_strata_are_permuted_over_rows():
    means = thresholds(NOISE, 0, np.arange(32), 16).mean(axis=1)
    assert not (np.diff(means.astype(float)) > 0).all()


@pytest.mark.parametrize("num_blocks", [1, 16, 128])
def test_no_row_and_no_block_is_tied_to_a_part_of_the_range(num_blocks):
    """BD3-LM's published strata rise over rows and blocks; ours are uniform in every cell."""
    groups = 20_000 // (32 * num_blocks) + 32
    table = thresholds(NOISE, 0, np.arange(groups * 32), num_blocks) / 2**32
    cells = table.reshape(groups, 32, num_blocks)
    deviation = (0.999**2 / 12) ** 0.5
    for axes, count in (((0, 2), groups * num_blocks), ((0, 1), groups * 32)):
        error = deviation / count**0.5
        assert np.abs(cells.mean(axis=axes) - 0.5005).max() < 4.5 * error
    number = np.arange(32 * num_blocks)
    slopes = [np.corrcoef(number, group.ravel())[0, 1] for group in cells]
    assert abs(np.mean(slopes)) < 4 / (groups * 32 * num_blocks) ** 0.5


def test_default_bits_and_digests_are_those_of_format_one():
    table = thresholds(NoiseConfig(), 1, np.arange(4), 2)
    bits = mask_bits(NoiseConfig(), 1, np.arange(4, dtype=np.uint64), table, 16)
    assert digest(table.tolist())[:16] == "1745c1cf6e5754b6"
    assert digest(bits.tolist())[:16] == "ff52f5b96e09139a"
    assert digest(to_dict(NoiseConfig()))[:16] == "e37d95cefd03bb9c"


def test_complementary_rates_add_up_to_one_and_never_leave_32_bits():
    table = np.array([[1, 2**31, FULL, 7]], dtype=np.uint32)
    assert complement(table).tolist() == [[FULL, 2**31, 1, 2**32 - 7]]
    assert complement(np.zeros(1, dtype=np.uint32)).tolist() == [FULL]


def short(rate, multiple=8):
    return TrainingNoise(short_rate=rate, short_multiple=multiple)


def test_cut_lengths_are_uniform_on_the_multiples_and_as_frequent_as_asked():
    lengths = np.array([cut_length(short(1.0), number, 64) for number in range(4000)])
    values, counts = np.unique(lengths, return_counts=True)
    assert values.tolist() == [8, 16, 24, 32, 40, 48, 56, 64]
    assert np.abs(counts / 4000 - 1 / 8).max() < 4 * (7 / 64 / 4000) ** 0.5
    some = np.array([cut_length(short(0.25), number, 64) for number in range(4000)])
    expected = 0.25 * 7 / 8
    error = (expected * (1 - expected) / 4000) ** 0.5
    assert abs((some < 64).mean() - expected) < 4 * error
    assert {cut_length(short(0.0), number, 64) for number in range(100)} == {64}


def test_cut_lengths_depend_on_seed_and_number_alone():
    one = [cut_length(short(1.0), number, 64) for number in range(50)]
    assert one == [cut_length(short(1.0), number, 64) for number in range(50)]
    other = TrainingNoise(short_rate=1.0, short_multiple=8, seed=1)
    assert one != [cut_length(other, number, 64) for number in range(50)]


def test_the_settings_of_a_run_leave_its_recipe_as_it_is():
    recipe = NoiseConfig(seed=3, block_size=4, per="sequence")
    noise = TrainingNoise.over(recipe, complement=True, sequences_per_batch=2, short_rate=0.1)
    assert noise.recipe == recipe
    assert digest(to_dict(noise)) != digest(to_dict(TrainingNoise.over(recipe)))


def test_one_rate_per_sequence_when_asked():
    noise = NoiseConfig(per="sequence")
    table = thresholds(noise, 0, np.arange(32), 16)
    assert (table == table[:, :1]).all()
    assert len(np.unique(table[:, 0])) == 32


def test_thresholds_saturate_and_respect_the_window():
    top = thresholds(NoiseConfig(min_rate=1.0, max_rate=1.0), 0, np.arange(4), 2)
    assert (top == FULL).all()
    table = thresholds(NoiseConfig(min_rate=0.3, max_rate=0.8), 0, np.arange(320), 4) / 2**32
    assert table.min() >= 0.3 - 1e-6
    assert table.max() <= 0.8


def test_mask_bits_follow_the_rates_and_are_independent_between_places():
    ids = np.arange(4000, dtype=np.uint64)
    table = np.full((4000, 2), int(0.3 * 2**32), dtype=np.uint32)
    bits = mask_bits(NOISE, 0, ids, table, 16)
    error = (0.3 * 0.7 / bits.size) ** 0.5
    assert abs(bits.mean() - 0.3) < 4 * error
    correlation = np.corrcoef(bits.T.astype(float)) - np.eye(16)
    assert np.abs(correlation).max() < 5 / 4000**0.5


def test_noise_of_a_sequence_does_not_depend_on_its_company():
    ranks = np.array([3, 99, 41], dtype=np.uint64)
    alone = [thresholds(NOISE, 2, ranks[i : i + 1], 4)[0] for i in range(3)]
    assert (thresholds(NOISE, 2, ranks, 4) == np.stack(alone)).all()
    table = thresholds(NOISE, 2, ranks, 4)
    together = mask_bits(NOISE, 2, ranks, table, 32)
    assert (mask_bits(NOISE, 2, ranks[1:2], table[1:2], 32)[0] == together[1]).all()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"block_size": 3}, "noise.block_size=3"),
        ({"min_rate": 0.0}, "noise.min_rate=0.0"),
        ({"min_rate": 0.9, "max_rate": 0.1}, "noise.max_rate=0.1"),
        ({"strata": 0}, "noise.strata=0"),
        ({"seed": -1}, "noise.seed=-1"),
    ],
)
def test_bad_recipes_are_refused_by_name(values, named):
    with pytest.raises(InputError, match=named):
        NoiseConfig(**values)
    with pytest.raises(InputError, match=named):
        TrainingNoise(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"complement": True, "sequences_per_batch": 3}, "sequences_per_step=3 is odd; use 4"),
        ({"short_rate": 1.5}, "noise.short_rate=1.5"),
        ({"short_rate": 0.1, "short_multiple": 3}, "short_multiple=3 .*block_size=8"),
        ({"short_rate": 0.1, "per": "sequence", "short_multiple": 0}, "short_multiple=0"),
        ({"sequences_per_batch": 0}, "sequences_per_batch=0"),
    ],
)
def test_bad_settings_of_a_run_are_refused_by_name(values, named):
    with pytest.raises(InputError, match=named):
        TrainingNoise(**values)


BLOCK_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 384, 512, 1024, 2048)
"""Blocks of a sequence in use: lengths 64 to 4096 by blocks of 1 to 64, and some odd ones."""


@pytest.mark.parametrize("size", [2, 5, 32, 96, 1000, 8192])
def test_permuting_row_by_row_is_permuting(size):
    tweaks = np.array([7, 3, 7, 2**32 - 1], dtype=np.uint64)
    index = np.random.default_rng(size).integers(0, size, (4, 40)).astype(np.uint64)
    found = permute_rows(index, size, (5, 9), tweaks, STRATUM)
    expected = permute(index, size, (5, 9), np.repeat(tweaks[:, None], 40, axis=1), STRATUM)
    assert np.array_equal(found, expected)
    assert found.dtype == np.uint64


def test_a_draw_for_each_sequence_is_each_draw_alone():
    draws = np.array([0, 3, 3, 70000], dtype=np.uint64)
    ranks = np.array([5, 5, 40, 2**33], dtype=np.uint64)
    table = thresholds(NOISE, draws, ranks, 12)
    bits = mask_bits(NOISE, draws, ranks, table, 96)
    for at, draw in enumerate(draws.tolist()):
        mine = slice(at, at + 1)
        assert np.array_equal(table[mine], thresholds(NOISE, draw, ranks[mine], 12))
        assert np.array_equal(bits[mine], mask_bits(NOISE, draw, ranks[mine], table[mine], 96))


@pytest.mark.parametrize("num_blocks", BLOCK_COUNTS)
def test_no_block_count_aliases_with_the_strata(num_blocks):
    """A low-discrepancy walk over blocks fails here: for some counts a block stays in one part.

    Each block and each row must reach every eighth of the range as often as chance has it.
    """
    groups = max(8, 6144 // num_blocks)
    table = thresholds(NOISE, 0, np.arange(groups * 32), num_blocks)
    eighths = (table >> np.uint32(29)).reshape(groups, 32, num_blocks)
    for cells in (np.moveaxis(eighths, 2, 0), np.moveaxis(eighths, 1, 0)):
        flat = cells.reshape(len(cells), -1)
        counts = np.stack([(flat == part).sum(axis=1) for part in range(8)], axis=1)
        expected = flat.shape[1] / 8
        assert np.abs(counts - expected).max() < 6 * (expected * 7 / 8) ** 0.5


def test_the_control_for_aliasing_a_golden_ratio_walk_over_blocks_fails():
    ratio, num_blocks = (5**0.5 - 1) / 2, 610  # a Fibonacci number: 610 ratio is nearly whole
    walk = (np.arange(512 * num_blocks) * ratio) % 1
    eighths = (walk.reshape(512, num_blocks) * 8).astype(int)
    counts = np.stack([(eighths == part).sum(axis=0) for part in range(8)])
    assert np.abs(counts - 64).max() > 6 * (64 * 7 / 8) ** 0.5


@pytest.mark.parametrize(("per", "num_blocks"), [("block", 16), ("block", 3), ("sequence", 8)])
def test_mask_rates_are_uniform(per, num_blocks):
    """Kolmogorov's distance to the uniform law, which stratified rates undercut by far."""
    noise = NoiseConfig(seed=5, per=per, min_rate=2**-32, max_rate=1.0)
    table = thresholds(noise, 1, np.arange(6400), num_blocks)
    rates = np.sort((table if per == "block" else table[:, 0]).ravel() / 2**32)
    place = (np.arange(rates.size) + 0.5) / rates.size
    assert np.abs(rates - place).max() < 1.63 / rates.size**0.5  # 1 % for independent draws
    assert np.abs(rates - place).max() < 2 / 32
    groups = np.sort((table if per == "block" else table[:, :1]).reshape(200, -1) / 2**32, axis=1)
    cells = groups.shape[1]
    assert np.abs(groups - (np.arange(cells) + 0.5) / cells).max() <= 0.5 / cells + 1e-9


@pytest.mark.parametrize("draw", [0, 4])
def test_mean_and_variance_of_the_masks_are_those_of_the_recipe(draw):
    """A bit is 1 with a rate uniform on [low, 1]: mean m; the sum over a block is over-dispersed.

    Of a block of B bits with one rate t: Var(sum) = B E[t(1 - t)] + B^2 Var(t).
    """
    low, size, blocks, count = 0.001, 8, 16, 6400
    ids = np.arange(count, dtype=np.uint64)
    table = thresholds(NOISE, draw, ids, blocks)
    bits = mask_bits(NOISE, draw, ids, table, size * blocks).reshape(-1, size)
    mean, spread = (1 + low) / 2, (1 - low) ** 2 / 12
    inner = mean - (spread + mean**2)  # E[t(1 - t)]
    sums = bits.sum(axis=1)
    assert abs(bits.mean() - mean) < 4 * (inner / bits.size) ** 0.5
    variance = size * inner + size**2 * spread
    fourth = ((sums - sums.mean()) ** 4).mean()
    error = ((fourth - variance**2) / len(sums)) ** 0.5
    assert abs(sums.var() - variance) < 4 * error
    # All the dispersion comes of the common rate: given it, bits are independent.
    rates = table.reshape(-1) / 2**32
    rest = ((sums - size * rates) ** 2).mean()
    assert abs(rest - size * inner) < 4 * (sums.var() * 2 / len(sums)) ** 0.5


def test_bits_are_independent_between_places_sequences_and_draws():
    ids = np.arange(6000, dtype=np.uint64)
    half = np.full((6000, 1), 2**31, dtype=np.uint32)
    one = mask_bits(NOISE, 0, ids, half, 24).astype(float) - 0.5
    other = mask_bits(NOISE, 1, ids, half, 24).astype(float) - 0.5
    bound = 5.5 / 6000**0.5  # of 24 x 24 correlations
    places = np.corrcoef(one.T) - np.eye(24)
    between = one.T @ other / 6000 * 4
    neighbours = one[1:].T @ one[:-1] / 5999 * 4
    for table in (places, between, neighbours):
        assert np.abs(table).max() < bound
        assert abs(table.std() - 1 / 6000**0.5) < 0.2 / 6000**0.5


@pytest.mark.parametrize("strata", [1, 32, 65536])
def test_the_top_of_the_range_never_wraps_around(strata):
    """2^32 itself does not fit: a rate of 1 is the largest threshold, not 0."""
    for low in (1.0, 1 - 2**-33, 1 - 2**-31):
        noise = NoiseConfig(min_rate=low, max_rate=1.0, strata=strata)
        table = thresholds(noise, 0, np.arange(64), 4)
        assert table.min() >= 2**32 - 4
    whole = NoiseConfig(min_rate=2**-32, max_rate=1.0, strata=strata)
    table = thresholds(whole, 0, np.arange(2 * min(strata, 4096)), 4).astype(np.uint64)
    assert table.min() >= 1
    assert table.max() <= FULL
    assert complement(np.array([0, 1, FULL], dtype=np.uint32)).tolist() == [FULL, FULL, 1]
