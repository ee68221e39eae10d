"""Tokens of documents to sequences, array-native (no Python step per token).

Each document is its tokens plus EOS, padded with PAD to a multiple of the block size wherever it
ends, so that the block grid restarts at every document. Two ways to lay documents out:

- concat: one after the other, cut at the sequence length; the rest of a cut document goes on in the
  next sequence as a start of its own. Only the last sequence has padding of its own.
- best_fit: documents longer than a sequence are cut into whole sequences and a rest; then the
  pieces, longest first, go where the least room is left (best-fit decreasing). No document is cut
  that fits into a sequence, for some padding.

As cuts lie on the block grid and a last block holds at least its EOS, no sequence begins with PAD.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cascade_model.columns import Packed
from cascade_model.schema import Geometry
from cascade_model.tokenizer import Encoded


@dataclass(frozen=True, slots=True)
class _Layout:
    """Pieces of documents in the order of their tokens, and where they are put."""

    document: np.ndarray
    """int64: which document a piece is of."""
    begin: np.ndarray
    """int64: the piece's first token within the document."""
    size: np.ndarray
    """int64: tokens, the document's EOS counted."""
    place: np.ndarray
    """int64: where the piece begins, counted over all sequences."""
    num_sequences: int


def pack(
    encoded: Encoded,
    document_ids: np.ndarray,
    geometry: Geometry,
    eos_id: int,
    pad_id: int,
    *,
    packing: Literal["concat", "best_fit"] = "concat",
    is_response: np.ndarray | None = None,
) -> Packed:
    """Pack documents; the result depends on their order and nothing else.

    `document_ids` is uint64, one per document. `is_response` (bool, one per token) marks what may
    be masked, where that is not everything; a document's EOS goes with its last token.
    """
    length = geometry.sequence_length
    lengths = np.asarray(encoded.lengths, dtype=np.int64)
    layout = (_concat if packing == "concat" else _best_fit)(lengths + 1, geometry)
    shift = np.repeat(layout.place - (np.cumsum(layout.size) - layout.size), layout.size)
    places = np.arange(len(shift)) + shift
    ends = np.cumsum(lengths + 1) - 1
    is_text = np.ones(len(places), dtype=bool)
    is_text[ends] = False
    tokens = np.full(layout.num_sequences * length, pad_id, dtype=geometry.token_dtype)
    tokens[places[is_text]] = encoded.tokens
    tokens[places[ends]] = eos_id
    is_maskable = np.zeros(len(tokens), dtype=bool)
    if is_response is None:
        is_maskable[places] = True
    else:
        is_maskable[places[is_text]] = is_response
        is_maskable[places[ends]] = _last(is_response, lengths)
    order = np.argsort(layout.place, kind="stable")
    starts = layout.place[order]
    span_starts, span_stops = _spans(encoded, lengths, layout)
    edges = np.arange(layout.num_sequences + 1, dtype=np.int64) * length
    return Packed(
        tokens=tokens.reshape(-1, length),
        start_offsets=np.searchsorted(starts, edges).astype(np.int32),
        document_starts=(starts % length).astype(np.uint32),
        document_ids=np.asarray(document_ids, dtype=np.uint64)[layout.document[order]],
        span_starts=span_starts[order].astype(np.uint32),
        span_stops=span_stops[order].astype(np.uint32),
        is_maskable=is_maskable.reshape(-1, length),
    )


def joined(several: Sequence[Packed]) -> Packed:
    """Packed sequences one after the other; at least one."""
    if len(several) == 1:
        return several[0]
    names = [name for name in Packed.__dataclass_fields__ if name != "start_offsets"]
    counts = np.concatenate([np.diff(packed.start_offsets) for packed in several])
    return Packed(
        start_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        **{name: np.concatenate([getattr(each, name) for each in several]) for name in names},
    )


def padding_of(packed: Packed, lengths: np.ndarray) -> int:
    """Places that hold PAD: all but the documents' tokens and their EOS."""
    return packed.tokens.size - int(np.sum(lengths)) - len(lengths)


def _last(is_response: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each document's last token is a response; a document without tokens has none."""
    ends = np.cumsum(lengths)
    return (lengths > 0) & np.concatenate([[False], is_response])[ends]


def _spans(encoded: Encoded, lengths: np.ndarray, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """The byte range of its document's text that each piece holds; EOS has no bytes."""
    bytes_before = np.concatenate([[0], np.cumsum(encoded.sizes, dtype=np.int64)])
    first = (np.cumsum(lengths) - lengths)[layout.document]
    own = lengths[layout.document]
    base = bytes_before[first]
    begin = np.minimum(layout.begin, own)
    end = np.minimum(layout.begin + layout.size, own)
    return bytes_before[first + begin] - base, bytes_before[first + end] - base


def _concat(sizes: np.ndarray, geometry: Geometry) -> _Layout:
    """Documents of these sizes one after the other, cut at the sequence length."""
    length = geometry.sequence_length
    padded = _padded(sizes, geometry)
    begins = np.cumsum(padded) - padded
    count = -(-int(padded.sum()) // length)
    starts = np.union1d(begins, np.arange(count, dtype=np.int64) * length)
    owner = np.searchsorted(begins, starts, side="right") - 1
    begin = starts - begins[owner]
    size = np.minimum(sizes[owner] - begin, length - starts % length)
    return _Layout(owner, begin, size, starts, count)


def _best_fit(sizes: np.ndarray, geometry: Geometry) -> _Layout:
    """Whole sequences of long documents, and everything else where the least room is left."""
    length = geometry.sequence_length
    count = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes), dtype=np.int64), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    begin = number * length
    size = np.minimum(sizes[document] - begin, length)
    blocks = _padded(size, geometry) // geometry.block_size
    sequence, column = _fitted(blocks, geometry.num_blocks)
    place = sequence * length + column * geometry.block_size
    return _Layout(document, begin, size, place, int(sequence.max(initial=-1)) + 1)


def _fitted(blocks: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the sequence of each piece and the block at which it begins there.

    `blocks` (1..room) are the pieces' sizes. Sequences are numbered by their first piece in the
    order given, and hold theirs in that order, so that documents stay near their neighbours.
    """
    bins = np.empty(len(blocks), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(room + 1)]
    has_room, made = 0, 0  # bit r of has_room: some sequence has r blocks left
    order = np.argsort(-blocks, kind="stable")
    for piece, size in zip(order.tolist(), blocks[order].tolist(), strict=True):
        fits = has_room >> size
        if fits:
            left = size + (fits & -fits).bit_length() - 1
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                has_room &= ~(1 << left)
        else:
            left, chosen, made = room, made, made + 1
        bins[piece] = chosen
        if left > size:
            open_bins[left - size].append(chosen)
            has_room |= 1 << (left - size)
    _, first, renumbered = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    sequence = rank[renumbered]
    order = np.argsort(sequence, kind="stable")
    before = np.cumsum(blocks[order]) - blocks[order]
    starts = np.searchsorted(sequence[order], sequence[order])
    column = np.empty(len(blocks), dtype=np.int64)
    column[order] = before - before[starts]
    return sequence, column


def _padded(sizes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Sizes up to the next multiple of the block size."""
    return -(-sizes // geometry.block_size) * geometry.block_size
