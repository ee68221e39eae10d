"""Special-token text stays text, and a tokenizer is the same bytes wherever it is made."""

import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.errors import InputError
from cascade_model.tokenizer import INFILL_NAMES, Tokenizer, byte_tokenizer, train_tokenizer

TEXTS = ["def area(width, height):\n    return width * height\n", "Größe, naïve 中文 🙂"]


def test_bytes_are_their_own_ids():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("é\n") == list("é\n".encode())
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 259


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_every_text_survives_the_round_trip(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["a <|mask|> b", "<|endoftext|>", "<|pad|><|mask|>"])
def test_the_text_of_a_special_token_is_ordinary_text(text):
    for tokenizer in (byte_tokenizer(), train_tokenizer(TEXTS, 300)):
        ids = tokenizer.encode(text)
        assert not {tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.decode(ids) == text


def test_decoding_leaves_special_tokens_out():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([104, 105, tokenizer.eos_id, tokenizer.pad_id]) == "hi"


def test_a_batch_gives_the_tokens_of_each_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    encoded = tokenizer.encode_arrays(TEXTS)
    split = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
    assert [part.tolist() for part in split] == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_arrays([]).tokens.dtype == np.uint32


def test_training_gives_the_same_bytes_in_another_process():
    program = (
        "from cascade_model.tokenizer import train_tokenizer;"
        f"print(train_tokenizer({TEXTS!r} * 20, 320).sha256)"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == train_tokenizer(TEXTS * 20, 320).sha256


def test_a_saved_tokenizer_keeps_its_digest(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.from_file(where).sha256 == tokenizer.sha256
    found = Tokenizer.from_url(f"file://{tmp_path}/tokenizer.json")
    assert found.sha256 == tokenizer.sha256


def test_missing_specials_are_added_at_the_end_and_found_again():
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = Tokenizer(plain.to_str().encode())
    with pytest.raises(InputError, match="has no mask token"):
        _ = tokenizer.mask_id
    completed = tokenizer.with_specials()
    assert (completed.eos_id, completed.pad_id, completed.mask_id) == (1, 2, 3)
    assert completed.with_specials() is completed
    assert Tokenizer(completed.to_bytes()).sha256 == completed.sha256


def of_names(names, special: bool) -> Tokenizer:
    """A byte tokenizer that has these names besides."""
    engine = tokenizers.Tokenizer.from_str(byte_tokenizer().to_bytes().decode())
    engine.add_tokens([tokenizers.AddedToken(name, special=special) for name in names])
    return Tokenizer(engine.to_str().encode())


def test_tokens_of_prefix_suffix_and_middle_come_behind_mask_and_padding():
    plain = byte_tokenizer()
    with pytest.raises(InputError, match="has no tokens of prefix, suffix and middle"):
        _ = plain.infill_ids
    made = plain.with_infill()
    assert made.infill_ids == (259, 260, 261)
    assert made.with_infill() is made
    assert Tokenizer(made.to_bytes()).infill_ids == made.infill_ids
    assert made.with_specials() is made
    assert plain.with_infill().sha256 == made.sha256 != plain.sha256
    assert train_tokenizer(TEXTS, 300, infill=True).infill_ids == (3, 4, 5)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("names", INFILL_NAMES)
def test_a_tokenizers_own_tokens_are_taken_and_no_text_becomes_one(names, special):
    given = of_names(names, special)
    made = given.with_infill()
    assert made.infill_ids == (259, 260, 261) == given.infill_ids
    assert made.vocab_size == given.vocab_size
    assert (made is given) == special
    assert made.special_tokens.items() >= dict(zip(names, made.infill_ids, strict=True)).items()
    text = "".join(names) + " a"
    assert made.encode(text) == list(text.encode())
    assert made.decode(made.encode(text)) == text
    assert (given.encode(text) == made.encode(text)) == special


def test_tokens_in_the_plain_vocabulary_are_taken_too():
    own = dict(zip(INFILL_NAMES[3], range(2, 5), strict=True))
    engine = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "</s>": 1, **own}, unk_token="a")
    )
    made = Tokenizer(engine.to_str().encode()).with_specials().with_infill()
    assert made.infill_ids == (2, 3, 4)
    assert made.special_tokens.items() >= own.items()


def test_a_missing_or_foreign_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("hello")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


def test_a_vocabulary_below_all_bytes_is_refused():
    with pytest.raises(InputError, match="vocab_size=100 is below the 259"):
        train_tokenizer(TEXTS, 100)


def test_special_tokens_are_themselves_only_in_a_template():
    tokenizer = byte_tokenizer()
    assert tokenizer.special_tokens == {"<|endoftext|>": 256, "<|pad|>": 257, "<|mask|>": 258}
    encoded = tokenizer.encode_with_special("a<|endoftext|>é")
    assert encoded.tokens.tolist() == [97, 256, 195, 169]
    assert encoded.sizes.tolist() == [1, 13, 2, 0]


def test_texts_of_arrays_can_be_exchanged():
    tokenizer = byte_tokenizer()
    encoded = tokenizer.encode_arrays(["ab", "", "cd"])
    changed = encoded.replaced([1, 2], tokenizer.encode_arrays(["xyz", "é"]))
    assert changed.tokens.tobytes() == tokenizer.encode_arrays(["ab", "xyz", "é"]).tokens.tobytes()
    assert changed.lengths.tolist() == [2, 3, 2]
    assert encoded.replaced([], tokenizer.encode_arrays([])) is encoded
    assert tokenizer.encode_arrays([]).split() == ([], [])
