"""The KubeRay files as `cascade validate` reads them (strict schema, the operator's own rules, what
is embedded as text), and what all of them have in common."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cascade_model.errors import InputError
from jobs.kuberay_yaml import (
    cluster_spec,
    kuberay_mistakes,
    operator_mistakes,
    schema,
)
from jobs.schema_mistakes import mistakes_by

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = ("kuberay-cluster.yaml", "kuberay-job.yaml", "kuberay-service.yaml")


def load(name: str) -> list[dict[str, Any]]:
    """The documents of one file of `cluster/`."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def schema_errors(document: dict[str, Any]) -> list[str]:
    """Every breach of the strict schema of the document's kind."""
    return mistakes_by({**schema(), "$ref": f"#/$defs/{document['kind']}"}, document)


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every container that runs Ray, the head's first."""
    spec = cluster_spec(document)
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    return [c for group in groups for c in group["template"]["spec"]["containers"]]


def ray_documents() -> list[dict[str, Any]]:
    """The Ray resources of all files."""
    return [d for name in FILES for d in load(name) if d["kind"].startswith("Ray")]


def test_the_schema_itself_is_valid():
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_is_accepted(name):
    documents = [each for each in load(name) if each["kind"].startswith("Ray")]
    assert [kuberay_mistakes(each, name) for each in documents] == [[]]


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
            found = schema_errors(broken)
            assert any(path[-1] in each for each in found), f"{document['kind']}: {path}: {found}"
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
    assert broken(lambda spec: spec["authOptions"].update(mode="tokens"))
    assert broken(lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}))
    assert broken(lambda spec: spec["autoscalerOptions"].update(version=2))


@pytest.mark.parametrize("text", ["", "# pip: [a]\n", "{}", "env_vars:\n"])
def test_a_runtime_environment_without_settings_is_accepted(text):
    document = changed(FILES[1], lambda spec: spec.update(runtimeEnvYAML=text))
    assert kuberay_mistakes(document, "f.yaml") == []


def changed(name: str, change) -> dict[str, Any]:
    """The Ray resource of a shipped file after a change."""
    [document] = [copy.deepcopy(each) for each in load(name) if each["kind"].startswith("Ray")]
    change(document["spec"])
    return document


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (FILES[0], lambda s: s["workerGroupSpecs"][0].update(minReplicas=99),
         "cpu: minReplicas=99 is above maxReplicas=16"),
        (FILES[0], lambda s: s["workerGroupSpecs"][0].update(replicas=17),
         "cpu: replicas=17 is outside minReplicas=0..maxReplicas=16"),
        (FILES[0], lambda s: s["workerGroupSpecs"][0].update(groupName="gpu-spot"),
         "groupName=gpu-spot stands at two groups"),
        (FILES[0], lambda s: s.pop("rayVersion"), "authOptions.mode=token needs a rayVersion"),
        (FILES[0], lambda s: s["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"),
         "headGroupSpec: restartPolicy=Always goes not with autoscaler v2"),
        (FILES[0], lambda s: s["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
         "headGroupSpec: rayStartParams.labels is refused"),
        (FILES[0], lambda s: s["headGroupSpec"].update(resources={"CPU": "1"}),
         "headGroupSpec: resources stand in the group and in rayStartParams"),
        (FILES[0], lambda s: s["headGroupSpec"]["template"]["spec"].update(volumes=[]),
         "headGroupSpec: volumeMounts has shared, which is no volume"),
        (FILES[1], lambda s: s.pop("shutdownAfterJobFinishes"),
         "`spec.ttlSecondsAfterFinished` has no effect"),
        (FILES[1], lambda s: s.pop("rayClusterSpec"), "`spec.rayClusterSpec` is missing"),
        (FILES[2], lambda s: s.pop("serveConfigV2"), "`spec.serveConfigV2` is missing"),
    ],
)  # fmt: skip
def test_what_the_operator_refuses_and_the_schema_cannot_say_is_found(name, change, words):
    document = changed(name, change)
    assert schema_errors(document) == [], "the schema alone does not see it"
    found = operator_mistakes(document)
    assert len(found) == 1
    assert found[0].startswith(words)
    assert kuberay_mistakes(document, "f.yaml") == [f"f.yaml: {found[0]}"]


def test_what_a_pod_may_have_is_known_beyond_the_shipped_files():
    """The schema once was a trimmed one, which refused these."""
    rare = {
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["a"]}],
        "priority": 5,
        "overhead": {"cpu": "250m"},
        "schedulingGates": [{"name": "g"}],
        "dnsConfig": {"nameservers": ["1.1.1.1"]},
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}
        ]}},
    }  # fmt: skip

    def add(spec: dict[str, Any]) -> None:
        pod = spec["headGroupSpec"]["template"]["spec"]
        pod.update(rare)
        pod["volumes"].append({"name": "c", "csi": {"driver": "d", "readOnly": True}})
        pod["volumes"].append({"name": "p", "projected": {"sources": [{"secret": {"name": "s"}}]}})

    document = changed(FILES[0], add)
    assert kuberay_mistakes(document, "f.yaml") == []
    gate = document["spec"]["headGroupSpec"]["template"]["spec"]["schedulingGates"][0]
    gate["nam"] = gate.pop("name")
    [told] = kuberay_mistakes(document, "f.yaml")
    assert told.endswith("did you mean `spec.headGroupSpec.template.spec.schedulingGates[0].name`?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env_var: {}", "no setting `env_var`; did you mean `env_vars`?"),
        ("- 1", "holds no mapping"),
        ("a: [", "not valid YAML at line 1"),
        ("pip: [a]\npip: [b]", "`pip` stands at line 1 and again at line 2"),
    ],
)
def test_the_runtime_environment_of_a_job_is_read(text, words):
    document = changed(FILES[1], lambda spec: spec.update(runtimeEnvYAML=text))
    [told] = kuberay_mistakes(document, "f.yaml")
    assert told.startswith("f.yaml: spec.runtimeEnvYAML")
    assert words in told


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
