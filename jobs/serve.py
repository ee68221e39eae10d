"""serve: a checkpoint as an OpenAI-compatible endpoint on Ray Serve, in two tiers.

The ingress speaks the protocol and holds no weights; sampler replicas hold the weights and are
called by handle. Flags and a Serve YAML (`--serve-config`) lead to the same thing: a checked Serve
config that names `jobs.serve:build_app`.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_model.config import check
from cascade_model.errors import CheckpointMismatch, InputError
from jobs.cli import command, parse_mapping
from jobs.launch import absolute
from jobs.replicas import KEYS_VARIABLE, Ingress, Sampler
from jobs.serve_yaml import check_serve_document, read_serve_yaml
from pipelines.cluster import start_ray

APP = "cascade"
BUILDER = "jobs.serve:build_app"
DEPLOYMENTS = ("ingress", "sampler")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """An OpenAI-compatible endpoint over a model folder."""

    model: str = ""
    """Model folder (weights, config, tokenizer, manifest)."""
    model_name: str = ""
    """Name that clients give; none: the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    api_keys: str | None = None
    """File with one API key a line; keys in the variable CASCADE_API_KEYS (commas) count too."""
    no_auth: bool = False
    """Serve without any key; only on a loopback address."""
    min_replicas: int = 1
    """Sampler replicas at least."""
    max_replicas: int = 2
    """Sampler replicas at most."""
    streams_per_replica: int = 8
    """Completions that one sampler replica decodes at once, block by block in turn."""
    max_in_flight: int = 64
    """Completions decoded or waiting in all; beyond it clients get 429."""
    threads_per_replica: int = 1
    """Torch threads and Ray CPUs of one sampler replica."""
    serve_config: str | None = None
    """A Serve config YAML to start instead; the other settings then stand in its `args`."""

    def __post_init__(self) -> None:
        check(
            bool(self.model) != bool(self.serve_config),
            "model and serve_config: give exactly one, a model folder or a Serve YAML",
        )
        check(0 <= self.port < 65536, f"port={self.port} must be in 0..65535; use 8000")
        check(
            0 <= self.min_replicas <= self.max_replicas and self.max_replicas >= 1,
            f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} must satisfy "
            "0 <= min_replicas <= max_replicas, with at least one; use 1 and 2",
        )
        for name in ("streams_per_replica", "threads_per_replica"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.max_in_flight >= 8, f"max_in_flight={self.max_in_flight} must be at least 8")
        check(
            not self.no_auth or is_loopback(self.host),
            f"no_auth=True with host={self.host} would serve strangers; use host=127.0.0.1 or "
            "give api_keys",
        )

    @property
    def name(self) -> str:
        """The model's name for clients; a folder called `model` takes its run's name."""
        folder = Path(self.model)
        return self.model_name or (folder.parent.name if folder.name == "model" else folder.name)


def build_app(args: dict[str, Any]) -> Any:
    """The Serve application; `args` are the settings of `ServeConfig`, checked as on the CLI."""
    from ray import serve

    config = parse_mapping(ServeConfig, args, "args")
    require_keys(config)
    sampler = serve.deployment(
        name="sampler",
        max_ongoing_requests=config.streams_per_replica,
        max_queued_requests=config.max_in_flight,
        ray_actor_options={"num_cpus": config.threads_per_replica},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.streams_per_replica,
        },
        graceful_shutdown_timeout_s=60,
        max_constructor_retry_count=2,
    )(Sampler)
    # The ingress counts requests itself, so that its refusals have OpenAI's shape.
    ingress = serve.deployment(
        name="ingress", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )(serve.ingress()(Ingress))
    return ingress.bind(config, sampler.bind(config.model, config.threads_per_replica))


def require_keys(config: ServeConfig) -> None:
    """Refuse a server that anyone could use."""
    from jobs.gate import load_api_keys

    if not config.no_auth and not load_api_keys(config.api_keys, os.environ.get(KEYS_VARIABLE, "")):
        raise InputError(
            "api_keys: no key is set; put keys into the variable CASCADE_API_KEYS or a file "
            "(--api-keys FILE), or give --no-auth True on a loopback host"
        )


def serve_document(config: ServeConfig) -> dict[str, Any]:
    """The Serve config that the flags mean: what a Serve YAML would hold."""
    args = {
        key: value for key, value in dataclasses.asdict(config).items() if key != "serve_config"
    }
    args["model"] = absolute(config.model)
    args["api_keys"] = config.api_keys and absolute(config.api_keys)
    application = {"name": APP, "route_prefix": "/", "import_path": BUILDER, "args": args}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [application],
    }


def validate_serve_config(path: str | Path) -> dict[str, Any]:
    """Read a Serve YAML strictly, the `args` of our own application included."""
    document = read_serve_yaml(path)
    check_serve_document(document, str(path))
    host = document.get("http_options", {}).get("host", "127.0.0.1")
    for index, application in enumerate(document["applications"]):
        if application["import_path"] != BUILDER:
            continue
        place = f"{path}: applications[{index}]"
        config = parse_mapping(ServeConfig, application.get("args", {}), f"{place}.args")
        dataclasses.replace(config, host=host)  # no_auth is judged by the address listened on
        for deployment in application.get("deployments", []):
            name = deployment["name"]
            check(
                name in DEPLOYMENTS,
                f"{place}.deployments: no deployment `{name}`; known are {list(DEPLOYMENTS)}",
            )
    return document


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_free_port(host: str, port: int) -> None:
    """Refuse a port in use, before Ray starts (Serve would wait for it in its own log)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port={port} on host={host} cannot be used ({error.strerror}); "
                "end its owner or give another --port"
            ) from None


def run(config: ServeConfig) -> dict[str, Any]:
    """Start the endpoint and keep it until SIGTERM or Ctrl-C; then end it cleanly."""
    import ray

    from cascade_model.weights import read_config

    if config.serve_config:
        document = validate_serve_config(config.serve_config)
    else:
        document = serve_document(config)
    http = {"host": "127.0.0.1", "port": 8000, **document.get("http_options", {})}
    for application in document["applications"]:
        if application["import_path"] == BUILDER:
            own = parse_mapping(ServeConfig, application["args"], "args")
            require_keys(own)
            read_config(own.model)
    require_free_port(http["host"], http["port"])
    stop = threading.Event()
    start_ray(num_cpus=2)
    # After Ray's start, which puts handlers of its own in place.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with deployed(document, stop):
        if not stop.is_set():
            announce(document, f"http://{http['host']}:{http['port']}")
        stop.wait()
        print("ending: open streams get their time", flush=True)
    ray.shutdown()
    return {"url": f"http://{http['host']}:{http['port']}"}


@contextlib.contextmanager
def deployed(document: dict[str, Any], stop: threading.Event | None = None):
    """The applications of a Serve config, running on this process's Ray; ended on leaving."""
    from ray import serve
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(document)
    try:
        client = serve_start(
            http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location
        )
        client.deploy_apps(schema)
        wait_until_running([application.name for application in schema.applications], stop)
        yield
    finally:
        serve.shutdown()


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
            raise RuntimeError(f"the applications {names} were not ready in {seconds:.0f} s")
        time.sleep(0.2)


def refusal_in(message: str) -> InputError | None:
    """The user's mistake in a traceback that Serve reports as text, or None."""
    for line in message.splitlines():
        for kind in (CheckpointMismatch, InputError):
            before, found, sentence = line.partition(f"cascade_model.errors.{kind.__name__}: ")
            if found and not before.strip():
                return kind(sentence.strip())
    return None


def announce(document: dict[str, Any], url: str) -> None:
    """Say that it is up, with a line to try it."""
    for application in document["applications"]:
        config = parse_mapping(ServeConfig, application["args"], "args")
        key = "" if config.no_auth else ' -H "Authorization: Bearer $KEY"'
        body = json.dumps({"model": config.name, "prompt": "def main():", "max_tokens": 32})
        print(
            f"serving {config.name} at {url}/v1 (Ctrl-C or SIGTERM ends it)\n"
            f"try: curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
            flush=True,
        )


main = command(ServeConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
