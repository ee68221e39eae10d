"""A resource as the API server keeps it: without those of its settings that are null."""

from typing import Any


def without_nulls(schema: dict[str, Any], document: Any) -> Any:
    """A copy without the settings that are null, such as an `env:` whose lines are all commented
    out; one that the schema does not know stays.

    The schema is one whose `$ref`s point into its own `$defs` and that has no setting that may be
    null (https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/
    custom-resource-definitions, "Defaulting and Nullable").
    """
    return _kept(document, schema, schema["$defs"])


def _kept(value: Any, rule: Any, definitions: dict[str, Any]) -> Any:
    if not isinstance(rule, dict):  # `true` or `false`, or no rule: nothing is known of it
        return value
    if "$ref" in rule:
        return _kept(value, definitions[rule["$ref"].removeprefix("#/$defs/")], definitions)
    if isinstance(value, list):
        return [_kept(each, rule.get("items"), definitions) for each in value]
    if not isinstance(value, dict):
        return value
    known, other = rule.get("properties", {}), rule.get("additionalProperties")
    rules = {key: known.get(key, other) for key in value}
    return {
        key: _kept(inner, rules[key], definitions)
        for key, inner in value.items()
        if inner is not None or not isinstance(rules[key], dict)
    }
