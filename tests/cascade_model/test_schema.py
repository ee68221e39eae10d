"""The columns and the sizes of a shard's row."""

import numpy as np
import pytest

from cascade_model.config import NoiseConfig
from cascade_model.schema import Geometry, batch_rows, documents_schema, rates_per_row


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(vocab_size, dtype):
    geometry = Geometry(sequence_length=8, block_size=4, vocab_size=vocab_size)
    assert geometry.token_dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"per": "sequence", "block_size": 4}, 1),
        ({"per": "sequence", "block_size": 64}, 1),
        ({"per": "block", "block_size": 16}, 0),
        ({"per": "block", "block_size": 32}, 8),
        ({"per": "block", "block_size": 256}, 1),
    ],
)
def test_thresholds_are_stored_where_they_take_no_more_room_than_the_bitmap(settings, expected):
    noise = NoiseConfig(**settings)
    assert rates_per_row(noise, 256) == expected
    if noise.per == "block":
        assert (4 * 256 // noise.block_size <= 256 // 8) == (expected > 0)


def test_the_documents_table_has_no_empty_cells():
    assert not any(field.nullable for field in documents_schema())


def test_record_batches_are_bounded_in_tokens():
    assert batch_rows(Geometry(sequence_length=4096, block_size=8, vocab_size=300)) == 16
    assert batch_rows(Geometry(sequence_length=2**20, block_size=8, vocab_size=300)) == 1
