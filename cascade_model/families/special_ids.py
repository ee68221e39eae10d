"""Which tokens are mask, padding and end of text, from whatever a checkpoint records of them.

In this order: the caller's override, config.json, generation_config.json, the tokenizer's special
tokens, the published number of the family where it lies inside the vocabulary. Where none of them
knows, the checkpoint is refused with the flag to give: decoding with a wrong mask token gives
nonsense and no error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families.family import Family
from cascade_model.tokenizer import EOS_NAMES, MASK_NAMES, PAD_NAMES, Tokenizer

# The field's spellings of a mask token besides those of our tokenizers: SDAR, Fast-dLLM v2.
_NAMES = {
    "mask": (*MASK_NAMES, "<|mdm_mask|>", "<MASK>", "|<MASK>|"),
    "eos": EOS_NAMES,
    "pad": PAD_NAMES,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """What the files beside the weights say of special tokens."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    """mask_token, eos_token and pad_token by their text."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Special tokens, text to id."""

    @classmethod
    def of_folder(
        cls, folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> "Records":
        """Read the small JSON files of a folder; missing ones are fine."""
        described = _json(folder / "tokenizer_config.json")
        tokens = {
            entry["content"]: int(number)
            for number, entry in described.get("added_tokens_decoder", {}).items()
        }
        roles = {
            name: _text(described[name])
            for name in ("mask_token", "eos_token", "pad_token")
            if described.get(name)
        }
        return cls(
            config=config,
            generation=_json(folder / "generation_config.json"),
            roles=roles,
            tokens=tokens | added_tokens(tokenizer),
        )

    def find(self, role: str) -> tuple[int, ...]:
        """The ids recorded for "mask", "eos" or "pad", the best record first; may be empty."""
        for source in (self.config, self.generation):
            ids = source.get(f"{role}_token_id")
            ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
            if ids and min(ids) >= 0:  # old configs write -1 for none
                return tuple(ids)
        named = [self.roles.get(f"{role}_token", ""), *_NAMES[role]]
        return tuple(self.tokens[name] for name in named if name in self.tokens)[:1]


def special_ids(
    family: Family, records: Records, vocab_size: int, overrides: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Settings mask_id, eos_id, stop_ids and pad_id.

    Raises `InputError` where the mask or the end of text is unknown or outside the vocabulary.
    """
    mask = _one("mask", family, records, vocab_size, overrides, where)
    return {"mask_id": mask} | end_ids(family, records, vocab_size, overrides, where)


def end_ids(
    family: Family, records: Records, vocab_size: int, overrides: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Settings eos_id, stop_ids and pad_id: all that a model without a mask token has.

    Padding is never predicted. A checkpoint that pads with a token that also ends texts must stay
    able to predict it, so its padding is `eos_id` here. An override of eos_id stands alone: the
    recorded ends of text are then none.
    """
    eos = _one("eos", family, records, vocab_size, overrides, where)
    generation = Records(config=records.generation)
    known = (*records.find("eos"), *generation.find("eos"), *family.ids.get("stop", ()))
    known = () if "eos_id" in overrides else known
    inside = tuple(dict.fromkeys(i for i in known if i != eos and i < vocab_size))
    stops = tuple(overrides.get("stop_ids", inside))
    pad = next((i for i in records.find("pad") if i < vocab_size and i not in stops), eos)
    return {"eos_id": eos, "stop_ids": stops, "pad_id": overrides.get("pad_id", pad)}


def _one(
    role: str,
    family: Family,
    records: Records,
    vocab_size: int,
    overrides: Mapping[str, Any],
    where: str,
) -> int:
    setting, flag = f"{role}_id", f"--{role}-id"
    recorded = (overrides[setting],) if setting in overrides else records.find(role)
    if not recorded and role == "eos" and family.eos_is_pad:
        recorded = records.find("pad")
    if not recorded:
        recorded = tuple(i for i in family.ids.get(role, ()) if i < vocab_size)
    if not recorded:
        published = ", ".join(map(str, family.ids.get(role, ()))) or "none"
        raise InputError(
            f"source={where} records no {role} token, and the published one of the family "
            f"{family.name} ({published}) is not in its vocabulary of {vocab_size}; give {flag} to "
            "`cascade convert`"
        )
    if not 0 <= recorded[0] < vocab_size:
        raise InputError(
            f"source={where} has {setting}={recorded[0]}, outside its vocabulary of {vocab_size}; "
            f"give {flag} with an id below {vocab_size} to `cascade convert`"
        )
    return recorded[0]


def added_tokens(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    entries = json.loads(tokenizer.to_bytes()).get("added_tokens") or []
    return {entry["content"]: entry["id"] for entry in entries}


def _text(token: Any) -> str:
    """A special token is its text, or an object that holds it."""
    return token["content"] if isinstance(token, dict) else str(token)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise CheckpointMismatch(f"{file} is not readable JSON; copy it again") from None
