"""Ray takes SIGTERM over while it starts, twice, and gives it up when it ends; kept from it here.

Its Python part sets a handler that ends the process in the middle of whatever it is at, with locks
taken that its threads then wait for. Its C++ part sets another, some tenths of a second before Ray
is there: that prints a stack, hands the signal on, and aborts the process by an alarm three seconds
later, when Ray's own processes may not have learnt yet whose they are. When Ray ends, before its
processes have ended, it sets none, so that the next SIGTERM kills.
"""

import contextlib
import ctypes
import functools
import signal
import threading
from collections.abc import Iterator

from cascade_model.stopping import sigterm_held_off

Action = ctypes.Array[ctypes.c_char]
"""A `struct sigaction`."""
_C = ctypes.CDLL(None)
_NUMBERS = (signal.SIGTERM, signal.SIGALRM)
_LOOK_EVERY = 0.002
_ACTION_BYTES = 512
"""More than any `struct sigaction`, which is put back as it was and never looked into."""


@contextlib.contextmanager
def sigterm_waits() -> Iterator[None]:
    """Lets a SIGTERM to a command wait until the body, in which Ray starts, has ended.

    Outside of a command Ray does as it likes.
    """
    with sigterm_held_off() as is_held:
        if not is_held:
            yield
            return
        with _without_rays_handler(), _in_groups_of_their_own(), _actions_kept():
            yield


@contextlib.contextmanager
def _without_rays_handler() -> Iterator[None]:
    """Ray's Python part sets none."""
    from ray._private import utils

    rays_own = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda sigterm_handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays_own


@contextlib.contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """A signal to the command's process group is not one to Ray's processes.

    `timeout` and shells send such; without its processes Ray would wait for them for a minute, and
    an orderly stop needs them. They end with the command, as the kernel sees to.
    """
    from ray._private import services

    rays_own = services.ConsolePopen
    services.ConsolePopen = functools.partial(rays_own, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = rays_own


@contextlib.contextmanager
def _actions_kept() -> Iterator[None]:
    """What the process does at SIGTERM and at an alarm is put back as soon as Ray changes it.

    By a thread, as the main one is inside of Ray then. Ray's C++ handler may still be faster: then
    its stack is printed and the signal noted, and the alarm that it set is taken back.
    """
    ours, ended = {number: _action(number) for number in _NUMBERS}, threading.Event()
    keeper = threading.Thread(target=_keep, args=(ours, ended), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()


def ignored_to_the_end() -> None:
    """A SIGTERM that is ignored now stays so until the interpreter has ended, and Ray in it."""
    ours = {signal.SIGTERM: _action(signal.SIGTERM)}
    threading.Thread(target=_keep, args=(ours, threading.Event()), daemon=True).start()


def _keep(ours: dict[signal.Signals, Action], ended: threading.Event) -> None:
    """Look after the actions, below Python's handlers, until told to end, and once more then."""
    is_last = False
    while not is_last:
        is_last = ended.wait(_LOOK_EVERY)
        for number, action in ours.items():
            if _action(number).raw == action.raw:
                continue
            _C.sigaction(number, action, None)
            if number == signal.SIGALRM:
                _C.alarm(0)


def _action(number: signal.Signals) -> Action:
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _C.sigaction(number, None, action)
    return action
