"""How probable a model finds each token of a given text, with the likeliest ones of each place.

The factorisation is `likelihood.sequential`'s: a token given the earlier blocks, the tokens on its
left in its own block and masks on its right. So a value does not depend on where a reader cuts
prompt from answer, values add up, and they are what decoding with the sequential rule tells of the
same tokens. In a bidirectional model they are of this text as a whole: how many masks a token has
on its right is part of what it is given.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cascade_model.decisions import logprobs_of
from cascade_model.likelihood import sequential_input, sequential_passes
from cascade_model.loss import outcome_logits
from cascade_model.networks import Network
from cascade_model.objective import banned_ids
from cascade_model.text_stream import TokenLogprob
from cascade_model.training_input import read_places
from cascade_model.unmasking import Drawn

_TOKENS_PER_FORWARD = 8192
_LOGITS_AT_ONCE = 2**24


@torch.no_grad()
def scored(
    model: Network, tokens: list[int], count: int = 0
) -> Iterator[list[tuple[int, TokenLogprob]]]:
    """Place and log-probability of every token but the first, some of them a forward pass.

    Each comes with the `count` most probable tokens of its place. A caller may stop between passes.
    """
    if len(tokens) < 2:
        return
    batch, is_open, is_target = sequential_input(model, tokens[:1], tokens[1:])
    banned = banned_ids(model.config, "text")
    rows = max(1, _TOKENS_PER_FORWARD // is_open.shape[1])
    for each in sequential_passes(model.config, batch, is_open, is_target, rows):
        wanted = each.batch.clean_tokens[each.rows, each.places]

        def read(hidden: Tensor, head: nn.Module, wanted: Tensor = wanted) -> list[TokenLogprob]:
            size = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
            found = []
            for some, own in zip(hidden.split(size), wanted.split(size), strict=True):
                drawn = Drawn(outcome_logits(some, head, banned), own)
                found += logprobs_of(drawn, list(range(len(own))), count)
            return found

        told = read_places(model, each.batch, each.rows, each.places, read, each.config)
        yield list(zip(each.places.tolist(), told, strict=True))
