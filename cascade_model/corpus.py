"""The reader: global sample numbers to batches, the same for any number of ranks.

Global sample g of a corpus of N sequences is rank g mod N in the order of draw g div N. With
complementary pairs, samples 2k and 2k + 1 are both rank k mod N of draw k div N. What a sample
looks like depends on (corpus, recipe, g) alone.
"""

from dataclasses import dataclass, replace

import numpy as np

from cascade_model import noise as mask_noise
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig, TrainingNoise
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.schema import MANIFEST, TOKENIZER, Manifest
from cascade_model.shards import Shard
from cascade_model.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n masked sequences of L tokens in blocks of B."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    clean_tokens: np.ndarray
    """int64 [n, L]; PAD places hold pad_id."""
    is_masked: np.ndarray
    """bool [n, L]; false wherever is_maskable is."""
    is_maskable: np.ndarray
    """bool [n, L]; false at PAD."""
    thresholds: np.ndarray
    """uint32 [n, L / B]: mask rate of each block times 2^32; [n, 1] where a batch was cut within a
    block, which is done to rates per sequence only."""
    positions: np.ndarray
    """int64 [n, L]; restart at 0 with each document."""
    segments: np.ndarray
    """int32 [n, L]: 0, 1, 2... per sequence; PAD belongs to the document before it."""

    def __len__(self) -> int:
        return len(self.sequence_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRows:
    """Sequences as they lie in the shards, bitmaps unpacked (draw 0 of the corpus's recipe)."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    tokens: np.ndarray
    """int64 [n, L]."""
    is_maskable: np.ndarray
    """bool [n, L]."""
    thresholds: np.ndarray
    """uint32 [n, L / B] of draw 0."""
    is_masked: np.ndarray
    """bool [n, L] of draw 0."""
    is_start: np.ndarray
    """bool [n, L]: a document starts or goes on here; the first place is always one."""


class Corpus:
    """One split of a prepared corpus; shards are checked when first touched."""

    def __init__(self, folder: Folder, manifest: Manifest, split: str) -> None:
        self._folder, self.manifest, self.split = folder, manifest, split
        self._entry = manifest.splits[split]
        self._shards: dict[int, Shard] = {}
        self._first = np.array([s.first_sequence for s in self._entry.shards], dtype=np.uint64)

    @classmethod
    def open(cls, url: str, split: str = "train") -> "Corpus":
        """Open a finished corpus; `CorpusMismatch` when it is missing, unfinished or empty."""
        folder = Folder(url)
        manifest = read_manifest(folder)
        entry = manifest.splits.get(split)
        if entry is None or entry.num_sequences == 0:
            have = [name for name, each in manifest.splits.items() if each.num_sequences]
            raise CorpusMismatch(
                f"corpus={url} has no sequences in split {split!r}, only in {have}; prepare it "
                "with another held_out_rate or name another split"
            )
        return cls(folder, manifest, split)

    @property
    def num_sequences(self) -> int:
        """Sequences N in the split."""
        return self._entry.num_sequences

    @property
    def num_tokens(self) -> int:
        """Maskable tokens in the split."""
        return self._entry.num_tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of those tokens."""
        return self._entry.num_bytes

    @property
    def sequence_length(self) -> int:
        """Tokens L per sequence."""
        return self.manifest.sequence_length

    @property
    def block_size(self) -> int:
        """Block size the documents are aligned to."""
        return self.manifest.block_size

    @property
    def digest(self) -> str:
        """Digest of the manifest."""
        return self.manifest.digest

    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer; `CorpusMismatch` when the file is not the one recorded."""
        where = self._folder.path(TOKENIZER)
        try:
            tokenizer = Tokenizer(self._folder.read_bytes(TOKENIZER), where)
        except FileNotFoundError:
            raise CorpusMismatch(f"{where} is missing; prepare the corpus again") from None
        self.require_tokenizer(tokenizer.sha256, where)
        return tokenizer

    def require_tokenizer(self, sha256: str, whose: str) -> None:
        """Refuse a tokenizer other than the one the shards were made with."""
        if sha256 != self.manifest.tokenizer_sha256:
            raise CorpusMismatch(
                f"tokenizer of {whose} has sha256 {sha256[:12]} but corpus {self._folder.url} was "
                f"made with {self.manifest.tokenizer_sha256[:12]}; prepare the corpus with that "
                "tokenizer"
            )

    def rows(self, sequence_ids: np.ndarray) -> SequenceRows:
        """Sequences by id, in the order asked for; `IndexError` outside the split."""
        ids = np.asarray(sequence_ids, dtype=np.uint64)
        if ids.size and int(ids.max()) >= self.num_sequences:
            raise IndexError(f"sequence {int(ids.max())} of {self.num_sequences}")
        into = self._empty(len(ids))
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        owner = np.searchsorted(self._first, ordered, side="right") - 1
        for index in np.unique(owner):
            low, high = np.searchsorted(owner, [index, index + 1])
            places = (ordered[low:high] - self._first[index]).astype(np.int64)
            self._shard(int(index)).gather(places, into, order[low:high])
        return SequenceRows(sequence_ids=ids, **into)

    def _empty(self, count: int) -> dict[str, np.ndarray]:
        length, blocks = self.sequence_length, self.manifest.geometry.num_blocks
        return {
            "tokens": np.empty((count, length), dtype=np.int64),
            "is_maskable": np.empty((count, length), dtype=bool),
            "thresholds": np.empty((count, blocks), dtype=np.uint32),
            "is_masked": np.empty((count, length), dtype=bool),
            "is_start": np.zeros((count, length), dtype=bool),
        }

    def _shard(self, index: int) -> Shard:
        if index not in self._shards:
            entry = self._entry.shards[index]
            self._shards[index] = Shard(self._folder, entry, self.manifest.geometry)
        return self._shards[index]

    def batch(
        self,
        first_sample: int,
        num_samples: int,
        noise: NoiseConfig,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Rank `rank`'s contiguous slice of global samples first_sample..+num_samples."""
        noise = noise if isinstance(noise, TrainingNoise) else TrainingNoise.over(noise)
        self._require_noise(noise)
        low = first_sample + num_samples * rank // world_size
        high = first_sample + num_samples * (rank + 1) // world_size
        samples = np.arange(low, high, dtype=np.uint64)
        copies = np.uint64(2 if noise.complement else 1)
        shown, is_second = samples // copies, samples % copies == 1
        draws = shown // np.uint64(self.num_sequences)
        ranks = shown % np.uint64(self.num_sequences)
        parts = [
            self._ordered(ranks[draws == draw], is_second[draws == draw], noise, int(draw))
            for draw in np.unique(draws)
        ]
        parts = parts or [self._ordered(ranks, is_second, noise, 0)]
        names = Batch.__dataclass_fields__
        whole = parts[0]
        if len(parts) > 1:
            whole = Batch(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})
        return self._cut(whole, first_sample, num_samples, noise)

    def _require_noise(self, noise: TrainingNoise) -> None:
        if self.block_size % noise.block_size:
            raise CorpusMismatch(
                f"noise.block_size={noise.block_size} does not divide the corpus's block size "
                f"{self.block_size}; use a divisor or prepare the corpus with "
                f"--noise.block_size {noise.block_size}"
            )
        if noise.padding == "eos" and self.manifest.pad_id == self.manifest.eos_id:
            raise InputError(
                f"noise.padding=eos needs padding of its own, and pad_id and eos_id of the corpus "
                f"are both {self.manifest.eos_id}; use noise.padding=never"
            )

    def masked(
        self, sequence_ids: np.ndarray, ranks: np.ndarray, noise: NoiseConfig, draw: int
    ) -> Batch:
        """Given sequences with the noise that `draw` has for these ranks, whatever its order."""
        noise = TrainingNoise.over(noise)
        self._require_noise(noise)
        is_second = np.zeros(len(sequence_ids), dtype=bool)
        return self._masked(sequence_ids, ranks, is_second, noise, draw, is_stored=False)

    def _ordered(
        self, ranks: np.ndarray, is_second: np.ndarray, noise: TrainingNoise, draw: int
    ) -> Batch:
        """Samples of one draw, in its order; a second one is the complement of its first."""
        ids = mask_noise.sequence_at(ranks, self.num_sequences, noise, draw)
        is_stored = draw == 0 and noise.recipe == self.manifest.noise and noise.padding != "eos"
        return self._masked(ids, ranks, is_second, noise, draw, is_stored=is_stored)

    def _masked(
        self,
        ids: np.ndarray,
        ranks: np.ndarray,
        is_second: np.ndarray,
        noise: TrainingNoise,
        draw: int,
        *,
        is_stored: bool,
    ) -> Batch:
        rows = self.rows(ids)
        if noise.padding == "eos":
            is_padding = ~rows.is_maskable & (rows.tokens == self.manifest.pad_id)
            tokens = np.where(is_padding, self.manifest.eos_id, rows.tokens)
            rows = replace(rows, tokens=tokens, is_maskable=rows.is_maskable | is_padding)
        thresholds, is_masked = rows.thresholds, rows.is_masked
        if not is_stored:
            blocks = self.sequence_length // noise.block_size
            thresholds = mask_noise.thresholds(noise, draw, ranks, blocks)
            bits = mask_noise.mask_bits(noise, draw, ids, thresholds, self.sequence_length)
            is_masked = bits & rows.is_maskable
        if is_second.any():
            other = is_second[:, None]
            is_masked = np.where(other, rows.is_maskable & ~is_masked, is_masked)
            thresholds = np.where(other, mask_noise.complement(thresholds), thresholds)
        places = np.arange(self.sequence_length, dtype=np.int64)
        starts = np.maximum.accumulate(np.where(rows.is_start, places, 0), axis=1)
        return Batch(
            sequence_ids=ids,
            clean_tokens=rows.tokens,
            is_masked=is_masked,
            is_maskable=rows.is_maskable,
            thresholds=thresholds,
            positions=places - starts,
            segments=np.cumsum(rows.is_start, axis=1, dtype=np.int32) - np.int32(1),
        )

    def _cut(
        self, batch: Batch, first_sample: int, num_samples: int, noise: TrainingNoise
    ) -> Batch:
        """The batch at the length that its global batch drew."""
        if noise.short_rate == 0.0:
            return batch
        number = first_sample // noise.sequences_per_batch
        if (first_sample + max(num_samples, 1) - 1) // noise.sequences_per_batch != number:
            raise InputError(
                f"samples {first_sample}..{first_sample + num_samples - 1} belong to several "
                f"batches of noise.sequences_per_batch={noise.sequences_per_batch}, which are cut "
                "apart; read one at a time"
            )
        length = mask_noise.cut_length(noise, number, self.sequence_length)
        blocks = 1 if length % noise.block_size else length // noise.block_size
        cut = {
            name: getattr(batch, name)[:, :length]
            for name in ("clean_tokens", "is_masked", "is_maskable", "positions", "segments")
        }
        return replace(batch, thresholds=batch.thresholds[:, :blocks], **cut)


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a finished corpus; `CorpusMismatch` when there is none."""
    try:
        data = folder.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.list():
            raise CorpusMismatch(
                f"corpus={folder.url} does not exist; make it with `cascade prepare`"
            ) from None
        raise CorpusMismatch(
            f"corpus={folder.url} has no {MANIFEST}, so it is unfinished; run its `cascade "
            "prepare` again to go on"
        ) from None
    return Manifest.from_json(data, folder.path(MANIFEST))
