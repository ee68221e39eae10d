"""Which pre-tokenizers are one pattern, and which characters engines put into other classes."""

import pytest

from cascade_model.pre_tokens import (
    CHARACTERS,
    WORDS,
    classes,
    doubtful,
    other_digits,
    word_pattern,
)
from cascade_model.tiktoken_engine import members
from tests.cascade_model.tokenizer_kinds import CL100K

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BARE = {**LEVEL, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}


def test_the_built_in_pattern_and_a_published_one():
    assert word_pattern([LEVEL]) == WORDS
    assert word_pattern([SPLIT, BARE]) == "x"
    assert word_pattern([{**SPLIT, "behavior": "Removed", "invert": True}, BARE]) == "x"


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [BARE],
        [{**LEVEL, "add_prefix_space": True}],
        [SPLIT, LEVEL],
        [SPLIT, SPLIT, BARE],
        [{**SPLIT, "behavior": "MergedWithNext"}, BARE],
        [{**SPLIT, "pattern": {"String": "x"}}, BARE],
        [{"type": "Metaspace"}],
    ],
)
def test_any_other_is_none(steps):
    assert word_pattern(steps) is None


def test_classes_are_named_once_and_unknown_escapes_refused():
    assert classes(CL100K) == {r"\p{L}", r"\p{N}", r"\s"}
    assert classes(r"\P{Lu}[^\S\\]\.\r") == {r"\p{Lu}", r"\s"}
    with pytest.raises(ValueError, match="h"):
        classes(r"\h+")


def test_characters_of_other_classes_are_found():
    assert len(CHARACTERS) == 0x50000 - 0x800
    assert len(other_digits()) < 100
    assert not set("0٣½Ⅷ十") & set(other_digits())

    def without_marks(name: str) -> str:
        return members(name).replace("ª", "") + ("§" if name == r"\s" else "")

    assert set(doubtful(r"\p{L}\s", without_marks)) >= {"ª", "§"}
    assert "ſ" in doubtful("(?i:'s)", members)


def test_the_installed_engines_read_the_classes_alike():
    """If a release changes its Unicode version this fails; texts with such characters are then
    encoded by the reference engine, which is right but slower."""
    assert doubtful(WORDS, members) == ""
