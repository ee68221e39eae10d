"""Packing loses no token, doubles none, and keeps every document on the block grid."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.columns import Packed
from cascade_model.schema import RAGGED, Geometry
from cascade_model.tokenizer import Encoded
from pipelines.packing import joined, pack, padding_of

EOS, PAD = 200, 201
SHAPES = st.sampled_from([(16, 4), (16, 16), (8, 1), (24, 8)])
DOCUMENTS = st.lists(st.lists(st.integers(0, 199), max_size=40), max_size=12)


def sizes_of(tokens):
    """Bytes of a token."""
    return [1 + token % 3 for token in tokens]


def packed(documents, sequence_length=16, block_size=4, packing="concat", is_response=None):
    geometry = Geometry(
        sequence_length=sequence_length, block_size=block_size, vocab_size=max(202, PAD + 1)
    )
    flat = [token for document in documents for token in document]
    encoded = Encoded(
        np.array(flat, np.uint32),
        np.array([len(d) for d in documents], np.int64),
        np.array(sizes_of(flat), np.uint32),
    )
    ids = np.arange(len(documents), dtype=np.uint64) + np.uint64(100)
    return pack(encoded, ids, geometry, EOS, PAD, packing=packing, is_response=is_response)


def by_hand(documents, sequence_length, block_size):
    """The same with Python lists."""
    stream, maskable, starts = [], [], {}
    for index, document in enumerate(documents):
        starts[len(stream)] = index
        body = [*document, EOS]
        padding = -len(body) % block_size
        stream += body + [PAD] * padding
        maskable += [True] * len(body) + [False] * padding
    tail = -len(stream) % sequence_length
    owner = None
    rows = []
    for first in range(0, len(stream), sequence_length):
        row_starts = []
        for place in range(first, first + sequence_length):
            owner = starts.get(place, owner)
            if place in starts or place == first:
                row_starts.append((place - first, 100 + owner))
        rows.append(row_starts)
    return stream + [PAD] * tail, maskable + [False] * tail, rows


def pieces_of(result: Packed):
    """(row, start, document, span, tokens without PAD) of every piece, in the order they lie."""
    found = []
    length = result.tokens.shape[1]
    for row in range(len(result)):
        low, high = result.start_offsets[row], result.start_offsets[row + 1]
        starts = result.document_starts[low:high].tolist()
        for number, (start, stop) in enumerate(itertools.pairwise([*starts, length])):
            tokens = result.tokens[row, start:stop].tolist()
            body = list(itertools.takewhile(lambda token: token != PAD, tokens))
            assert set(tokens[len(body) :]) <= {PAD}
            place = low + number
            span = (int(result.span_starts[place]), int(result.span_stops[place]))
            found.append((row, start, int(result.document_ids[place]) - 100, span, body))
    return found


def test_a_short_document_is_padded_to_a_block_and_the_sequence_filled():
    result = packed([[1, 2], [3, 4, 5, 6]])
    assert result.tokens.tolist() == [[1, 2, EOS, PAD, 3, 4, 5, 6, EOS, *[PAD] * 7]]
    assert result.document_starts.tolist() == [0, 4]
    assert result.is_maskable.sum() == 8
    assert result.span_starts.tolist() == [0, 0]
    assert result.span_stops.tolist() == [2 + 3, 1 + 2 + 3 + 1]


def test_a_cut_document_goes_on_as_a_new_start_with_the_rest_of_its_bytes():
    result = packed([list(range(20))])
    assert len(result) == 2
    assert result.start_offsets.tolist() == [0, 1, 2]
    assert result.document_ids.tolist() == [100, 100]
    assert result.span_starts.tolist() == [0, sum(sizes_of(range(16)))]
    assert result.span_stops.tolist() == [sum(sizes_of(range(16))), sum(sizes_of(range(20)))]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_documents_give_no_sequences(packing):
    assert len(packed([], packing=packing)) == 0


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, SHAPES)
def test_packing_equals_the_plain_way(documents, shape):
    result = packed(documents, *shape)
    tokens, maskable, rows = by_hand(documents, *shape)
    assert result.tokens.reshape(-1).tolist() == tokens
    assert result.is_maskable.reshape(-1).tolist() == maskable
    starts, ids = result.document_starts.tolist(), result.document_ids.tolist()
    assert list(zip(starts, ids, strict=True)) == [pair for row in rows for pair in row]
    assert np.diff(result.start_offsets).tolist() == [len(row) for row in rows]
    assert result.is_maskable.sum() == sum(len(d) + 1 for d in documents)
    assert result.is_maskable[:, 0].all()


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, SHAPES, st.sampled_from(["concat", "best_fit"]))
def test_every_token_and_every_byte_is_there_once(documents, shape, packing):
    result = packed(documents, *shape, packing)
    pieces = sorted(pieces_of(result), key=lambda piece: (piece[2], piece[3]))
    by_document = {
        number: list(group) for number, group in itertools.groupby(pieces, lambda piece: piece[2])
    }
    assert list(by_document) == list(range(len(documents)))
    for number, document in enumerate(documents):
        # Only a piece that is an EOS alone has no bytes; its span comes behind all others.
        mine = sorted(by_document[number], key=lambda piece: piece[3])
        assert [token for piece in mine for token in piece[4]] == [*document, EOS]
        edges = [piece[3] for piece in mine]
        assert edges[0][0] == 0
        assert edges[-1][1] == sum(sizes_of(document))
        assert all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        for _, start, _, span, body in mine:
            assert start % shape[1] == 0
            assert span[1] - span[0] == sum(sizes_of([t for t in body if t != EOS]))
    assert result.is_maskable.sum() == (result.tokens != PAD).sum()
    assert result.is_maskable[:, 0].all()
    assert padding_of(result, np.array([len(d) for d in documents], np.int64)) == int(
        (result.tokens == PAD).sum()
    )


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, SHAPES)
def test_best_fit_cuts_no_document_that_fits_and_long_ones_into_whole_sequences(documents, shape):
    length, block = shape
    pieces = pieces_of(packed(documents, *shape, "best_fit"))
    for number, document in enumerate(documents):
        sizes = sorted((len(p[4]) for p in pieces if p[2] == number), reverse=True)
        whole, rest = divmod(len(document) + 1, length)
        assert sizes == [length] * whole + [rest] * (rest > 0)
    # Any two sequences that are not full could not stand in one: best fit opens none too many.
    used = {}
    for row, start, _, _, body in pieces:
        used[row] = max(used.get(row, 0), start + -(-len(body) // block) * block)
    assert all(a + b > length for a, b in itertools.combinations(used.values(), 2))
    # Sequences, and the pieces in them, come in the order of their documents.
    firsts = [next(p[2] for p in pieces if p[0] == row) for row in sorted(used)]
    assert firsts == sorted(firsts)
    for row in used:
        order = [p[2] for p in pieces if p[0] == row]
        assert order == sorted(order)


def test_best_fit_puts_a_piece_where_the_least_room_is_left():
    # Without PAD: 12 and 10 open two sequences; 4 fits both and goes to the first, then 6.
    documents = [[1] * size for size in (3, 11, 9, 5)]
    rows = packed(documents, 16, 1, "best_fit").document_ids.reshape(-1).tolist()
    assert rows == [100, 101, 102, 103]
    result = packed(documents, 16, 1, "best_fit")
    assert np.diff(result.start_offsets).tolist() == [2, 2]
    assert (result.tokens == PAD).sum() == 0


def test_the_padding_of_best_fit_is_small_on_many_documents():
    documents = [[1] * (7 * i % 61) for i in range(500)]
    lengths = np.array([len(d) for d in documents])
    result = packed(documents, 64, 4, "best_fit")
    assert padding_of(result, lengths) / result.tokens.size < 0.06
    assert padding_of(packed(documents, 64, 4), lengths) <= padding_of(result, lengths)


def test_only_responses_are_maskable_and_an_end_goes_with_its_last_token():
    documents = [[1, 2, 3], [4, 5], []]
    is_response = np.array([False, True, True, True, False])
    for packing in ("concat", "best_fit"):
        result = packed(documents, 16, 4, packing, is_response)
        assert result.tokens[0].tolist() == [1, 2, 3, EOS, 4, 5, EOS, PAD, EOS, *[PAD] * 7]
        assert np.flatnonzero(result.is_maskable[0]).tolist() == [1, 2, 3, 4]


def test_joined_sequences_are_what_was_cut():
    result = packed([list(range(number, number + 9)) for number in range(12)])
    again = joined([result.slice(0, 3), result.slice(3, 4), result.slice(4, len(result))])
    for name in ("tokens", "start_offsets", "is_maskable", *RAGGED):
        assert np.array_equal(getattr(again, name), getattr(result, name)), name
