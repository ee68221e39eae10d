"""What a published family is: how it is recognised, read, and which parameter is which.

One table of `Parameter` serves reading and exporting, and every rule in it only renames, cuts,
stacks or transposes, so a checkpoint that is read and exported is bit-equal. The table also says
what shapes a checkpoint must have, before a weight is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.families.fields import Fields

Rule = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def as_it_is(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The rule of a parameter that only has another name."""
    return tensors


@dataclass(frozen=True, slots=True)
class Parameter:
    """One entry of a family's table: some of their tensors are some of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    """Empty for a constant, which is written but may be missing and is never read."""
    read: Rule = as_it_is
    write: Rule = as_it_is


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published family of checkpoints."""

    name: str
    model_type: str
    architectures: tuple[str, ...]
    """Class names; a config must name one of them, or none where its model_type has one family."""
    read_settings: Callable[[Fields], dict[str, Any]]
    parameters: Callable[[ModelConfig], list[Parameter]]
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Published numbers of `mask`, `eos` and `stop`, for checkpoints that record none."""
    eos_is_pad: bool = False
    """Whether the padding token ends a text where no other is recorded."""
    is_autoregressive: bool = False
    """Whether its checkpoints have no mask token."""
    successor: str = ""
    """Autoregressive: the family of its block-diffusion descendants."""
    constants: tuple[str, ...] = ()
    """Endings of names of tensors that are no parameters: they are not read."""
    prefix: str = ""
    """Beginning of every name, which some published files leave out."""

    def settings(
        self, config: Mapping[str, Any], where: str, ignore: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A published config as settings of `ModelConfig`.

        Raises `InputError` for a value that our networks do not have and for a field that is not
        known and not in `ignore`, `CheckpointMismatch` for one that is missing.
        """
        fields = Fields(config, where, self.name, ignore)
        settings = self.read_settings(fields)
        fields.require_all_known()
        return settings | {"family": self.name}


def renamed(names: Mapping[str, str], layers: int = 0) -> list[Parameter]:
    """Parameters that only have another name; `{}` in a name is each of the layers."""
    if not layers:
        return [Parameter((theirs,), (ours,)) for theirs, ours in names.items()]
    return [
        Parameter((theirs.format(n),), (ours.format(n),))
        for n in range(layers)
        for theirs, ours in names.items()
    ]


def fused_rows(theirs: str, ours: tuple[str, ...], rows: tuple[int, ...]) -> Parameter:
    """One matrix of theirs whose rows are several of ours, in order."""
    return Parameter(
        (theirs,),
        ours,
        read=lambda tensors: tensors[0].split(rows),
        write=lambda tensors: (torch.cat(list(tensors)),),
    )


def stacked(theirs: tuple[str, ...], ours: str) -> Parameter:
    """Their matrices [out, in], one an expert, are one of ours [experts, out, in]."""
    return Parameter(
        theirs,
        (ours,),
        read=lambda tensors: (torch.stack(list(tensors)),),
        write=lambda tensors: tensors[0].unbind(),
    )


def transposed(theirs: str, ours: str) -> Parameter:
    """A matrix that is stored [in, out]."""
    return Parameter(
        (theirs,),
        (ours,),
        read=lambda tensors: (tensors[0].T,),
        write=lambda tensors: (tensors[0].T,),
    )


def constant(theirs: str, value: Tensor) -> Parameter:
    """A tensor that follows from the config."""
    return Parameter((theirs,), (), write=lambda _: (value,))
