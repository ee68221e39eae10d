"""Names of a mixture of experts' parameters, as LLaDA-MoE and LLaDA2 publish them."""

from cascade_model.config import ModelConfig
from cascade_model.families.family import Parameter, renamed, stacked

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_layers(
    config: ModelConfig, *, bias: str, shared: str, is_merged: bool = False
) -> list[Parameter]:
    """The feed-forwards of all layers: dense first, then mixtures.

    `bias` and `shared` are the names inside a layer of the router's bias and the shared expert;
    merged experts are one tensor [experts, out, in] a projection, as ours are.
    """
    experts = config.experts
    assert experts is not None
    table = []
    for n in range(config.num_layers):
        theirs, ours = f"model.layers.{n}", f"layers.{n}.mlp"
        if n < experts.first_dense_layers:
            names = {f"{theirs}.mlp.{p}.weight": f"{ours}.{p}.weight" for p in _PROJECTIONS}
            table += renamed(names)
            continue
        names = {f"{theirs}.mlp.gate.weight": f"{ours}.router.weight"}
        if experts.router_bias:
            names[f"{theirs}.{bias}"] = f"{ours}.router_bias"
        if experts.shared_intermediate_size:
            names |= {
                f"{theirs}.{shared}.{p}.weight": f"{ours}.shared.{p}.weight" for p in _PROJECTIONS
            }
        if is_merged:
            names |= {f"{theirs}.mlp.experts.{p}": f"{ours}.{p}" for p in _PROJECTIONS}
        else:
            for p in _PROJECTIONS:
                each = [f"{theirs}.mlp.experts.{e}.{p}.weight" for e in range(experts.num_experts)]
                table.append(stacked(tuple(each), f"{ours}.{p}"))
        table += renamed(names)
    return table
