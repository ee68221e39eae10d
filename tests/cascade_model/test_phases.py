"""The block-size schedule: a function of the step alone, refused where it cannot be."""

import dataclasses

import numpy as np
import pytest

from cascade_model.config import ModelConfig, NoiseConfig, Phase, TrainerConfig, TrainingNoise
from cascade_model.corpus import Corpus
from cascade_model.errors import InputError
from cascade_model.phases import noise_at, phase_starts, require_phases

MODEL = ModelConfig(vocab_size=9, mask_id=1, pad_id=2, eos_id=3, block_size=4)
NOISE = NoiseConfig(block_size=4)


def config(*phases, num_steps=10):
    return TrainerConfig(
        num_steps=num_steps,
        block_sizes=tuple(Phase(block_size=size, share=share) for size, share in phases),
    )


GROWING = config((1, 0.25), (64, 0.25), (4, 0.5))


def test_each_phase_begins_at_its_share_of_the_steps():
    assert phase_starts(GROWING) == [[0, 1], [2, 64], [5, 4]]
    assert phase_starts(TrainerConfig()) == []


def test_each_step_has_the_noise_of_its_phase():
    sizes = [noise_at(step, NOISE, GROWING, 64).block_size for step in range(10)]
    assert sizes == [1, 1, 64, 64, 64, 4, 4, 4, 4, 4]
    assert noise_at(0, NOISE, TrainerConfig(), 64) is NOISE
    assert noise_at(9, NOISE, GROWING, 64) is NOISE


def test_a_whole_sequence_has_one_mask_rate_also_when_it_is_cut(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    noise = TrainingNoise.over(
        corpus.manifest.noise, short_rate=1.0, short_multiple=4, sequences_per_batch=2
    )
    whole = noise_at(3, noise, GROWING, corpus.sequence_length)
    lengths = set()
    for first in range(0, 20, 2):
        batch = corpus.batch(first, 2, whole)
        assert batch.thresholds.shape == (2, 1)
        lengths.add(batch.clean_tokens.shape[1])
    assert len(lengths) > 3


def test_the_share_of_masks_of_a_whole_sequence_is_its_one_rate(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    noise = noise_at(3, corpus.manifest.noise, GROWING, corpus.sequence_length)
    batch = corpus.batch(0, 64, noise)
    counts = batch.is_maskable.sum(axis=1)
    seen = batch.is_masked.sum(axis=1) / counts
    rate = batch.thresholds[:, 0] / 2**32
    assert np.abs(seen - rate).max() < 0.3
    assert abs((seen - rate).mean()) < 0.02


def test_shares_that_do_not_make_a_whole_are_refused():
    with pytest.raises(InputError, match=r"shares 0\.4, 0\.5, which add up to 0\.9; they must"):
        config((1, 0.4), (4, 0.5))
    with pytest.raises(InputError, match=r"block_sizes\[1\]\.share=0\.01 \(block size 4\) is less"):
        config((1, 0.99), (4, 0.01))


@pytest.mark.parametrize(
    ("size", "share", "sentence"),
    [
        (4, "0.5", r"trainer\.block_sizes\[1\]\.share='0\.5' must be a number"),
        (2.0, 0.5, r"trainer\.block_sizes\[1\]\.block_size=2\.0 must be a whole number"),
        (0, 0.5, r"trainer\.block_sizes\[1\]\.block_size=0 must be at least 1"),
    ],
)
def test_a_phase_that_is_none_is_refused_by_its_place(size, share, sentence):
    with pytest.raises(InputError, match=sentence):
        config((1, 0.5), (size, share))


@pytest.mark.parametrize(
    ("phases", "changes", "sentence"),
    [
        ([(1, 0.5), (2, 0.5)], {}, r"\[1\].block_size=2 is the last .* model.block_size=4"),
        ([(8, 0.5), (4, 0.5)], {}, r"\[0\].block_size=8 does not divide .* block size 4; use a"),
        ([(48, 0.5), (4, 0.5)], {}, r"\[0\].block_size=48 does not"),
        ([(1, 0.5), (4, 0.5)], {"attention": "bidirectional"}, "needs model.attention"),
    ],
)
def test_what_model_or_corpus_cannot_have_is_refused(phases, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        require_phases(config(*phases), dataclasses.replace(MODEL, **changes), 4, 48)


def test_what_can_be_is_accepted():
    require_phases(GROWING, MODEL, 4, 64)
    require_phases(TrainerConfig(), MODEL, 8, 48)
