"""A finished corpus made from texts alone, with a packer in plain Python: an oracle for the reader.

Bytes are tokens, so a document's byte spans can be read off its tokens.
"""

import itertools

import numpy as np
import pyarrow as pa

from cascade_model import noise as mask_noise
from cascade_model.columns import Rows, rows_columns
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.manifest import (
    MANIFEST,
    TOKENIZER,
    DocumentsEntry,
    Manifest,
    SourceEntry,
    SplitEntry,
)
from cascade_model.mixing import Mixture, shares
from cascade_model.schema import (
    Geometry,
    batch_rows,
    documents_name,
    documents_schema,
    rates_per_row,
    shard_schema,
)
from cascade_model.shards import arrow_writer, entry_of, write_shard
from cascade_model.tokenizer import byte_tokenizer

NOISE = NoiseConfig(block_size=4)
Texts = dict[str, list[str]]
"""Documents of each source."""


class _Part:
    """Documents of one part, packed one after the other."""

    def __init__(self, index: int, texts: list[str], geometry: Geometry) -> None:
        self.index, self.texts, tokenizer = index, texts, byte_tokenizer()
        length, block = geometry.sequence_length, geometry.block_size
        tokens, maskable, pieces = [], [], []
        for row, text in enumerate(texts):
            data = text.encode()
            padding = -(len(data) + 1) % block
            begin = len(tokens)
            tokens += [*data, tokenizer.eos_id, *[tokenizer.pad_id] * padding]
            maskable += [True] * (len(data) + 1) + [False] * padding
            cuts = [begin, *range((begin // length + 1) * length, len(tokens), length), len(tokens)]
            for start, stop in itertools.pairwise(cuts):
                span = [min(place - begin, len(data)) for place in (start, stop)]
                pieces.append((start, index << 32 | row, *span))
        rest = -len(tokens) % length
        self.tokens = np.array([*tokens, *[tokenizer.pad_id] * rest]).reshape(-1, length)
        self.is_maskable = np.array([*maskable, *[False] * rest]).reshape(-1, length)
        self.pieces = np.array(pieces, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, geometry: Geometry, first: int, ranks: np.ndarray, noise: NoiseConfig) -> Rows:
        """The part as sequences numbered from `first` on, under draw 0."""
        ids = np.arange(first, first + len(self), dtype=np.uint64)
        rates = mask_noise.thresholds(noise, 0, ranks, geometry.num_blocks)
        bits = mask_noise.mask_bits(noise, 0, ids, rates, geometry.sequence_length)
        starts, length = self.pieces[:, 0], geometry.sequence_length
        return Rows(
            tokens=self.tokens.astype(geometry.token_dtype),
            start_offsets=np.searchsorted(starts, np.arange(len(self) + 1) * length),
            document_starts=starts % length,
            document_ids=self.pieces[:, 1],
            span_starts=self.pieces[:, 2],
            span_stops=self.pieces[:, 3],
            is_maskable=self.is_maskable,
            sequence_ids=ids,
            thresholds=rates[:, : geometry.rates_per_row],
            is_masked=bits & self.is_maskable,
        )

    def commit_table(self, folder: Folder) -> DocumentsEntry:
        """The part's table of documents."""
        sizes = [len(text.encode()) for text in self.texts]
        values = {
            "document_id": [self.index << 32 | row for row in range(len(self.texts))],
            "path": [f"part-{self.index}.jsonl"] * len(self.texts),
            "where": [f"line {row + 1}" for row in range(len(self.texts))],
            "bytes": sizes,
            "tokens": [size + 1 for size in sizes],
            "split": [0] * len(self.texts),
        }
        schema = documents_schema()
        columns = [pa.array(values[field.name], field.type) for field in schema]
        record = folder.commit(documents_name(self.index), arrow_writer(schema, [columns]))
        return DocumentsEntry(
            name=record.name,
            object=record.object,
            bytes=record.bytes,
            sha256=record.sha256,
            rows=len(self.texts),
        )


def make_corpus(
    url,
    texts: Texts,
    *,
    noise: NoiseConfig = NOISE,
    sequence_length: int = 64,
    weights: list[float] | None = None,
    parts: int = 1,
) -> str:
    """Write a corpus of one split, `parts` shards for each source; returns its URL."""
    tokenizer, folder = byte_tokenizer(), Folder(url)
    folder.publish(TOKENIZER, tokenizer.to_bytes())
    geometry = Geometry(
        sequence_length=sequence_length,
        block_size=noise.block_size,
        vocab_size=tokenizer.vocab_size,
        rates_per_row=rates_per_row(noise, sequence_length),
    )
    cut = [(name, docs[i::parts]) for name, docs in texts.items() for i in range(parts)]
    packed = [_Part(index, docs, geometry) for index, (_, docs) in enumerate(cut)]
    sources, first = [], 0
    for (name, _), share in zip(texts.items(), shares(weights or [1] * len(texts)), strict=True):
        mine = [part for (owner, _), part in zip(cut, packed, strict=True) if owner == name]
        rows, tokens = sum(map(len, mine)), sum(int(p.is_maskable.sum()) for p in mine)
        sources.append(
            SourceEntry(
                name=name, first_sequence=first, num_sequences=rows, num_tokens=tokens, share=share
            )
        )
        first += rows
    entries, total, mixture = [], first, Mixture(sources, first)
    first = 0
    for part in packed:
        ranks = mixture.ranks_of(np.arange(first, first + len(part), dtype=np.uint64), noise, 0)
        rows = part.rows(geometry, first, ranks, noise)
        columns, step = rows_columns(rows), batch_rows(geometry)
        batches = [[c[i : i + step] for c in columns] for i in range(0, len(part), step)]
        facts = {"rows": len(part), "tokens": int(part.is_maskable.sum()), "first_sequence": first}
        name = f"shard-train-{part.index:05d}.arrow"
        entries.append(entry_of(write_shard(folder, name, shard_schema(geometry), batches, facts)))
        first += len(part)
    split = SplitEntry(
        num_sequences=total,
        num_tokens=sum(source.num_tokens for source in sources),
        num_bytes=sum(len(text.encode()) for docs in texts.values() for text in docs),
        num_documents=sum(map(len, texts.values())),
        sources=tuple(sources),
        shards=tuple(entries),
    )
    manifest = Manifest(
        sequence_length=sequence_length,
        block_size=noise.block_size,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        noise=noise,
        prepare={},
        sources=(),
        counts={},
        splits={"train": split},
        documents=tuple(part.commit_table(folder) for part in packed),
    )
    folder.publish(MANIFEST, manifest.to_json())
    return folder.url
