"""A strict reading of Serve config YAMLs: Serve itself accepts any misspelt key in silence."""

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml

from cascade_model.errors import InputError

# Fields that Serve types as a plain mapping, with the model that the mapping must fit.
_HIDDEN_MODELS = {
    "autoscaling_config": "AutoscalingConfig",
    "backpressure_config": "BackpressureConfig",
    "request_router_config": "RequestRouterConfig",
}


def read_serve_yaml(path: str | Path, text: str | None = None) -> dict[str, Any]:
    """The mapping of a Serve config YAML, or of such a text out of the file at `path`;
    `InputError` for one that is none."""
    try:
        document = yaml.safe_load(Path(path).read_text("utf-8") if text is None else text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"serve_config={path} cannot be read ({error}); check the path") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise InputError(f"serve_config={path} is not valid YAML{line}; mend the file") from None
    if not isinstance(document, dict):
        raise InputError(f"serve_config={path} holds no mapping; start it with `applications:`")
    return document


def check_serve_document(document: dict[str, Any], source: str) -> None:
    """Refuse unknown keys (with the nearest right name), wrong values and crossed bounds."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    _check_keys(ServeDeploySchema, document, source, "")
    for place, deployment in _deployments(document):
        _check_bounds(deployment.get("autoscaling_config"), source, place)
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{source}: `{place}`: {first['msg']}; mend that line") from None


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


def _check_keys(model: Any, mapping: dict[str, Any], source: str, prefix: str) -> None:
    for key, value in mapping.items():
        if key not in model.model_fields:
            known = sorted(model.model_fields)
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            cure = f"did you mean `{prefix}{near[0]}`?" if near else f"known are {known}"
            raise InputError(f"{source}: no setting `{prefix}{key}`; {cure}")
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
        for i, application in enumerate(document.get("applications") or [])
        if isinstance(application, dict)
        for j, deployment in enumerate(application.get("deployments") or [])
        if isinstance(deployment, dict)
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
