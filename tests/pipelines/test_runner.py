"""Tasks come back in order; a user's mistake comes back as itself."""

import sys

import pytest

from cascade_model.errors import CorpusMismatch, InputError
from pipelines.runner import run_tasks

ORDERS = [{"number": number} for number in range(5)]


def double(order):
    return {"twice": 2 * order["number"]}


def refuse(order):
    if order["number"] == 3:
        raise CorpusMismatch("shard a.arrow was cut; copy it anew")
    return order


def fail(order):
    raise ZeroDivisionError


def test_results_come_in_the_order_of_the_orders():
    results = run_tasks(double, ORDERS, runner="local", num_workers=1)
    assert [result["twice"] for result in results] == [0, 2, 4, 6, 8]
    assert run_tasks(double, [], runner="local", num_workers=1) == []


def test_each_result_is_told_as_it_comes():
    told = []
    run_tasks(double, ORDERS, runner="local", num_workers=1, on_result=told.append)
    assert [result["twice"] for result in told] == [0, 2, 4, 6, 8]


def test_a_mistake_keeps_its_class_and_so_its_exit_code():
    with pytest.raises(CorpusMismatch, match=r"a\.arrow was cut") as caught:
        run_tasks(refuse, ORDERS, runner="local", num_workers=1)
    assert caught.value.exit_code == 3


def test_a_class_nobody_knows_here_is_still_an_input_error():
    error = InputError.from_data({"kind": "Unheard", "message": "m"})
    assert type(error) is InputError
    assert str(error) == "m"


def test_a_fault_of_ours_is_not_taken_for_a_mistake():
    with pytest.raises(ZeroDivisionError):
        run_tasks(fail, ORDERS, runner="local", num_workers=1)


@pytest.mark.ray
def test_on_ray_too(ray_local):
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # workers cannot import a test file
    try:
        told = []
        found = run_tasks(double, ORDERS, runner="ray", num_workers=2, on_result=told.append)
        assert found[4] == {"twice": 8}
        assert sorted(result["twice"] for result in told) == [0, 2, 4, 6, 8]
        with pytest.raises(CorpusMismatch, match=r"a\.arrow was cut"):
            run_tasks(refuse, ORDERS, runner="ray", num_workers=2)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
