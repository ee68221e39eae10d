"""What is told of a step's decisions besides their outcome: how probable each token was."""

import torch

from cascade_model.text_stream import TokenLogprob
from cascade_model.unmasking import Drawn


def logprobs_of(drawn: Drawn, rows: list[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens of some rows, and of the `count` best tokens of each; of
    equally probable ones the lower ids. Banned ids are never among them."""
    index = torch.tensor(rows, dtype=torch.int64, device=drawn.logits.device)
    chosen = drawn.log_probability[index].tolist()
    if count == 0 or not rows:
        return [TokenLogprob(value, ()) for value in chosen]
    logits = drawn.logits[index]
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).values
    tops = []
    for row, last, total in zip(logits, best[:, -1], drawn.log_total[index], strict=True):
        ids = ((row >= last) & ~row.isneginf()).nonzero()[:, 0]  # with all ties of the last
        ids = ids[row[ids].argsort(descending=True, stable=True)[:count]]
        tops.append(tuple(zip(ids.tolist(), (row[ids] - total).tolist(), strict=True)))
    return [TokenLogprob(value, top) for value, top in zip(chosen, tops, strict=True)]
