"""A Serve config on the Ray of this process: deployed, waited for, ended on leaving."""

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.settings import check

log = logging.getLogger("cascade.endpoint")


@contextlib.contextmanager
def deployed(document: dict[str, Any], stop: threading.Event | None = None) -> Iterator[None]:
    """The applications of a Serve config, running on this process's Ray; ended on leaving.

    `InputError` where a Serve runs there already: this would replace its applications, and end them
    with its own.
    """
    from ray import serve
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    running = serve.status()
    check(
        not running.applications and not running.proxies,
        f"Ray Serve runs on this cluster already (applications {sorted(running.applications)}); "
        "change it by `serve deploy FILE`, or give `cascade serve` another Ray",
    )
    schema = ServeDeploySchema.model_validate(document)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process alone
    try:
        client = serve_start(
            http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location
        )
        client.deploy_apps(schema)
        wait_until_running([application.name for application in schema.applications], stop)
        yield
    finally:
        with without_the_controllers_end():
            serve.shutdown()


def drain(application: str, seconds: float) -> None:
    """Let every ingress of an application end its streams; Serve's own end would cut them off."""
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        ingress = serve.get_deployment_handle("ingress", application)
    except KeyError:  # Serve never got to it
        return
    try:
        left = ingress.broadcast("drain", seconds).results(timeout_s=seconds + 10)
    except DeploymentUnavailableError:  # no replica is there yet
        return
    except Exception as error:  # it has died: nothing is open
        log.warning("no ingress of %s could be drained: %s", application, error)
        return
    if any(left):
        log.warning("%d answers were not whole after %g s and got an error", sum(left), seconds)


@contextlib.contextmanager
def without_the_controllers_end() -> Iterator[None]:
    """Leaves out what Ray prints of calls to Serve's controller when the controller, which was told
    to end, has ended; everything else on stdout is let through."""
    out = _Lines(sys.stdout)
    with contextlib.redirect_stdout(out):
        try:
            yield
        finally:
            out.flush()


class _Lines(io.TextIOBase):
    """A text stream that drops the lines about the controller."""

    def __init__(self, target: TextIO) -> None:
        self._target, self._line = target, ""

    def write(self, text: str) -> int:
        """Pass whole lines on."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if not ("Task ServeController." in line and "killed by `ray.kill`" in line):
                self._target.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Pass on what has no end yet."""
        self._target.write(self._line)
        self._line = ""
        self._target.flush()


def wait_until_running(
    names: list[str], stop: threading.Event | None, seconds: float = 600
) -> None:
    """Block until every application answers; a failed one raises with Serve's own words."""
    from ray import serve

    deadline = time.monotonic() + seconds
    while stop is None or not stop.is_set():
        applications = serve.status().applications
        states = {name: applications[name] for name in names if name in applications}
        if len(states) == len(names) and all(s.status == "RUNNING" for s in states.values()):
            return
        for name, state in states.items():
            if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                causes = [deployment.message for deployment in state.deployments.values()]
                reason = "\n".join([state.message, *causes])
                raise refusal_in(reason) or RuntimeError(f"{name} did not start: {reason}")
        if time.monotonic() > deadline:
            waits = [d.message for s in states.values() for d in s.deployments.values()]
            raise InputError(
                f"the applications {names} were not ready in {seconds:.0f} s "
                f"({'; '.join(filter(None, waits))}); ask for fewer replicas or threads"
            )
        time.sleep(0.2)


def refusal_in(message: str) -> InputError | None:
    """The user's mistake in a traceback that Serve reports as text, or None."""
    for line in message.splitlines():
        for kind in (CheckpointMismatch, InputError):
            before, found, sentence = line.partition(f"cascade_model.errors.{kind.__name__}: ")
            if found and not before.strip():
                return kind(sentence.strip())
    return None
