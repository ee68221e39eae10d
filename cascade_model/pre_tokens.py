"""The pre-tokenizer of a byte-level tokenizer.json as one pattern, and where engines read it apart.

A pattern's classes (`\\p{L}`, `\\s`) are those of the Unicode version of the engine that reads it.
So each class is laid out over the characters by both engines; a text that holds a character on
which they differ is not for the fast one.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, pre_tokenizers

_SPACES = r"\s+(?!\S)|\s+"
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
"""The built-in pattern of the ByteLevel pre-tokenizer (GPT-2's)."""
_AROUND_DIGITS = (
    # White space before a digit ends its stretch, as it does at the end of the text.
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
_ESCAPE = re.compile(r"\\[pP]\{\^?(\w+)\}|\\(.)")
_FOLDED = "\u017f\u212a\ufb05\ufb06"
"""Characters that `(?i:...)` may take for s, k or st."""
_PLANES = (*range(0x40000), *range(0xE0000, 0xF0000))
CHARACTERS = "".join(chr(i) for i in _PLANES if not 0xD800 <= i < 0xE000)
"""Every character of the planes that any version of Unicode assigns; the others are private or
nothing in each."""


def word_pattern(steps: list[dict[str, Any]]) -> str | None:
    """One pattern that cuts a text as these pre-tokenizers do, in the syntax of the reference.

    None when they are not of a kind that is known here.
    """
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    uses_words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_words:
        return WORDS
    if kinds == ["Digits", "ByteLevel"] and uses_words:
        digits = r"\p{N}" if steps[0]["individual_digits"] else r"\p{N}+"
        return _AROUND_DIGITS.replace("DIGITS", digits)
    if kinds == ["Split", "ByteLevel"] and not uses_words:
        split = steps[0]
        how = (split["behavior"], split["invert"])
        if how in (("Isolated", False), ("Removed", True)):
            return split["pattern"].get("Regex")
    return None


def classes(pattern: str) -> set[str]:
    r"""The classes that a pattern names, such as `\p{L}` and `\s`; a negated one counts as itself.

    `ValueError` when it holds an escape that is not known here.
    """
    found = set()
    for escape in _ESCAPE.finditer(pattern):
        name, letter = escape.groups()
        if name:
            found.add(f"\\p{{{name}}}")
        elif letter.lower() in "sdw":
            found.add("\\" + letter.lower())
        elif letter.isalnum() and letter not in "rnt":
            raise ValueError(f"pattern holds \\{letter}")
    return found


@cache
def doubtful(pattern: str, members: Callable[[str], str]) -> str:
    """The characters that the reference engine puts into other classes of a pattern.

    `members` gives the characters of a class by the other engine.
    """
    found = set(_FOLDED) if "(?i" in pattern else set()
    for written in classes(pattern):
        found |= set(_reference_members(written)) ^ set(members(written))
    return "".join(sorted(found))


@cache
def _reference_members(written: str) -> str:
    pieces = pre_tokenizers.Split(Regex(written + "+"), "removed", invert=True)
    return "".join(text for text, _ in pieces.pre_tokenize_str(CHARACTERS))


@cache
def other_digits() -> str:
    """Characters that the Digits pre-tokenizer and the class `\\p{N}` do not both take."""
    pieces = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(CHARACTERS)
    digits = {c for text, _ in pieces[1::2] for c in text}  # the first character is none
    return "".join(sorted(digits ^ set(_reference_members(r"\p{N}"))))
