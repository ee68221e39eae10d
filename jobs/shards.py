"""Look into a prepared corpus: verify it, show its masks, count, trace documents, write draws."""

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import TrainingNoise
from cascade_model.errors import CorpusMismatch
from cascade_model.settings import check
from jobs.cli import actions, command

if TYPE_CHECKING:
    import numpy as np

    from cascade_model.commit import Folder
    from cascade_model.corpus import Corpus
    from cascade_model.manifest import Manifest, ShardEntry
    from cascade_model.verification import Verifier

Split = Literal["train", "held_out"]
_MARK, _PLAIN = "\x1b[7m", "\x1b[0m"
"""Reverse video and back."""
_SAMPLES = 1 << 62
"""Sample numbers stay below this."""
_BAR = 40
"""Characters of the longest bar of a histogram."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """Compute again everything that a corpus says of itself; exit code 3 names what is bad."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    num_workers: int = 2
    """Processes that look at shards side by side."""

    def __post_init__(self) -> None:
        check(self.num_workers >= 1, f"num_workers={self.num_workers} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowConfig:
    """Print samples as training sees them, the masked places marked."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    split: Split = "train"
    first_sample: int = 0
    """Global sample number; the order is that of the corpus's own recipe."""
    num_samples: int = 3
    color: Literal["auto", "always", "never"] = "auto"
    """Masked text in reverse video instead of [MASK]; auto does so on a terminal."""

    def __post_init__(self) -> None:
        check(
            0 <= self.first_sample < _SAMPLES,
            f"first_sample={self.first_sample} must be at least 0 and below 2^62",
        )
        check(self.num_samples >= 1, f"num_samples={self.num_samples} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsConfig:
    """Print the counts of each split and how its mask rates are spread."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    max_sequences: int = 4096
    """Sequences of each split to look into, the first ones of draw 0's order; counts are of all."""

    def __post_init__(self) -> None:
        check(self.max_sequences >= 1, f"max_sequences={self.max_sequences} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsConfig:
    """Print which pieces of which documents a training step saw, as tab-separated lines."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    step: int
    """Number of the step as in metrics.jsonl, from 1."""
    batch_size: int
    """Samples of a step: trainer.sequences_per_step of the run."""
    split: Split = "train"
    seed: int | None = None
    """noise.seed of the run; none: the corpus's."""
    complement: bool = False
    """noise.complement of the run."""

    def __post_init__(self) -> None:
        check(self.step >= 1, f"step={self.step} must be at least 1, as steps are counted from 1")
        check(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        check(
            self.step * self.batch_size < _SAMPLES,
            f"step={self.step} of batch_size={self.batch_size} is beyond sample 2^62; check both",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaterialiseConfig:
    """Write the bitmaps of further draws beside the shards; readers then use them."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    draws: int = field()
    """Draws that have bitmaps afterwards: draw 0, which the shards hold, and 1 to draws - 1."""
    num_workers: int = 2
    """Processes that write side by side."""

    def __post_init__(self) -> None:
        check(
            2 <= self.draws <= 10_000,
            f"draws={self.draws} must be in 2..10000; draw 0 is in the shards already",
        )
        check(self.num_workers >= 1, f"num_workers={self.num_workers} must be at least 1")


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check the whole corpus; `CorpusMismatch` when anything in it is bad."""
    verifier = _verifier(config.corpus)
    manifest, faults = verifier.manifest, verifier.corpus()
    for fault in faults:
        print(f"BAD   {fault}")
    work, units, bad = partial(_verify_shard, config.corpus), _units(manifest), 0
    for (split, index), found in zip(units, _shared(work, units, config.num_workers), strict=True):
        entry = manifest.splits[split].shards[index]
        print("\n".join(f"BAD   {fault}" for fault in found) or f"ok    {entry.name}")
        bad += bool(found)
        faults += found
    if faults:
        raise CorpusMismatch(
            f"corpus={config.corpus}: bad shards: {bad} of {len(units)}, faults: {len(faults)}, "
            f"the first: {faults[0]}"
        )
    draws = 1 + len(verifier.draws)
    print(
        f"shards: {len(units)}, draws: {draws}; all is as the manifest {manifest.digest[:12]} says"
    )
    return {"shards": len(units), "draws": draws, "digest": manifest.digest}


def _verifier(url: str) -> "Verifier":
    from cascade_model.commit import Folder
    from cascade_model.corpus import read_manifest
    from cascade_model.verification import Verifier

    folder = Folder(url)
    return Verifier(folder, read_manifest(folder))


_kept_verifier = lru_cache(maxsize=1)(_verifier)
"""Of a process that looks at many shards of one corpus."""


def _verify_shard(url: str, split: str, index: int) -> list[str]:
    """What is wrong with a shard."""
    return _kept_verifier(url).shard(split, index)


def show(config: ShowConfig) -> None:
    """Print samples with their masks."""
    from cascade_model.corpus import Corpus

    corpus = Corpus.open(config.corpus, config.split)
    tokenizer = corpus.tokenizer()
    batch = corpus.batch(config.first_sample, config.num_samples, corpus.manifest.noise)
    is_terminal = config.color == "auto" and sys.stdout.isatty()
    in_color = config.color == "always" or is_terminal
    is_text = batch.clean_tokens != corpus.manifest.pad_id
    for row, sequence in enumerate(batch.sequence_ids.tolist()):
        maskable = batch.is_maskable[row]
        masked = batch.is_masked[row]
        share = masked.sum() / max(maskable.sum(), 1)
        print(f"--- sample {config.first_sample + row}, sequence {sequence}: {share:.1%} masked")
        for number in range(int(batch.segments[row].max()) + 1):
            mine = (batch.segments[row] == number) & (maskable | is_text[row])
            print(marked_text(batch.clean_tokens[row][mine], masked[mine], tokenizer, in_color))


def marked_text(
    tokens: "np.ndarray", is_masked: "np.ndarray", tokenizer: Any, in_color: bool
) -> str:
    """Text of tokens [n], the masked ones as [MASK] each or as their text in reverse video."""
    import numpy as np

    cuts = np.flatnonzero(np.diff(is_masked)) + 1
    runs = np.split(np.arange(len(tokens)), cuts)
    return "".join(
        _run_text(tokens[run], bool(is_masked[run[0]]), tokenizer, in_color)
        for run in runs
        if len(run)
    )


def _run_text(tokens: "np.ndarray", is_masked: bool, tokenizer: Any, in_color: bool) -> str:
    if is_masked and not in_color:
        return "[MASK]" * len(tokens)
    text = printable(tokenizer.decode(tokens.tolist(), skip_special=False), kept="\n\t")
    return f"{_MARK}{text}{_PLAIN}" if is_masked else text


def printable(text: str, kept: str = "") -> str:
    """A text for a terminal or a table: what draws nothing, such as an escape, is spelt out, but
    for the characters `kept`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def stats(config: StatsConfig) -> dict[str, Any]:
    """Print and return counts and mask rates by split."""
    from cascade_model.commit import Folder
    from cascade_model.corpus import Corpus, read_manifest

    manifest = read_manifest(Folder(config.corpus))
    found = {}
    for split, entry in manifest.splits.items():
        if not entry.num_sequences:
            continue
        places = entry.num_sequences * manifest.sequence_length
        values: dict[str, Any] = {
            "sequences": entry.num_sequences,
            "tokens": entry.num_tokens,
            "documents": entry.num_documents,
            "bytes": entry.num_bytes,
            "bytes_per_token": entry.num_bytes / entry.num_tokens,
            "not_maskable": 1 - entry.num_tokens / places,
            **mask_rates(Corpus.open(config.corpus, split), config.max_sequences),
        }
        found[split] = values
        print(f"{split}")
        for name, value in values.items():
            if not isinstance(value, list):
                form = ",.4f" if isinstance(value, float) else ","
                print(f"  {name:<16}{value:{form}}")
        for source in entry.sources:
            print(
                f"  source {source.name}: {source.num_sequences:,} sequences, "
                f"{source.num_tokens:,} tokens, {source.share}/1024 of the samples"
            )
        print("\n".join(_histogram(values["rates"])))
    return found


def mask_rates(corpus: "Corpus", max_sequences: int) -> dict[str, Any]:
    """Mask rates of draw 0: the share masked, the mean rate, and its shares of ten equal bins."""
    import numpy as np

    noise = corpus.manifest.noise
    masked = maskable = 0
    counts, rate_sum, blocks = np.zeros(10, dtype=np.int64), 0.0, 0
    total = min(max_sequences, corpus.num_sequences)
    for first in range(0, total, 1024):
        batch = corpus.batch(first, min(1024, total - first), noise)
        rates = batch.thresholds[:, :1] if noise.per == "sequence" else batch.thresholds
        bins = (rates.ravel().astype(np.int64) * 10) >> 32
        counts += np.bincount(bins, minlength=10)
        rate_sum += float(rates.sum(dtype=np.float64)) / 2**32
        blocks += rates.size
        masked += int(batch.is_masked.sum())
        maskable += int(batch.is_maskable.sum())
    return {
        "masked": masked / max(maskable, 1),  # a few sequences may hold no response at all
        "mean_rate": rate_sum / blocks,
        "rates": [count / blocks for count in counts.tolist()],
    }


def _histogram(shares: list[float]) -> Iterator[str]:
    for number, share in enumerate(shares):
        bar = "#" * round(_BAR * share / max(shares))
        yield f"  rate {number / 10:.1f}-{(number + 1) / 10:.1f} {share:7.2%} {bar}"


def documents(config: DocumentsConfig) -> None:
    """Print what a step saw."""
    from cascade_model.corpus import Corpus

    corpus = Corpus.open(config.corpus, config.split)
    seed = {} if config.seed is None else {"seed": config.seed}
    noise = TrainingNoise.over(
        corpus.manifest.noise,
        complement=config.complement,
        sequences_per_batch=config.batch_size,
        **seed,
    )
    first = (config.step - 1) * config.batch_size
    print("sample\tsequence\tpath\twhere\tfirst_byte\tlast_byte")
    for piece in corpus.documents_of(first, config.batch_size, noise):
        start, stop = piece.span
        path, where = printable(piece.path), printable(piece.where)
        place = f"{path}\t{where}\t{start}\t{stop - 1}"
        print(f"{piece.sample}\t{piece.sequence_id}\t{place}")


def materialise(config: MaterialiseConfig) -> dict[str, Any]:
    """Write the draws that are missing; a finished draw is left as it is."""
    from cascade_model.commit import Folder
    from cascade_model.corpus import read_manifest
    from cascade_model.draws import publish_draw, read_draw

    folder = Folder(config.corpus)
    manifest = read_manifest(folder)
    units, written = _units(manifest), []
    for draw in range(1, config.draws):
        if read_draw(folder, manifest, draw):
            continue
        work = partial(_write_shard, config.corpus, draw)
        entries = {split: [] for split in manifest.splits}
        made = _shared(work, units, config.num_workers)
        for (split, _), entry in zip(units, made, strict=True):
            entries[split].append(entry)
        publish_draw(folder, manifest, draw, entries)
        written.append(draw)
        print(f"draw {draw}: {len(units)} shards")
    print(f"{config.draws} draws in {config.corpus}, {len(written)} of them new")
    return {"draws": config.draws, "written": written}


def _write_shard(url: str, draw: int, split: str, index: int) -> "ShardEntry":
    """A further draw of a shard."""
    from cascade_model.draws import write_draw

    return write_draw(*_kept_manifest(url), split, index, draw)


@lru_cache(maxsize=1)
def _kept_manifest(url: str) -> "tuple[Folder, Manifest]":
    """Of a process that works on many shards of one corpus."""
    from cascade_model.commit import Folder
    from cascade_model.corpus import read_manifest

    folder = Folder(url)
    return folder, read_manifest(folder)


def _units(manifest: "Manifest") -> list[tuple[str, int]]:
    """Every shard of every split."""
    return [(name, i) for name, split in manifest.splits.items() for i in range(len(split.shards))]


def _shared(
    work: Callable[[str, int], Any], units: list[tuple[str, int]], num_workers: int
) -> Iterable[Any]:
    """`work` of every unit, in order, by several processes (one: in this one)."""
    splits, indexes = [split for split, _ in units], [index for _, index in units]
    if num_workers == 1 or len(units) < 2:
        yield from map(work, splits, indexes)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, splits, indexes)


main = actions(
    "shards",
    verify=("recompute hashes, ids, spans, masks; name every bad shard",
            command(VerifyConfig, verify, "verify")),
    show=("samples with their masks marked", command(ShowConfig, show, "show")),
    stats=("counts, padding, mask rates", command(StatsConfig, stats, "stats")),
    documents=("which documents a step saw", command(DocumentsConfig, documents, "documents")),
    materialise=("write the bitmaps of further draws",
                 command(MaterialiseConfig, materialise, "materialise")),
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
