"""Fast-dLLM v2 (arXiv 2509.26328): a Qwen2.5 trained further into block diffusion, logits shifted.

A block's first token is predicted by the last row of the finished block before it.
"""

from typing import Any

from cascade_model.families import llama
from cascade_model.families.family import Family
from cascade_model.families.fields import Fields


def _settings(fields: Fields) -> dict[str, Any]:
    return llama.settings(fields) | {
        "qkv_bias": True,
        "attention": "block_causal",
        "block_size": fields.whole("bd_size", 32),
        "logits": "shifted",
        "first_place": "clean",
    }


FAMILIES = (
    Family(
        name="fast_dllm_v2",
        model_type="Fast_dLLM_Qwen",
        architectures=("Fast_dLLM_QwenForCausalLM",),
        read_settings=_settings,
        parameters=llama.parameters,
        ids={"mask": (151665,), "eos": (151645,)},
        constants=("rotary_emb.inv_freq",),
    ),
)
