"""What can be decoded at all: refusals by name, before anything is allocated."""

import json

import pytest

from cascade_model.config import ModelConfig
from cascade_model.errors import InputError
from cascade_model.requests import (
    Infilling,
    between,
    block_edges,
    check_infilling,
    check_request,
    longest_text,
    masks_behind,
    masks_left,
    masks_per_block,
    rearranged,
    with_committed,
)
from cascade_model.sampling import SamplingParams
from cascade_model.settings import to_dict
from tests.tiny_models import EOS, MASK, PAD, tiny_config

CAUSAL, BOTH_WAYS = tiny_config(), tiny_config(attention="bidirectional")


def test_the_grid_of_a_block_causal_model_starts_at_the_prompt():
    params = SamplingParams(max_tokens=6)
    assert block_edges(CAUSAL, 7, params) == [4, 8, 12, 16]
    assert block_edges(CAUSAL, 8, params) == [8, 12, 16]
    assert masks_behind([4, 8, 12, 16], 7) == [1, 4, 4]
    assert masks_behind([4, 8, 12, 16], 12) == [4]


def test_the_grid_of_a_bidirectional_model_starts_behind_the_prompt():
    params = SamplingParams(max_tokens=6)
    assert block_edges(BOTH_WAYS, 7, params) == [7, 11, 13]
    assert block_edges(BOTH_WAYS, 7, SamplingParams(max_tokens=6, block_length=3)) == [7, 10, 13]


def test_a_suffix_stands_behind_a_hole_where_the_hole_sees_it():
    hole = [MASK] * 2
    assert between(BOTH_WAYS, [1] * 9, [2] * 9, 2) == [*[1] * 9, *hole, *[2] * 9]
    assert between(CAUSAL, [1] * 5, [2], 2) == [*[1] * 5, *hole, 2]  # to the end of a block of 4
    psm = tiny_config(infill="psm", infill_ids=(10, 11, 12))
    assert between(psm, [1], [2] * 9, 2) == rearranged(psm, [1], [2] * 9)


@pytest.mark.parametrize(
    ("config", "prefix", "suffix", "words"),
    [
        (CAUSAL, [1] * 5, [2, 2], r"hole of max_tokens=2 ends beyond .* shorter by 1 tokens.*none"),
        (tiny_config(block_size=1), [1], [2], "block_size=1"),
        (BOTH_WAYS, [MASK], [2], "^prompt has the mask"),
        (BOTH_WAYS, [1], [PAD], "^suffix has the mask or padding"),
        (BOTH_WAYS, [1], [99], "^suffix has the token id 99"),
    ],
)
def test_a_suffix_that_is_not_seen_is_refused_with_the_cures(config, prefix, suffix, words):
    with pytest.raises(InputError, match=words):
        between(config, prefix, suffix, 2)


def test_holes_that_were_filled_are_no_more_to_be_decoded():
    text = [1, 2, 3, MASK, MASK, MASK, 7, 8, 9, MASK]
    params = SamplingParams(max_tokens=4)
    assert masks_left(BOTH_WAYS, text, params) == [1, 2, 1]
    assert with_committed(BOTH_WAYS, text, [4, 5, 6])[3:7] == [4, 5, 6, 7]
    assert masks_left(BOTH_WAYS, text, params, [4, 5, 6]) == [1]
    check_infilling(BOTH_WAYS, text, params, [4, 5, 6], 2)
    for committed, words in (([4, 5], "ends within a block"), ([4, 5, 6, 6], "nothing is left")):
        with pytest.raises(InputError, match=words):
            check_infilling(BOTH_WAYS, text, params, committed, 2)
    with pytest.raises(InputError, match="steps_made=3 does not fit the 0 blocks"):
        check_infilling(BOTH_WAYS, text, params, [], 3)


def test_masks_are_counted_by_block_and_the_last_one_is_filled_whole():
    tokens = [1, MASK, 3, 4, 5, 6, 7, 8, MASK, MASK]
    assert masks_per_block(BOTH_WAYS, tokens, SamplingParams()) == {0: 1, 2: 2}
    assert masks_per_block(BOTH_WAYS, tokens, SamplingParams(block_length=8)) == {0: 1, 1: 2}
    assert masks_per_block(CAUSAL, tokens, SamplingParams()) == {0: 1, 2: 4}


@pytest.mark.parametrize(
    ("committed", "steps_made", "options", "message"),
    [
        ([1, 2], 2, {}, "committed has 2 tokens and ends within a block; give whole blocks only"),
        ([1, 2], 2, {}, "which are the first 1"),
        ([1] * 9, 3, {"max_tokens": 9}, "committed has 9 tokens and max_tokens=9; nothing is left"),
        ([1] * 13, 4, {"max_tokens": 9}, "committed has 13 tokens and max_tokens=9"),
        ([EOS], 1, {}, "committed has the token id 13, which ends the completion"),
        ([5], 1, {"stop_ids": (4, 5)}, "committed has the token id 5, which ends the completion"),
        ([MASK], 1, {}, "committed has the mask or padding token 15"),
        ([16], 1, {}, "committed has the token id 16, outside the vocabulary of 16"),
        ([], 3, {}, "steps_made=3 does not fit the 0 blocks of committed"),
        ([1] * 5, 1, {"max_steps": 20}, "steps_made=1 does not fit the 2 blocks of committed"),
        (
            [1] * 5,
            19,
            {"max_steps": 20},
            "max_steps=20 less steps_made=19 is below the 4 blocks.*raise max_steps to 23",
        ),
    ],
)
def test_a_beginning_that_cannot_be_gone_on_from_is_refused(
    committed, steps_made, options, message
):
    params = SamplingParams(**{"max_tokens": 20, **options})
    with pytest.raises(InputError, match=message):
        check_request(CAUSAL, [1, 2, 3], params, committed, steps_made)


def test_whole_blocks_can_be_gone_on_from():
    params = SamplingParams(max_tokens=20)
    for count in (0, 1, 5, 9, 13, 17):
        check_request(CAUSAL, [1, 2, 3], params, [4] * count)
    for count in (0, 4, 8, 12, 16):
        check_request(BOTH_WAYS, [1, 2, 3], params, [4] * count)
    with pytest.raises(InputError, match="committed has 5 tokens and ends within a block"):
        check_request(BOTH_WAYS, [1, 2, 3], params, [4] * 5)
    ended = SamplingParams(max_tokens=20, stop_at_eos=False)
    check_request(CAUSAL, [1, 2, 3], ended, [EOS])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1, 2, 3], {}, "the text has no mask token 15"),
        ([1, PAD, MASK], {}, "the text has the mask or padding token 14"),
        ([1, *[MASK] * 5], {"max_tokens": 4}, "the hole has 5 tokens, over max_tokens=4"),
        ([1, *[MASK] * 5], {"max_steps": 1}, "max_steps=1 is below the 2 blocks"),
        ([1] * 120 + [MASK] * 9, {}, "the text has 129 tokens, over the context of 128"),
    ],
)
def test_holes_that_cannot_be_filled_are_refused(tokens, options, message):
    for config in (CAUSAL, BOTH_WAYS):
        with pytest.raises(InputError, match=message):
            check_infilling(config, tokens, SamplingParams(**options))


def test_a_text_with_a_suffix_is_rearranged_as_in_training():
    config = tiny_config(infill="psm", infill_ids=(10, 11, 12))
    assert rearranged(config, [1, 2], [3]) == [10, 1, 2, 11, 3, 12]
    assert rearranged(config, [], [3]) == [10, 11, 3, 12]
    check_request(config, rearranged(config, [1, 2], [3]), SamplingParams())
    with pytest.raises(InputError, match="prompt of 6 tokens plus max_tokens=123 makes 129"):
        check_request(config, rearranged(config, [1, 2], [3]), SamplingParams(max_tokens=123))
    with pytest.raises(InputError, match="suffix is for models with infill=psm and this one has"):
        rearranged(CAUSAL, [1, 2], [3])
    for name, texts in (("prompt", ([1, 11], [3])), ("suffix", ([1], [3, 11]))):
        with pytest.raises(InputError, match=f"{name} has the token 11"):
            rearranged(config, *texts)


@pytest.mark.parametrize(
    "changes",
    [
        {"infill": "psm"},
        {"infill": "psm", "infill_ids": (10, 11)},
        {"infill": "psm", "infill_ids": (10, 11, 11)},
        {"infill": "psm", "infill_ids": (10, 11, 16)},
        {"infill_ids": (10, 11, 12)},
    ],
)
def test_a_model_that_fills_holes_names_its_three_tokens(changes):
    with pytest.raises(InputError, match=r"model\.infill="):
        tiny_config(**changes)


def test_a_config_that_fills_holes_comes_back_from_json():
    config = tiny_config(infill="psm", infill_ids=(10, 11, 12))
    written = json.loads(json.dumps(to_dict(config)))
    assert ModelConfig.from_dict(written) == config
    before = {name: value for name, value in written.items() if not name.startswith("infill")}
    assert ModelConfig.from_dict(before) == tiny_config()


def test_a_hole_has_a_length():
    with pytest.raises(InputError, match="length=0 of the hole must be at least 1"):
        Infilling(prefix="a", length=0, suffix="b")


def test_a_stop_outside_the_vocabulary_is_refused():
    for wrong in (16, -1):
        with pytest.raises(InputError, match=f"has {wrong}, outside the vocabulary of 16; use"):
            check_request(CAUSAL, [1], SamplingParams(stop_ids=(3, wrong)))


def test_a_last_block_beyond_learned_positions_is_refused():
    config = tiny_config(network="gpt2", num_kv_heads=4, num_heads=4, max_sequence_length=126)
    check_request(config, [1] * 118, SamplingParams(max_tokens=6))
    with pytest.raises(InputError, match="the last block ends at 128 and the model has 126"):
        check_request(config, [1] * 120, SamplingParams(max_tokens=6))


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
@pytest.mark.parametrize("network", ["transformer", "gpt2"])
def test_the_longest_text_is_the_last_one_that_is_not_refused(network, attention):
    shape = {"network": network, "attention": attention, "num_kv_heads": 4, "num_heads": 4}
    for context in (124, 126, 127):
        config = tiny_config(max_sequence_length=context, **shape)
        longest = longest_text(config)
        for size in (1, 7, longest - 1):
            check_request(config, [1] * size, SamplingParams(max_tokens=longest - size))
            with pytest.raises(InputError):
                check_request(config, [1] * size, SamplingParams(max_tokens=longest - size + 1))
