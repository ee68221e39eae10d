"""The reader: global sample numbers to batches, the same for any number of ranks.

Global sample g of a corpus of N sequences is rank g mod N in the order of draw g div N. With
complementary pairs, samples 2k and 2k + 1 are both rank k mod N of draw k div N. With several
sources, g chooses the source and its own sample first (`mixing`). What a sample looks like depends
on (corpus, recipe, g) alone.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from cascade_model import noise as mask_noise
from cascade_model.commit import Folder, reason_of
from cascade_model.config import NoiseConfig, TrainingNoise
from cascade_model.draws import Draws, draw_manifest_name
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.manifest import CURE, MANIFEST, TOKENIZER, Manifest
from cascade_model.mixing import mixture_of
from cascade_model.provenance import DocumentTables, Seen
from cascade_model.sequences import SequenceRows, Sequences
from cascade_model.shard_cache import CacheConfig, ShardCache
from cascade_model.tokenizer import Tokenizer

WINDOW = 1024
"""Consecutive samples whose places in the corpus are found at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """n masked sequences of L tokens in blocks of B."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    clean_tokens: np.ndarray
    """uint16 or uint32 [n, L]; PAD places hold pad_id."""
    is_masked: np.ndarray
    """bool [n, L]; false wherever is_maskable is."""
    is_maskable: np.ndarray
    """bool [n, L]; false at PAD."""
    thresholds: np.ndarray
    """uint32 [n, L / B]: mask rate of each block times 2^32; [n, 1] where a batch was cut within a
    block, which is done to rates per sequence only."""
    positions: np.ndarray
    """int32 [n, L]; restart at 0 with each document."""
    segments: np.ndarray
    """int32 [n, L]: 0, 1, 2... per sequence; PAD belongs to the document before it."""

    def __len__(self) -> int:
        return len(self.sequence_ids)


class Corpus:
    """One split of a prepared corpus; its record batches are checked when first touched."""

    def __init__(
        self, folder: Folder, manifest: Manifest, split: str, cache: ShardCache | None = None
    ) -> None:
        self._folder, self.manifest, self.split = folder, manifest, split
        self._entry = manifest.splits[split]
        self.documents = DocumentTables(folder, manifest)
        self._mixture = mixture_of(self._entry.sources, self._entry.num_sequences)
        self._window = lru_cache(maxsize=16)(self._placed)
        self._draws = Draws(folder, manifest, split, cache)
        self._sequences = Sequences(folder, manifest, split, cache)

    @classmethod
    def open(cls, url: str, split: str = "train", cache: CacheConfig = CacheConfig()) -> "Corpus":
        """Open a finished corpus; `CorpusMismatch` when it is missing, unfinished or empty.

        What is read of a corpus in a store is kept as `cache` says, by default in a temporary
        folder. A local one is mapped into memory, unless `cache` names a folder.
        """
        folder = Folder(url)
        manifest = read_manifest(folder)
        entry = manifest.splits.get(split)
        if entry is None or entry.num_sequences == 0:
            have = [name for name, each in manifest.splits.items() if each.num_sequences]
            raise CorpusMismatch(
                f"corpus={url} has no sequences in split {split!r}, only in {have}; prepare it "
                "with another held_out_rate or name another split"
            )
        is_mapped = folder.is_local and cache.folder is None
        return cls(folder, manifest, split, None if is_mapped else ShardCache(cache))

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
    def recipe(self) -> NoiseConfig:
        """The noise whose first draw is stored."""
        return self.manifest.noise

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
            raise CorpusMismatch(f"{where} is missing; {CURE}") from None
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
        return self._sequences.rows(sequence_ids)

    def batch(self, first_sample: int, num_samples: int, noise: NoiseConfig) -> Batch:
        """Global samples first_sample..first_sample + num_samples - 1."""
        noise, recipe = _settings_of(noise)
        self._require_noise(noise)
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
        copies = np.uint64(2 if noise.complement else 1)
        ids, ranks, draws = self._places(samples // copies, recipe)
        is_second = samples % copies == 1
        is_recipe = recipe == self.manifest.noise and noise.padding != "eos"
        whole = self._masked(ids, ranks, draws, is_second, noise, is_recipe=is_recipe)
        return self._cut(whole, first_sample, num_samples, noise)

    def documents_of(
        self, first_sample: int, num_samples: int, noise: NoiseConfig | None = None
    ) -> list[Seen]:
        """Which pieces of which documents these samples hold, in order.

        `noise` is the run's, whose seed fixes the order; none is the corpus's own recipe.
        """
        noise = noise or self.manifest.noise
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
        copies = np.uint64(2 if isinstance(noise, TrainingNoise) and noise.complement else 1)
        ids, _, _ = self._places(samples // copies, _settings_of(noise)[1])
        flat = [
            (place, document, span)
            for place, pieces in enumerate(self._sequences.pieces(ids))
            for document, span in pieces
        ]
        documents = np.array([document for _, document, _ in flat], dtype=np.uint64)
        return [
            Seen(
                sample=first_sample + place,
                sequence_id=int(ids[place]),
                document_id=int(document),
                path=path,
                where=where,
                span=span,
            )
            for (place, document, span), (path, where) in zip(
                flat, self.documents.places(documents), strict=True
            )
        ]

    def _places(self, samples: np.ndarray, recipe: NoiseConfig) -> np.ndarray:
        """Ids, ranks and draws, uint64 [3, n], of samples, uint64 [n].

        They are made for whole windows: a thousand cost little more than one.
        """
        found = np.empty((3, len(samples)), dtype=np.uint64)
        numbers = samples // np.uint64(WINDOW)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            window = self._window(number, recipe)
            found[:, mine] = window[:, (samples[mine] % np.uint64(WINDOW)).astype(np.int64)]
        return found

    def _placed(self, number: int, recipe: NoiseConfig) -> np.ndarray:
        """A window's ids, ranks and draws, uint64 [3, WINDOW]."""
        first = number * WINDOW
        samples = np.arange(first, first + WINDOW, dtype=np.uint64)
        return np.stack(self._mixture.places(samples, recipe))

    def _require_noise(self, noise: TrainingNoise) -> None:
        is_whole = noise.block_size == self.sequence_length
        if self.block_size % noise.block_size and not is_whole:
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
        draws = np.full(len(sequence_ids), draw, dtype=np.uint64)
        no = np.zeros(len(sequence_ids), dtype=bool)
        return self._masked(sequence_ids, ranks, draws, no, noise, is_recipe=False)

    def _masked(
        self,
        ids: np.ndarray,
        ranks: np.ndarray,
        draws: np.ndarray,
        is_second: np.ndarray,
        noise: TrainingNoise,
        *,
        is_recipe: bool,
    ) -> Batch:
        """Samples of the given draws and ranks; a second one is the complement of its first.

        With `is_recipe` the noise is the corpus's own, of which draw 0 is stored, and further draws
        where they were written.
        """
        rows = self.rows(ids)
        if noise.padding == "eos":
            is_padding = ~rows.is_maskable & (rows.tokens == self.manifest.pad_id)
            eos_id = rows.tokens.dtype.type(self.manifest.eos_id)
            tokens = np.where(is_padding, eos_id, rows.tokens)
            rows = replace(rows, tokens=tokens, is_maskable=rows.is_maskable | is_padding)
        blocks = self.sequence_length // noise.block_size
        is_stored = (draws == 0) & is_recipe
        if is_stored.all() and rows.thresholds.shape[1]:
            thresholds = np.broadcast_to(rows.thresholds, (len(ids), blocks))
        else:
            thresholds = mask_noise.thresholds(noise, draws, ranks, blocks)
        is_masked = rows.is_masked
        if is_recipe:
            is_stored |= self._take_draws(ids, draws, rows.is_maskable, is_masked)
        fresh = np.flatnonzero(~is_stored)
        if fresh.size:
            bits = mask_noise.mask_bits(
                noise, draws[fresh], ids[fresh], thresholds[fresh], self.sequence_length
            )
            is_masked[fresh] = bits & rows.is_maskable[fresh]
        if is_second.any():
            other = is_second[:, None]
            is_masked = np.where(other, rows.is_maskable & ~is_masked, is_masked)
            thresholds = np.where(other, mask_noise.complement(thresholds), thresholds)
        positions, segments = _within_documents(rows.is_start)
        return Batch(
            sequence_ids=ids,
            clean_tokens=rows.tokens,
            is_masked=is_masked,
            is_maskable=rows.is_maskable,
            thresholds=thresholds,
            positions=positions,
            segments=segments,
        )

    def _take_draws(
        self, ids: np.ndarray, draws: np.ndarray, is_maskable: np.ndarray, is_masked: np.ndarray
    ) -> np.ndarray:
        """Put bitmaps of further draws into `is_masked`; returns which rows had one, bool [n]."""
        taken = np.zeros(len(ids), dtype=bool)
        for draw in np.unique(draws[draws > 0]).tolist():
            mine = draws == draw
            found = self._draws.masked(draw, ids[mine])
            if found is None:
                continue
            if (found & ~is_maskable[mine]).any():
                raise CorpusMismatch(
                    f"draw {draw} of corpus {self._folder.url} masks places that must stay; delete "
                    f"{draw_manifest_name(draw)} and materialise again"
                )
            is_masked[mine] = found
            taken |= mine
        return taken

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


@lru_cache(maxsize=16)
def _settings_of(noise: NoiseConfig) -> tuple[TrainingNoise, NoiseConfig]:
    """A run's settings of the noise, and the recipe that a stored bitmap is bound to."""
    settings = noise if isinstance(noise, TrainingNoise) else TrainingNoise.over(noise)
    return settings, settings.recipe


def _within_documents(is_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place within the document and number of the document in its sequence, int32 [n, L] each."""
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=is_start.size)
    places = np.arange(is_start.size, dtype=np.int32)
    positions = places - np.repeat(starts.astype(np.int32), lengths)
    numbers = np.arange(len(starts), dtype=np.int32)
    is_first = starts % is_start.shape[1] == 0
    own = numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
    segments = np.repeat(own.astype(np.int32), lengths)
    return positions.reshape(is_start.shape), segments.reshape(is_start.shape)


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a finished corpus; `CorpusMismatch` when there is none, `InputError` when the
    folder does not exist or cannot be read."""
    try:
        data = folder.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.list():
            raise InputError(
                f"corpus={folder.url} does not exist; make it with `cascade prepare`, or check the "
                "path"
            ) from None
        raise CorpusMismatch(
            f"corpus={folder.url} has no {MANIFEST}, so it is unfinished or no corpus at all; run "
            "its `cascade prepare` again to go on, or check the path"
        ) from None
    except InputError:
        raise
    except Exception as error:  # each store has errors of its own
        raise InputError(
            f"corpus={folder.url} cannot be read ({reason_of(error)}); check its URL and your "
            "rights"
        ) from None
    return Manifest.from_json(data, folder.path(MANIFEST))
