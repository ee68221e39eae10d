"""A family's table for one network: names and shapes of a published checkpoint, both ways."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.families.family import Family, Parameter
from cascade_model.networks import build_network, shapes_of

_VOCABULARY = ("embed.weight", "head.weight")


class Table:
    """The parameters of a network, and what the published file must look like.

    `rows` is the published vocabulary; the network may have more rows, behind it.
    """

    def __init__(self, family: Family, config: ModelConfig, rows: int) -> None:
        self.family, self.config, self.rows = family, config, rows
        self.parameters: list[Parameter] = family.parameters(config)
        self.constants = {n for p in self.parameters if not p.ours for n in p.theirs}
        with torch.device("meta"):
            published = dataclasses.replace(config, vocab_size=rows, mask_id=0, pad_id=0, eos_id=0)
            shapes = shapes_of(build_network(published))
            empty = {name: torch.empty(shape) for name, shape in shapes.items()}
        self.shapes = {name: tuple(t.shape) for name, t in self._written(empty).items()}
        untied = family.parameters(dataclasses.replace(config, tied_head=False))
        self._tied = {n for p in untied for n in p.theirs} - set(self.shapes)

    def is_passed_over(self, name: str) -> bool:
        """Whether a tensor in a file is no parameter, or a copy of one: a tied head."""
        return name in self._tied or name.endswith(self.family.constants)

    def names_of(self, files: list[str]) -> dict[str, str]:
        """The names in a file by those of the table, which may have a prefix more."""
        prefix = self.family.prefix
        if any(name.startswith(prefix) for name in files):
            return {name: name for name in files}
        return {prefix + name if prefix + name in self.shapes else name: name for name in files}

    def with_rows(self, ours: str, tensor: Tensor) -> Tensor:
        """A table of the published vocabulary with rows of zeros for what the network adds."""
        added = self.config.vocab_size - self.rows
        if ours not in _VOCABULARY or not added:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(added, tensor.shape[1])])

    def published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors as theirs; rows behind the published vocabulary are cut."""
        cut = {name: state[name][: self.rows] for name in _VOCABULARY if name in state}
        return self._written(dict(state) | cut)

    def _written(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor
            for p in self.parameters
            for name, tensor in zip(p.theirs, p.write([state[n] for n in p.ours]), strict=True)
        }
