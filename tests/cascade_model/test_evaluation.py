"""The bound is what its formula says, with fixed noise; the baseline is add-one counting."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch
from cascade_model.evaluation import (
    bound,
    chosen_sequences,
    evaluation_noise,
    sequential,
    unigram_baseline,
    untrained,
)
from cascade_model.likelihood import sequential as sequential_answer
from cascade_model.likelihood import sequential_nats
from cascade_model.model import Transformer
from cascade_model.noise import thresholds
from tests.cascade_model.corpus_making import make_corpus


@pytest.fixture(scope="module")
def held_out(tiny_corpus):
    return Corpus.open(tiny_corpus, split="held_out")


def shaped(corpus, **changes):
    manifest = corpus.manifest
    values = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 16,
        "block_size": 4,
        **changes,
    }
    config = ModelConfig(
        vocab_size=manifest.vocab_size,
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **values,
    )
    model = Transformer(config)
    model.init_weights(0)
    return model


def uniform(corpus, **changes):
    """A model that gives every real token the same probability."""
    model = shaped(corpus, **changes)
    with torch.no_grad():
        model.head.weight.zero_()
    return model


def test_uniform_model_scores_the_log_of_the_vocabulary(held_out):
    measured = bound(uniform(held_out), held_out, draws=8)
    exact = math.log(held_out.manifest.vocab_size - 2)
    assert measured.nats_per_token == pytest.approx(exact, abs=5 * measured.standard_error)
    assert 0 < measured.standard_error < 0.3
    assert not measured.is_exact


def test_autoregressive_uniform_model_is_exact(held_out):
    model = uniform(held_out, block_size=1, logits="shifted", clean_half="token_causal")
    measured = bound(model, held_out)
    assert measured.is_exact
    assert measured.nats_per_token == pytest.approx(math.log(model.config.vocab_size - 2), rel=1e-5)
    assert measured.standard_error < 1e-4


def test_value_per_byte_is_the_value_per_token_times_tokens_per_byte(held_out):
    measured = bound(uniform(held_out), held_out, draws=1, max_sequences=8)
    ratio = held_out.num_tokens / held_out.num_bytes
    assert measured.nats_per_byte == pytest.approx(measured.nats_per_token * ratio)
    assert measured.num_sequences == 8


def test_same_model_gets_the_same_value_whatever_the_batch(held_out):
    model = shaped(held_out)
    one = bound(model, held_out, draws=1, max_sequences=10, sequences_per_forward=3)
    two = bound(model, held_out, draws=1, max_sequences=10, sequences_per_forward=10)
    assert one.nats_per_token == pytest.approx(two.nats_per_token, rel=1e-5)
    assert one.num_tokens == two.num_tokens


def test_mask_rates_fill_every_stratum():
    noise = evaluation_noise(4, strata=32)
    rates = thresholds(noise, 0, np.arange(32, dtype=np.uint64), 16) / 2**32
    counts, _ = np.histogram(rates, bins=8, range=(1e-3, 1.0))
    assert counts.tolist() == [64] * 8


def test_unigram_baseline_is_add_one_counting(tiny_corpus, held_out):
    train = Corpus.open(tiny_corpus)
    vocabulary = train.manifest.vocab_size

    def tokens(corpus):
        rows = corpus.rows(np.arange(corpus.num_sequences, dtype=np.uint64))
        return rows.tokens[rows.is_maskable]

    seen = tokens(train)
    counts = np.bincount(seen, minlength=vocabulary)
    expected = -np.log((counts[tokens(held_out)] + 1) / (len(seen) + vocabulary - 2)).mean()
    assert unigram_baseline(train, held_out) == pytest.approx(expected, rel=1e-9)
    assert expected < math.log(vocabulary)


def test_untrained_model_has_the_same_shape_and_its_own_weights(held_out):
    model = shaped(held_out)
    fresh = untrained(model, seed=3)
    assert fresh.config == model.config
    assert not torch.equal(fresh.embed.weight, model.embed.weight)


def test_other_tokenizer_is_refused_with_both_digests(held_out):
    model = shaped(held_out)
    model.config = dataclasses.replace(model.config, tokenizer_sha256="abc")
    with pytest.raises(CheckpointMismatch, match=f"abc .* {held_out.manifest.tokenizer_sha256}"):
        bound(model, held_out)


def test_a_bidirectional_model_has_a_rate_for_each_sequence(held_out):
    measured = bound(uniform(held_out, attention="bidirectional"), held_out, draws=8)
    exact = math.log(held_out.manifest.vocab_size - 2)
    assert measured.nats_per_token == pytest.approx(exact, abs=5 * measured.standard_error)
    assert not measured.is_exact


def test_what_can_be_predicted_is_an_axis(held_out):
    model = uniform(held_out, block_size=1, logits="shifted", clean_half="token_causal")
    size = model.config.vocab_size
    for outcomes, count in (("text", size - 2), ("all_but_mask", size - 1), ("all", size)):
        measured = bound(model, held_out, max_sequences=2, outcomes=outcomes)
        assert measured.nats_per_token == pytest.approx(math.log(count), rel=1e-5)


@pytest.mark.parametrize(
    "shape",
    [{}, {"block_size": 1, "logits": "shifted"}, {"attention": "bidirectional"}],
)
def test_sequential_measures_each_document_as_an_answer(held_out, shape):
    model = shaped(held_out, **shape)
    measured = sequential(model, held_out, max_sequences=2, sequences_per_forward=7)
    rows = held_out.batch(0, 2, evaluation_noise(held_out.block_size))
    total, count = 0.0, 0
    for row in range(2):
        for segment in range(rows.segments[row].max() + 1):
            is_own = (rows.segments[row] == segment) & rows.is_maskable[row]
            tokens = rows.clean_tokens[row][is_own].tolist()
            given = 1 if model.config.logits == "shifted" else 0
            if model.config.attention == "bidirectional":
                # Its canvas ends with the padding, which the answer alone does not have.
                tokens += [held_out.manifest.pad_id] * int(
                    ((rows.segments[row] == segment) & ~rows.is_maskable[row]).sum()
                )
            answer = sequential_answer(model, tokens[:given], tokens[given:])
            total -= float(answer[: int(is_own.sum()) - given].sum())
            count += int(is_own.sum()) - given
    assert measured.is_exact
    assert measured.num_tokens == count
    assert measured.nats_per_token == pytest.approx(total / count, rel=1e-5)


def test_sequential_gives_padding_that_ends_texts_too_as_training_shows_it(tmp_path):
    corpus = Corpus.open(make_corpus(tmp_path, {"all": [f"{n} " * (n % 9) for n in range(40)]}))
    ids = chosen_sequences(corpus, 2)
    ranks = np.arange(2, dtype=np.uint64)
    batch = TrainBatch.from_numpy(corpus.masked(ids, ranks, evaluation_noise(4), 0))
    text = batch.is_maskable
    assert not text.all()

    def measured(model, is_open):
        with torch.no_grad():
            return float(sequential_nats(model, batch, is_open, text).sum() / text.sum())

    hidden = torch.ones_like(text)
    model = shaped(corpus, stop_ids=(corpus.manifest.pad_id,))
    found = sequential(model, corpus, max_sequences=2).nats_per_token
    assert found == pytest.approx(measured(model, text), rel=1e-6)
    assert found != pytest.approx(measured(model, hidden), rel=1e-6)
    model = shaped(corpus)
    found = sequential(model, corpus, max_sequences=2).nats_per_token
    assert found == pytest.approx(measured(model, hidden), rel=1e-6)


def test_sequential_is_the_likelihood_of_an_autoregressive_model(held_out):
    model = shaped(held_out, block_size=1, logits="shifted")
    one, two = bound(model, held_out), sequential(model, held_out)
    assert one.nats_per_token == pytest.approx(two.nats_per_token, rel=1e-6)
    assert one.num_tokens == two.num_tokens


def test_all_draws_and_all_models_take_the_same_sequences(held_out):
    few = bound(uniform(held_out), held_out, draws=3, max_sequences=4)
    assert few.num_sequences == 4
    ids = chosen_sequences(held_out, 4)
    assert len(set(ids.tolist())) == 4
    assert ids.tolist() == chosen_sequences(held_out, None)[:4].tolist()
    maskable = int(held_out.rows(ids).is_maskable.sum())
    assert few.num_tokens == 3 * maskable
