"""Text to token ids and back, on Hugging Face's `tokenizers`.

The text of a special token inside a document is ordinary text: only the pipeline itself sets
EOS, PAD and MASK, and the tokens before the parts of a rearranged document. A tokenizer is known by
the SHA-256 of its tokenizer.json.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from cascade_model.errors import InputError
from cascade_model.token_sizes import (
    byte_sizes,
    byte_symbols,
    only_unicode_forms,
    pre_tokenizer_steps,
    sizes_from_offsets,
    sums,
    utf8_lengths,
)

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
# Ours come first, so that a file written by `with_specials` is read back with the same ids.
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
MASK_NAMES = (MASK, "<|mdm_mask|>", "<|MASK|>", "|<MASK>|", "<MASK>", "[MASK]", "<mask>")
INFILL_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # ours too; Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
"""What stands before prefix, suffix and middle of a document with a hole, by who trained so."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of several texts, one after the other."""

    tokens: np.ndarray
    """uint32 [total]."""
    lengths: np.ndarray
    """int64 [number of texts]."""
    sizes: np.ndarray
    """uint32 [total]: bytes of the text, in UTF-8, that each token stands for (`token_sizes`).

    Those of a text add up to its bytes, unless it has no token at all."""

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], sizes: Sequence[np.ndarray]) -> "Encoded":
        """Texts from the tokens and the sizes of each, uint32 [its tokens]."""
        none = np.empty(0, dtype=np.uint32)
        lengths = np.array([len(each) for each in tokens], dtype=np.int64)
        return cls(np.concatenate([none, *tokens]), lengths, np.concatenate([none, *sizes]))

    def replaced(self, places: Sequence[int], others: "Encoded") -> "Encoded":
        """With the texts of `others` at these places."""
        if not places:
            return self
        tokens, sizes = self.split()
        for place, *new in zip(places, *others.split(), strict=True):
            tokens[place], sizes[place] = new
        return Encoded.of(tokens, sizes)

    def split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The tokens and the sizes of each text, as `of` takes them."""
        cuts = np.cumsum(self.lengths)[:-1]
        if not len(self.lengths):
            return [], []
        return np.split(self.tokens, cuts), np.split(self.sizes, cuts)


class Encoder(Protocol):
    """Anything that encodes texts: a `Tokenizer`, or a faster engine for one (`fast_tokenizer`)."""

    def encode_arrays(self, texts: Sequence[str]) -> Encoded:
        """Token ids of several texts, with their sizes."""
        ...


class Tokenizer:
    """A tokenizer.json whose EOS, PAD and MASK are known; `vocab_size` counts them."""

    def __init__(self, data: bytes, where: str = "tokenizer.json") -> None:
        """Read the bytes of a tokenizer.json; `InputError` when they are none."""
        try:
            self._engine = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the engine raises bare Exception
            raise InputError(
                f"tokenizer {where} is not a tokenizer.json ({error}); give a file in the format "
                "of Hugging Face tokenizers, `train` or `bytes`"
            ) from None
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True
        self._data, self._where = data, where
        self.sha256 = hashlib.sha256(data).hexdigest()
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._ids = {
            role: next((vocabulary[name] for name in names if name in vocabulary), None)
            for role, names in (("eos", EOS_NAMES), ("pad", PAD_NAMES), ("mask", MASK_NAMES))
        }
        self._infill = next(
            (
                {name: vocabulary[name] for name in names}
                for names in INFILL_NAMES
                if vocabulary.keys() >= set(names)
            ),
            None,
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            raise InputError(
                f"tokenizer={path} cannot be read ({error.strerror}); give a tokenizer.json, "
                "`train` or `bytes`"
            ) from None

    @classmethod
    def from_url(cls, url: str) -> "Tokenizer":
        """Read a tokenizer.json from a local path or any fsspec URL."""
        if "://" not in url:
            return cls.from_file(url)
        import fsspec

        try:
            with fsspec.open(url, "rb") as file:
                return cls(file.read(), url)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as error:
            raise InputError(
                f"tokenizer={url} cannot be read ({type(error).__name__}); check the URL"
            ) from None

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return self._special("mask")

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self._special("pad")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document."""
        return self._special("eos")

    @property
    def infill_ids(self) -> tuple[int, int, int]:
        """Ids of the tokens before prefix, suffix and middle."""
        if self._infill is None:
            raise InputError(
                f"tokenizer {self._where} has no tokens of prefix, suffix and middle; call "
                "with_infill()"
            )
        prefix, suffix, middle = self._infill.values()
        return prefix, suffix, middle

    @property
    def eos(self) -> str:
        """Name of the token that ends a document."""
        name = self._engine.id_to_token(self.eos_id)
        assert name is not None
        return name

    def name_of(self, role: str) -> str | None:
        """Name of the "eos", "pad" or "mask" token; none where it is missing."""
        index = self._ids[role]
        return None if index is None else self._engine.id_to_token(index)

    def _special(self, role: str) -> int:
        value = self._ids[role]
        if value is None:
            raise InputError(f"tokenizer {self._where} has no {role} token; call with_specials()")
        return value

    def with_specials(self) -> "Tokenizer":
        """This tokenizer with the missing ones of EOS, PAD and MASK added at the end."""
        missing = [n for r, n in (("eos", EOS), ("pad", PAD), ("mask", MASK)) if not self.has(r)]
        if not missing:
            return self
        return self._with_added(missing)

    def with_infill(self) -> "Tokenizer":
        """This tokenizer with the tokens of prefix, suffix and middle: its own, made special where
        they are not, so that no text becomes one, or new ones at the end."""
        names = self._infill or INFILL_NAMES[0]
        if self._infill is not None and self.special_tokens.keys() >= set(names):
            return self
        added = [
            token | {"special": token["special"] or token["content"] in names}
            for token in self.description.get("added_tokens", [])
        ]
        text = json.dumps({**self.description, "added_tokens": added}, ensure_ascii=False)
        return Tokenizer(text.encode(), self._where)._with_added(names)

    def _with_added(self, names: Iterable[str]) -> "Tokenizer":
        engine = tokenizers.Tokenizer.from_str(self._data.decode("utf-8"))
        engine.add_special_tokens([AddedToken(name, special=True) for name in names])
        return Tokenizer(engine.to_str(pretty=True).encode(), self._where)

    def has(self, role: str) -> bool:
        """Whether the tokenizer knows its "eos", "pad" or "mask" token."""
        return self._ids[role] is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts: Sequence[str]) -> Encoded:
        """Token ids of several texts in one array, with their sizes.

        Both depend on the text alone, not on what stands beside it.
        """
        if self._byte_sizes is None:
            return self._encode_by_offsets(texts)
        tokens = [np.array(each, dtype=np.uint32) for each in self.encode_batch(texts)]
        encoded = Encoded.of(tokens, [self._byte_sizes[each] for each in tokens])
        fits = sums(encoded.sizes, encoded.lengths) == utf8_lengths(texts)
        others = [i for i, text in enumerate(texts) if not (fits[i] and self.keeps(text))]
        return encoded.replaced(others, self._encode_by_offsets([texts[i] for i in others]))

    def _encode_by_offsets(self, texts: Sequence[str]) -> Encoded:
        found = self._engine.encode_batch(texts, add_special_tokens=False)
        sizes = [sizes_from_offsets(t, e.offsets) for t, e in zip(texts, found, strict=True)]
        return Encoded.of([np.array(e.ids, dtype=np.uint32) for e in found], sizes)

    def encode_with_special(self, text: str) -> Encoded:
        """Of a text in which the names of special tokens are these tokens: a template's own."""
        found = self._marking_engine.encode(text, add_special_tokens=False)
        sizes = sizes_from_offsets(text, found.offsets)
        return Encoded.of([np.array(found.ids, dtype=np.uint32)], [sizes])

    def keeps(self, text: str) -> bool:
        """Whether the normaliser leaves a text as it is."""
        normalizer = self._engine.normalizer
        if normalizer is None or (self._keeps_ascii and text.isascii()):
            return True
        return normalizer.normalize_str(text) == text

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the special tokens."""
        return {token.content: index for index, token in self._added.items() if token.special}

    @cached_property
    def _marking_engine(self) -> tokenizers.Tokenizer:
        """The engine, but for special tokens in the text being themselves."""
        engine = tokenizers.Tokenizer.from_str(self._data.decode("utf-8"))
        engine.no_truncation()
        engine.no_padding()
        return engine

    @cached_property
    def description(self) -> dict[str, Any]:
        """The parsed tokenizer.json."""
        return json.loads(self._data)

    @cached_property
    def _byte_sizes(self) -> np.ndarray | None:
        return byte_sizes(self.description, self.vocab_size)

    @cached_property
    def _keeps_ascii(self) -> bool:
        return only_unicode_forms(self.description)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for, a special token's name; none for an id without
        a token. Those of a text's tokens need not be whole characters."""
        name = self._engine.id_to_token(int(token))
        if name is None:
            return b""
        if int(token) in self._added:
            return name.encode()
        symbols = self._byte_of_symbol
        if symbols is not None and symbols.keys() >= set(name):
            return bytes(symbols[symbol] for symbol in name)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # a byte that the vocabulary has no text for
            return bytes.fromhex(name[3:5])
        return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._engine.get_added_tokens_decoder()

    @cached_property
    def _byte_of_symbol(self) -> dict[str, int] | None:
        """Of byte-level BPE the byte of each symbol that names are written in."""
        steps = pre_tokenizer_steps(self.description)
        if not any(step["type"] == "ByteLevel" for step in steps):
            return None
        return {symbol: byte for byte, symbol in enumerate(byte_symbols())}

    def to_bytes(self) -> bytes:
        """The tokenizer.json that `sha256` is the digest of."""
        return self._data

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_bytes(self._data)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, infill: bool = False) -> Tokenizer:
    """Train a byte-level BPE with the three specials, and with those of infilling if asked; the
    same texts give the same bytes."""
    specials = [EOS, PAD, MASK, *(INFILL_NAMES[0] if infill else ())]
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size} is below the {smallest} of all bytes and specials; use 4096"
        )
    engine = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return Tokenizer(engine.to_str(pretty=True).encode(), "trained here")


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the three specials: a byte is its own id, then EOS 256, PAD 257, MASK 258."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    engine = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    engine.add_special_tokens([AddedToken(name, special=True) for name in (EOS, PAD, MASK)])
    return Tokenizer(engine.to_str(pretty=True).encode(), "bytes")


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    engine.decoder = decoders.ByteLevel()  # pyright: ignore
    return engine
