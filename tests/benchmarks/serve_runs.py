"""An endpoint of a tiny model with real replicas, for tests and fault tables: who runs, who is
free, and how to kill one."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.deployment import deployed
from jobs.serve import APP, serve_document
from jobs.serve_config import ScalingConfig, ServeConfig
from tests.benchmarks.serve_client import KEY
from tests.benchmarks.waiting import wait_until


def write_model(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A model folder with random weights."""
    from cascade_model.model import Transformer
    from cascade_model.tokenizer import byte_tokenizer
    from cascade_model.weights import save_model
    from tests.tiny_models import text_config

    tokenizer = byte_tokenizer()
    network = Transformer(text_config(tokenizer, **{"max_sequence_length": 1024, **changes}))
    network.init_weights(seed)
    save_model(folder, network, tokenizer)
    return str(folder)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config_of(model: str, folder: Path, **changes: Any) -> ServeConfig:
    """Settings of a server whose replicas neither come nor go by themselves."""
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    settings = {
        "model": model,
        "model_name": "tiny",
        "api_keys": str(keys),
        "port": free_port(),
        "min_replicas": 2,
        "max_replicas": 2,
        "scaling": ScalingConfig(down_seconds=600.0),
        **changes,
    }
    return ServeConfig(**settings)


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Its URL; replicas are ready."""
    with deployed(serve_document(config)):
        wait_until(lambda: len(states()) >= config.min_replicas, 120)
        yield f"http://127.0.0.1:{config.port}"


def requests(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Requests at temperature 1, each with a seed of its own, that take some seconds."""
    settings = {
        "model": "tiny",
        "max_tokens": 160,
        "temperature": 1.0,
        "confidence_threshold": 1.0,
        **changes,
    }
    return [{"prompt": f"def f{n}(", "seed": 100 + n, **settings} for n in range(count)]


def states(seconds: float = 10) -> list[dict[str, Any]]:
    """What every sampler that runs states."""
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    handle = serve.get_deployment_handle("sampler", APP)
    try:
        told = handle.broadcast("state").results(timeout_s=seconds, return_exceptions=True)
    except (DeploymentUnavailableError, TimeoutError):  # nobody is there, or not any more
        return []
    return [state for state in told if isinstance(state, dict)]


def running() -> int:
    """Sampler replicas that Serve calls running."""
    return replicas("sampler").get("RUNNING", 0)


def replicas(deployment: str) -> dict[str, int]:
    """Replicas by state; none while Serve replaces what it knows of the deployment."""
    from ray import serve

    known = serve.status().applications[APP].deployments
    found = known[deployment].replica_states if deployment in known else {}
    return {str(getattr(state, "value", state)): count for state, count in found.items()}


def busy_slots() -> int:
    """Choices that any engine holds or waits with."""
    return sum(state["running"] + state["waiting"] for state in states())


def busy_victim(seconds: float = 60) -> dict[str, Any]:
    """The state of a sampler that has a stream in mid-block, while two are ready."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        told = states()
        found[:] = [each for each in told if each["choices"] and each["blocks_left"] > 4]
        return len(told) >= 2 and bool(found) and running() >= 2

    wait_until(is_there, seconds)
    return found[0]


def kill(state: dict[str, Any]) -> None:
    """`kill -9` of a sampler's process."""
    os.kill(state["process"], signal.SIGKILL)


def update(config: ServeConfig) -> None:
    """Deploy other settings over those that run; returns at once."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_document(config))
    _get_global_client().deploy_apps(schema)  # type: ignore[union-attr]


def serve_processes() -> list[psutil.Process]:
    """Proxy, ingress and samplers of the Ray that this process started."""
    mine = psutil.Process().children(recursive=True)
    return [each for each in mine if "Replica" in each.name() or "Proxy" in each.name()]
