"""Settings of the prepare job (standard library only, so that `--help` stays fast)."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cascade_model.config import NoiseConfig
from cascade_model.settings import check

ONLY_SOURCE = "source"
"""Name of the source of a corpus that has one."""
MAX_SOURCES = 1024
"""Each has at least one sample of every 1024 (`cascade_model.mixing`)."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the text comes from."""

    paths: tuple[str, ...] = ()
    """Files or folders, local or any fsspec URL; `stdlib:` is the running Python's own sources."""
    format: Literal["auto", "jsonl", "parquet", "text", "arrow", "hf"] = "auto"
    """auto goes by file name; text makes one document of each file; arrow is an IPC file or stream;
    hf is a folder written by datasets' save_to_disk."""
    pattern: str | None = None
    """Which files of a folder to take, such as **/*.md; none takes those the format knows."""
    exclude: tuple[str, ...] = ()
    """Files or sub-folders of a folder to leave out, such as **/test."""
    text_column: str = "text"
    """Column that holds the document (JSONL, Parquet, Arrow, hf)."""
    messages_column: str | None = None
    """Column that holds a conversation, a list of {role, content}; then only responses are
    masked. Instead of text_column."""
    id_column: str | None = None
    """Column whose value names a record in dead letters and the documents table."""
    weight: float = 1.0
    """Share of the tokens that a reader takes from this source, relative to the others of a
    mixture."""

    def check_as(self, label: str) -> None:
        """Check the settings under the name that they have in the job, such as `mixture.web`."""
        messages = f"{label}.messages_column={self.messages_column}"
        check(bool(self.paths), f"{label}.paths is empty; name at least one file or folder")
        check(
            0 < self.weight < math.inf,
            f"{label}.weight={self.weight} must be a number above 0; to read nothing from a "
            "source, leave it out",
        )
        check(
            self.messages_column is None or self.text_column == "text",
            f"{messages} and {label}.text_column={self.text_column} contradict each other; set "
            "one of them",
        )
        check(
            self.messages_column is None or self.format != "text",
            f"{messages} needs records but {label}.format=text has none; use jsonl, parquet, "
            "arrow or hf",
        )


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Rules that drop a document, each off when it is none; its reason is the rule's name.

    The rules and their usual thresholds are those of Gopher (Rae et al. 2021, table A1) and C4
    (Raffel et al. 2020, section 2.2). Words are what stands between white space, lines are those
    with anything in them.
    """

    min_bytes: int | None = None
    """UTF-8 bytes of the cleaned text."""
    min_words: int | None = None
    """Gopher: 50."""
    max_words: int | None = None
    """Gopher: 100000."""
    min_mean_word_length: float | None = None
    """Characters; Gopher: 3."""
    max_mean_word_length: float | None = None
    """Characters; Gopher: 10."""
    min_letter_share: float | None = None
    """Words with at least one letter; Gopher: 0.8."""
    max_symbol_share: float | None = None
    """Hash signs or ellipses (the more frequent) for each word; Gopher: 0.1."""
    max_bullet_line_share: float | None = None
    """Lines that begin with a bullet; Gopher: 0.9."""
    max_ellipsis_line_share: float | None = None
    """Lines that end with an ellipsis; Gopher: 0.3."""
    max_repeated_line_share: float | None = None
    """Lines that stood in the document before; Gopher: 0.3."""
    min_unique_word_share: float | None = None
    """Distinct words among all."""
    banned_phrases: tuple[str, ...] = ()
    """Texts that no document may contain, in any case; C4: lorem ipsum."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_share") and value is not None:
                check(0 <= value <= 1, f"filters.{name}={value} must be in 0..1; leave it out")
            elif isinstance(value, int | float):
                check(value >= 0, f"filters.{name}={value} must be at least 0; leave it out")
        check(all(self.banned_phrases), "filters.banned_phrases holds an empty text; remove it")
        for name in ("words", "mean_word_length"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            check(
                low is None or high is None or low <= high,
                f"filters.min_{name}={low} is above filters.max_{name}={high}, so every document "
                "would be dropped; exchange them",
            )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Corpus to tokens to packed sequences to pre-masked Arrow shards with a manifest."""

    output: str
    """Folder of the corpus, local or any fsspec URL; an unfinished one is taken up again."""
    source: SourceConfig = field(default_factory=SourceConfig)
    """Where the text comes from, if from one place; several: `mixture` in a YAML file, a group of
    these settings by name (pipelines/README.md)."""
    mixture: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, each with its weight (in a YAML file); instead of source."""
    normalise: Literal["none", "nfc"] = "none"
    """nfc: Unicode NFC, line ends as LF, control characters but tab and newline removed."""
    max_document_bytes: int = 1 << 20
    """UTF-8 bytes of a document above which long_documents applies."""
    long_documents: Literal["cut", "drop"] = "cut"
    """cut: into pieces at a line or sentence end that are tokenised apart, then joined again;
    drop: left out. Some tokenizers take hours for one text of many megabytes. Conversations are
    not cut."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which documents are dropped for their quality."""
    dedup: Literal["none", "exact"] = "exact"
    """exact: of documents that are equal after cleaning the first stays, over all sources."""
    tokenizer: str = "train"
    """A tokenizer.json (path or URL), `train` for a byte-level BPE of this corpus, or `bytes`."""
    tokenizer_engine: Literal["auto", "reference"] = "auto"
    """auto: a fast engine, where it gives the reference engine's ids on a sample of the corpus."""
    chat_template: str = "plain"
    """How conversations become text: plain, chatml, or a Jinja template or its file."""
    vocab_size: int = 4096
    """Vocabulary to train, specials included; only with `train`."""
    sample_bytes: int = 2 << 20
    """Text to train the tokenizer on, in characters; only with `train`."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: documents one after the other, cut at the sequence length. best_fit: no document is
    cut that fits into a sequence; more padding."""
    sequence_length: int = 256
    """Tokens per sequence; a multiple of noise.block_size."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    part_bytes: int = 8 << 20
    """Source bytes per part, the unit of work, of retry and of packing, and so the bound of a
    worker's memory; part of the corpus's identity."""
    held_out_rate: float = 0.02
    """Share of the documents kept from training, chosen by a hash of their text."""
    infill_rate: float = 0.0
    """Share of the training documents that are rearranged as prefix, suffix and middle, by a hash
    of noise.seed and their text, so that a model learns to fill holes (0.5 is usual). Those that do
    not fit into a sequence, and conversations, stay as they are. A model to go on from needs the
    three tokens: cascade convert --infill tokens."""
    max_dead_rate: float = 0.01
    """Share of unreadable documents above which the job fails instead of setting them aside; the
    same job may go on with another share."""
    num_workers: int = 2
    """Parts worked on at a time on Ray; the result does not depend on it."""
    runner: Literal["ray", "local"] = "ray"
    """ray: Ray Data tasks. local: in this process; the same bytes, sooner for small corpora."""

    def __post_init__(self) -> None:
        check(bool(self.output), "output is empty; name a folder")
        self._check_sources()
        size, length = self.noise.block_size, self.sequence_length
        check(
            length >= 1 and length % size == 0,
            f"sequence_length={length} is not a multiple of noise.block_size={size}; "
            f"use {max(size, length // size * size)}",
        )
        check(self.part_bytes >= 1, f"part_bytes={self.part_bytes} must be at least 1; use 8388608")
        check(
            self.max_document_bytes >= 4,  # the longest character
            f"max_document_bytes={self.max_document_bytes} must be at least 4; use 1048576",
        )
        check(
            0.0 <= self.held_out_rate < 1.0,
            f"held_out_rate={self.held_out_rate} must be at least 0 and below 1; use 0.02",
        )
        check(
            0.0 <= self.infill_rate <= 1.0,
            f"infill_rate={self.infill_rate} must be in 0..1; use 0.5, or 0 for none",
        )
        check(
            self.infill_rate == 0.0 or any(not s.messages_column for s in self.sources.values()),
            f"infill_rate={self.infill_rate} rearranges texts and every source holds "
            "conversations, where nobody can ask for the middle of an answer; leave it out",
        )
        check(
            0.0 <= self.max_dead_rate <= 1.0,
            f"max_dead_rate={self.max_dead_rate} must be in 0..1; use 0.01",
        )
        check(self.num_workers >= 1, f"num_workers={self.num_workers} must be at least 1")
        check(self.sample_bytes >= 1, f"sample_bytes={self.sample_bytes} must be at least 1")

    def _check_sources(self) -> None:
        check(
            bool(self.source.paths) or bool(self.mixture),
            "source.paths is empty; name at least one file or folder, there or in a mixture",
        )
        check(
            not (self.source.paths and self.mixture),
            f"source.paths={list(self.source.paths)} and mixture={list(self.mixture)} are both "
            "given; move the source into the mixture",
        )
        check(
            len(self.mixture) <= MAX_SOURCES,
            f"mixture has {len(self.mixture)} sources, at most {MAX_SOURCES} can be mixed; join "
            "some of them",
        )
        for name, source in self.mixture.items():
            source.check_as(f"mixture.{name}")
        if not self.mixture:
            self.source.check_as("source")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The sources by name, in the order in which their documents are numbered."""
        return self.mixture or {ONLY_SOURCE: self.source}

    @property
    def has_chats(self) -> bool:
        """Whether any source holds conversations."""
        return any(source.messages_column for source in self.sources.values())
