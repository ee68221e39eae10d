"""A selection of the equality table, for every family; and that the table can say no."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from tests.cascade_model.equality import (
    alone,
    compared,
    conditions,
    elsewhere,
    main,
    model_of,
    random_model,
    requests,
)
from tests.cascade_model.test_scheduler import FAMILIES

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "head_dim": 16, "block_size": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_gives_the_same_logits_to_the_bit_whatever_happens(family):
    """Float32, thresholds in the middle of the scores."""
    model = random_model(**(SIZES | FAMILIES[family]))
    asks = requests(model, 2, 20)
    expected = alone(model, asks)
    for name, condition in conditions(model).items():
        row = compared("float32", name, expected, condition(model, asks))
        assert row.ok, row


def test_the_table_can_say_no():
    """One weight's last bit is enough."""
    model, nudged = random_model(**SIZES), random_model(**SIZES)
    weight = next(p for name, p in nudged.named_parameters() if "k_proj" in name).data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    asks = requests(model, 2, 8)
    expected, found = alone(model, asks), alone(nudged, asks)
    row = compared("float32", "nudged", expected, found)
    assert (row.requests, row.ok) == (2, False)
    assert compared("bfloat16", "nudged", expected, found).ok
    assert not compared("float32", "never came about", expected, [None, None]).ok


def test_another_process_after_a_killed_one_gives_the_same_logits():
    model = model_of(None, "float32")
    asks = requests(model, 3, 16)
    job = {"model": None, "threads": torch.get_num_threads()}
    job |= {"asks": {"float32": [asdict(ask) for ask in asks]}}
    found = elsewhere(job, is_killed_first=True)["float32"]
    assert compared("float32", "after kill -9", alone(model, asks), found).ok


@pytest.mark.slow
def test_the_whole_table_holds(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.count("| float32") == 11
