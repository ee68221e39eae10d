"""serve: a checkpoint as an OpenAI-compatible endpoint on Ray Serve, in two tiers.

The ingress speaks the protocol and holds no weights; sampler replicas hold the weights and are
called by handle. Flags and a Serve YAML (`--serve-config`) lead to the same thing: a checked Serve
config that names `jobs.serve:build_app`.
"""

import dataclasses
import errno
import json
import math
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from cascade_model.errors import InputError
from cascade_model.settings import check
from jobs.autoscaling import POLICY, QueuedBlocks
from jobs.cli import build, command
from jobs.deployment import deployed, drain, without_the_controllers_end
from jobs.gate import KEYS_VARIABLE, load_api_keys
from jobs.launch import absolute
from jobs.replicas import Ingress, Sampler
from jobs.serve_config import ServeConfig
from jobs.serve_yaml import amounts_of, check_serve_document, read_serve_yaml
from jobs.slow_readers import DEFAULT_SECONDS, SECONDS_VARIABLE
from pipelines.cluster import require_resources, start_ray

APP = "cascade"
BUILDER = "jobs.serve:build_app"
DEPLOYMENTS = ("ingress", "sampler")
SERVE_ENVIRONMENT = {
    # HAProxy binds all interfaces and fixed ports: for clusters, behind a firewall.
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "jobs.slow_readers:middlewares",
}
"""For every process of a Serve on one machine."""


def build_app(args: dict[str, Any]) -> Any:
    """The Serve application; `args` are the settings of `ServeConfig`, checked as on the CLI."""
    from ray import serve

    config = build(ServeConfig, args, "args")
    require_keys(config)
    options = deployment_options(config)
    sampler = serve.deployment(name="sampler", **options["sampler"])(Sampler)
    ingress = serve.deployment(name="ingress", **options["ingress"])(serve.ingress()(Ingress))
    places = config.streams_per_replica
    samplers = sampler.bind(config.model, config.threads_per_replica, config.engine, places)
    return ingress.bind(config, samplers)


def deployment_options(config: ServeConfig) -> dict[str, dict[str, Any]]:
    """Serve's options of the two tiers, where a Serve YAML does not override them."""
    scaling = config.scaling
    sampler = {
        "max_ongoing_requests": config.streams_per_replica,
        "max_queued_requests": config.max_in_flight,
        "ray_actor_options": {
            "num_cpus": config.threads_per_replica,
            "num_gpus": config.engine.num_gpus,
        },
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "upscale_delay_s": scaling.up_seconds,
            "downscale_delay_s": scaling.down_seconds,
            "downscale_to_zero_delay_s": scaling.to_zero_seconds,
            # Statements every second, the last five count: the delays are to do the waiting. Serve
            # means to replace the first by variables, which nothing of 2.60 reads.
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
            "policy": {
                "policy_function": POLICY,
                "policy_kwargs": {
                    "queue_seconds": scaling.queue_seconds,
                    "free_share": scaling.free_share,
                },
            },
        },
        "graceful_shutdown_timeout_s": 60,
        "health_check_period_s": 2,
        "max_constructor_retry_count": 2,
    }
    # The ingress counts requests itself, so that its refusals have OpenAI's shape. In an update the
    # new one is there before the old one goes; it takes no CPU.
    ingress = {
        "max_ongoing_requests": 100_000,
        # Serve cuts what is left then without a word: longer than any stream should take.
        "graceful_shutdown_timeout_s": 600,
        "max_surge_percent": 100,
        "ray_actor_options": {"num_cpus": 0},
    }
    return {"sampler": sampler, "ingress": ingress}


def wanted_of(document: dict[str, Any], resource: str = "num_cpus") -> tuple[float, float]:
    """CPUs, or GPUs, of a checked document: at the start, and when all replicas have come."""
    start = most = 0.0
    for application in document["applications"]:
        options: dict[str, dict[str, Any]] = {}
        if is_ours(application):
            options = deployment_options(settings_of(application))
        for deployment in application.get("deployments", []):
            name = deployment["name"]
            options[name] = {**options.get(name, {}), **deployment}
        for first, last in (amounts_of(each, resource) for each in options.values()):
            start, most = start + first, most + last
    return start, most


def is_ours(application: dict[str, Any]) -> bool:
    """Whether an application of a Serve config is this endpoint."""
    return application["import_path"] == BUILDER


def settings_of(application: dict[str, Any], source: str = "args") -> ServeConfig:
    """The checked settings of an application of ours."""
    return build(ServeConfig, application.get("args") or {}, source)


def require_keys(config: ServeConfig) -> None:
    """Refuse a server that anyone could use."""
    if not config.no_auth and not load_api_keys(config.api_keys, os.environ.get(KEYS_VARIABLE, "")):
        raise InputError(
            "api_keys: no key is set; put keys into the variable CASCADE_API_KEYS or a file "
            "(--api-keys FILE), or give --no-auth True on a loopback host"
        )


def require_template(config: ServeConfig) -> None:
    """Refuse a chat template that no ingress could use (`own_template.template_of`)."""
    from cascade_model.commit import Folder
    from cascade_model.own_template import template_of
    from cascade_model.tokenizer import Tokenizer
    from cascade_model.weights import TOKENIZER

    data = Folder(config.model).read_bytes(TOKENIZER)
    tokenizer = Tokenizer(data, f"{config.model}/{TOKENIZER}")
    template_of(config.model, tokenizer, config.chat_template)


def serve_document(config: ServeConfig) -> dict[str, Any]:
    """The Serve config that the flags mean: what a Serve YAML would hold. `InputError` for a chat
    template that cannot be read."""
    from cascade_model.chat_template import template_text

    args = {
        key: value for key, value in dataclasses.asdict(config).items() if key != "serve_config"
    }
    args["model"] = absolute(config.model)
    args["api_keys"] = config.api_keys and absolute(config.api_keys)
    args["chat_template"] = config.chat_template and template_text(config.chat_template)
    application = {"name": APP, "route_prefix": "/", "import_path": BUILDER, "args": args}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.host, "port": config.port},
        "applications": [application],
    }


def validate_serve_config(path: str | Path) -> dict[str, Any]:
    """Read a Serve YAML strictly, the `args` of our own application included."""
    document = read_serve_yaml(path)
    check_serve_config(document, str(path))
    return document


def check_serve_config(document: dict[str, Any], source: str) -> None:
    """Refuse a Serve config that is wrong, the `args` of our own application included; `source`
    begins every sentence."""
    check_serve_document(document, source)
    http = {"host": "127.0.0.1", "port": 8000, **document.get("http_options", {})}
    for index, application in enumerate(document["applications"]):
        if not is_ours(application):
            continue
        place = f"{source}: applications[{index}]"
        config = settings_of(application, f"{place}.args")
        given = application.get("args") or {}
        # no_auth is judged by the address listened on.
        settings_of({**application, "args": {**given, "host": http["host"]}}, f"{place}.args")
        for name in http.keys() & given.keys():
            check(
                given[name] == http[name],
                f"{place}.args: {name}={given[name]} has no effect, http_options has "
                f"{name}={http[name]}; write it there alone",
            )
        for deployment in application.get("deployments", []):
            name = deployment["name"]
            check(
                name in DEPLOYMENTS,
                f"{place}.deployments: no deployment `{name}`; known are {list(DEPLOYMENTS)}",
            )
            _check_policy(deployment, f"{place}.deployments: {name}")
            if name == "sampler":
                _check_override(deployment, given, config, place)


def _check_override(
    sampler: dict[str, Any], given: dict[str, Any], config: ServeConfig, place: str
) -> None:
    """Refuse settings of ours that the same file's Serve options for the sampler undo."""
    places = sampler.get("max_ongoing_requests", config.streams_per_replica)
    check(
        places == config.streams_per_replica,
        f"{place}: sampler.max_ongoing_requests={places} is not args.streams_per_replica="
        f"{config.streams_per_replica}; make them equal, or leave the first one out",
    )
    counts = next((o for o in ("autoscaling_config", "num_replicas") if o in sampler), None)
    undone = [n for n in ("min_replicas", "max_replicas", "scaling") if counts and n in given]
    check(
        not undone,
        f"{place}: args.{undone and undone[0]} has no effect beside deployments: "
        f"sampler.{counts}; keep one of them",
    )


def _check_policy(deployment: dict[str, Any], place: str) -> None:
    """Settings of our own autoscaling policy; Serve hands them over when it is too late to tell."""
    policy = (deployment.get("autoscaling_config") or {}).get("policy") or {}
    if policy.get("policy_function") in (POLICY, POLICY.replace(":", ".")):
        build(QueuedBlocks, policy.get("policy_kwargs") or {}, f"{place}: policy_kwargs")


def require_free_port(host: str, port: int) -> None:
    """Refuse an address that is not this machine's and a port that cannot be had, before Ray starts
    (Serve would wait for them in its own log)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise InputError(
                f"port={port} is no port; give --port one of 1024..65535, such as 8000"
            ) from None
        except (TypeError, UnicodeError):  # before the system is asked
            raise InputError(_no_address(host, "no host is spelt so")) from None
        except OSError as error:
            where = f"port={port} on host={host} cannot be used ({error.strerror})"
            # A link-local address without its network interface is an invalid argument.
            wrong_hosts = (errno.EADDRNOTAVAIL, errno.EINVAL)
            if isinstance(error, socket.gaierror) or error.errno in wrong_hosts:
                told = _no_address(host, error.strerror)
            elif error.errno == errno.EACCES:
                told = f"{where}; give a --port of 1024 or above"
            else:
                told = f"{where}; end its owner or give another --port"
            raise InputError(told) from None


def _no_address(host: str, reason: str | None) -> str:
    return (
        f"host={host} is no address of this machine ({reason}); give --host 127.0.0.1 (this "
        "machine alone), 0.0.0.0 (every address that it has) or one that `hostname -I` shows"
    )


def run(config: ServeConfig) -> dict[str, Any]:
    """Start the endpoint and keep it until SIGTERM or Ctrl-C; then end it cleanly."""
    from cascade_model.weights import read_config

    if config.serve_config:
        document = validate_serve_config(config.serve_config)
    else:
        document = serve_document(config)
    http = {"host": "127.0.0.1", "port": 8000, **document.get("http_options", {})}
    for application in filter(is_ours, document["applications"]):
        own = settings_of(application)
        require_keys(own)
        read_config(own.model)
        require_template(own)
    require_free_port(http["host"], http["port"])
    start_ray_for(document)
    import ray

    stop = threading.Event()
    # After Ray's start, which puts handlers of its own in place.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    url = f"http://{http['host']}:{http['port']}"
    with deployed(document, stop):
        if not stop.is_set():
            announce(document, url)
        stop.wait()
        print("ending: open streams get their time", flush=True)
        for application in filter(is_ours, document["applications"]):
            drain(application.get("name", "default"), settings_of(application).drain_seconds)
    with without_the_controllers_end():
        ray.shutdown()
    return {"url": url}


def start_ray_for(document: dict[str, Any]) -> None:
    """A Ray of this machine with a place for every replica, or one that can start them at least."""
    ours = [settings_of(each) for each in filter(is_ours, document["applications"])]
    seconds = max((own.reader_timeout_seconds for own in ours), default=DEFAULT_SECONDS)
    # Read by the processes of a Ray that starts here; a cluster has its own (cluster/*.yaml).
    for name, value in {**SERVE_ENVIRONMENT, SECONDS_VARIABLE: str(seconds)}.items():
        os.environ.setdefault(name, value)
    start, most = wanted_of(document)
    start_ray(num_cpus=max(1, math.ceil(most)))
    require_resources(
        start,
        wanted_of(document, "num_gpus")[0],
        "the replicas to start (min_replicas x threads_per_replica, a GPU each on cuda)",
        "lower min_replicas or threads_per_replica, or use a larger cluster",
    )


def announce(document: dict[str, Any], url: str) -> None:
    """Say that it is up, with a line to try it."""
    from pipelines.endpoint_client import KEY_VARIABLE

    for application in document["applications"]:
        if not is_ours(application):
            place = f"{url}{application.get('route_prefix', '/')}"
            print(f"serving {application.get('name', 'default')} at {place}", flush=True)
            continue
        config = settings_of(application)
        key = "" if config.no_auth else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
        body = json.dumps({"model": config.name, "prompt": "def main():", "max_tokens": 32})
        print(
            f"serving {config.name} at {url}/v1 (Ctrl-C or SIGTERM ends it)\n"
            f"page: {url}/\n"
            f"{key_line(config)}"
            f"try: curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
            flush=True,
        )


def key_line(config: ServeConfig) -> str:
    """Where the key of a request comes from; nothing where none is asked for."""
    from pipelines.endpoint_client import KEY_VARIABLE

    if config.no_auth:
        return ""
    file = f" or in {config.api_keys}" if config.api_keys else ""
    places = f"in the server's variable {KEYS_VARIABLE}{file}"
    return f"key: one of those {places}; first: export {KEY_VARIABLE}=KEY\n"


main = command(ServeConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
