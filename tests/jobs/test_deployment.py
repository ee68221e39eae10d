"""What Serve reports as text becomes the user's mistake again; the rest is in test_serve.py."""

import sys
import threading

import pytest

from cascade_model.errors import CheckpointMismatch, InputError
from jobs.deployment import refusal_in, wait_until_running, without_the_controllers_end

TRACEBACK = """Deploying app 'cascade' failed with exception:
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    raise cascade_model.errors.InputError: "not this line"
cascade_model.errors.{kind}: model=a is broken; give another
"""


@pytest.mark.parametrize("kind", [InputError, CheckpointMismatch])
def test_a_mistake_is_found_in_a_traceback_with_its_class(kind):
    found = refusal_in(TRACEBACK.format(kind=kind.__name__))
    assert type(found) is kind
    assert str(found) == "model=a is broken; give another"


def test_a_fault_of_ours_is_none_of_the_users():
    assert refusal_in("Traceback\nValueError: cascade_model") is None


def test_only_the_controllers_own_end_is_left_out(capsys):
    end = "(raylet) Task ServeController.graceful_shutdown failed. {} killed by `ray.kill`."
    with without_the_controllers_end():
        sys.stdout.write(end.format("The actor is dead because it was") + "\n")
        sys.stdout.write("Task ServeController.deploy failed: another cause\nno line")
        sys.stdout.write(" yet")
    assert capsys.readouterr().out == (
        "Task ServeController.deploy failed: another cause\nno line yet"
    )


@pytest.mark.ray
def test_what_does_not_come_in_time_is_one_sentence(ray_local):
    with pytest.raises(InputError, match=r"\['absent'\] were not ready in 0 s"):
        wait_until_running(["absent"], None, seconds=0)
    stopped = threading.Event()
    stopped.set()
    wait_until_running(["absent"], stopped)
