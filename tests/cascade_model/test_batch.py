"""A batch on a device says what the corpus said."""

import numpy as np
import torch

from cascade_model.batch import TrainBatch
from cascade_model.corpus import Batch


def rows(**changes) -> Batch:
    values = {
        "sequence_ids": np.array([3, 1], np.uint64),
        "clean_tokens": np.arange(8, dtype=np.int64).reshape(2, 4),
        "is_masked": np.eye(2, 4, dtype=bool),
        "is_maskable": np.ones((2, 4), bool),
        "thresholds": np.array([[0, 2**31], [1, 2**32 - 1]], np.uint32),
        "positions": np.tile(np.arange(4), (2, 1)),
        "segments": np.zeros((2, 4), np.int32),
    }
    return Batch(**values | changes)


def test_every_field_keeps_its_values_and_has_the_type_of_the_contract():
    batch = TrainBatch.from_numpy(rows())
    for name in ("sequence_ids", "clean_tokens", "is_masked", "is_maskable", "positions"):
        expected = getattr(rows(), name).astype(np.int64)
        assert np.array_equal(getattr(batch, name).numpy().astype(np.int64), expected)
    types = {"sequence_ids": torch.int64, "clean_tokens": torch.int64, "is_masked": torch.bool,
             "is_maskable": torch.bool, "mask_rates": torch.float32, "positions": torch.int64,
             "segments": torch.int32}  # fmt: skip
    assert {name: getattr(batch, name).dtype for name in types} == types


def test_a_mask_rate_is_its_threshold_over_two_to_the_32():
    rates = TrainBatch.from_numpy(rows()).mask_rates
    expected = torch.tensor([[0.0, 0.5], [2.0**-32, 1.0]])
    assert torch.equal(rates, expected)
    # Divided in float32 the smallest rate would be right but 2**32 - 1 would be lost before.
    assert (rates <= 1).all()


def test_the_batch_is_a_copy_so_that_later_changes_of_the_rows_do_not_reach_it():
    source = rows()
    batch = TrainBatch.from_numpy(source)
    source.clean_tokens[0, 0] = 99
    assert batch.clean_tokens[0, 0] == 0


def test_rows_that_are_views_of_a_read_only_file_can_be_used():
    tokens = np.arange(8, dtype=np.int64).reshape(2, 4)
    tokens.flags.writeable = False
    batch = TrainBatch.from_numpy(rows(clean_tokens=tokens))
    batch.clean_tokens[0, 0] = 7
    assert tokens[0, 0] == 0
