"""The arena: runs never overlap, and what was given back can be taken again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.pages import PageArena
from tests.tiny_models import tiny_config


def arena(pages: int = 20) -> PageArena:
    return PageArena(
        tiny_config(), num_pages=pages, page_tokens=4, dtype=torch.float32, device="cpu"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "shorten", "give back"]), st.integers(1, 9)),
        max_size=40,
    )
)
def test_runs_never_overlap_and_all_pages_come_back(moves):
    pages, held = arena(), []
    for move, number in moves:
        if move == "take":
            run = pages.take(number)
            if run is not None:
                held.append(run)
        elif held and move == "shorten":
            run = held[number % len(held)]
            kept = min(run.count, number)
            pages.shorten(run, number)
            assert run.count == kept
        elif held:
            pages.give_back(held.pop(number % len(held)))
        taken = [page for run in held for page in range(run.first, run.first + run.count)]
        assert len(taken) == len(set(taken))
        assert pages.free_pages == 20 - len(taken)
    for run in held:
        pages.give_back(run)
    assert pages.take(20) is not None


def test_a_run_cannot_be_given_back_twice():
    pages = arena()
    run, _ = pages.take(3), pages.take(2)
    first, count = run.first, run.count
    pages.give_back(run)
    run.first, run.count = first, count
    with pytest.raises(RuntimeError, match="page 0 was given back twice"):
        pages.give_back(run)


def test_copies_keep_keys_and_values():
    pages = arena()
    a, b = pages.take(2), pages.take(3)
    pages.entries.zero_()
    keys, values = pages.views(a, 8)[1]
    keys.fill_(1.5)
    values.fill_(2.5)
    pages.copy(a, b, 6)
    keys, values = pages.views(b, 8)[1]
    assert keys[..., :6, :].eq(1.5).all()
    assert values[..., :6, :].eq(2.5).all()
    assert keys[..., 6:, :].eq(0).all()


def test_a_run_grows_where_it_is_into_free_pages_behind_it():
    pages = arena(10)
    first, second = pages.take(3), pages.take(2)
    assert not pages.extend(first, 4)
    assert pages.extend(second, 7)
    assert not pages.extend(second, 8)
    assert (second.first, second.count, pages.free_pages) == (3, 7, 0)
    pages.give_back(second)
    assert pages.extend(first, 10)
    assert pages.free_pages == 0


def test_what_would_fit_in_place_of_a_run():
    pages = arena(12)
    runs = [pages.take(count) for count in (2, 3, 2, 5)]
    pages.give_back(runs[0])
    pages.give_back(runs[2])
    for count in range(1, 13):
        assert pages.fits_in_place_of(runs[1], count) == (count <= 7)
        assert pages.fits_in_place_of(runs[3], count) == (count <= 7)
