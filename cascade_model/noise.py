"""The order of a draw, the mask rates and the mask bits, as pure functions of the recipe.

A *draw* is one pass over a corpus of N sequences. Draw d fixes an order (a keyed permutation of
0..N-1) and the noise of every sequence; the *rank* of a sequence is its place in that order. All
arithmetic is on integers, so any machine, worker count and batch size gives the same bits.

Sources: Philox4x32-10 is Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011),
with the test vectors of Random123. The format-preserving permutation is a balanced Feistel network
with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
Stratified mask rates lower the variance of the bound as in BD3-LM (arXiv 2503.09573); here the
strata are permuted, so that no row is tied to one part of the range.
"""

import numpy as np

from cascade_model.config import NoiseConfig, TrainingNoise

# What a random word is for; it stands in the counter, so no two uses share a word.
ORDER, STRATUM, JITTER, BIT, TOKEN, POSITION, VOCABULARY = 1, 2, 3, 4, 5, 6, 7
CUT, COUNT, SUBSET = 8, 9, 10
FULL = 2**32 - 1
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
Draws = int | np.ndarray
"""A draw for all, or uint64 [n]: one for each rank or sequence."""
_CHUNK = 8192  # counters per turn: six arrays of 64 KiB stay in the second-level cache


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: uint32 counters [..., 4] and two uint32 key words -> uint32 [..., 4]."""
    shape = np.shape(counter)
    words = np.asarray(counter, dtype=np.uint64).reshape(-1, 4)
    result = np.empty(words.shape, dtype=np.uint32)
    for start in range(0, len(words), _CHUNK):
        part = slice(start, start + _CHUNK)
        _philox_rounds([np.array(word) for word in words[part].T], key, result[part])
    return result.reshape(shape)


def _philox_rounds(words: list[np.ndarray], key: tuple[int, int], result: np.ndarray) -> None:
    """Ten rounds on four arrays uint64 [n], written to uint32 [n, 4].

    The arrays are used up: everything happens in place, to stay in cache.
    """
    c0, c1, c2, c3 = words
    left, right = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = (int(word) & FULL for word in key)
    for _ in range(10):
        np.multiply(c0, np.uint64(0xD2511F53), out=left)
        np.multiply(c2, np.uint64(0xCD9E8D57), out=right)
        np.right_shift(right, _SHIFT, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(left, _SHIFT, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(right, _LOW, out=c1)
        np.bitwise_and(left, _LOW, out=c3)
        k0, k1 = (k0 + 0x9E3779B9) & FULL, (k1 + 0xBB67AE85) & FULL
    for place, word in enumerate((c0, c1, c2, c3)):
        result[:, place] = word


def key_of(seed: int) -> tuple[int, int]:
    """A 64-bit seed as the two words of a Philox key."""
    return seed & FULL, (seed >> 32) & FULL


def counters(w0, w1, w2, w3) -> np.ndarray:
    """Four broadcastable words -> uint64 counters [..., 4]."""
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in (w0, w1, w2, w3)))
    return np.stack(words, axis=-1)


def random_words(
    key: tuple[int, int], purpose: int, draw: Draws, ids: np.ndarray, count: int
) -> np.ndarray:
    """`count` words for each id, uint32 [n, count]: word j is word j % 4 of counter j // 4."""
    ids = np.asarray(ids, dtype=np.uint64)
    draws = np.broadcast_to(np.asarray(draw, dtype=np.uint64), ids.shape)
    high = (ids >> _SHIFT) + np.uint64(purpose << 24)
    quads = np.arange((count + 3) // 4, dtype=np.uint64)
    result = np.empty((len(ids), len(quads), 4), dtype=np.uint32)
    step = max(1, _CHUNK // max(len(quads), 1))
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        mine = result[part].reshape(-1, 4)
        rows = (ids[part] & _LOW, high[part], draws[part])
        words = [np.repeat(word, len(quads)) for word in rows]
        _philox_rounds([np.tile(quads, len(rows[0])), *words], key, mine)
    return result.reshape(len(ids), 4 * len(quads))[:, :count]


def permute(
    index: np.ndarray,
    size: int,
    key: tuple[int, int],
    tweak: int | np.ndarray,
    purpose: int = ORDER,
) -> np.ndarray:
    """A keyed permutation of range(size) at the given indices (uint64, any shape).

    `tweak` (a scalar or an array like `index`) chooses one of 2^32 permutations of the same key.
    `IndexError` for an index outside of range(size).
    """
    return _walk(index, size, key, tweak, purpose, forward=True)


def unpermute(
    index: np.ndarray,
    size: int,
    key: tuple[int, int],
    tweak: int | np.ndarray,
    purpose: int = ORDER,
) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(index, size, key, tweak, purpose, forward=False)


def _walk(index, size, key, tweak, purpose, *, forward: bool) -> np.ndarray:
    """Apply the Feistel network again to whatever still lies outside range(size).

    From an index outside, the walk might never come back: `IndexError`.
    """
    value = np.array(index, dtype=np.uint64)
    if value.size and int(value.max()) >= size:
        raise IndexError(f"index {int(value.max())} of a permutation of {size}")
    keyed = np.broadcast_to(_keyed(key, np.asarray(tweak, np.uint64), purpose), value.shape)
    half = _half_bits(size)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, keyed[outside], forward)
        outside = value >= np.uint64(size)
    return value


def _half_bits(size: int) -> int:
    """Bits of either half of the Feistel network over range(size)."""
    return max(1, (max(size - 1, 1).bit_length() + 1) // 2)


def _keyed(key: tuple[int, int], tweak: np.ndarray, purpose: int) -> np.ndarray:
    """What the rounds of a permutation depend on besides their input, uint64."""
    word = np.array([key[0] | key[1] << 32], dtype=np.uint64)
    return _mix(_mix(word) + tweak) + np.uint64(purpose)


def _turn(number: int) -> np.uint64:
    """What tells a round from the others."""
    return np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)


def _feistel(value: np.ndarray, half: int, keyed: np.ndarray, forward: bool) -> np.ndarray:
    """Six balanced rounds on 2 * half bits."""
    mask, width = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = value >> width, value & mask
    for number in range(6) if forward else reversed(range(6)):
        source, target = (right, left) if forward else (left, right)
        mixed = target ^ (_mix(_mix(source + _turn(number)) ^ keyed) & mask)
        left, right = (right, mixed) if forward else (mixed, left)
    return (left << width) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute_rows(
    index: np.ndarray, size: int, key: tuple[int, int], tweaks: np.ndarray, purpose: int
) -> np.ndarray:
    """`permute` of uint64 [n, c], each row with a tweak of its own, uint64 [n].

    A round depends on half of the bits and the tweak alone, and `size` is small here: so it is
    looked up in a table of the tweaks that occur.
    """
    half = _half_bits(size)
    found, rows = np.unique(tweaks, return_inverse=True)
    mask, every = (1 << half) - 1, np.arange(1 << half, dtype=np.uint64)
    turns = np.array([_turn(number) for number in range(6)], dtype=np.uint64)
    keyed = _mix(every + turns[:, None])[:, None] ^ _keyed(key, found, purpose)[:, None]
    tables = (_mix(keyed) & np.uint64(mask)).astype(np.intp).reshape(6, -1)
    base = np.repeat(rows.astype(np.intp) << half, index.shape[1])
    value = index.astype(np.intp).ravel()
    result, places = np.empty_like(value), np.arange(value.size)
    while value.size:
        left, right = value >> half, value & mask
        for table in tables:
            np.add(base, right, out=value)
            left ^= table.take(value, mode="clip", out=value)
            left, right = right, left
        value = left << half | right
        result[places] = value
        outside = np.flatnonzero(value >= size)
        value, base, places = value[outside], base[outside], places[outside]
    return result.astype(np.uint64).reshape(index.shape)


def sequence_at(
    ranks: np.ndarray, num_sequences: int, noise: NoiseConfig, draw: Draws
) -> np.ndarray:
    """The sequence ids (uint64) that stand at these ranks of the draw's order."""
    return permute(ranks, num_sequences, key_of(noise.seed), draw)


def rank_of(
    sequence_ids: np.ndarray, num_sequences: int, noise: NoiseConfig, draw: Draws
) -> np.ndarray:
    """The ranks (uint64) of these sequences in the draw's order: the inverse of `sequence_at`."""
    return unpermute(sequence_ids, num_sequences, key_of(noise.seed), draw)


def thresholds(noise: NoiseConfig, draw: Draws, ranks: np.ndarray, num_blocks: int) -> np.ndarray:
    """Mask rates of sequences at these ranks, as uint32 thresholds [n, num_blocks].

    A position is masked when its random word lies below the threshold, so the mask rate is
    threshold / 2^32 and the loss weight 1/t is 2^32 / threshold. `noise.strata` consecutive ranks
    form a group; the group's cells (rank x block) take one stratum each of [0, 1), permuted by a
    permutation of the group, with a jitter inside the stratum. The affine map to
    [min_rate, max_rate] comes last; the top saturates at 2^32 - 1.
    """
    ranks = np.asarray(ranks, dtype=np.uint64)
    per_rank = num_blocks if noise.per == "block" else 1
    strata, cells = np.uint64(noise.strata), noise.strata * per_rank
    cell = (ranks % strata)[:, None] * np.uint64(per_rank) + np.arange(per_rank, dtype=np.uint64)
    tweaks = (ranks // strata * np.uint64(0x9E3779B1) + np.asarray(draw, np.uint64)) & _LOW
    key = key_of(noise.seed)
    stratum = permute_rows(cell, cells, key, tweaks, STRATUM)
    jitter = random_words(key, JITTER, draw, ranks, per_rank).astype(np.uint64)
    uniform = ((stratum << _SHIFT) + jitter) // np.uint64(cells)
    low = int(noise.min_rate * 2**32)
    high = min(FULL, int(noise.max_rate * 2**32))
    result = np.uint64(min(low, FULL)) + ((uniform * np.uint64(max(high - low, 0))) >> _SHIFT)
    return np.broadcast_to(result, (len(ranks), num_blocks)).astype(np.uint32)


def mask_bits(
    noise: NoiseConfig,
    draw: Draws,
    sequence_ids: np.ndarray,
    thresholds: np.ndarray,
    sequence_length: int,
) -> np.ndarray:
    """Which places the noise masks, bool [n, sequence_length]; the caller ANDs `is_maskable`."""
    bits = random_words(key_of(noise.seed), BIT, draw, sequence_ids, sequence_length)
    return bits < np.repeat(thresholds, sequence_length // thresholds.shape[1], axis=1)


def complement(thresholds: np.ndarray) -> np.ndarray:
    """The mask rates of the other member of a pair: 1 - t, as uint32 thresholds.

    A place is masked in the one when its word lies below the threshold, in the other when not.
    """
    return np.minimum(2**32 - thresholds.astype(np.uint64), np.uint64(FULL)).astype(np.uint32)


def cut_length(noise: TrainingNoise, batch: int, sequence_length: int) -> int:
    """Length of the samples of the global batch with this number: mostly L, sometimes less.

    With probability `short_rate` it is uniform on the multiples of `short_multiple` up to L, so L
    itself may be drawn, as in LLaDA.
    """
    chance, choice = random_words(
        key_of(noise.seed), CUT, 0, np.array([batch], dtype=np.uint64), 2
    )[0].tolist()
    if chance >= noise.short_rate * 2**32:
        return sequence_length
    lengths = sequence_length // noise.short_multiple
    return (1 + (choice * lengths >> 32)) * noise.short_multiple
