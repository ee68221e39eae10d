"""A strict reading of Serve config YAMLs: Serve itself accepts any misspelt key in silence."""

import copy
import typing
from pathlib import Path
from typing import Any

from cascade_model.errors import InputError
from cascade_model.nearest import cure
from cascade_model.settings import check
from jobs.yaml_text import document_in, text_of

# Fields that Serve types as a plain mapping, with the model that the mapping must fit.
_HIDDEN_MODELS = {
    "autoscaling_config": "AutoscalingConfig",
    "backpressure_config": "BackpressureConfig",
    "request_router_config": "RequestRouterConfig",
}

_LAST_PORT = 65535


def read_serve_yaml(path: str | Path, text: str | None = None) -> dict[str, Any]:
    """The mapping of a Serve config YAML, or of such a text, whose place `path` then is.

    `InputError` for one that is none, holds more than one, or where a key stands twice.
    """
    source = f"serve_config={path}" if text is None else str(path)
    document = document_in(text_of(path, source) if text is None else text, source)
    if not isinstance(document, dict):
        raise InputError(f"{source}: holds no mapping; start it with `applications:`")
    return document


def check_serve_document(document: dict[str, Any], source: str) -> None:
    """Refuse unknown keys (with the nearest right name), wrong values and crossed bounds."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    _check_lists(document, source)
    _check_keys(ServeDeploySchema, document, source, "")
    document = copy.deepcopy(document)
    for place, deployment in _deployments(document):
        autoscaling = deployment.get("autoscaling_config")
        _check_bounds(autoscaling, source, place)
        if isinstance(autoscaling, dict):
            policy = autoscaling.pop("policy", {})
            _check_policy(policy, source, f"{place}.autoscaling_config.policy.")
            # The deployment's own model takes any values.
            _fitted(AutoscalingConfig, autoscaling, source, f"{place}.autoscaling_config.")
    config = _fitted(ServeDeploySchema, document, source, "")
    ports = {"http_options": config.http_options.port, "grpc_options": config.grpc_options.port}
    for options, port in ports.items():
        check(
            0 <= port <= _LAST_PORT,
            f"{source}: `{options}.port` is {port}; give one in 0..{_LAST_PORT}",
        )


def _check_policy(policy: Any, source: str, prefix: str) -> None:
    """A policy, whose function Serve's models would import; it may be where they serve alone."""
    from ray.serve.config import AutoscalingPolicy

    if isinstance(policy, dict):
        policy = {key: value for key, value in policy.items() if key != "policy_function"}
    _fitted(AutoscalingPolicy, policy, source, prefix)


def _fitted(model: Any, values: dict[str, Any], source: str, prefix: str) -> Any:
    """The values as one of Serve's models."""
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = (prefix + ".".join(str(part) for part in first["loc"])).removesuffix(".")
        raise InputError(f"{source}: `{place}`: {first['msg']}; mend that line") from None
    except TypeError as error:  # Ray's own, for a runtime environment
        raise InputError(f"{source}: {str(error).strip(' .')}; mend that line") from None


def amounts_of(deployment: dict[str, Any], resource: str) -> tuple[float, float]:
    """CPUs (`num_cpus`) or GPUs (`num_gpus`) of a deployment's replicas: of those it starts with,
    and of all it may have."""
    default = 1 if resource == "num_cpus" else 0  # Ray's
    each = (deployment.get("ray_actor_options") or {}).get(resource, default) or 0
    fixed, scaling = deployment.get("num_replicas"), deployment.get("autoscaling_config")
    if isinstance(fixed, int) or not scaling:
        count = fixed if isinstance(fixed, int) else 1
        return each * count, each * count
    first = scaling.get("initial_replicas")
    start = scaling.get("min_replicas", 1) if first is None else first
    return each * start, each * max(start, scaling.get("max_replicas", 1))


def _check_lists(document: dict[str, Any], source: str) -> None:
    """Refuse `applications` and `deployments` that are no lists of mappings."""
    applications = document.get("applications", [])
    _check_rows(applications, "applications", source)
    for index, application in enumerate(applications):
        place = f"applications[{index}].deployments"
        _check_rows(application.get("deployments", []), place, source)


def _check_rows(rows: Any, place: str, source: str) -> None:
    check(
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
        f"{source}: `{place}` must be a list of mappings; begin each with `- name:`",
    )


def _check_keys(model: Any, mapping: dict[str, Any], source: str, prefix: str) -> None:
    for key, value in mapping.items():
        if key not in model.model_fields:
            known = cure(str(key), model.model_fields, prefix)
            raise InputError(f"{source}: no setting `{prefix}{key}`; {known}")
        inner = _model_of(key, model.model_fields[key].annotation)
        if inner is None:
            continue
        rows = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, row in rows:
            place = f"{prefix}{key}." if index is None else f"{prefix}{key}[{index}]."
            if isinstance(row, dict):
                _check_keys(inner, row, source, place)


def _model_of(key: str, annotation: Any) -> Any:
    """The pydantic model that a field's mapping must fit, or None for free mappings."""
    from pydantic import BaseModel
    from ray.serve import config

    if key in _HIDDEN_MODELS:
        return getattr(config, _HIDDEN_MODELS[key])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_of(key, inner) for inner in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)


def _deployments(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each deployment's override with its place in the file."""
    return [
        (f"applications[{i}].deployments[{j}]", deployment)
        for i, application in enumerate(document.get("applications", []))
        for j, deployment in enumerate(application.get("deployments", []))
    ]


def _check_bounds(autoscaling: Any, source: str, place: str) -> None:
    """min_replicas <= initial_replicas <= max_replicas; Serve checks it only when it deploys."""
    if not isinstance(autoscaling, dict):
        return
    low, high = autoscaling.get("min_replicas", 1), autoscaling.get("max_replicas", 1)
    first = autoscaling.get("initial_replicas")
    start = low if first is None else first
    if not all(isinstance(value, int) for value in (low, start, high)):
        return
    if not 0 <= low <= start <= high or high < 1:
        raise InputError(
            f"{source}: `{place}.autoscaling_config` has min_replicas={low}, "
            f"initial_replicas={first}, max_replicas={high}; they must rise in this order, "
            "with max_replicas at least 1"
        )
