"""The classic launcher files pass Ray's own checks, ours for what Ray lets through, and the
security rules of every cluster: token mode, no literal token, no dashboard on all interfaces."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER_FILES = ("local.yaml", "aws.yaml")

# Keys of `provider` that Ray's node providers read; Ray's own schema leaves the mapping open.
PROVIDER_KEYS = {
    "local": {"type", "head_ip", "worker_ips", "coordinator_address", "external_head_ip"},
    "aws": {
        "type",
        "region",
        "availability_zone",
        "cache_stopped_nodes",
        "key_pair",
        "security_group",
        "use_internal_ips",
        "cloudwatch",
    },
}


def load(name: str) -> dict[str, Any]:
    """The parsed YAML of one file of `cluster/`."""
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def errors_in(config: dict[str, Any]) -> list[str]:
    """What Ray's prepare + validate and the strict provider check say; empty when all is well."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = []
    provider = config.get("provider", {})
    unknown = set(provider) - PROVIDER_KEYS.get(provider.get("type"), set())
    found += [f"provider.{key} is no setting of {provider.get('type')}" for key in sorted(unknown)]
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # Ray raises jsonschema errors and bare ValueErrors alike
        found.append(str(error).splitlines()[0])
    for name, node in config.get("available_node_types", {}).items():
        if node.get("min_workers", 0) > node.get("max_workers", config.get("max_workers", 0)):
            found.append(f"available_node_types.{name}: min_workers is above max_workers")
    return found


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_shipped_launcher_file_is_accepted(name):
    assert errors_in(load(name)) == []


def test_a_misspelt_key_is_found_at_every_level():
    for path in (("max_worker",), ("provider", "regoin"), ("available_node_types", "head", "cpus")):
        config = load("aws.yaml")
        target = config
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = 1
        assert any(path[-1] in error for error in errors_in(config)), path


def test_more_least_than_most_workers_is_refused():
    config = load("aws.yaml")
    config["available_node_types"]["gpu-spot"].update(min_workers=9)
    assert any("min_workers" in error for error in errors_in(config))


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
