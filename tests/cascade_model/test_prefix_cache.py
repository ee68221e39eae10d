"""Known beginnings: the longest is found, tokens are compared, the least used goes first."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.pages import PageArena
from cascade_model.prefix_cache import Beginning, PrefixCache
from tests.tiny_models import tiny_config

PAGE = 4


def cache(max_pages: int = 6, pages: int = 12) -> PrefixCache:
    sizes = {"num_pages": pages, "page_tokens": PAGE}
    return PrefixCache(
        PageArena(tiny_config(), **sizes, dtype=torch.float32, device="cpu"), max_pages
    )


def adopt(known: PrefixCache, tokens: list[int]) -> bool:
    """A sequence of these tokens ends and leaves its pages, one more than they fill."""
    run = known.arena.take(known.arena.pages_for(len(tokens)) + 1)
    assert run is not None
    is_kept = known.adopt(Beginning.of(tokens, PAGE), run)
    if not is_kept:
        known.arena.give_back(run)
    return is_kept


def count(known: PrefixCache, tokens: list[int]) -> int:
    """Tokens of the longest known beginning."""
    found = known.find(Beginning.of(tokens, PAGE))
    return 0 if found is None else found[1] * PAGE


def test_the_longest_beginning_of_whole_pages_is_found():
    known = cache()
    adopt(known, list(range(10)))
    assert count(known, list(range(20))) == 8
    assert count(known, [*range(6), 99, 99]) == 4
    assert count(known, [1, *range(10)]) == 0
    assert count(known, list(range(3))) == 0


def test_a_digest_alone_is_not_trusted():
    known = cache()
    adopt(known, list(range(8)))
    true = Beginning.of(list(range(8)), PAGE)
    false = dataclasses.replace(true, tokens=Beginning.of(list(range(1, 9)), PAGE).tokens)
    assert known.find(false) is None
    assert true.shared(false) == 0


def test_pages_behind_the_known_ones_are_given_back_at_once():
    known = cache()
    adopt(known, list(range(10)))
    assert (known.pages, known.arena.free_pages) == (2, 10)


def test_the_bound_holds_and_the_least_recently_used_goes_first():
    known = cache(max_pages=4)
    for first in (0, 100):
        adopt(known, list(range(first, first + 8)))
    assert count(known, list(range(8))) == 8
    adopt(known, list(range(200, 208)))
    assert known.pages == 4
    assert count(known, list(range(8))) == 8
    assert count(known, list(range(100, 108))) == 0


def test_of_a_text_longer_than_the_bound_the_first_pages_are_kept():
    known = cache(max_pages=2)
    adopt(known, list(range(20)))
    assert (known.pages, count(known, list(range(20)))) == (2, 8)
    assert not adopt(cache(max_pages=0), list(range(20)))


def test_what_a_dropped_entry_shared_with_others_stays_known():
    known = cache()
    shared = list(range(8))
    adopt(known, [*shared, 50, 51, 52, 53])
    adopt(known, [*shared, 60, 61, 62, 63])
    known.evict()
    assert count(known, [*shared, 50, 51, 52, 53]) == 8
    assert count(known, [*shared, 60, 61, 62, 63]) == 12


def test_a_longer_text_takes_the_place_of_its_own_beginning():
    known = cache()
    adopt(known, list(range(8)))
    adopt(known, list(range(16)))
    assert (known.pages, known.arena.free_pages) == (4, 8)
    assert count(known, list(range(8))) == 8


def test_what_is_known_is_not_kept_twice_and_counts_as_used():
    known = cache(max_pages=4)
    adopt(known, list(range(12)))
    assert not adopt(known, list(range(8)))
    assert known.pages == 3
    adopt(known, list(range(100, 104)))
    assert not adopt(known, list(range(8)))
    adopt(known, list(range(200, 204)))
    assert count(known, list(range(12))) == 12
    assert count(known, list(range(100, 104))) == 0


TEXTS = st.lists(st.integers(0, 1), max_size=6).map(
    lambda pages: [i for i in pages for _ in "page"]
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["adopt", "find", "evict"]), TEXTS), max_size=30))
def test_exactly_the_surviving_entries_beginnings_are_known(moves):
    """Against a plain list of texts, in the order of their last use; 8 known pages leave a gap of
    7 somewhere among 80."""
    known, texts = cache(max_pages=8, pages=80), []

    def alike(a: list[int], b: list[int]) -> int:
        return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]),
                    min(len(a), len(b)))  # fmt: skip

    for move, tokens in moves:
        if move == "evict":
            assert known.evict() == bool(texts)
            texts = texts[1:]
        expected = max((alike(text, tokens) for text in texts), default=0)
        if move == "adopt":
            assert adopt(known, tokens) == (bool(tokens) and expected < len(tokens))
        assert count(known, tokens) == (len(tokens) if move == "adopt" else expected)
        texts = [[*entry.beginning.tokens[::8]] for entry in known._entries]
        assert known.pages == sum(len(text) // PAGE for text in texts) <= 8
        assert known.arena.free_pages == 80 - known.pages
        assert not any(a is not b and alike(a, b) == len(a) for a in texts for b in texts)
    while known.evict():
        pass
    assert (known.pages, known.arena.free_pages, known._by_digest) == (0, 80, {})
