"""Every number of ranks takes the same samples in the same forward passes."""

import dataclasses

import numpy as np
import pytest

from cascade_model.corpus import Corpus
from cascade_model.errors import InputError
from cascade_model.feed import feed, require_shares, spans
from cascade_model.training_config import Phase, TrainerConfig

CONFIG = TrainerConfig(num_steps=4, sequences_per_step=8, sequences_per_forward=2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_forward_passes_of_a_step_do_not_depend_on_the_ranks(ranks):
    found = [span for rank in range(ranks) for span in spans(3, CONFIG, rank, ranks)]
    assert found == [(24, 2), (26, 2), (28, 2), (30, 2)]


def test_a_share_that_is_no_multiple_ends_with_a_smaller_pass():
    config = dataclasses.replace(CONFIG, sequences_per_forward=3)
    assert spans(0, config, 1, 2) == [(4, 3), (7, 1)]


def test_a_step_must_be_shared_evenly():
    require_shares(CONFIG, [1, 2, 4])
    with pytest.raises(InputError, match=r"sequences_per_step=8 .* num_workers=3; use a mul.* 3$"):
        spans(0, CONFIG, 0, 3)
    with pytest.raises(InputError, match=r"num_workers=3 or 5; use a multiple of 30$"):
        require_shares(CONFIG, [2, 3, 5])


def test_the_feed_goes_on_where_it_was_left(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    phases = (Phase(block_size=2, share=0.5), Phase(block_size=4, share=0.5))
    config = dataclasses.replace(CONFIG, block_sizes=phases)
    whole = list(feed(corpus, corpus.manifest.noise, config, 0))
    firsts = [first for step in range(4) for first, _ in spans(step, config, 0, 1)]
    for first, batch in zip(firsts[8:], whole[8:], strict=True):
        alone = corpus.batch(first, 2, corpus.manifest.noise)
        assert np.array_equal(batch.sequence_ids, alone.sequence_ids)
        assert np.array_equal(batch.is_masked, alone.is_masked)
    rest = list(feed(corpus, corpus.manifest.noise, config, 1))
    assert len(whole) == 16
    assert [batch.thresholds.shape[1] for batch in whole] == [32] * 8 + [16] * 8
    for one, two in zip(whole[4:], rest, strict=True):
        assert np.array_equal(one.sequence_ids, two.sequence_ids)
        assert np.array_equal(one.is_masked, two.is_masked)
