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
    for text, words in (
        ("a: [", "not valid YAML at line"),
        ("a: 2024-99-99", "not valid YAML"),
        ("- a", "no mapping"),
        ("a: 1\n---\na: 1", "holds 2 documents"),
    ):
        (tmp_path / "serve.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            read_serve_yaml(tmp_path / "serve.yaml")
    (tmp_path / "serve.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_serve_yaml(tmp_path / "serve.yaml")


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"applications": 5}, "applications"),
        ({"applications": None}, "applications"),
        ({"applications": [5]}, "applications"),
        ({"applications": {"name": "a"}}, "applications"),
        (
            {"applications": [{"import_path": "a:b", "deployments": 5}]},
            r"applications\[0\].deployments",
        ),
        (
            {"applications": [{"import_path": "a:b", "deployments": ["d"]}]},
            r"applications\[0\].deployments",
        ),
    ],
)
def test_what_must_be_a_list_of_mappings_is_told(wrong, place):
    with pytest.raises(InputError, match=f"f: `{place}` must be a list of mappings"):
        check_serve_document(wrong, "f")


@pytest.mark.parametrize("options", ["http_options", "grpc_options"])
def test_a_port_is_one_that_a_machine_can_have(options):
    for port in (0, 8000, 65535):
        check_serve_document({**document(), options: {"port": port}}, "f")
    for port in (-1, 65536, 99999):
        with pytest.raises(InputError, match=f"f: `{options}.port` is {port}; give one in 0..655"):
            check_serve_document({**document(), options: {"port": port}}, "f")


def test_a_right_document_passes():
    check_serve_document(document(num_replicas=2, user_config={"anything": {"goes": 1}}), "f")
    policy = {"policy_function": "on.another.machine:policy", "policy_kwargs": {"share": 0.5}}
    scaling = {"min_replicas": 0, "max_replicas": 4, "target_ongoing_requests": 3, "policy": policy}
    check_serve_document(document(autoscaling_config=scaling), "f")
    check_serve_document(document(autoscaling_config=None, num_replicas="auto"), "f")


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
        ({"autoscaling_config": {"max_replicas": "x"}}, "autoscaling_config.max_replicas`: Input"),
        ({"autoscaling_config": {"policy": 5}}, "autoscaling_config.policy`: Input"),
        ({"autoscaling_config": {"policy": {"policy_kwargs": 5}}}, "policy.policy_kwargs`: Input"),
        ({"autoscaling_config": 5}, "autoscaling_config.*mend that line"),
        ({"ray_actor_options": {"runtime_env": {"working_dir": 5}}}, "f: .*must be a string.*mend"),
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
