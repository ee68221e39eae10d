"""Known beginnings: the longest is found, tokens are compared, the least used goes first."""

import torch

from cascade_model.pages import PageArena
from cascade_model.prefix_cache import PrefixCache
from tests.tiny_models import tiny_config


def cache(max_pages: int = 6) -> PrefixCache:
    arena = PageArena(tiny_config(), num_pages=12, page_tokens=4, dtype=torch.float32, device="cpu")
    return PrefixCache(arena, max_pages)


def publish(known: PrefixCache, tokens: list[int]) -> None:
    run = known.arena.take(known.arena.pages_for(len(tokens)))
    known.publish(tokens, run)
    known.arena.give_back(run)


def test_the_longest_beginning_of_whole_pages_is_found():
    known = cache()
    publish(known, list(range(10)))
    assert known.find(list(range(20)))[1] == 8
    assert known.find([*range(6), 99, 99])[1] == 4
    assert known.find([1, *range(10)]) is None
    assert known.find(list(range(3))) is None


def test_a_digest_alone_is_not_trusted():
    known = cache()
    publish(known, list(range(8)))
    [number] = known._entries
    entry = known._entries[number]
    known._entries[number] = type(entry)(tuple(range(1, 9)), entry.run)
    assert known.find(list(range(8))) is None


def test_the_bound_holds_and_the_least_recently_used_goes_first():
    known = cache(max_pages=4)
    for first in (0, 100):
        publish(known, list(range(first, first + 8)))
    known.find(list(range(8)))
    publish(known, list(range(200, 208)))
    assert known.pages <= 4
    assert known.find(list(range(8))) is not None
    assert known.find(list(range(100, 108))) is None
    publish(known, list(range(300, 320)))  # longer than the bound: not kept
    assert known.find(list(range(300, 320))) is None


def test_clearing_gives_every_page_back():
    known = cache()
    publish(known, list(range(8)))
    publish(known, list(range(50, 62)))
    known.clear()
    assert (known.pages, known.arena.free_pages) == (0, 12)
