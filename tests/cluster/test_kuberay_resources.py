"""KubeRay resources as their users write them: what the API server and the operator accept is
accepted, defaults and nulls too, and what they refuse is told with its place."""

import copy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.kuberay_yaml import KNOWN_TO, kuberay_mistakes, was_read

CLUSTER = Path(__file__).parents[2] / "cluster"
ACCEPTED = {
    "a group without bounds, which the operator's own definition gives": """
        workerGroupSpecs:
        - groupName: workers
          replicas: 3
          template: {spec: {containers: [{name: ray-worker, image: a}]}}
        """,
    "a group with one bound": """
        workerGroupSpecs:
        - groupName: workers
          minReplicas: 2
          template: {spec: {containers: [{name: ray-worker, image: a}]}}
        """,
    "settings whose lines are all commented out": """
        workerGroupSpecs:
        autoscalerOptions:
        headServiceAnnotations:
        rayVersion:
        """,
    "settings of a group whose lines are all commented out": """
        workerGroupSpecs:
        - groupName: workers
          minReplicas:
          maxReplicas:
          labels:
          rayStartParams:
            # num-cpus: "2"
          template:
            metadata: {annotations: , creationTimestamp: null}
            spec:
              containers:
              - {name: ray-worker, image: a, args: , env: , volumeMounts: , resources: {limits: }}
              nodeSelector:
              tolerations:
              volumes:
        """,
    "an autoscaler that mounts a volume of the operator's": """
        enableInTreeAutoscaling: true
        autoscalerOptions: {volumeMounts: [{name: ray-logs, mountPath: /logs}]}
        """,
}
HEAD = """
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: small, annotations: , labels: }
spec:
  headGroupSpec:
    template: {spec: {containers: [{name: ray-head, image: a}]}}
"""


def cluster_of(text: str) -> dict[str, Any]:
    """A small RayCluster with the settings of a text beside its head."""
    document = yaml.safe_load(HEAD)
    document["spec"] |= yaml.safe_load(textwrap.dedent(text))
    return document


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=list(ACCEPTED))
def test_what_the_operator_accepts_is_accepted(text):
    document = cluster_of(text)
    before = copy.deepcopy(document)
    assert kuberay_mistakes(document, "f.yaml") == []
    assert was_read(document) == "every setting"
    assert document == before


def test_bounds_are_compared_with_those_that_the_operator_gives():
    group = {"groupName": "workers", "template": {"spec": {"containers": [{"name": "a"}]}}}
    for wrong, told in (
        ({"replicas": 3, "maxReplicas": 2}, "replicas=3 is outside minReplicas=0..maxReplicas=2"),
        (
            {"replicas": 3, "minReplicas": 4},
            "replicas=3 is outside minReplicas=4..maxReplicas=2147",
        ),
    ):
        document = cluster_of(yaml.safe_dump({"workerGroupSpecs": [{**group, **wrong}]}))
        [found] = kuberay_mistakes(document, "f.yaml")
        assert found.startswith(f"f.yaml: workers: {told}")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (("metadata",), "`metadata` is missing; add it"),
        (("spec",), "`spec` is missing; add it"),
        (("spec", "headGroupSpec"), "`spec.headGroupSpec` is missing; add it"),
        (("spec", "headGroupSpec", "template"), "`spec.headGroupSpec.template` is missing; add it"),
        (
            ("spec", "headGroupSpec", "template", "spec"),
            "`spec.headGroupSpec.template.spec` is missing; add it",
        ),
        (("spec", "rayVersio"), "no setting `spec.rayVersio` in KubeRay 1"),
    ],
)
def test_a_null_is_no_value_of_a_required_setting_and_hides_no_misspelt_one(path, told):
    document = yaml.safe_load(HEAD)
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = None
    [found] = kuberay_mistakes(document, "f.yaml")
    assert found.startswith(f"f.yaml: {told}")


def test_a_null_in_a_list_stays_wrong():
    document = cluster_of("autoscalerOptions: {args: [null]}")
    [found] = kuberay_mistakes(document, "f.yaml")
    assert "`spec.autoscalerOptions.args[0]` is null; it must be text" in found


MOUNT = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}


def test_mounts_of_every_pod_are_compared_with_its_volumes():
    no_volume = "volumeMounts has data, which is no volume of the pod; "
    document = cluster_of(yaml.safe_dump({"autoscalerOptions": MOUNT}))
    [found] = kuberay_mistakes(document, "f.yaml")
    assert found.startswith(f"f.yaml: autoscalerOptions: {no_volume}")
    head = document["spec"]["headGroupSpec"]["template"]["spec"]
    head["volumes"] = [{"name": "data", "emptyDir": {}}]
    assert kuberay_mistakes(document, "f.yaml") == [], "the autoscaler stands in the head's pod"
    del head["volumes"], document["spec"]["autoscalerOptions"]
    head["containers"][0] |= MOUNT
    [found] = kuberay_mistakes(document, "f.yaml")
    assert found == f"f.yaml: headGroupSpec: {no_volume}add it below volumes"


JOB = """
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: small}
spec:
  entrypoint: python train.py
  submitterPodTemplate:
    spec:
      restartPolicy: Never
      containers: [{name: submitter, image: a, volumeMounts: [{name: data, mountPath: /data}]}]
"""


@pytest.mark.parametrize(
    "cluster",
    [
        {"clusterSelector": {"ray.io/cluster": "standing"}},
        {"rayClusterSpec": yaml.safe_load(HEAD)["spec"]},
    ],
    ids=["of a standing cluster", "with a cluster"],
)
def test_the_mounts_of_a_jobs_submitter_are_compared_with_its_volumes(cluster):
    job = yaml.safe_load(JOB)
    job["spec"] |= cluster
    [found] = kuberay_mistakes(job, "f.yaml")
    assert found == (
        "f.yaml: submitterPodTemplate: volumeMounts has data, which is no volume of the pod; add "
        "it below volumes"
    )
    submitter = job["spec"]["submitterPodTemplate"]["spec"]
    submitter["volumes"] = [{"name": "dat", "emptyDir": {}}]
    assert kuberay_mistakes(job, "f.yaml")[0].endswith("did you mean `dat`?")
    submitter["volumes"] = [{"name": "data", "emptyDir": {}}]
    assert kuberay_mistakes(job, "f.yaml") == []


def test_the_versions_in_the_sentences_are_those_that_the_readme_tells():
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    assert all(version in readme for version in KNOWN_TO.split(" with "))
