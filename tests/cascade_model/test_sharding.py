"""Networks in shards hold the same weights and gradients, and what is recomputed is the same."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

from cascade_model import sharding
from cascade_model.config import ExpertsConfig
from cascade_model.errors import InputError
from cascade_model.feed_forward import MixtureOfExperts
from cascade_model.loss import diffusion_loss
from cascade_model.networks import build_network
from cascade_model.training_config import TrainerConfig
from tests.cascade_model.training_runs import run_ranks
from tests.tiny_models import batch_of, tiny_config

CPU = torch.device("cpu")
RANKS = """
from torch.distributed.tensor import DTensor
from cascade_model import sharding
from tests.cascade_model.test_sharding import EXPERTS, KINDS, NETWORKS, loss_of, model_of
from cascade_model.networks import build_network
from tests.tiny_models import tiny_config

parallel.join_group(torch.device("cpu"))
told = {}
for name, shape in NETWORKS.items():
    for kind, settings in KINDS.items():
        model = model_of(**shape)
        whole = {key: value.clone() for key, value in model.named_parameters()}
        sharding.prepare(model, TrainerConfig(**settings), torch.device("cpu"))
        seen = told[f"{name} {kind}"] = {}
        state = sharding.full_state(model)
        seen["state"] = sorted(state)
        seen["state_is_whole"] = all(torch.equal(state[key], whole[key]) for key in state)
        seen["names"] = sorted(key for key, _ in model.named_parameters())
        local = sum(value.to_local().numel() for value in model.parameters())
        seen["share"] = local / sum(value.numel() for value in model.parameters())
        with torch.no_grad():
            loss_of(model, rank, kind)
        sharding.reshard(model)
        seen["is_put_away"] = all(isinstance(value, DTensor) for value in model.parameters())
        seen["loss"] = float(parallel.sum_over_ranks(loss_of(model, rank, kind).detach()))
        loss_of(model, rank, kind).backward()
        trained = [value for value in model.parameters() if value.requires_grad]
        seen["types"] = sorted({str(value.grad.dtype) for value in trained})
        seen["norm"] = float(sharding.gradient_norm(model))
        sharding.scale_gradients(model, 0.5)
        seen["half_norm"] = float(sharding.gradient_norm(model))
with torch.device("meta"):
    bare = build_network(tiny_config(experts=EXPERTS))
sharding.prepare(bare, TrainerConfig(), torch.device("cpu"))
told["devices"] = sorted({value.device.type for value in bare.parameters()})
told["mesh"] = list(sharding.mesh(2, torch.device("cpu")).mesh_dim_names)
(folder / f"{rank}.json").write_text(json.dumps(told))
"""
KINDS = {
    "plain": {},
    "replicas": {"replicas": 2},
    "recompute": {"recompute": True},
    "half": {"precision": "bfloat16"},
    "half-recompute": {"precision": "bfloat16", "recompute": True},
}
EXPERTS = ExpertsConfig(
    num_experts=4, experts_per_token=2, intermediate_size=8, router_bias=True, first_dense_layers=1
)
NETWORKS = {
    "transformer": {"qk_norm": True, "qkv_bias": True},
    "experts": {"experts": EXPERTS},
    "dit": {"network": "dit", "num_kv_heads": 4, "tied_head": False},
    "gpt2": {"network": "gpt2", "num_kv_heads": 4, "intermediate_size": 64, "qkv_bias": True},
}


def model_of(**shape):
    """A small network with weights of one seed, none of them zero."""
    model = build_network(tiny_config(**shape))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.05)
    return model


def loss_of(model, number, kind="plain"):
    """Sum of the squared logits of one of two texts, seen from left to right."""
    from cascade_model.attention import dense

    tokens = torch.arange(8)[None] + number
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    positions = torch.arange(8)[None]
    is_half = "precision" in KINDS[kind]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half):
        return model(
            tokens, positions, dense(mask), lambda hidden, head: head(hidden).float().square().sum()
        )


@pytest.fixture(scope="module")
def told(tmp_path_factory, tiny_corpus):
    folder = tmp_path_factory.mktemp("shards")
    run_ranks(folder, tiny_corpus, RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """Loss and gradient norm of one process, of the mean over both texts as FSDP takes it."""
    found = {}
    for name, shape in NETWORKS.items():
        for kind in ("plain", "half"):
            model = model_of(**shape)
            sharding.prepare(model, TrainerConfig(**KINDS[kind]), CPU)
            total = 0.0
            for number in (0, 1):
                loss = loss_of(model, number, kind)
                (loss / 2).backward()
                total += float(loss.detach())
            found[f"{name} {kind}"] = total, float(sharding.gradient_norm(model))
    return found


KEYS = [f"{name} {kind}" for name in NETWORKS for kind in KINDS]


@pytest.mark.parametrize("key", KEYS)
def test_shards_hold_the_whole_under_the_same_names(told, key):
    name, kind = key.split()
    names = sorted(each for each, _ in model_of(**NETWORKS[name]).named_parameters())
    assert [rank[key]["state"] for rank in told] == [names, []]
    for seen in (rank[key] for rank in told):
        assert seen["state_is_whole"]
        assert seen["is_put_away"]
        assert seen["names"] == names
        assert seen["share"] == 1.0 if kind == "replicas" else 0.4 < seen["share"] < 0.6


@pytest.mark.parametrize("key", KEYS)
def test_losses_and_gradients_of_shards_are_those_of_one_process(told, alone, key):
    name, kind = key.split()
    loss, norm = alone[f"{name} half" if "half" in kind else f"{name} plain"]
    for seen in (rank[key] for rank in told):
        assert seen["loss"] == pytest.approx(loss, rel=1e-6)
        assert seen["norm"] == pytest.approx(norm, rel=1e-6)
        assert seen["half_norm"] == pytest.approx(seen["norm"] / 2, rel=1e-6)
        assert seen["types"] == ["torch.float32"]
    assert told[0][key]["norm"] == told[1][key]["norm"]
    if "half" in kind:
        assert told[0][key]["loss"] != told[0][f"{name} plain"]["loss"]


def test_only_fsdp_puts_weights_on_the_device_of_several_ranks(told):
    """It takes one unit at a time, and leaves those of the meta device, which has no values to
    move, as they are; the model itself cannot be moved from there."""
    assert [seen["devices"] for seen in told] == [["meta"], ["meta"]]


def test_replicas_have_a_mesh_of_two_dimensions(told):
    assert told[0]["mesh"] == ["replica", "shard"]


def test_replicas_must_share_the_ranks():
    sharding.require_replicas(TrainerConfig(replicas=2), 4)
    with pytest.raises(InputError, match=r"trainer.replicas=3 cannot share num_workers=4"):
        sharding.require_replicas(TrainerConfig(replicas=3), 4)


def test_recomputing_keeps_nothing_inside_a_layer():
    def kept(recompute):
        model = model_of()
        sharding.prepare(model, TrainerConfig(recompute=recompute), CPU)
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(model, 0)
        return sum(sizes)

    assert kept(True) < kept(False) / 3


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_compiled_to_two_graphs_whatever_the_documents(recompute):
    """The compiler's own work, without that of a C++ compiler."""
    config = TrainerConfig(compile=True, recompute=recompute)
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = model_of(num_layers=3), model_of(num_layers=3)
    for layer in compiled.layers:
        layer.forward = sharding.wrapped(layer.forward, config, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        segments = torch.zeros(2, 32, dtype=torch.int32)
        segments[:, 8 + 4 * number :] = 1
        clean = torch.randint(0, 13, (2, 32), generator=generator)
        batch = batch_of(clean, block_size=4, segments=segments)
        one, two = (diffusion_loss(model, batch).sum for model in (plain, compiled))
        assert float(two.detach()) == pytest.approx(float(one.detach()), rel=1e-5)
        one.backward()
        two.backward()
    assert counters["stats"]["unique_graphs"] == 2
    norms = [float(sharding.gradient_norm(model)) for model in (plain, compiled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.slow
def test_compiled_kernels_compute_the_same():
    """Minutes of a C++ compiler on a CPU."""
    plain, compiled = model_of(), model_of()
    sharding.prepare(plain, TrainerConfig(), CPU)
    sharding.prepare(compiled, TrainerConfig(compile=True, recompute=True), CPU)
    for number in range(2):
        one, two = loss_of(plain, number), loss_of(compiled, number)
        assert float(two.detach()) == pytest.approx(float(one.detach()), rel=1e-4)
        one.backward()
        two.backward()
    norms = [float(sharding.gradient_norm(model)) for model in (plain, compiled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_experts_are_chosen_in_float32_under_autocast():
    torch.manual_seed(0)
    mixture, rows = MixtureOfExperts(32, EXPERTS), torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mixture.router(rows).float()
        scores = mixture.scores(rows)
    assert scores.equal(mixture.scores(rows))
    assert not rounded.equal(scores), "autocast does not round: this test shows nothing"
