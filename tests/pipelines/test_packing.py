"""Packing loses no token, doubles none, and keeps every document on the block grid."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.schema import Geometry
from cascade_model.tokenizer import Encoded
from pipelines.packing import pack

EOS, PAD = 200, 201


def packed(documents, sequence_length=16, block_size=4):
    geometry = Geometry(
        sequence_length=sequence_length, block_size=block_size, vocab_size=max(202, PAD + 1)
    )
    tokens = np.concatenate([np.array(d, np.uint32) for d in documents] or [np.empty(0, np.uint32)])
    lengths = np.array([len(d) for d in documents], np.int64)
    ids = np.arange(len(documents), dtype=np.uint64) + np.uint64(100)
    return pack(Encoded(tokens, lengths), ids, geometry, EOS, PAD)


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


def test_a_short_document_is_padded_to_a_block_and_the_sequence_filled():
    result = packed([[1, 2], [3, 4, 5, 6]])
    assert result.tokens.tolist() == [[1, 2, EOS, PAD, 3, 4, 5, 6, EOS, *[PAD] * 7]]
    assert result.document_starts.tolist() == [0, 4]
    assert result.is_maskable.sum() == 8


def test_a_cut_document_goes_on_as_a_new_start():
    result = packed([list(range(20))])
    assert len(result) == 2
    assert result.start_offsets.tolist() == [0, 1, 2]
    assert result.document_ids.tolist() == [100, 100]


def test_no_documents_give_no_sequences():
    assert len(packed([])) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 199), max_size=40), max_size=12),
    st.sampled_from([(16, 4), (16, 16), (8, 1), (24, 8)]),
)
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
