"""Small tokenizers of each kind that is published, and texts that set engines apart."""

import functools
import json
import sysconfig
from pathlib import Path

import tokenizers
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from cascade_model.tokenizer import EOS, MASK, PAD, Tokenizer, byte_tokenizer, train_tokenizer

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern that Llama 3 and others publish."""
AWKWARD = [
    "",
    " ",
    "  \n\t\n   x",
    "a  1  b   22 ١٢٣ ½ Ⅷ",
    "it's 'S 'ſ we'LL 'll'd",
    "\r\n\r\n \r\r\n",
    "\u00a0\u2003 \u3000\u200b\ufeff\u0085x\u180e y\x1c\x1d z",
    "Größe e\u0301 \u1e9b\u0323 ﬁ Å 中文の 👩‍👩‍👧‍👦🙂",
    "a" * 500 + " " * 500 + "!" * 500 + "0" * 500,
    "\x00\x04\x7f \ufffd\uffff\U000f1234\U0010ffff\U00040000",
    f"{EOS} <|endoftext|{MASK}{PAD}|> <|im_start|><tool_call>x</tool_call>",
    "def area(width, height):\n    return width * height  # 42\n",
]
TEXTS = st.text() | st.lists(
    st.sampled_from([*AWKWARD, "'", "s", "ll", " ", "  ", "\n", "7", "é", "e", "\u0301", "<", "|>"])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@functools.cache
def real_texts(count: int = 30) -> tuple[str, ...]:
    """Files of the standard library, in a fixed order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]
    return tuple(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def trained(vocab_size: int = 2000) -> Tokenizer:
    return train_tokenizer([text[:20000] for text in real_texts(20)], vocab_size)


@functools.cache
def kind(name: str) -> Tokenizer:
    """A byte-level BPE of a kind that the fast engine knows."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "trained":
        return trained()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "digits")
    splits = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "digit runs": pre_tokenizers.Digits(individual_digits=False),
        "removed": pre_tokenizers.Split(Regex(CL100K), "removed", invert=True),
    }
    if name == "digit runs":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = splits.get(name, pre_tokenizers.Split(Regex(CL100K), "isolated"))
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=True)
    if name == "nfc":
        engine.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[EOS, PAD, MASK, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([text[:20000] for text in real_texts(20)], trainer)
    if name == "nfc":
        engine.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    if name == "whole words":
        return _with_whole_words(engine)
    if name == "every split":
        return _with_every_split(engine)
    if name == "missing bytes":
        return _without_bytes(engine)
    return Tokenizer(engine.to_str().encode(), name)


CONVERTIBLE = [
    "bytes",
    "trained",
    "digits",
    "digit runs",
    "split",
    "removed",
    "nfc",
    "whole words",
    "every split",
    "missing bytes",
]


def _with_whole_words(engine: tokenizers.Tokenizer) -> Tokenizer:
    """Tokens that no merge makes, found as whole words (`ignore_merges`), as in Llama 3."""
    document = json.loads(engine.to_str())
    document["model"]["ignore_merges"] = True
    for word in ("Ġheightened", "ĠwidthQ", "qzjx"):
        document["model"]["vocab"][word] = len(document["model"]["vocab"])
    return Tokenizer(json.dumps(document).encode())


def _with_every_split(engine: tokenizers.Tokenizer) -> Tokenizer:
    """Merges of all pairs that join to a token, as converters from tiktoken list them."""
    document = json.loads(engine.to_str())
    vocabulary = document["model"]["vocab"]
    tokens = sorted((t for t in vocabulary if not t.startswith("<|")), key=vocabulary.__getitem__)
    splits = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))]
    merges = [list(split) for split in splits if set(split) <= vocabulary.keys()]
    document["model"] |= {"merges": merges, "ignore_merges": True}
    return Tokenizer(json.dumps(document).encode())


def _without_bytes(engine: tokenizers.Tokenizer) -> Tokenizer:
    """The vocabulary lacks bytes that its corpus lacked, as SmolLM2's does."""
    document = json.loads(engine.to_str())
    vocabulary = document["model"]["vocab"]
    for symbol in ("Ą", "ñ", "À"):
        del vocabulary[symbol]
    merges = document["model"]["merges"]
    document["model"]["merges"] = [m for m in merges if not set("".join(m)) & set("ĄñÀ")]
    kept = {"".join(merge) for merge in document["model"]["merges"]}
    specials = {token["content"] for token in document["added_tokens"]}
    names = [t for t in vocabulary if len(t) == 1 or t in kept or t in specials]
    document["model"]["vocab"] = {name: vocabulary[name] for name in names}
    return Tokenizer(json.dumps(document).encode())


@functools.cache
def foreign(name: str) -> Tokenizer:
    """A tokenizer that is no byte-level BPE, or not one that a pattern can stand for."""
    texts = [text[:5000] for text in real_texts(10)]
    specials = [EOS, PAD, MASK, "[UNK]"]
    if name == "wordpiece":
        engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=specials, show_progress=False
        )
    elif name == "unigram":
        engine = tokenizers.Tokenizer(models.Unigram())
        engine.normalizer = normalizers.NFKC()
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=specials, unk_token="[UNK]", show_progress=False
        )
    elif name == "byte fallback":
        engine = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
        engine.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=specials + bytes_, show_progress=False
        )
    else:
        engine = tokenizers.Tokenizer.from_str(trained().to_bytes().decode())
        if name == "lower case":
            engine.normalizer = normalizers.Lowercase()
        else:  # a space before the first word
            engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return Tokenizer(engine.to_str().encode(), name)
    engine.train_from_iterator(texts, trainer)
    return Tokenizer(engine.to_str().encode(), name)


FOREIGN = ["wordpiece", "unigram", "byte fallback", "lower case", "prefix space"]
