"""The settings of a decode engine. Standard library only; it checks itself."""

from dataclasses import dataclass
from typing import Literal

from cascade_model.config import ModelConfig
from cascade_model.settings import check, check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How one decode engine runs: its numbers and its limits."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which weights are loaded, and of keys and values. bfloat16 takes half the memory and
    is faster where the CPU has it; what it rounds may give other tokens. A model that was loaded
    already keeps its own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is loaded; cuda asks Ray for a GPU of its own for each engine. One that was
    loaded already stays where it is."""
    max_sequences: int = 32
    """Sequences that run at once."""
    rows_per_round: int = 512
    """Rows of one forward pass; beside a single pass that cannot be cut and takes more than half of
    them, half as many for the others."""
    cache_bytes: int = 1 << 30
    """Keys and values of all sequences and known prefixes, in bytes; taken as they are written. One
    token takes 2 x layers x key-value heads x head size numbers."""
    prefix_share: float = 0.25
    """Of the pages, how many known prefixes may hold; 0: nothing is taken over from others."""
    page_tokens: int = 32
    """Tokens that keys and values are handed out for at a time, and the shortest beginning that a
    request can take over from another; rounded up to whole blocks."""

    def __post_init__(self) -> None:
        check_types(self, "engine.")
        for name in ("max_sequences", "rows_per_round", "cache_bytes", "page_tokens"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 <= self.prefix_share < 1.0,
            f"prefix_share={self.prefix_share} must be at least 0 and below 1; use 0.25",
        )

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return int(self.device == "cuda")

    @property
    def number_bytes(self) -> int:
        """Bytes of one number of the keys and values."""
        return 4 if self.precision == "float32" else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What `cache_bytes` holds of one model's keys and values."""

    page_tokens: int
    """Tokens of a page: whole blocks."""
    num_pages: int

    def longest(self, num_streams: int = 1) -> int:
        """Tokens of the longest text that fits when nothing else is there; guidance keeps two
        streams of it."""
        return self.num_pages // num_streams * self.page_tokens


def room_of(config: ModelConfig, engine: EngineConfig, number_bytes: int | None = None) -> Room:
    """The pages that `cache_bytes` buys, for numbers of `engine.precision` unless told otherwise.
    Raises `InputError` where it is not one."""
    size = config.block_size if config.attention == "block_causal" else 1
    page_tokens = -(-engine.page_tokens // size) * size
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * page_tokens
    page_bytes = numbers * (number_bytes or engine.number_bytes)
    check(
        engine.cache_bytes >= page_bytes,
        f"cache_bytes={engine.cache_bytes} holds not one page of {page_tokens} tokens, which takes "
        f"{page_bytes}; raise cache_bytes",
    )
    return Room(page_tokens=page_tokens, num_pages=engine.cache_bytes // page_bytes)
