"""Tokens of documents to sequences, array-native (no Python step per token).

Each document is its tokens plus EOS, padded with PAD to a multiple of the block size, so that the
block grid restarts at every document; documents are put one after the other and cut at the sequence
length. The rest of a cut document goes on in the next sequence as a start of its own. As a cut lies
on the block grid and a document's last block holds at least its EOS, no sequence begins with PAD.
"""

import numpy as np

from cascade_model.schema import Geometry, Packed
from cascade_model.tokenizer import Encoded


def pack(
    encoded: Encoded, document_ids: np.ndarray, geometry: Geometry, eos_id: int, pad_id: int
) -> Packed:
    """Pack documents in the order given; the last sequence is padded.

    `document_ids` is uint64, one per document.
    """
    length, block = geometry.sequence_length, geometry.block_size
    lengths = np.asarray(encoded.lengths, dtype=np.int64)
    padded = -(-(lengths + 1) // block) * block
    begins = np.cumsum(padded) - padded
    count = -(-int(padded.sum()) // length)
    tokens = np.full(count * length, pad_id, dtype=geometry.token_dtype)
    is_maskable = np.zeros(count * length, dtype=bool)
    shift = begins - (np.cumsum(lengths) - lengths)
    places = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
    tokens[places] = encoded.tokens
    tokens[begins + lengths] = eos_id
    is_maskable[places] = True
    is_maskable[begins + lengths] = True
    starts = np.union1d(begins, np.arange(count, dtype=np.int64) * length)
    owners = np.searchsorted(begins, starts, side="right") - 1
    offsets = np.searchsorted(starts, np.arange(count + 1, dtype=np.int64) * length)
    return Packed(
        tokens=tokens.reshape(count, length),
        start_offsets=offsets.astype(np.int32),
        document_starts=(starts % length).astype(np.uint32),
        document_ids=np.asarray(document_ids, dtype=np.uint64)[owners],
        span_starts=np.zeros(len(owners), dtype=np.uint32),
        span_stops=np.zeros(len(owners), dtype=np.uint32),
        is_maskable=is_maskable.reshape(count, length),
    )
