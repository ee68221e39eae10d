"""What Python's own reader lets pass, or fails on in ways of its own, is a 400 with a reason."""

import json

import pytest

from jobs.openai_protocol import ApiError
from jobs.strict_json import read_json


@pytest.mark.parametrize(
    "value",
    [{}, [], None, "ünï\n", 1e300, -0.5, 2**63, {"a": [{"b": {"a": 1}}]}, "\N{GRINNING FACE}"],
    ids=str,
)
@pytest.mark.parametrize("ascii", [True, False])
def test_json_is_read_as_it_is(value, ascii):
    assert read_json(json.dumps(value, ensure_ascii=ascii).encode()) == value


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value at character 0"),
        (b"{bad", "double quotes at character 1"),
        (b"{} {}", "Extra data"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b'{"a": 1, "b": 2, "a": 1}', 'name "a" stands twice'),
        (b'{"x": {"a": 1, "a": 2}}', 'name "a" stands twice'),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"1" * 5000, "number is too long"),
    ],
)
def test_anything_else_is_refused_with_its_reason(body, words):
    with pytest.raises(ApiError, match=words) as refused:
        read_json(body)
    assert refused.value.status == 400
    assert refused.value.body["error"]["code"] == "invalid_json"
