"""A YAML of Ray's cluster launcher (`ray up`) read strictly: by Ray's own schema and rules, and the
settings of `provider`, which that schema leaves open."""

import contextlib
import copy
import functools
import io
import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cascade_model.nearest import cure
from jobs.schema_mistakes import mistakes_by
from jobs.unread import every_setting

# What Ray 2.60 reads of `provider`, whatever its type, and what the node providers read.
_OF_ALL = (
    "type",
    "use_internal_ips",
    "use_external_head_ip",
    "disable_node_updaters",
    "disable_launch_config_check",
    "foreground_node_launch",
    "worker_liveness_check",
)
PROVIDER_KEYS = {
    "local": (*_OF_ALL, "head_ip", "worker_ips", "coordinator_address", "external_head_ip"),
    "aws": (
        *_OF_ALL,
        "region",
        "availability_zone",
        "aws_credentials",
        "cache_stopped_nodes",
        "key_pair",
        "security_group",
        "cloudwatch",
    ),
}


@functools.cache
def schema() -> dict[str, Any]:
    """Ray's own."""
    spec = find_spec("ray")
    [folder] = (spec and spec.submodule_search_locations) or []
    return json.loads(Path(folder, "autoscaler", "ray-schema.json").read_text("utf-8"))


def launcher_mistakes(document: dict[str, Any], source: str) -> list[str]:
    """Everything wrong with the document; each sentence begins with `source`."""
    provider = document.get("provider")
    provider = provider if isinstance(provider, dict) else {}
    if provider.get("type") == "aws":
        document = _with_resources(document)
    # Ray's schema is that of the prepared document, where this one has gone into a node type.
    is_moved = provider.get("type") == "local"
    raw = {k: v for k, v in document.items() if k != "min_workers"} if is_moved else document
    wrong = mistakes_by(schema(), raw)
    found = [*wrong, *_provider_mistakes(provider)]
    if not wrong:
        found = [*found, *_node_mistakes(document)] or _refusal(document)
    return [f"{source}: {each}" for each in found]


def was_read(document: dict[str, Any]) -> str:
    """What of a right document was looked at, and what was not."""
    is_open = document["provider"]["type"] not in PROVIDER_KEYS
    unread = ["provider"] if is_open else []
    if any(node.get("node_config") for node in document.get("available_node_types", {}).values()):
        unread.append("node_config")
    return every_setting([f"those in {' and '.join(unread)}"] if unread else [])


def _with_resources(document: dict[str, Any]) -> dict[str, Any]:
    """The document as Ray's provider for AWS hands it on to the schema: it asks AWS for the
    resources of a node type that has none."""
    nodes = document.get("available_node_types")
    if not isinstance(nodes, dict):
        return document
    filled = {
        name: {"resources": {}, **node} if isinstance(node, dict) else node
        for name, node in nodes.items()
    }
    return {**document, "available_node_types": filled}


def _provider_mistakes(provider: dict[str, Any]) -> list[str]:
    known = PROVIDER_KEYS.get(str(provider.get("type")), tuple(provider))
    return [
        f"no setting `provider.{key}`; {cure(str(key), known, 'provider.')}"
        for key in provider
        if key not in known
    ]


def _node_mistakes(document: dict[str, Any]) -> list[str]:
    """Wrong names and bounds of the node types."""
    nodes, head = document.get("available_node_types", {}), document.get("head_node_type")
    found = []
    if nodes and head is not None and head not in nodes:  # without one, Ray takes its default
        found.append(
            f"head_node_type={head} is none of available_node_types; {cure(str(head), nodes)}"
        )
    for name, node in nodes.items():
        low, high = node.get("min_workers", 0), node.get("max_workers")
        if high is not None and low > high:
            found.append(
                f"available_node_types.{name}: min_workers={low} is above max_workers={high}; "
                "lower it"
            )
    least, most = sum(n.get("min_workers", 0) for n in nodes.values()), document.get("max_workers")
    if most is not None and least > most:
        found.append(f"max_workers={most} is below the {least} min_workers of all types; raise it")
    return found


def _refusal(document: dict[str, Any]) -> list[str]:
    """Why Ray itself refuses the document, in its own words; it starts nothing to find out."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what it fills in is no news
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(copy.deepcopy(document)))
    except Exception as error:  # jsonschema's, bare ones, and those of its own printing
        words = (str(error) or said.getvalue() or type(error).__name__).strip()
        return [f"Ray refuses it ({words.splitlines()[0]}); mend that"]
    finally:
        logging.disable(level)
    return []
