"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import Any


def until(is_so: Callable[[], Any], seconds: float) -> bool:
    """Wait for something to become so; whether it did in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def wait_until(is_so: Callable[[], Any], seconds: float = 60) -> None:
    """`until`, but raises `TimeoutError` where it does not become so."""
    if not until(is_so, seconds):
        raise TimeoutError(f"not so after {seconds} s")
