"""A part's records on their way to packed sequences: each is packed, dropped or dead.

Texts are encoded in chunks and packed in windows. A window ends behind the document that fills it
(`window_bytes` of text), so what a part holds in memory is bounded however large a record batch or
a compressed file is, and what is packed together does not depend on the chunks.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cascade_model.columns import packed_columns
from cascade_model.schema import SPLITS, Geometry, batch_rows, documents_schema, packed_schema
from cascade_model.tokenizer import Encoded
from pipelines.cleaning import Cleaning, Drop, cleaned_document
from pipelines.documents import Document
from pipelines.encoding import DocumentEncoder
from pipelines.held_out import is_held_out
from pipelines.packing import pack, padding_of
from pipelines.pieces import EXCERPT
from pipelines.spool import ArrowSpool, Spool

CHUNK_CHARACTERS = 1 << 20
"""Text handed to the tokenizer in one call."""
WINDOW_DOCUMENTS = 1 << 16
"""Documents of a window, at most: small ones are mostly Python objects until they are packed."""
HISTOGRAM_BINS = 65
"""By bit length: 0, 1, 2-3, 4-7 and so on."""
_TOTALS = ("rows", "tokens", "documents", "characters", "bytes", "padding")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How records become sequences."""

    cleaning: Cleaning
    held_out_rate: float
    packing: Literal["concat", "best_fit"]
    geometry: Geometry
    window_bytes: int


@dataclass(slots=True)
class _Window:
    """Documents of one split that are packed together."""

    documents: list[tuple[int, str, str]] = field(default_factory=list)
    """Row, path and where of each."""
    sizes: list[np.ndarray] = field(default_factory=list)
    """UTF-8 bytes of each, int64."""
    encoded: list[Encoded] = field(default_factory=list)
    is_response: list[np.ndarray] = field(default_factory=list)
    """Of conversations only."""


class Intake:
    """Takes a part's records in order; when it is closed, the spools hold its units."""

    def __init__(self, part: int, recipe: Recipe, encoder: DocumentEncoder) -> None:
        self._part, self._recipe, self._encoder = part, recipe, encoder
        self._waiting: dict[str, list[Document]] = {split: [] for split in SPLITS}
        self._windows = {split: _Window() for split in SPLITS}
        self._characters = self._window_bytes = self._window_documents = 0
        self._documents_in = self._rearranged = 0
        self._dropped: Counter[str] = Counter()
        self._dead: Counter[str] = Counter()
        self._first_dead: dict[str, Any] | None = None
        self._totals: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._histograms = np.zeros((2, HISTOGRAM_BINS), dtype=np.int64)
        self._batch_splits: list[int] = []
        self.dead_letters = Spool()
        self.documents = ArrowSpool(documents_schema())
        self.sequences = ArrowSpool(packed_schema(recipe.geometry))

    def take(self, document: Document, is_repeated: bool = False) -> None:
        """Take a record: dead, dropped, or on to its split."""
        self._documents_in += 1
        if document.text is None:
            self._bury(document, document.reason, document.excerpt)
        elif is_repeated:
            self._dropped["duplicate"] += 1
        else:
            found = cleaned_document(document, self._recipe.cleaning)
            if isinstance(found, Drop):
                self._dropped[found.reason] += 1
            else:
                self._wait(found)

    def bury(self, document: Document, reason: str) -> None:
        """Take a record that is dead for a reason found elsewhere."""
        self._documents_in += 1
        self._bury(document, reason, (document.text or document.excerpt)[:EXCERPT])

    def close(self) -> None:
        """Pack what is left and finish the spools."""
        self._end_window()
        self.documents.finish()
        self.sequences.finish()

    def facts(self) -> dict[str, Any]:
        """The part's counts; in = out + dropped + dead is checked.

        `batch_splits` tells the split (an index into SPLITS) of each record batch of sequences.
        """
        splits = {s: {key: self._totals[s][key] for key in _TOTALS} for s in SPLITS}
        out = sum(each["documents"] for each in splits.values())
        if self._documents_in != out + self._dropped.total() + self._dead.total():
            raise RuntimeError("a document was lost or doubled")
        return {
            "documents_in": self._documents_in,
            "dropped": dict(sorted(self._dropped.items())),
            "dead": dict(sorted(self._dead.items())),
            "first_dead": self._first_dead,
            "rearranged": self._rearranged,
            "splits": splits,
            "document_bytes": self._histograms[0].tolist(),
            "document_tokens": self._histograms[1].tolist(),
            "batch_splits": self._batch_splits,
        }

    def _bury(self, document: Document, reason: str, excerpt: str) -> None:
        letter = {"path": document.path, "where": document.where}
        letter |= {"reason": reason, "excerpt": excerpt}
        self._dead[reason] += 1
        self._first_dead = self._first_dead or letter
        self.dead_letters.write((json.dumps(letter, ensure_ascii=False) + "\n").encode())

    def _wait(self, document: Document) -> None:
        """Put a document into the line of its split."""
        assert document.text is not None
        is_kept = is_held_out(document.text, self._recipe.held_out_rate)
        self._waiting["held_out" if is_kept else "train"].append(document)
        self._characters += len(document.text)
        self._window_bytes += len(document.text.encode())
        self._window_documents += 1
        is_full = self._window_bytes >= self._recipe.window_bytes
        if is_full or self._window_documents == WINDOW_DOCUMENTS:
            self._end_window()
        elif self._characters >= CHUNK_CHARACTERS:
            self._encode_waiting()

    def _encode_waiting(self) -> None:
        """Tokenise what waits."""
        for split, documents in self._waiting.items():
            if documents:
                is_chat = documents[0].messages is not None  # a part has one source
                (self._encode_chats if is_chat else self._encode_texts)(split, documents)
        self._waiting = {split: [] for split in SPLITS}
        self._characters = 0

    def _encode_texts(self, split: str, documents: list[Document]) -> None:
        texts = [document.text or "" for document in documents]
        encoded = self._encoder.texts(texts)
        if split == "train":
            encoded, count = self._encoder.rearranged(texts, encoded)
            self._rearranged += count
        sizes = [len(text.encode()) for text in texts]
        self._totals[split].update(characters=sum(map(len, texts)), bytes=sum(sizes))
        self._add(split, documents, encoded, np.array(sizes, dtype=np.int64))

    def _encode_chats(self, split: str, documents: list[Document]) -> None:
        """Conversations: what the template refuses is dead, what holds no response is dropped.

        Characters and bytes are counted of the responses, as those are what tokens are counted of.
        """
        chats = [document.messages or [] for document in documents]
        encoded, is_response, refused = self._encoder.chats(chats)
        for place in refused:
            shown = json.dumps(chats[place], ensure_ascii=False)[:EXCERPT]
            self._bury(documents[place], "chat_template_fails", shown)
        left = [document for i, document in enumerate(documents) if i not in set(refused)]
        owner = np.repeat(np.arange(len(left)), encoded.lengths)
        answers = np.bincount(owner, weights=is_response, minlength=len(left)) > 0
        if not answers.all():
            self._dropped["no_response"] += int((~answers).sum())
        keep = answers[owner]
        sizes = np.bincount(owner, weights=encoded.sizes, minlength=len(left)).astype(np.int64)
        chosen = Encoded(encoded.tokens[keep], encoded.lengths[answers], encoded.sizes[keep])
        is_response = is_response[keep]
        kept = [document for document, has in zip(left, answers, strict=True) if has]
        self._windows[split].is_response.append(is_response)
        turns = (turn for document in kept for turn in document.messages or [])
        self._totals[split].update(
            characters=sum(len(turn["content"]) for turn in turns if turn["role"] == "assistant"),
            bytes=int(chosen.sizes[is_response].sum()),
        )
        self._add(split, kept, chosen, sizes[answers])

    def _add(
        self,
        split: str,
        documents: list[Document],
        encoded: Encoded,
        sizes: np.ndarray,
    ) -> None:
        """Encoded documents to their window and to the counts; `sizes` is their texts' bytes."""
        window, total = self._windows[split], self._totals[split]
        window.encoded.append(encoded)
        window.documents += [(each.row, each.path, each.where) for each in documents]
        window.sizes.append(sizes)
        total["documents"] += len(documents)
        for row, values in enumerate((sizes, encoded.lengths)):
            bins = np.bincount(bit_lengths(values), minlength=HISTOGRAM_BINS)
            self._histograms[row] += bins

    def _end_window(self) -> None:
        """Pack the windows of all splits and begin new ones."""
        self._encode_waiting()
        self._list_documents()
        for number, split in enumerate(SPLITS):
            self._pack(number, split, self._windows[split])
            self._windows[split] = _Window()
        self._window_bytes = self._window_documents = 0

    def _list_documents(self) -> None:
        """The window's rows of the table of documents, by rising id."""
        windows = [self._windows[split] for split in SPLITS]
        listed = [each for window in windows for each in window.documents]
        if not listed:
            return
        rows = np.array([row for row, _, _ in listed], dtype=np.uint64)
        counts = [len(window.documents) for window in windows]
        columns = {
            "document_id": self._ids(rows),
            "bytes": np.concatenate([each for w in windows for each in w.sizes]),
            "tokens": np.concatenate([each.lengths for w in windows for each in w.encoded]),
            "split": np.repeat(np.arange(len(SPLITS)), counts),
        }
        order = np.argsort(rows)
        arrays = {name: values[order] for name, values in columns.items()}
        texts = {
            "path": [listed[place][1] for place in order],
            "where": [listed[place][2] for place in order],
        }
        schema = documents_schema()
        self.documents.append(
            [pa.array((arrays | texts)[field.name], type=field.type) for field in schema]
        )

    def _pack(self, number: int, split: str, window: _Window) -> None:
        """The window's sequences."""
        if not window.documents:
            return
        encoded = Encoded(
            np.concatenate([each.tokens for each in window.encoded]),
            np.concatenate([each.lengths for each in window.encoded]),
            np.concatenate([each.sizes for each in window.encoded]),
        )
        rows = np.array([row for row, _, _ in window.documents], dtype=np.uint64)
        tokenizer, geometry = self._encoder.tokenizer, self._recipe.geometry
        packed = pack(
            encoded,
            self._ids(rows),
            geometry,
            tokenizer.eos_id,
            tokenizer.pad_id,
            packing=self._recipe.packing,
            is_response=np.concatenate(window.is_response) if window.is_response else None,
        )
        if (infilling := self._encoder.infilling) is not None:
            # The model is always given what stands before a part, and never to write it.
            is_mark = np.isin(packed.tokens, infilling.ids)
            packed = replace(packed, is_maskable=packed.is_maskable & ~is_mark)
        total = self._totals[split]
        total["rows"] += len(packed)
        total["tokens"] += int(packed.is_maskable.sum())
        total["padding"] += padding_of(packed, encoded.lengths)
        step = batch_rows(geometry)
        for start in range(0, len(packed), step):
            piece = packed.slice(start, min(start + step, len(packed)))
            self.sequences.append(packed_columns(piece))
            self._batch_splits.append(number)

    def _ids(self, rows: np.ndarray) -> np.ndarray:
        """Document ids of the part's rows."""
        return np.uint64(self._part << 32) | rows


def bit_lengths(values: np.ndarray) -> np.ndarray:
    """Bits that each number (0 to 2^53) needs; 0 needs none."""
    return np.frexp(values.astype(np.float64))[1]
