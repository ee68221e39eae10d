"""All families, and which of them a config.json belongs to."""

from collections.abc import Mapping
from typing import Any

from cascade_model.errors import InputError
from cascade_model.families import (
    dit,
    dream,
    fast_dllm_v2,
    gpt2,
    llada,
    llada2,
    llada_moe,
    llama,
    sdar,
)
from cascade_model.families.family import Family

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *llada.FAMILIES,
    *llada_moe.FAMILIES,
    *llada2.FAMILIES,
    *dream.FAMILIES,
    *sdar.FAMILIES,
    *fast_dllm_v2.FAMILIES,
    *dit.FAMILIES,
    *gpt2.FAMILIES,
)


def recognise(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config, by its model_type and its class name together.

    A config without class names (GGUF has none) is taken by a model_type that only one family has.
    Raises `InputError` with both values and the list of what can be read.
    """
    kind, classes = config.get("model_type"), config.get("architectures") or ()
    same = [family for family in FAMILIES if family.model_type == kind]
    found = [family for family in same if set(classes) & set(family.architectures)]
    found = same if not classes and len(same) == 1 else found
    if len(found) != 1:
        known = ", ".join(f"{f.model_type} ({f.architectures[0]})" for f in FAMILIES)
        raise InputError(
            f"source={where} has model_type={kind!r} and architectures={list(classes)}; only "
            f"{known} can be read, choose such a checkpoint"
        )
    return found[0]


def family_named(name: str) -> Family:
    """A family by the name that `ModelConfig.family` records."""
    return next(family for family in FAMILIES if family.name == name)
