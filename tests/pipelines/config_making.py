"""Settings of a small corpus of bytes, made in this process."""

from cascade_model.config import NoiseConfig
from pipelines.config import PrepareConfig, SourceConfig


def config_for(output, path, **changes) -> PrepareConfig:
    """Sequences of 64 bytes in blocks of 8, read from the file at `path`."""
    settings = {
        "output": str(output),
        "source": SourceConfig(paths=(str(path),)),
        "tokenizer": "bytes",
        "sequence_length": 64,
        "noise": NoiseConfig(block_size=8),
        "part_bytes": 60_000,
        "held_out_rate": 0.1,
        "tokenizer_engine": "reference",
        "runner": "local",
    }
    return PrepareConfig(**{**settings, **changes})
