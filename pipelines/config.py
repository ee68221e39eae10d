"""Settings of the prepare job (standard library only, so that `--help` stays fast)."""

from dataclasses import dataclass, field
from typing import Literal

from cascade_model.config import NoiseConfig, check


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the text comes from."""

    paths: tuple[str, ...]
    """Files or folders, local or any fsspec URL; `stdlib:` is the running Python's own sources."""
    format: Literal["auto", "jsonl", "parquet", "text", "hf"] = "auto"
    """auto goes by file name; text makes one document of each file; hf is a folder written by
    datasets' save_to_disk."""
    pattern: str | None = None
    """Which files of a folder to take, such as **/*.md; none takes those the format knows."""
    exclude: tuple[str, ...] = ()
    """Files or sub-folders of a folder to leave out, such as **/test."""
    text_column: str = "text"
    """Column that holds the document (JSONL, Parquet, hf)."""

    def __post_init__(self) -> None:
        check(bool(self.paths), "source.paths is empty; name at least one file or folder")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Corpus to tokens to packed sequences to pre-masked Arrow shards with a manifest."""

    output: str
    """Folder of the corpus, local or any fsspec URL; an unfinished one is taken up again."""
    source: SourceConfig
    tokenizer: str = "train"
    """A tokenizer.json (path or URL), `train` for a byte-level BPE of this corpus, or `bytes`."""
    vocab_size: int = 4096
    """Vocabulary to train, specials included; only with `train`."""
    sample_bytes: int = 2 << 20
    """Text to train the tokenizer on, in characters; only with `train`."""
    sequence_length: int = 256
    """Tokens per sequence; a multiple of noise.block_size."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    part_bytes: int = 8 << 20
    """Source bytes per part, the unit of work and of retry; part of the corpus's identity."""
    held_out_rate: float = 0.02
    """Share of the documents kept from training, chosen by a hash of their text."""
    max_dead_rate: float = 0.01
    """Share of unreadable documents above which the job fails instead of setting them aside; the
    same job may go on with another share."""
    num_workers: int = 2
    """Parts worked on at a time on Ray; the result does not depend on it."""
    runner: Literal["ray", "local"] = "ray"
    """ray: Ray Data tasks. local: in this process; the same bytes, sooner for small corpora."""

    def __post_init__(self) -> None:
        size, length = self.noise.block_size, self.sequence_length
        check(
            length >= 1 and length % size == 0,
            f"sequence_length={length} is not a multiple of noise.block_size={size}; "
            f"use {max(size, length // size * size)}",
        )
        check(self.part_bytes >= 1, f"part_bytes={self.part_bytes} must be at least 1; use 8388608")
        check(
            0.0 <= self.held_out_rate < 1.0,
            f"held_out_rate={self.held_out_rate} must be at least 0 and below 1; use 0.02",
        )
        check(
            0.0 <= self.max_dead_rate <= 1.0,
            f"max_dead_rate={self.max_dead_rate} must be in 0..1; use 0.01",
        )
        check(self.num_workers >= 1, f"num_workers={self.num_workers} must be at least 1")
        check(self.sample_bytes >= 1, f"sample_bytes={self.sample_bytes} must be at least 1")
