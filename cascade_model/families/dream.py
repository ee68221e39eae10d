"""Dream-7B (arXiv 2508.15487): a Qwen2 that sees both ways and kept its shifted logits.

The shift runs over the whole text, so only the text's first token is predicted by its own row.
"""

from typing import Any

from cascade_model.families import llama
from cascade_model.families.family import Family
from cascade_model.families.fields import Fields


def _settings(fields: Fields) -> dict[str, Any]:
    fields.only("use_mrope", False, None)
    return llama.settings(fields) | {
        "qkv_bias": True,
        "attention": "bidirectional",
        "block_size": 32,
        "logits": "shifted",
        "first_place": "own",
    }


FAMILIES = (
    Family(
        name="dream",
        model_type="Dream",
        architectures=("DreamModel",),
        read_settings=_settings,
        parameters=llama.parameters,
        ids={"mask": (151666,), "eos": (151643,)},
        constants=("rotary_emb.inv_freq",),
    ),
)
