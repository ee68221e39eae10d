"""SDAR (arXiv 2510.06303): a Qwen3 trained further into block diffusion, logits aligned."""

from typing import Any

from cascade_model.families import llama
from cascade_model.families.family import Family
from cascade_model.families.fields import Fields


def _settings(fields: Fields) -> dict[str, Any]:
    fields.inert("debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint")
    fields.inert("use_deepep")
    return llama.settings(fields) | {
        "qk_norm": True,
        "attention": "block_causal",
        "block_size": fields.whole("block_size", 4),
        "logits": "aligned",
    }


FAMILIES = (
    Family(
        name="sdar",
        model_type="sdar",
        architectures=("SDARForCausalLM",),
        read_settings=_settings,
        parameters=llama.parameters,
        ids={"mask": (151669,), "eos": (151643,), "stop": (151645,)},
        constants=("rotary_emb.inv_freq",),
    ),
)
