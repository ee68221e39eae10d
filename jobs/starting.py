"""The model that a run starts from: one that is there, or a new one of the settings' shape."""

import dataclasses
from typing import TYPE_CHECKING, Any

from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch
from cascade_model.settings import check, shown
from jobs.convert import ConvertConfig
from jobs.training_settings import ModelShape, TrainingConfig

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.networks import Network


def starting_config(config: TrainingConfig, corpus: "Corpus") -> ModelConfig:
    """The model's configuration: of `initial_model`, or of `model` and the corpus."""
    manifest = corpus.manifest
    if config.initial_model is not None:
        from cascade_model.weights import read_config

        shape = read_config(config.initial_model)
        if shape.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise CheckpointMismatch(
                f"initial_model={config.initial_model} was made with the tokenizer "
                f"{shown(shape.tokenizer_sha256)} and the corpus {config.corpus} with "
                f"{shown(manifest.tokenizer_sha256)}; prepare the corpus with the model's tokenizer"
            )
        require_shape(config, shape)
        require_blocks(config, shape, corpus)
        return dataclasses.replace(shape, **infilling_of(corpus))
    values = dataclasses.asdict(config.model)
    values["block_size"] = config.model.block_size or corpus.block_size
    return ModelConfig(
        vocab_size=manifest.vocab_size,
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **infilling_of(corpus),
        **values,
    )


def require_shape(config: TrainingConfig, shape: ModelConfig) -> None:
    """Refuse a setting of `model` that `initial_model` has otherwise, as it would not be followed;
    what nobody set, and what is the same there, is no contradiction."""
    for field in dataclasses.fields(ModelShape):
        given, found = getattr(config.model, field.name), getattr(shape, field.name)
        if given in (field.default, found):
            continue
        cure = f"leave model.{field.name} out"
        if field.name in ConvertConfig.__dataclass_fields__:
            flag = field.name.replace("_", "-")
            cure += f", or start from what `cascade convert --{flag} {given}` makes of it"
        check(
            False,
            f"model.{field.name}={given} and initial_model={config.initial_model} has "
            f"{field.name}={found}, which a run keeps; {cure}",
        )


def require_blocks(config: TrainingConfig, shape: ModelConfig, corpus: "Corpus") -> None:
    """Refuse a model to start from whose blocks are not those of the corpus, or parts of them."""
    size, most = shape.block_size, corpus.block_size
    check(
        shape.attention != "block_causal" or most % size == 0,
        f"initial_model={config.initial_model} has block_size={size}, which does not divide the "
        f"block size {most} of corpus={config.corpus}; prepare the corpus with --noise.block-size "
        f"{size}, or start from what `cascade convert --block-size {most}` makes of the model",
    )


def require_length(config: TrainingConfig, shape: ModelConfig, corpus: "Corpus") -> None:
    """Refuse a corpus whose sequences are longer than what the model will be asked for."""
    most, length = shape.max_sequence_length, corpus.sequence_length
    if config.initial_model is not None:
        require_context(f"initial_model={config.initial_model}", shape, corpus, config.corpus)
    check(
        length <= most,
        f"model.max_sequence_length={most} and corpus={config.corpus} has sequences of {length} "
        f"tokens; use model.max_sequence_length={length}",
    )


def require_context(model: str, shape: ModelConfig, corpus: "Corpus", where: str) -> None:
    """Refuse a corpus, at `where`, whose sequences are longer than what a finished model can read:
    its rotations would go on beyond what it has learnt, a table of places would end."""
    most, length = shape.max_sequence_length, corpus.sequence_length
    check(
        length <= most,
        f"{model} has max_sequence_length={most} and corpus={where} has sequences of {length} "
        f"tokens; prepare the corpus with --sequence-length {most}, or a shorter one",
    )


def infilling_of(corpus: "Corpus") -> dict[str, Any]:
    """What a model learns of filling holes from a corpus, as settings of its configuration: nothing
    where no document is rearranged, and then a model that could do it before keeps its word."""
    entry = corpus.manifest.infill
    return {} if entry is None else {"infill": entry.mode, "infill_ids": entry.ids}


def starting_model(config: TrainingConfig, corpus: "Corpus") -> "Network":
    """The initial weights, equal on every rank: loaded, or drawn from `trainer.seed`."""
    from cascade_model.networks import build_network
    from cascade_model.weights import load_model

    shape = starting_config(config, corpus)
    if config.initial_model is not None:
        model = load_model(config.initial_model)[0]
        model.config = shape
        return model
    model = build_network(shape)
    model.init_weights(config.trainer.seed)
    return model


def initial_weights_of(config: TrainingConfig) -> str | None:
    """The digest of the model that a run starts from; none if it draws its own."""
    from cascade_model.weights import weights_digest

    return None if config.initial_model is None else weights_digest(config.initial_model)
