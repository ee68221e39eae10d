"""The schedules: published values, and the laws that all of them keep."""

import pytest

from cascade_model.schedules import SCHEDULES, counts, masks_left


def test_published_values():
    assert counts("even", 32, 5) == [7, 7, 6, 6, 6]
    assert counts("linear", 32, 5) == [6, 6, 7, 6, 7]
    # MaskGIT: left are floor(16 cos(pi/2 k/4)) = 14, 11, 6, 0.
    assert counts("cosine", 16, 4) == [2, 3, 5, 6]
    # Left are floor(16 (16 - 2^k) / 15) = 14, 12, 8, 0.
    assert counts("exponential", 16, 4) == [2, 2, 4, 8]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("masks", [1, 2, 3, 8, 31, 32])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 32])
def test_everything_is_committed_and_at_least_one_a_step_while_masks_are_left(
    schedule, masks, steps
):
    shares = counts(schedule, masks, steps)
    assert sum(shares) == masks
    assert all(share >= 1 for share in shares[: min(masks, steps)]) or steps > masks
    assert all(share >= 0 for share in shares)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_nothing_is_left_after_the_last_step(schedule):
    assert masks_left(schedule, 9, 4, 4) == 0
    assert masks_left(schedule, 9, 7, 4) == 0
