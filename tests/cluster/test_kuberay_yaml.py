"""The KubeRay files against the CRD schemas made strict, the operator's own rules, and what is
embedded in them as text: the Serve configuration, the runtime environment, a job's settings."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cascade_model.errors import InputError

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ("kuberay-cluster.yaml", "kuberay-job.yaml", "kuberay-service.yaml")
SCHEMA = json.loads(Path(__file__).with_name("kuberay_v1.schema.json").read_text(encoding="utf-8"))


def load(name: str) -> list[dict[str, Any]]:
    """The documents of one file of `cluster/`."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def schema_errors(document: dict[str, Any]) -> list[str]:
    """Every breach of the strict schema of the document's kind, with its path."""
    schema = {**SCHEMA, "$ref": f"#/$defs/{document['kind']}"}
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The RayClusterSpec inside a RayCluster, RayJob or RayService; empty for other kinds."""
    spec = document.get("spec", {})
    inner = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
    return spec[inner] if inner else spec


def operator_errors(document: dict[str, Any]) -> list[str]:
    """Breaches of the rules that the operator checks and the schema cannot say."""
    spec = cluster_spec(document)
    if not spec:
        return []
    found = []
    is_v2 = spec.get("autoscalerOptions", {}).get("version") == "v2"
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) != len(names):
        found.append("two worker groups have the same groupName")
    for group in groups:
        name = group["groupName"]
        if group["minReplicas"] > group["maxReplicas"]:
            found.append(f"{name}: minReplicas is above maxReplicas")
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            found.append(f"{name}: replicas is outside minReplicas..maxReplicas")
        if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append(f"{name}: autoscaler v2 asks for restartPolicy Never")
    for group in [spec["headGroupSpec"], *groups]:
        start = group.get("rayStartParams", {})
        if "labels" in start or "resources" in start:
            found.append("labels and resources belong into the group, not into rayStartParams")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory"} & set(start):
            found.append("resources stand in the group and in rayStartParams")
        mounts, volumes = pod_volumes(group["template"]["spec"])
        if not mounts <= volumes:
            found.append(f"volumeMounts without a volume: {sorted(mounts - volumes)}")
    if spec.get("authOptions", {}).get("mode") == "token" and not spec.get("rayVersion"):
        found.append("authOptions need rayVersion")
    job = document["spec"]
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    return found


def pod_volumes(pod: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names of the volumes that a pod's containers mount, and of those it declares."""
    mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", [])}
    return mounts, {volume["name"] for volume in pod.get("volumes", [])}


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every container that runs Ray, the head's first."""
    spec = cluster_spec(document)
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    return [c for group in groups for c in group["template"]["spec"]["containers"]]


def ray_documents() -> list[dict[str, Any]]:
    """The Ray resources of all files."""
    return [d for name in FILES for d in load(name) if d["kind"].startswith("Ray")]


def test_the_schema_itself_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_is_accepted(name):
    for document in load(name):
        assert schema_errors(document) == []
        assert operator_errors(document) == []


def test_a_planted_typo_is_found_wherever_it_is_planted():
    """Renames every key of every document in turn: the strict schema must notice each one."""
    # Below these, names are the user's own and any key is right.
    free = {"rayStartParams", "labels", "nodeSelector", "requests", "limits", "data", "annotations"}
    planted = 0
    for document in ray_documents():
        for path in key_paths(document, free):
            broken = copy.deepcopy(document)
            target: Any = broken
            for step in path[:-1]:
                target = target[step]
            target[path[-1] + "x"] = target.pop(path[-1])
            if path == ("kind",):
                continue
            assert schema_errors(broken), f"{document['kind']}: {path} misspelt was accepted"
            planted += 1
    assert planted > 150


def key_paths(value: Any, free: set[str], path: tuple = ()) -> list[tuple]:
    """Paths to every mapping key that the schema names."""
    found = []
    if isinstance(value, dict):
        for key, child in value.items():
            found.append((*path, key))
            if key not in free:
                found += key_paths(child, free, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            found += key_paths(child, free, (*path, index))
    return found


def test_wrong_types_and_values_are_found():
    def broken(change) -> list[str]:
        document = load("kuberay-cluster.yaml")[0]
        change(document["spec"])
        return schema_errors(document)

    assert broken(lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="0"))
    assert broken(lambda spec: spec["workerGroupSpecs"][0].pop("maxReplicas"))
    assert broken(lambda spec: spec["authOptions"].update(mode="tokens"))
    assert broken(lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}))
    assert broken(lambda spec: spec["autoscalerOptions"].update(version=2))


def test_more_least_than_most_replicas_is_refused():
    document = load("kuberay-cluster.yaml")[0]
    document["spec"]["workerGroupSpecs"][0]["minReplicas"] = 99
    assert schema_errors(document) == [], "the schema alone does not see it"
    assert any("minReplicas is above" in error for error in operator_errors(document))


@pytest.mark.parametrize("document", ray_documents(), ids=lambda document: document["kind"])
def test_every_container_runs_in_token_mode(document):
    spec = cluster_spec(document)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == "2.60.0"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    autoscaler = spec.get("autoscalerOptions")
    for container in [*containers(document), *([autoscaler] if autoscaler else [])]:
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    if spec.get("enableInTreeAutoscaling"):
        assert spec["autoscalerOptions"]["version"] == "v2"


def test_a_spot_group_is_labelled_and_never_the_head():
    spec = load("kuberay-cluster.yaml")[0]["spec"]
    assert spec["headGroupSpec"]["labels"]["ray.io/market-type"] == "on-demand"
    spot = [g for g in spec["workerGroupSpecs"] if g["groupName"].endswith("spot")]
    assert spot
    assert all(group["labels"]["ray.io/market-type"] == "spot" for group in spot)


def test_the_image_has_the_ray_version_of_the_rule_book():
    import ray

    assert all(cluster_spec(d)["rayVersion"] == ray.__version__ for d in ray_documents())


def test_the_runtime_environment_is_one_that_ray_accepts():
    from ray.runtime_env import RuntimeEnv

    job = load("kuberay-job.yaml")[1]
    runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert set(RuntimeEnv(**runtime_env)) <= RuntimeEnv.known_fields
    assert runtime_env["env_vars"]["RAY_AUTH_MODE"] == "token"
    assert not [k for k in runtime_env["env_vars"] if "KEY" in k or k.endswith("TOKEN")]


def test_the_job_gets_the_gpus_it_asks_for():
    settings, job = load("kuberay-job.yaml")
    config = yaml.safe_load(settings["data"]["pretrain.yaml"])
    group = cluster_spec(job)["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    assert (
        config["num_workers"]
        == group["minReplicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert job["spec"]["entrypoint"].endswith("--config /etc/cascade/pretrain.yaml")


def test_the_jobs_settings_are_ones_that_pretrain_knows():
    from jobs.cli import build
    from jobs.pretrain import PretrainConfig

    settings = yaml.safe_load(load("kuberay-job.yaml")[0]["data"]["pretrain.yaml"])
    config = build(PretrainConfig, settings, "pretrain.yaml")
    assert config.use_gpu
    assert config.trainer.sequences_per_step % config.num_workers == 0
    with pytest.raises(InputError, match="num_workers"):
        build(PretrainConfig, {**settings, "num_worker": 1}, "pretrain.yaml")


def test_the_embedded_serve_config_passes_the_strict_check(tmp_path):
    from jobs.serve import validate_serve_config

    text = load("kuberay-service.yaml")[0]["spec"]["serveConfigV2"]
    file = tmp_path / "serve.yaml"
    file.write_text(text, encoding="utf-8")
    (application,) = validate_serve_config(file)["applications"]
    assert application["import_path"] == "jobs.serve:build_app"
    assert 1 <= application["args"]["min_replicas"] < application["args"]["max_replicas"]
    for good, bad in (("http_options", "http_option"), ("max_replicas", "max_replica")):
        file.write_text(text.replace(good, bad), encoding="utf-8")
        with pytest.raises(InputError, match=bad):
            validate_serve_config(file)


def test_the_machines_suffice_for_all_replicas_of_the_endpoint():
    spec = load("kuberay-service.yaml")[0]["spec"]
    args = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["args"]
    group = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    cores = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    replicas = group["maxReplicas"] * (cores // args["threads_per_replica"])
    assert replicas >= args["max_replicas"]


HAPROXY = {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"}


@pytest.mark.parametrize("name", ["kuberay-service.yaml", "kuberay-cluster.yaml"])
def test_haproxy_is_on_at_the_head_and_at_every_worker(name):
    [document] = [each for each in load(name) if each["kind"].startswith("Ray")]
    for container in containers(document):
        assert HAPROXY in container["env"], container["name"]


def test_haproxy_is_on_for_the_launchers_cluster_and_off_on_one_machine():
    from jobs.serve import SERVE_ENVIRONMENT

    launcher = yaml.safe_load((CLUSTER / "aws.yaml").read_text(encoding="utf-8"))
    assert "--env RAY_SERVE_ENABLE_HA_PROXY=1" in launcher["docker"]["run_options"]
    assert SERVE_ENVIRONMENT[HAPROXY["name"]] == "0"
    assert HAPROXY["name"] not in (CLUSTER / "local.yaml").read_text(encoding="utf-8")


def test_the_endpoints_keys_come_from_a_secret():
    for container in containers(load("kuberay-service.yaml")[0]):
        (keys,) = [e for e in container["env"] if e["name"] == "CASCADE_API_KEYS"]
        assert "value" not in keys
        assert keys["valueFrom"]["secretKeyRef"]["name"] == "cascade-api"
