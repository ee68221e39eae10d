"""Ranks agree: on sums, on norms, on what the first one found, and on its failures."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cascade_model import parallel
from cascade_model.errors import InputError

RANKS = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from cascade_model import parallel
from cascade_model.errors import CorpusMismatch, InputError

parallel.join_group(torch.device("cpu"))
rank, told = parallel.rank(), {}

def refuse():
    raise CorpusMismatch("corpus=a was cut; copy it anew")

def fail():
    raise OSError("disk full")

def find():
    return {"from": parallel.rank()}

for name, work in (("value", find), ("mistake", refuse), ("fault", fail)):
    try:
        told[name] = parallel.on_first_rank(work)
    except Exception as error:
        told[name] = [type(error).__name__, str(error)]
told["sum"] = parallel.sum_over_ranks(torch.tensor([1.0, rank])).tolist()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
whole = {name: value.clone() for name, value in model.state_dict().items()}
parallel.shard(model, [model[0]], torch.device("cpu"))
told["is_sharded"] = model[0].weight.to_local().shape[0] < 5
state = parallel.full_state(model)
told["state_is_whole"] = all(torch.equal(state[name], whole[name]) for name in whole)
x = torch.arange(6.0).reshape(2, 3)[rank : rank + 1]
model(x).square().sum().backward()
told["norm"] = float(parallel.gradient_norm(model))
parallel.scale_gradients(model, 0.5)
told["half"] = float(parallel.gradient_norm(model))
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
parallel.barrier()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *words, str(folder / "ranks.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_what_the_first_rank_found_is_found_by_all(told):
    assert [each["value"] for each in told] == [{"from": 0}] * 2


def test_a_mistake_on_the_first_rank_is_the_same_mistake_on_all(told):
    expected = ["CorpusMismatch", "corpus=a was cut; copy it anew"]
    assert [each["mistake"] for each in told] == [expected] * 2


def test_a_fault_on_the_first_rank_stops_all(told):
    assert told[0]["fault"] == ["OSError", "disk full"]
    assert told[1]["fault"] == ["RuntimeError", "the first rank failed: OSError: disk full"]


def test_a_sum_is_over_all_ranks(told):
    assert [each["sum"] for each in told] == [[2.0, 1.0]] * 2


def test_a_sharded_model_gives_its_whole_state_back(told):
    assert all(each["is_sharded"] and each["state_is_whole"] for each in told)


def test_the_norm_of_shards_is_that_of_the_mean_gradient_of_one_process(told):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    x = torch.arange(6.0).reshape(2, 3)
    (model(x).square().sum() / 2).backward()  # FSDP takes the mean over ranks
    norm = float(parallel.gradient_norm(model))
    assert [each["norm"] for each in told] == [pytest.approx(norm, rel=1e-6)] * 2
    assert told[0]["norm"] == told[1]["norm"]
    assert told[0]["half"] == pytest.approx(norm / 2, rel=1e-6)


def test_alone_everything_is_local():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    parallel.join_group(torch.device("cpu"))
    parallel.barrier()
    values = torch.tensor([1.0])
    assert parallel.sum_over_ranks(values) is values
    assert parallel.on_first_rank(lambda: 3) == 3

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        parallel.on_first_rank(refuse)
