"""Heads that make a small network's predictions extreme, and a count of its passes."""

import torch
from torch import Tensor, nn

from cascade_model.model import Transformer
from tests.tiny_models import MASK, PAD, lively_model

WHOLE = {"attention": "bidirectional"}
DREAM = {"attention": "bidirectional", "logits": "shifted", "first_place": "own"}


class Without(nn.Module):
    """A head that never predicts some tokens."""

    def __init__(self, head: nn.Module, tokens: list[int]) -> None:
        super().__init__()
        self.head, self.tokens = head, torch.tensor(tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).index_fill(-1, self.tokens, -1e4)  # finite: guidance subtracts


def text_model(seed: int = 0, **changes) -> Transformer:
    """A network that never predicts the mask or padding, as the general sampler has it."""
    model = lively_model(seed, **changes)
    model.head = Without(model.head, [MASK, PAD])  # type: ignore[assignment]
    return model


def masking_model(seed: int = 0, **changes) -> Transformer:
    """A network that predicts nothing but the mask."""
    model = lively_model(seed, **changes)
    others = [token for token in range(model.config.vocab_size) if token != MASK]
    model.head = Without(model.head, others)  # type: ignore[assignment]
    return model


def fed(model: nn.Module) -> list[int]:
    """A list that grows by the rows of each pass."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    return rows
