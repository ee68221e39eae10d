"""What a generated text is worth: three figures of its tokens, for `text`.

Each fools where it stands alone. A text that repeats itself is probable under any model; a text of
rare words is varied and improbable. So they are read together.
"""

import math
from collections import Counter
from collections.abc import Sequence

from cascade_model.likelihood import sequential
from cascade_model.networks import Network


def nats_per_token(parent: Network, prompt: list[int], text: list[int]) -> float:
    """Mean negative log-probability of the text behind its prompt, under an autoregressive model:
    the chain rule, mask and padding being no outcomes."""
    return -float(sequential(parent, prompt, text).mean())


def entropy(text: Sequence[int]) -> float:
    """Nats of the text's own token frequencies: 0 for one token over and over, log n for n
    different ones."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log(share) for share in shares)


def repetition(text: Sequence[int], n: int = 4) -> float:
    """Share of the text's n-grams that occurred in it before; 0 where there is none."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
