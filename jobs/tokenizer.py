"""`cascade tokenizer train`: a tokenizer.json from a bounded sample of a corpus."""

from dataclasses import dataclass, field
from typing import Any

from cascade_model.settings import check
from jobs.cli import actions, command
from pipelines.config import SourceConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a byte-level BPE, the very one that `prepare` trains from the same settings."""

    output: str
    """The tokenizer.json to write, local or any fsspec URL; another that is there is refused."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the text comes from."""
    vocab_size: int = 4096
    """Tokens, specials included."""
    sample_bytes: int = 2 << 20
    """Text to train on, in characters."""
    part_bytes: int = 8 << 20
    """Source bytes per part; the sample is taken from evenly spaced parts."""
    held_out_rate: float = 0.02
    """Share of the documents not trained on, chosen by a hash of their text."""

    def __post_init__(self) -> None:
        self.source.check_as("source")
        check(self.part_bytes >= 1, f"part_bytes={self.part_bytes} must be at least 1; use 8388608")
        check(self.sample_bytes >= 1, f"sample_bytes={self.sample_bytes} must be at least 1")
        check(
            0.0 <= self.held_out_rate < 1.0,
            f"held_out_rate={self.held_out_rate} must be at least 0 and below 1; use 0.02",
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, write the file, print its size and what a token stands for in held-out text."""
    import posixpath

    from cascade_model.commit import Folder, require_writable
    from cascade_model.token_sizes import utf8_lengths
    from cascade_model.tokenizer import train_tokenizer
    from pipelines.sampling import sample_texts

    folder, name = posixpath.split(config.output)
    check(bool(name), f"output={config.output} names no file; add /tokenizer.json")
    require_writable(folder or ".")
    where = config.source, config.part_bytes
    trained = list(sample_texts(*where, config.held_out_rate, config.sample_bytes))
    check(
        bool(trained),
        f"source.paths={list(config.source.paths)} holds no text to train on; give documents or a "
        "smaller held_out_rate",
    )
    tokenizer = train_tokenizer(trained, config.vocab_size)
    Folder(folder or ".").publish(name, tokenizer.to_bytes())
    others = _others(list(sample_texts(*where, 0.0, config.sample_bytes)), trained)
    encoded, size = tokenizer.encode_arrays(others), int(utf8_lengths(others).sum())
    summary = {
        "output": config.output,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "trained_on_bytes": int(utf8_lengths(trained).sum()),
        "held_out_bytes": size,
        "bytes_per_token": round(size / len(encoded.tokens), 3) if others else None,
    }
    for key, value in summary.items():
        print(f"{key:<20}{value:,}" if isinstance(value, int | float) else f"{key:<20}{value}")
    return summary


def _others(texts: list[str], trained: list[str]) -> list[str]:
    """The texts that were not trained on, nor are the cut beginning of one that was."""
    seen = set(trained)
    return [
        text
        for text in texts
        if text and text not in seen and not any(own.startswith(text) for own in trained)
    ]


main = actions(
    "tokenizer",
    train=("a byte-level BPE from a sample of a corpus", command(TrainConfig, train, "train")),
)

if __name__ == "__main__":
    raise SystemExit(main())
