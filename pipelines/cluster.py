"""Join a Ray cluster, or start one on this machine: the only place that calls `ray.init`.

A Ray of our own asks for a token that only this process and its children know: Ray binds its ports
to all interfaces whatever address it is given, and who reaches one without a token runs code.
"""

import logging
import os
import secrets
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path

from cascade_model.errors import InputError
from cascade_model.stopping import sigterm_held_off
from pipelines.ray_signals import sigterm_waits

_LOCAL = ("", "local")
# A label of every node that Ray's launcher or KubeRay made: such a cluster may grow on demand.
_NODE_GROUP = "ray.io/node-group"


def start_ray(num_cpus: int = 1) -> None:
    """Join the Ray of this process, of `RAY_ADDRESS` or of the submitted job, or start a local one.

    The local one gets at least `num_cpus` logical CPUs. `InputError` if there is no cluster at
    `RAY_ADDRESS` or its token is another. A SIGTERM to a command waits until Ray is there.
    """
    was_imported = "ray" in sys.modules
    if was_imported and sys.modules["ray"].is_initialized():
        return
    settle_authentication(os.environ)
    with sigterm_held_off():
        import ray
        from ray.exceptions import AuthenticationError
    if was_imported:
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")  # Ray read the mode when it was imported; so ray.init refreshes it
    address = os.environ.get("RAY_ADDRESS", "")
    if address in _LOCAL:
        # Without "local" Ray would join whatever cluster it finds on this machine.
        with sigterm_waits():
            ray.init(
                "local",
                num_cpus=max(num_cpus, cores()),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        return
    try:
        _require_listener(address)
        with sigterm_waits():
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, AuthenticationError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise InputError(
            f"RAY_ADDRESS={address} cannot be joined ({reason}); check the address and the token, "
            "or leave RAY_ADDRESS unset to use a Ray of this machine's own"
        ) from None


def settle_authentication(environment: MutableMapping[str, str]) -> None:
    """Make the mode explicit, before Ray is imported; a mode that is set already stands.

    For a Ray of our own: token mode, with a fresh token where the environment names none. For a
    cluster that is joined: token mode where a token is at hand, or else disabled.
    """
    joins = environment.get("RAY_ADDRESS", "") not in _LOCAL
    if not environment.get("RAY_AUTH_MODE"):
        has_token = _names_token(environment) or _token_file(environment).is_file()
        environment["RAY_AUTH_MODE"] = "token" if has_token or not joins else "disabled"
    is_token = environment["RAY_AUTH_MODE"].lower() == "token"
    if is_token and not joins and not _names_token(environment):
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def require_resources(num_cpus: float, num_gpus: float, setting: str, cure: str) -> None:
    """Raise `InputError` if the running Ray has less and nothing could add more.

    `setting` names what asks for them, `cure` what to do. A cluster that may grow is not judged.
    """
    import ray

    if any(_NODE_GROUP in node["Labels"] for node in ray.nodes()):
        return
    here = ray.cluster_resources()
    for name, wanted in (("CPU", num_cpus), ("GPU", num_gpus)):
        if wanted > here.get(name, 0):
            raise InputError(
                f"{setting} needs {wanted:g} {name}s and this Ray has {here.get(name, 0):g}; {cure}"
            )


def quiet_ray_data() -> None:
    """Warnings and errors of Ray Data only, and no progress bars: the commands show their own."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # It warns that there are no progress bars.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _require_listener(address: str) -> None:
    """Raise `OSError` if nobody listens; Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _names_token(environment: MutableMapping[str, str]) -> bool:
    return any(environment.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def _token_file(environment: MutableMapping[str, str]) -> Path:
    return Path(environment.get("HOME", "/nonexistent")) / ".ray" / "auth_token"
