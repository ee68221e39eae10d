"""The strict reading of Serve config YAMLs, on documents of anybody's application."""

import pytest

from cascade_model.errors import InputError
from jobs.serve_yaml import amounts_of, check_serve_document, read_serve_yaml


def document(**deployment) -> dict:
    application = {"name": "a", "import_path": "a:app"}
    return {"applications": [{**application, "deployments": [{"name": "d", **deployment}]}]}


def test_a_file_that_is_no_serve_yaml_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_serve_yaml(tmp_path / "none.yaml")
    for text, words in (("a: [", "not valid YAML at line"), ("- a", "no mapping")):
        (tmp_path / "serve.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            read_serve_yaml(tmp_path / "serve.yaml")
    (tmp_path / "serve.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_serve_yaml(tmp_path / "serve.yaml")


def test_a_right_document_passes():
    check_serve_document(document(num_replicas=2, user_config={"anything": {"goes": 1}}), "f")


@pytest.mark.parametrize(
    ("deployment", "words"),
    [
        ({"num_replica": 1}, r"f: no setting `applications\[0\].deployments\[0\].num_replica`; "),
        ({"num_replica": 1}, "did you mean `.*num_replicas`"),
        ({"zzz": 1}, "known are"),
        ({"autoscaling_config": {"max_replica": 1}}, "autoscaling_config.max_replicas"),
        ({"ray_actor_options": {"num_cpu": 1}}, "ray_actor_options.num_cpus"),
        ({"num_replicas": "many"}, "mend that line"),
        ({"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas=3"),
        (
            {"autoscaling_config": {"min_replicas": 1, "initial_replicas": 9, "max_replicas": 2}},
            "initial_replicas=9",
        ),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 0}}, "max_replicas=0"),
    ],
)
def test_a_mistake_is_named_with_its_place(deployment, words):
    with pytest.raises(InputError, match=words):
        check_serve_document(document(**deployment), "f")


@pytest.mark.parametrize(
    ("deployment", "cpus"),
    [
        ({}, (1, 1)),
        ({"num_replicas": 3}, (3, 3)),
        ({"num_replicas": 3, "ray_actor_options": {"num_cpus": 0.5}}, (1.5, 1.5)),
        ({"ray_actor_options": {"num_cpus": 0}}, (0, 0)),
        ({"autoscaling_config": {"max_replicas": 4}}, (1, 4)),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}, (0, 4)),
        ({"autoscaling_config": {"initial_replicas": 2, "max_replicas": 4}}, (2, 4)),
        ({"num_replicas": "auto"}, (1, 1)),
    ],
)
def test_cpus_are_counted_at_the_start_and_at_most(deployment, cpus):
    assert amounts_of(deployment, "num_cpus") == cpus
