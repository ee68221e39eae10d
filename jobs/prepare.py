"""`cascade prepare`: corpus to tokens to packed sequences to pre-masked Arrow shards."""

from typing import Any

from jobs.cli import command
from pipelines.config import FilterConfig, PrepareConfig, SourceConfig

__all__ = ["FilterConfig", "PrepareConfig", "SourceConfig", "main", "run"]


def run(config: PrepareConfig) -> dict[str, Any]:
    """Make the corpus (or find it finished), print what is in it, return the same as a summary."""
    import time

    from pipelines.prepare import prepare
    from pipelines.report import REPORT_HTML

    started = time.monotonic()
    manifest = prepare(config)
    seconds = time.monotonic() - started
    counts = manifest.counts
    places = counts["sequences"] * manifest.sequence_length
    summary = {
        "output": config.output,
        "digest": manifest.digest,
        "seconds": round(seconds, 2),
        "documents": counts["documents"],
        "dropped": sum(counts["dropped"].values()),
        "dead": sum(counts["dead"].values()),
        "bytes": counts["bytes"],
        "tokens": counts["tokens"],
        "tokens_per_second": round(counts["tokens"] / seconds),
        "padding_rate": round(counts["padding"] / places, 4) if places else 0.0,
        "tokenizer_engine": manifest.tokenizer_engine["note"],
        "vocab_size": manifest.vocab_size,
        "sequence_length": manifest.sequence_length,
        "train_sequences": manifest.splits["train"].num_sequences,
        "held_out_sequences": manifest.splits["held_out"].num_sequences,
        "report": f"{config.output}/{REPORT_HTML}",
    }
    for name, value in summary.items():
        print(f"{name:<20}{value:,}" if isinstance(value, int | float) else f"{name:<20}{value}")
    return summary


main = command(PrepareConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
