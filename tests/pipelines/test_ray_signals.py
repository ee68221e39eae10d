"""What the process does at SIGTERM and at an alarm outlasts whoever changes it below Python."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, ctypes, os, signal, sys, time
from pipelines import ray_signals

c, noted = ctypes.CDLL(None), []
if sys.argv[2] == "loose":
    ray_signals._actions_kept = contextlib.nullcontext
    ray_signals.ignored_to_the_end = lambda: None
signal.signal(signal.SIGTERM, lambda *_: noted.append("SIGTERM"))


def start():
    with ray_signals._actions_kept():
        c.signal(signal.SIGALRM, None)
        c.signal(signal.SIGTERM, None)
        c.alarm(1)
        time.sleep(0.2)
        if sys.argv[1] == "alarm":
            time.sleep(1.5)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
            assert noted == ["SIGTERM"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def end():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ray_signals.ignored_to_the_end()
    c.signal(signal.SIGTERM, None)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


end() if sys.argv[1] == "end" else start()
"""


@pytest.mark.parametrize(
    ("what", "loose_end"),
    [("alarm", signal.SIGALRM), ("start", signal.SIGTERM), ("end", signal.SIGTERM)],
)
def test_what_is_changed_below_python_is_put_back(what, loose_end):
    root = Path(__file__).parents[2]
    codes = [
        subprocess.run([sys.executable, "-c", PROGRAM, what, how], cwd=root).returncode
        for how in ("kept", "loose")
    ]
    assert codes == [0, -loose_end]
