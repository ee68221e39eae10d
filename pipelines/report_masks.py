"""The masks that stand in a corpus's shards, as a report shows them.

A bounded part of any corpus is read: the first record batch of at most sixteen training shards.
"""

from typing import Any

import numpy as np

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus, SequenceRows
from cascade_model.manifest import Manifest
from cascade_model.schema import batch_rows
from cascade_model.tokenizer import Tokenizer

_READ_SHARDS = 16
_SHOWN_SEQUENCES = 12
_SHOWN_TOKENS = 512
_MOST_BINS = 20


def masks_of(folder: Folder, manifest: Manifest) -> dict[str, Any]:
    """Draw 0 as it is stored: how much is masked, and some sequences to look at."""
    corpus = Corpus(folder, manifest, "train")
    ids = _read_ids(manifest)
    rows = corpus.rows(ids)
    shown = np.unique(np.linspace(0, len(ids) - 1, _SHOWN_SEQUENCES).astype(int))
    tokenizer = corpus.tokenizer()
    return {
        "split": "train",
        "sequences_read": len(ids),
        "shards_read": min(_READ_SHARDS, len(manifest.splits["train"].shards)),
        "maskable": int(rows.is_maskable.sum()),
        "masked": int(rows.is_masked.sum()),
        "masked_rate": float(rows.is_masked.sum() / max(1, rows.is_maskable.sum())),
        "histogram": mask_histogram(rows, manifest),
        "shown_tokens": min(_SHOWN_TOKENS, manifest.sequence_length),
        "shown": [_shown(rows, int(place), manifest, tokenizer) for place in shown],
    }


def _read_ids(manifest: Manifest) -> np.ndarray:
    """The first record batch of some evenly spaced shards: a bounded read of any corpus."""
    shards = manifest.splits["train"].shards
    chosen = np.unique(np.linspace(0, len(shards) - 1, _READ_SHARDS).astype(int))
    most = batch_rows(manifest.geometry)
    return np.concatenate(
        [
            np.arange(min(shards[i].rows, most), dtype=np.uint64)
            + np.uint64(shards[i].first_sequence)
            for i in chosen
        ]
    )


def mask_histogram(rows: SequenceRows, manifest: Manifest) -> dict[str, Any]:
    """How often each share of a unit is masked, a unit being what draws one mask rate.

    Only units that are maskable throughout count. With a rate uniform on [0, 1] the number of
    masked places of such a unit is uniform too, so an unclipped recipe gives a flat histogram. A
    unit of less than 20 places has a bin per number of masked places.
    """
    size = manifest.sequence_length
    if manifest.noise.per == "block":
        size = manifest.noise.block_size
    is_whole = rows.is_maskable.reshape(-1, size).all(axis=1)
    masked = rows.is_masked.reshape(-1, size).sum(axis=1)[is_whole]
    num_bins = min(size + 1, _MOST_BINS)
    place = masked if num_bins == size + 1 else masked * num_bins // (size + 1)
    counts = np.bincount(place, minlength=num_bins)
    # Bin b holds the numbers of masked places n with b <= n * num_bins / (size + 1) < b + 1.
    lows = [-(-b * (size + 1) // num_bins) for b in range(num_bins + 1)]
    return {
        "unit": manifest.noise.per,
        "unit_size": size,
        "units": int(is_whole.sum()),
        "bins": [
            {"low": low, "high": high - 1, "count": int(count)}
            for low, high, count in zip(lows, lows[1:], counts, strict=False)
        ],
    }


def _shown(
    rows: SequenceRows, place: int, manifest: Manifest, tokenizer: Tokenizer
) -> dict[str, Any]:
    """One sequence as pieces to draw: runs of text, single masks, document borders."""
    is_maskable, is_masked = rows.is_maskable[place], rows.is_masked[place]
    pieces: list[dict[str, Any]] = []
    run: list[int] = []

    def end_run(kind: str) -> None:
        if run:
            pieces.append({"kind": kind, "text": tokenizer.decode(run, skip_special=False)})
            run.clear()

    kind = "text"
    for at, token in enumerate(rows.tokens[place][:_SHOWN_TOKENS].tolist()):
        new = _kind(token, bool(is_maskable[at]), bool(is_masked[at]), manifest)
        is_border = bool(rows.is_start[place, at]) and at > 0
        if new != kind or is_border:
            end_run(kind)
        if is_border:
            pieces.append({"kind": "border"})
        kind = new
        if kind == "pad":
            _count_padding(pieces)
        elif kind in ("mask", "end"):
            text = tokenizer.decode([token], skip_special=False)
            pieces.append({"kind": kind, "token": token, "text": text})
        else:
            run.append(token)
    end_run(kind)
    sequence = int(rows.sequence_ids[place])
    sources = manifest.splits["train"].sources
    return {
        "sequence": sequence,
        "source": next(s.name for s in reversed(sources) if s.first_sequence <= sequence),
        "maskable": int(is_maskable.sum()),
        "masked": int(is_masked.sum()),
        "pieces": pieces,
    }


def _kind(token: int, is_maskable: bool, is_masked: bool, manifest: Manifest) -> str:
    """What a place is drawn as."""
    if is_masked:
        return "mask"
    if token == manifest.pad_id and not is_maskable:
        return "pad"
    if token == manifest.eos_id:
        return "end"
    return "text" if is_maskable else "prompt"


def _count_padding(pieces: list[dict[str, Any]]) -> None:
    """Padding places in a row are one piece."""
    if pieces and pieces[-1]["kind"] == "pad":
        pieces[-1]["count"] += 1
    else:
        pieces.append({"kind": "pad", "count": 1})
