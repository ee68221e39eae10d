"""The block-size schedule: a function of the step alone, refused where it cannot be."""

import dataclasses

import numpy as np
import pytest

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, NoiseConfig, TrainingNoise
from cascade_model.corpus import Corpus
from cascade_model.errors import InputError
from cascade_model.feed import feed
from cascade_model.phases import block_size_at, noise_at, phase_starts, require_phases
from cascade_model.training_config import Phase, TrainerConfig
from tests.cascade_model.corpus_making import make_corpus
from tests.cascade_model.training_runs import Killed, dying, losses, make

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


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Blocks of 16, four times those of the model."""
    texts = {"all": [f"{number} " * (3 + number % 40) for number in range(200)]}
    folder = tmp_path_factory.mktemp("wide")
    return Corpus.open(make_corpus(folder, texts, noise=NoiseConfig(block_size=16)))


UP_AND_DOWN = tuple(Phase(block_size=size, share=1 / 6) for size in (1, 4, 16, 64, 16, 4))


def all_short(corpus, **changes):
    """The noise of a model with blocks of 4 whose every global batch is cut."""
    recipe = dataclasses.replace(corpus.manifest.noise, block_size=4, **changes)
    return TrainingNoise.over(recipe, short_rate=1.0, short_multiple=4, sequences_per_batch=4)


@pytest.mark.parametrize("per", ["block", "sequence"])
def test_blocks_larger_than_the_models_are_not_cut_within(wide, per):
    trainer = TrainerConfig(num_steps=48, sequences_per_step=4, block_sizes=UP_AND_DOWN)
    lengths = set()
    for step, batch in enumerate(feed(wide, all_short(wide, per=per), trainer, 0)):
        size, length = block_size_at(step, trainer), batch.clean_tokens.shape[1]
        lengths.add((size, length))
        assert size == 64 or TrainBatch.from_numpy(batch).noise_block_size == size
    assert all(sum(size == each for each, _ in lengths) > 1 for size in (1, 4, 16, 64))


def test_a_run_of_short_batches_goes_up_and_down_and_on_from_the_middle(wide, tmp_path):
    trainer = TrainerConfig(
        num_steps=6, sequences_per_step=4, checkpoint_every=1, log_every=1, block_sizes=UP_AND_DOWN
    )
    for name, loss in (("whole", {}), ("cut", {"loss_fn": dying(3)}), ("cut", {})):
        run = dataclasses.replace(
            make(wide, tmp_path / name, trainer, **loss), noise=all_short(wide)
        )
        if loss:
            with pytest.raises(Killed):
                run.fit()
        else:
            run.fit()
    assert len(losses(tmp_path / "whole")) == 6
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


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
