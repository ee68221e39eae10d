"""The classic launcher files pass `cascade validate` (Ray's own checks and stricter ones), and the
security rules of every cluster: token mode, no literal token, no dashboard on all interfaces."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private import constants

from jobs.launcher_yaml import PROVIDER_KEYS, launcher_mistakes, was_read

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER_FILES = ("local.yaml", "aws.yaml")


def load(name: str) -> dict[str, Any]:
    """The parsed YAML of one file of `cluster/`."""
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_shipped_launcher_file_is_accepted(name):
    assert launcher_mistakes(load(name), name) == []


def after(path: tuple[str, ...], value: Any) -> list[str]:
    """What is wrong with the file for AWS after one setting was put at a path."""
    config = load("aws.yaml")
    target = config
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return launcher_mistakes(config, "f.yaml")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        (("max_worker",), "max_workers"),
        (("provider", "regoin"), "provider.region"),
        (("docker", "images"), "docker.image"),
        (("available_node_types", "head", "resource"), "available_node_types.head.resources"),
    ],
)
def test_a_misspelt_key_is_found_at_every_level(path, meant):
    told = f"f.yaml: no setting `{'.'.join(path)}`; did you mean `{meant}`?"
    assert after(path, 1) == [told]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("available_node_types", "gpu-spot", "min_workers"), 9, "min_workers=9 is above max_work"),
        (("max_workers",), -1, "`max_workers` is -1; it must be at least 0"),
        (("head_node_type",), "hed", "head_node_type=hed is none .* did you mean `head`"),
        (("provider",), {"type": "awz"}, "Ray refuses it .*awz"),
        (("provider",), {"region": "us"}, "`provider.type` is missing"),
        (("provider",), 1, "`provider` is 1; it must be a group of settings"),
        (("docker", "container_name"), "", "Ray refuses it .*container"),
        (("setup_commands",), "pip", '`setup_commands` is "pip"; it must be a list'),
    ],
)
def test_a_wrong_value_is_told_with_its_cure(path, value, words):
    assert re.search(words, after(path, value)[0])


ON_PREMISES = """
cluster_name: default
provider:
  type: local
  head_ip: head.example.com
  worker_ips: [worker-1.example.com, worker-2.example.com]
  use_internal_ips: true
  worker_liveness_check: true
auth: {ssh_user: ray}
min_workers: 1
max_workers: 2
upscaling_speed: 1.0
"""
MINIMAL_AWS = """
cluster_name: minimal
provider:
  type: aws
  region: us-west-2
  use_internal_ips: true
  use_external_head_ip: true
  aws_credentials: {aws_access_key_id: "${ID}", aws_secret_access_key: "${KEY}"}
  foreground_node_launch: true
  disable_launch_config_check: true
max_workers: 3
available_node_types:
  ray.head.default:
    node_config: {InstanceType: m5.large}
  ray.worker.default:
    min_workers: 3
    node_config: {InstanceType: m5.large, InstanceMarketOptions: {MarketType: spot}}
"""


def test_the_number_of_workers_on_premises_is_taken_that_rays_schema_does_not_list():
    """Ray moves it into the one node type, with a coordinator and without."""
    config = yaml.safe_load(ON_PREMISES)
    assert launcher_mistakes(config, "f.yaml") == []
    [told] = launcher_mistakes({**config, "min_workers": "one"}, "f.yaml")
    assert "Ray refuses it" in told
    config["provider"] = {"type": "local", "coordinator_address": "10.0.0.1:8000"}
    assert launcher_mistakes(config, "f.yaml") == []
    del config["max_workers"]
    assert "max_workers" in launcher_mistakes(config, "f.yaml")[0]
    [told] = launcher_mistakes({**load("aws.yaml"), "min_workers": 0}, "f.yaml")
    assert "no setting `min_workers`" in told


def test_aws_itself_is_asked_for_the_resources_of_node_types():
    """`ray up` fills them in before it looks at its schema; it does so for no other provider that
    has settings here."""
    config = yaml.safe_load(MINIMAL_AWS)
    assert launcher_mistakes(config, "f.yaml") == []
    assert "resources" not in config["available_node_types"]["ray.head.default"], "no change here"
    config["max_workers"] = 2
    [told] = launcher_mistakes(config, "f.yaml")
    assert "max_workers=2 is below the 3 min_workers" in told
    [told] = launcher_mistakes({**config, "available_node_types": {"head": None}}, "f.yaml")
    assert "`available_node_types.head` is null" in told
    config["provider"] = {"type": "azure"}
    assert (
        "`available_node_types.ray.head.default.resources` is missing; add it"
        in (launcher_mistakes(config, "f.yaml")[0])
    )


def test_a_head_that_is_not_named_is_rays_default_one():
    config = yaml.safe_load(MINIMAL_AWS)
    nodes = config["available_node_types"]
    nodes["head"] = nodes.pop("ray.head.default")
    [told] = launcher_mistakes(config, "f.yaml")
    assert "Ray refuses it (`head_node_type` must be one of" in told


@pytest.mark.parametrize("kind", sorted(PROVIDER_KEYS))
def test_the_settings_of_a_provider_are_exactly_those_that_rays_own_source_reads(kind):
    folder = Path(constants.__file__).parent
    common = [folder / f"{name}.py" for name in ("autoscaler", "commands", "updater")]
    read: set[str] = set()
    for file in [*common, *(folder / kind).rglob("*.py")]:
        read |= keys_read(file.read_text(encoding="utf-8"))
    # What Ray writes there itself: where it keeps a filled-in copy, and the machines of its
    # coordinator's own process.
    assert read - {"_config_cache_path", "list_of_node_ips"} == set(PROVIDER_KEYS[kind])


def keys_read(source: str) -> set[str]:
    """Keys that a module of Ray looks up in `provider` of a launcher's YAML."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        key: Any = None
        match node:
            case ast.Subscript(value=owner, slice=key):
                pass
            case ast.Call(func=ast.Attribute(value=owner, attr="get"), args=[key, *_]):
                pass
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[owner]):
                pass
            case _:
                continue
        if not is_provider(owner):
            continue
        match key:
            case ast.Constant(value=str(name)):
                found.add(name)
            case ast.Name(id=name) if hasattr(constants, name):
                found.add(getattr(constants, name))
    return found


def is_provider(node: ast.expr) -> bool:
    """Whether an expression of Ray's source is the mapping below `provider`."""
    match node:
        case ast.Name(id="provider_config" | "provider_cfg"):
            return True
        case ast.Attribute(attr="provider_config"):
            return True
        case ast.Subscript(slice=ast.Constant(value="provider")):
            return True
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value="provider"), *_]):
            return True
    return False


def test_what_is_not_read_of_a_file_is_said():
    assert was_read(load("local.yaml")) == "every setting"
    assert was_read(load("aws.yaml")) == "every setting, but not those in node_config"
    config = {**load("aws.yaml"), "provider": {"type": "gcp", "regoin": "a"}}
    assert launcher_mistakes(config, "f.yaml") == []
    assert was_read(config) == "every setting, but not those in provider and node_config"


def test_what_ray_fills_in_is_not_told(capfd):
    config = load("aws.yaml")
    del config["available_node_types"]["gpu-spot"]["max_workers"]
    assert launcher_mistakes(config, "f.yaml") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_command_that_starts_ray_sets_the_auth_mode(name):
    config = load(name)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    ray_commands = [command for command in commands if re.search(r"\bray \w", command)]
    assert any("ray start --head" in command for command in ray_commands)
    for command in ray_commands:
        assert command.startswith("export RAY_AUTH_MODE=token;"), command


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.glob("*.yaml")))
def test_no_file_holds_a_literal_token_or_opens_the_dashboard(name):
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert not re.search(r"dashboard-host[=: \"]+(0\.0\.0\.0|::)", text)
    assert not re.search(r"RAY_AUTH_TOKEN=[^$ ]", text)
    assert not re.search(r"name: RAY_AUTH_TOKEN\b[^\n]*\n?\s*value:", text)
    assert not re.search(r"\b[0-9a-fA-F]{32,}\b", text), "looks like a secret"


def test_the_dashboard_is_bound_to_loopback_by_name():
    for name in LAUNCHER_FILES:
        head = " ".join(load(name)["head_start_ray_commands"])
        assert "--dashboard-host=127.0.0.1" in head


def test_aws_mounts_the_token_on_every_node_and_labels_spot_workers():
    config = load("aws.yaml")
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    workers = config["available_node_types"]["gpu-spot"]
    assert workers["labels"]["ray.io/market-type"] == "spot"
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    head = config["available_node_types"][config["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"], "a lost head is a lost cluster"


def test_aws_gives_every_container_the_same_disk():
    config = load("aws.yaml")
    commands = " ".join(config["initialization_commands"])
    region = config["provider"]["region"]
    assert re.search(
        rf"mount -t nfs4 .* fs-\d+\.efs\.{region}\.amazonaws\.com:/ /mnt/cascade", commands
    )
    assert "--volume /mnt/cascade:/mnt/cascade" in config["docker"]["run_options"]
    assert not {"head_node", "worker_nodes"} & set(config), "a node type must not skip the mount"
