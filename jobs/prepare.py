"""`cascade prepare`: corpus to tokens to packed sequences to pre-masked Arrow shards."""

from typing import TYPE_CHECKING, Any

from jobs.cli import command
from pipelines.config import FilterConfig, PrepareConfig, SourceConfig

if TYPE_CHECKING:
    from cascade_model.manifest import Manifest

__all__ = ["FilterConfig", "PrepareConfig", "SourceConfig", "main", "run"]

_LOST = ("dropped", "dead")


def run(config: PrepareConfig) -> dict[str, Any]:
    """Make the corpus (or find it finished), print what is in it, return the same as a summary."""
    import time

    from pipelines.prepare import prepare
    from pipelines.report import REPORT_HTML

    reused: list[Manifest] = []
    started = time.monotonic()
    manifest = prepare(config, on_finished=reused.append)
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
        "tokens_per_second": None if reused else round(counts["tokens"] / seconds),
        "padding_rate": round(counts["padding"] / places, 4) if places else 0.0,
        "tokenizer_engine": manifest.tokenizer_engine["note"],
        "rearranged": None if manifest.infill is None else manifest.infill.num_documents,
        "vocab_size": manifest.vocab_size,
        "sequence_length": manifest.sequence_length,
        "train_sequences": manifest.splits["train"].num_sequences,
        "held_out_sequences": manifest.splits["held_out"].num_sequences,
        "report": f"{config.output}/{REPORT_HTML}",
    }
    if reused:
        print(f"{config.output} was finished before and is left as it is")
    for name, value in summary.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int | float) else value
            print(f"{name:<20}{shown}{_reasons(counts[name]) if name in _LOST else ''}")
    if manifest.infill is not None:
        _warn_of_few(manifest)
    return summary


def _warn_of_few(manifest: "Manifest") -> None:
    """Say where much less is rearranged than was asked for, as then little is learnt of it."""
    from cascade_model.metrics import tell

    infill, documents = manifest.infill, manifest.counts["documents"]
    if infill is None or infill.num_documents >= infill.rate * documents / 2:
        return
    tell(
        f"infill_rate={infill.rate} rearranged {infill.num_documents:,} of {documents:,} documents "
        "only: the others were not drawn, are longer than sequence_length="
        f"{manifest.sequence_length}, held out or conversations"
    )


def _reasons(numbers: dict[str, int]) -> str:
    """Why documents are no part of the corpus, the most frequent reason first."""
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    return f" ({', '.join(f'{number:,} {name}' for name, number in ordered)})" if ordered else ""


main = command(PrepareConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
