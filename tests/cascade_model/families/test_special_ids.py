"""Mask, padding and end of text, from whatever a checkpoint records of them."""

import json

import pytest

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import read_description
from cascade_model.tokenizer import byte_tokenizer
from tests.cascade_model.families import published_cases as published


def tokenizer_with(*tokens: str) -> bytes:
    """256 bytes and these special tokens behind them."""
    document = json.loads(byte_tokenizer().to_bytes())
    like = document["added_tokens"][0]
    document["added_tokens"] = [
        like | {"id": 256 + number, "content": token} for number, token in enumerate(tokens)
    ]
    return json.dumps(document).encode()


@pytest.fixture
def silent(tmp_path):
    """A LLaDA2 whose config names nothing but its padding token."""
    return published.copied("llada2", tmp_path / "llada2")


def test_the_config_comes_first(tmp_path):
    folder = published.copied("dream", tmp_path / "dream")
    (folder / "generation_config.json").write_text('{"mask_token_id": 7, "eos_token_id": [379, 8]}')
    config = read_description(folder).config
    assert (config.mask_id, config.eos_id, config.stop_ids) == (382, 379, (8,))


def test_then_the_generation_config(silent):
    (silent / "generation_config.json").write_text('{"mask_token_id": 7, "eos_token_id": [9, 8]}')
    config = read_description(silent).config
    assert (config.mask_id, config.eos_id, config.stop_ids) == (7, 9, (8,))


@pytest.mark.parametrize("name", ["<|mask|>", "<|mdm_mask|>", "<MASK>", "|<MASK>|", "[MASK]"])
def test_then_the_tokenizer_s_mask_token(silent, name):
    (silent / "tokenizer.json").write_bytes(tokenizer_with("<a>", "<b>", "<c>", "<d>", name))
    assert read_description(silent).config.mask_id == 260


def test_the_tokenizer_config_says_which_token_is_which(silent):
    tokens = {"300": {"content": "<blank>"}, "301": {"content": "<fin>"}}
    roles = {"mask_token": "<blank>", "eos_token": {"content": "<fin>"}}
    text = json.dumps(roles | {"added_tokens_decoder": tokens})
    (silent / "tokenizer_config.json").write_text(text)
    config = read_description(silent).config
    assert (config.mask_id, config.eos_id) == (300, 301)


def test_the_published_number_counts_where_it_is_inside_the_vocabulary(tmp_path):
    folder = published.copied("llada2", tmp_path / "large", vocab_size=157184, pad_token_id=None)
    config = read_description(folder).config
    assert (config.mask_id, config.eos_id, config.pad_id) == (156895, 156892, 156892)


def test_the_mask_of_mdlm_is_the_last_row(tmp_path):
    folder = published.copied("mdlm_dit", tmp_path / "mdlm", vocab_size=50258)
    config = read_description(folder).config
    assert (config.mask_id, config.eos_id) == (50257, 50256)


@pytest.mark.parametrize(
    ("system", "overrides", "flag"),
    [
        ("llada2", {}, "--mask-id"),
        ("a2d_llama", {}, "--mask-id"),
        ("fast_dllm_v2", {}, "--mask-id"),
        ("mdlm_dit", {}, "--eos-id"),
    ],
)
def test_an_unknown_token_is_refused_with_the_flag_to_give(system, overrides, flag):
    with pytest.raises(InputError, match=rf"records no (mask|eos) token.*give {flag}"):
        read_description(published.DATA / system, overrides=overrides)


def test_a_mask_outside_the_vocabulary_is_refused(tmp_path):
    folder = published.copied("llada", tmp_path / "llada", mask_token_id=384)
    with pytest.raises(InputError, match=r"mask_id=384, outside its vocabulary of 384; give --ma"):
        read_description(folder)
    with pytest.raises(InputError, match=r"mask_id=500, outside its vocabulary of 384"):
        read_description(folder, overrides={"mask_id": 500})
    assert read_description(folder, overrides={"mask_id": 3}).config.mask_id == 3


def test_a_mask_that_dllm_added_behind_the_last_row_is_refused(tmp_path):
    folder = published.copied("a2d_llama", tmp_path / "a2d", vocab_size=260)
    (folder / "tokenizer.json").write_bytes(tokenizer_with("<a>", "<b>", "<c>", "<d>", "<|mask|>"))
    with pytest.raises(InputError, match=r"mask_id=260, outside its vocabulary of 260"):
        read_description(folder)


def test_several_ends_of_text_are_one_and_its_companions(tmp_path):
    folder = published.copied("sdar", tmp_path / "sdar", eos_token_id=[5, 6], pad_token_id=6)
    config = read_description(folder).config
    assert (config.eos_id, config.stop_ids, config.pad_id) == (5, (6,), 5)


def test_an_overridden_end_of_text_stands_alone(tmp_path):
    folder = published.copied("sdar", tmp_path / "sdar", eos_token_id=[5, 6])
    config = read_description(folder, overrides={"eos_id": 9}).config
    assert config.end_ids == (9,)


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    folder = published.copied("ar/llama", tmp_path / "llama", pad_token_id=17)
    assert read_description(folder).config.pad_id == 17
    folder = published.copied("ar/llama", tmp_path / "llama", pad_token_id=-1)
    assert read_description(folder).config.pad_id == 381


def test_a_broken_side_file_is_named(silent):
    (silent / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointMismatch, match=r"generation_config.json is not readable JSON"):
        read_description(silent)
