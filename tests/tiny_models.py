"""Small models and hand-built batches for the laws of model, loss and sampler."""

from pathlib import Path

import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.model import Transformer
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from cascade_model.weights import save_model

MASK, PAD, EOS = 15, 14, 13


def tiny_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "max_sequence_length": 128,
        "block_size": 4,
        "mask_id": MASK,
        "pad_id": PAD,
        "eos_id": EOS,
    }
    return ModelConfig(**(values | changes))


def text_config(tokenizer: Tokenizer, **changes) -> ModelConfig:
    """A tiny model of a tokenizer's texts."""
    values = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_sequence_length": 128,
        "block_size": 4,
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
    }
    return ModelConfig(**(values | changes))


def saved_text_model(folder: Path, tokenizer: Tokenizer | None = None, seed: int = 0) -> str:
    """The folder of a tiny model with random weights, for bytes without another tokenizer."""
    tokenizer = tokenizer or byte_tokenizer()
    network = Transformer(text_config(tokenizer))
    network.init_weights(seed)
    save_model(folder, network, tokenizer)
    return str(folder)


def lively_model(seed: int = 0, **changes) -> Transformer:
    """Float64, with logits that differ clearly between inputs."""
    model = Transformer(tiny_config(**changes))
    model.init_weights(seed)
    with torch.no_grad():
        model.embed.weight.mul_(50)
        if model.head.weight is not model.embed.weight:
            model.head.weight.mul_(50)
    return model.double().eval()


def batch_of(clean, *, block_size, is_masked=None, rates=None, segments=None) -> TrainBatch:
    """One batch; everything is maskable, and by default everything is masked at rate 1."""
    clean = torch.as_tensor(clean, dtype=torch.int64)
    n, length = clean.shape
    everything = torch.ones(n, length, dtype=torch.bool)
    if segments is None:
        segments = torch.zeros(n, length, dtype=torch.int32)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    place = torch.arange(length).expand(n, -1)
    first = torch.where(starts, place, 0).cummax(dim=1).values
    return TrainBatch(
        sequence_ids=torch.arange(n),
        clean_tokens=clean,
        is_masked=everything if is_masked is None else is_masked,
        is_maskable=everything,
        mask_rates=torch.ones(n, length // block_size) if rates is None else rates,
        positions=place - first,
        segments=segments,
    )
