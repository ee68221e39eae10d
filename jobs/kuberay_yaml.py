"""KubeRay's resources read strictly: each key and value by the schema of its kind, then the rules
of the operator that no schema can say, then what is embedded in them as text.

The API server drops what it does not know, so a misspelt setting is one that was never given.
"""

import functools
import json
from pathlib import Path
from typing import Any

from cascade_model.errors import InputError
from cascade_model.nearest import cure
from jobs.null_settings import without_nulls
from jobs.schema_mistakes import mistakes_by
from jobs.serve import check_serve_config
from jobs.serve_yaml import read_serve_yaml
from jobs.unread import every_setting, foreign_args
from jobs.yaml_text import document_in

KINDS = ("RayCluster", "RayJob", "RayService")
KNOWN_TO = "KubeRay 1.6 with Kubernetes 1.37"
_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
_MAX_REPLICAS = 2**31 - 1
"""What the operator's own definition gives a group that says none; the least is 0."""
_HEAD_VOLUMES = {"ray-logs", "shared-mem"}
"""What the operator adds to the pod of a head with an autoscaler."""


@functools.cache
def schema() -> dict[str, Any]:
    """The schema of all kinds, strict: a setting that it does not list is a mistake."""
    return json.loads(Path(__file__).with_name("kuberay_v1.schema.json").read_text("utf-8"))


def kuberay_mistakes(document: dict[str, Any], source: str) -> list[str]:
    """Everything wrong with a resource of one of `KINDS`; each sentence begins with `source`."""
    document = _kept(document)
    found = mistakes_by(_schema_of(document), document, KNOWN_TO)
    if not found:
        found = operator_mistakes(document)
    return [f"{source}: {each}" for each in found] + _embedded_mistakes(document, source)


def was_read(document: dict[str, Any]) -> str:
    """What of a right resource was looked at, and what was not."""
    document = _kept(document)
    spec = document["spec"]
    unread = ["networkPolicy"] if "networkPolicy" in cluster_spec(document) else []
    if "runtimeEnvYAML" in spec:
        unread.append("the values in runtimeEnvYAML")
    if "serveConfigV2" not in spec:
        return every_setting(unread)
    unread += foreign_args(read_serve_yaml("serveConfigV2", spec["serveConfigV2"]))
    return every_setting(unread, within="serveConfigV2")


def _schema_of(document: dict[str, Any]) -> dict[str, Any]:
    return {**schema(), "$ref": f"#/$defs/{document['kind']}"}


def _kept(document: dict[str, Any]) -> dict[str, Any]:
    """The document as the API server keeps it."""
    return without_nulls(_schema_of(document), document)


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec inside a RayCluster, RayJob or RayService; empty for other kinds."""
    spec = document.get("spec", {})
    inner = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
    return spec.get(inner, {}) if inner else spec


def operator_mistakes(document: dict[str, Any]) -> list[str]:
    """Breaches of the rules that the operator, or Kubernetes, checks beside the schema, which the
    document must fit."""
    job, spec = document["spec"], cluster_spec(document)
    found = []
    if document["kind"] == "RayService" and "serveConfigV2" not in job:
        found.append("`spec.serveConfigV2` is missing; add it")
    if document["kind"] == "RayJob":
        if not spec and not job.get("clusterSelector"):
            found.append("`spec.rayClusterSpec` is missing; add it, or a clusterSelector")
        if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
            found.append(
                "`spec.ttlSecondsAfterFinished` has no effect; set shutdownAfterJobFinishes too"
            )
        if template := job.get("submitterPodTemplate"):
            found += [f"submitterPodTemplate: {each}" for each in _pod_mistakes(template["spec"])]
    if not spec:
        return found
    if spec.get("authOptions", {}).get("mode") == "token" and not spec.get("rayVersion"):
        found.append("authOptions.mode=token needs a rayVersion; add it")
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    found += [f"groupName={name} stands at two groups; rename one" for name in twice]
    autoscaler, head = spec.get("autoscalerOptions", {}), spec["headGroupSpec"]
    is_v2 = autoscaler.get("version") == "v2"
    volumes = _HEAD_VOLUMES | _volumes(head["template"]["spec"])
    found += [f"autoscalerOptions: {each}" for each in _mount_mistakes([autoscaler], volumes)]
    for name, group in [("headGroupSpec", head), *zip(names, groups, strict=True)]:
        found += [f"{name}: {each}" for each in _group_mistakes(group, is_v2)]
    return found


def _group_mistakes(group: dict[str, Any], is_v2: bool) -> list[str]:
    found, pod = [], group["template"]["spec"]
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", _MAX_REPLICAS)
    if low > high:
        found.append(f"minReplicas={low} is above maxReplicas={high}; lower it")
    elif not low <= group.get("replicas", low) <= high:
        found.append(
            f"replicas={group['replicas']} is outside minReplicas={low}..maxReplicas={high}, so "
            "the operator takes another number; give one between them"
        )
    policy = pod.get("restartPolicy", "Never")
    if is_v2 and policy != "Never":
        found.append(f"restartPolicy={policy} goes not with autoscaler v2; write Never")
    start = set(group.get("rayStartParams", {}))
    if "labels" in start:
        found.append("rayStartParams.labels is refused; write labels into the group itself")
    if group.get("resources") and _RESOURCES & start:
        found.append("resources stand in the group and in rayStartParams; keep one of them")
    return found + _pod_mistakes(pod)


def _pod_mistakes(pod: dict[str, Any]) -> list[str]:
    containers = [*pod["containers"], *pod.get("initContainers", [])]
    return _mount_mistakes(containers, _volumes(pod))


def _volumes(pod: dict[str, Any]) -> set[str]:
    """Names of the volumes that a pod declares."""
    return {volume["name"] for volume in pod.get("volumes", [])}


def _mount_mistakes(containers: list[dict[str, Any]], volumes: set[str]) -> list[str]:
    """What the containers mount beside the volumes of their pod."""
    mounts = {mount["name"] for each in containers for mount in each.get("volumeMounts", [])}
    return [
        f"volumeMounts has {name}, which is no volume of the pod; "
        f"{cure(name, sorted(volumes)) if volumes else 'add it below volumes'}"
        for name in sorted(mounts - volumes)
    ]


def _embedded_mistakes(document: dict[str, Any], source: str) -> list[str]:
    """What is wrong in the Serve config of a RayService, or the runtime environment of a RayJob."""
    spec = document.get("spec")
    if not isinstance(spec, dict):
        return []
    serve, runtime = spec.get("serveConfigV2"), spec.get("runtimeEnvYAML")
    try:
        if document["kind"] == "RayService" and isinstance(serve, str):
            place = f"{source}: spec.serveConfigV2"
            check_serve_config(read_serve_yaml(place, serve), place)
        if document["kind"] == "RayJob" and isinstance(runtime, str):
            _check_runtime(runtime, f"{source}: spec.runtimeEnvYAML")
    except InputError as error:
        return [str(error)]
    return []


def _check_runtime(text: str, source: str) -> None:
    from ray.runtime_env import RuntimeEnv

    settings = document_in(text, source)
    if settings is None:  # no text, or comments alone: no settings
        return
    if not isinstance(settings, dict):
        raise InputError(f"{source}: holds no mapping of settings; write `name: value` lines")
    for key in settings:
        if key not in RuntimeEnv.known_fields:
            known = cure(str(key), sorted(RuntimeEnv.known_fields))
            raise InputError(f"{source}: no setting `{key}`; {known}")
