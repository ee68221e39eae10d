"""What was probably meant by a misspelt word."""

import difflib
from collections.abc import Collection


def cure(word: str, known: Collection[str], prefix: str = "", cutoff: float = 0.4) -> str:
    """What to write in place of an unknown word: the known one that is most like it, or all of
    them if none is alike enough (`cutoff`, 0..1, a ratio of `difflib`).

    `prefix` is the place of the word, such as `trainer.`.
    """
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return f"did you mean `{prefix}{near[0]}`?" if near else f"known are {', '.join(known)}"
