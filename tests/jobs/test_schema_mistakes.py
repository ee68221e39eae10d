"""One sentence for each breach of a schema: place, value, cure."""

import pytest

from jobs.schema_mistakes import mistakes_by

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["groups"],
    "properties": {
        "groups": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["replicas"],
                "properties": {
                    "replicas": {"type": "integer", "minimum": 0, "maximum": 9},
                    "mode": {"enum": ["token", "disabled"]},
                    "memory": {
                        "description": "a quantity",
                        "anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9]+Gi$"}],
                    },
                    "port": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "on": {"type": ["boolean", "null"]},
                    "name": {"type": "string", "pattern": "^[a-z]+$"},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            },
        },
        "kind": {"const": "Toy"},
    },
}


def group(**settings):
    return {"groups": [{"replicas": 1, **settings}]}


def test_the_version_of_the_settings_is_named_where_one_is_unknown():
    told = mistakes_by(SCHEMA, {"kind": "Toi", "groups": [{"replica": 1}]}, "Toy 1.6")
    assert "no setting `groups[0].replica` in Toy 1.6; did you mean `groups[0].replicas`?" in told
    assert '`kind` is "Toi"; it must be Toy' in told


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (group(), []),
        (group(labels={"any": "b"}, on=None, memory="4Gi", port="http"), []),
        ({}, ["`groups` is missing; add it"]),
        ({"groups": []}, ["`groups` is []; it must have 1 or more"]),
        ({"groups": 1}, ["`groups` is 1; it must be a list"]),
        ({"groups": [{}]}, ["`groups[0].replicas` is missing; add it"]),
        (
            {"groups": [{"replica": 1}]},
            ["no setting `groups[0].replica`; did you mean `groups[0].replicas`?"],
        ),
        (group(replicas="1"), ['`groups[0].replicas` is "1"; it must be a whole number']),
        (group(replicas=True), ["`groups[0].replicas` is true; it must be a whole number"]),
        (group(replicas=-1), ["`groups[0].replicas` is -1; it must be at least 0"]),
        (group(replicas=10), ["`groups[0].replicas` is 10; it must be at most 9"]),
        (group(mode="tokens"), ['`groups[0].mode` is "tokens"; it must be token or disabled']),
        (group(memory="4GiB"), ['`groups[0].memory` is "4GiB"; it must be a quantity']),
        (group(port=None), ["`groups[0].port` is null; it must be a whole number or text"]),
        (group(on="yes"), ['`groups[0].on` is "yes"; it must be true or false or null']),
        (group(name="A"), ['`groups[0].name` is "A"; it breaks the rule `pattern: "^[a-z]+$"`']),
        (group(labels={"a": 1}), ["`groups[0].labels.a` is 1; it must be text"]),
        ({**group(), "kind": "Tod"}, ['`kind` is "Tod"; it must be Toy']),
        ([], ["the document is []; it must be a group of settings"]),
        (
            group(labels={1: "a"}),
            ["`groups[0].labels.1` is a key that is no text; write it in quotes"],
        ),
        (
            {"groups": [{"replicas": -1, "zzz": 1}], "kin": "Toy", "qqq": 1},
            [
                "no setting `kin`; did you mean `kind`?",
                "no setting `groups[0].zzz`; known are replicas, mode, memory, port, on, name, "
                "labels",
                "no setting `qqq`; known are groups, kind",
                "`groups[0].replicas` is -1; it must be at least 0",
            ],
        ),
    ],
)  # fmt: skip
def test_each_breach_is_one_sentence(document, told):
    assert sorted(mistakes_by(SCHEMA, document)) == sorted(told)


def test_a_long_value_is_cut():
    [told] = mistakes_by(SCHEMA, group(replicas="x" * 1000))
    assert len(told) < 130
