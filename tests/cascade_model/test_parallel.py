"""Ranks agree: on sums, on norms, on what the first one found, and on its failures."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cascade_model import parallel
from cascade_model.errors import InputError, Unfinished
from tests.cascade_model.training_runs import run_ranks

RANKS = """
import json, sys
from pathlib import Path
import torch
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
told["named"] = parallel.sum_named({"b": torch.tensor(2.0), "a": torch.tensor(float(rank))})
told["first"] = [parallel.first_of(value) for value in (None, rank or None, f"rank {rank}")]
told["only"] = parallel.only_first_rank(lambda: object()) is not None
try:
    parallel.only_first_rank(refuse)
except InputError as error:
    told["only_mistake"] = str(error)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(told))
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


def test_named_sums_are_over_all_ranks(told):
    assert [each["named"] for each in told] == [{"b": 4.0, "a": 1.0}] * 2


def test_the_lowest_rank_that_has_a_value_speaks_for_all(told):
    assert [each["first"] for each in told] == [[None, 1, "rank 0"]] * 2


def test_what_cannot_travel_stays_with_the_first_rank_and_its_mistakes_do_not(told):
    assert [each["only"] for each in told] == [True, False]
    assert [each["only_mistake"] for each in told] == ["corpus=a was cut; copy it anew"] * 2


def test_alone_everything_is_local():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    parallel.join_group(torch.device("cpu"))
    parallel.barrier()
    values = torch.tensor([1.0])
    assert parallel.sum_over_ranks(values) is values
    assert parallel.on_first_rank(lambda: 3) == 3
    assert parallel.only_first_rank(lambda: 3) == 3
    assert parallel.first_of("a") == "a"
    assert parallel.sum_named({"a": torch.tensor(1.5)}) == {"a": 1.5}

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        parallel.on_first_rank(refuse)


END = """
import atexit
import torch.distributed as dist

def threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]

def tell():
    (folder / (str(rank) + ".ended")).write_text(f"{{dist.is_initialized()}} {{threads()}}")

atexit.register(tell)
sys.modules.pop("torch.distributed.nn.functional", None)
parallel.join_group(torch.device("cpu"))
import torch.distributed.nn.functional  # imported here first, its defaults would hold the group
assert threads()
parallel.join_group(torch.device("cpu"))
assert parallel.world_size() == 2
parallel.barrier()  # one that left at once would cut the other's connecting short
if rank == 1 and {fails}:
    raise SystemExit(3)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_leaves_its_group_before_python_ends(tmp_path, tiny_corpus, fails):
    shown = run_ranks(tmp_path, tiny_corpus, END.format(fails=fails), code=int(fails))
    ended = [tmp_path / f"{rank}.ended" for rank in (0, 1)]
    assert ended[1].read_text() == "False []"
    if not fails:  # else the launcher may end the other rank first
        assert ended[0].read_text() == "False []"
    assert "terminate called" not in shown


SLOW = """
parallel.join_group(torch.device("cpu"), timeout=6.0)
first = parallel.on_first_rank(os.getpid)

def work_for_long():
    time.sleep(9)
    return "done"

assert parallel.on_first_rank(work_for_long) == "done"
if rank == 0:
    parallel.on_first_rank(lambda: os.kill(first, signal.SIGSTOP))
else:
    began = time.monotonic()
    try:
        parallel.on_first_rank(lambda: None)
    except RuntimeError as error:
        (folder / "waited").write_text(f"{time.monotonic() - began} {error}")
    os.kill(first, signal.SIGCONT)
    raise SystemExit(3)
"""


def test_the_first_rank_may_work_for_longer_than_it_may_stand_still(tmp_path, tiny_corpus):
    run_ranks(tmp_path, tiny_corpus, SLOW, code=1)
    seconds, told = (tmp_path / "waited").read_text().split(" ", 1)
    assert 4 < float(seconds) < 60
    assert "timed out" in told.lower()


def test_a_store_that_does_not_answer_the_first_rank_is_one_sentence():
    from botocore.exceptions import EndpointConnectionError

    def ask():
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")

    with pytest.raises(Unfinished, match=r"cannot be used \(EndpointConnectionError"):
        parallel.on_first_rank(ask)
