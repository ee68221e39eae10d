"""No key twice in a YAML mapping: the parser would take the last one without a word."""

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from cascade_model.errors import InputError

_MERGE = "tag:yaml.org,2002:merge"


def require_single_keys(text: str, source: str) -> None:
    """Raise `InputError` naming the first key that stands twice in one mapping, and both lines; in
    any document of the text.

    `yaml.YAMLError` for a text that is no YAML.
    """
    for root in yaml.compose_all(text, Loader=yaml.SafeLoader):
        _look_into(root, source, "", set())


def _look_into(node: Node, source: str, prefix: str, seen: set[int]) -> None:
    """The node and those below it, each once: an anchor may be met again, inside itself too."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            _look_into(item, source, f"{prefix.removesuffix('.')}[{index}].", seen)
    if not isinstance(node, MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            continue  # a key that is no word is refused by whoever knows the settings
        name, line = key.value, key.start_mark.line + 1
        if name in lines and key.tag != _MERGE:
            raise InputError(
                f"{source}: `{prefix}{name}` stands at line {lines[name]} and again at line "
                f"{line}; keep one of them"
            )
        lines[name] = line
        _look_into(value, source, f"{prefix}{name}.", seen)
