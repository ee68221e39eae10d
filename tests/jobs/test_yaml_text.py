"""Every reader of YAML tells the same of a text that is none, after words of its own."""

import pytest

from cascade_model.errors import InputError
from jobs.yaml_text import document_in, documents_in, text_of


def test_documents_are_read_and_empty_ones_left_out():
    assert documents_in("a: 1\n---\n# nothing\n---\n[2]\n", "f") == [{"a": 1}, [2]]
    assert documents_in("", "f") == documents_in("# nothing", "f") == []
    assert document_in("a: 1", "f") == {"a": 1}
    assert document_in("# nothing", "f") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: [", "f: not valid YAML at line 2; mend it"),
        ("a: 2024-99-99", "f: not valid YAML; mend it"),
        ("a: \x00", "f: not valid YAML; mend it"),
        ("a: 1\na: 2", "f: `a` stands at line 1 and again at line 2; keep one of them"),
        ("a: 1\n---\nb: 1", "f: holds 2 documents; keep one of them"),
    ],
)
def test_a_broken_text_is_told_with_its_line(text, told):
    with pytest.raises(InputError) as caught:
        document_in(text, "f")
    assert str(caught.value) == told


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    for name, why in (("a.yaml", "not a text in UTF-8"), ("none", "No such file or directory")):
        with pytest.raises(InputError) as caught:
            text_of(tmp_path / name, "here")
        assert str(caught.value) == f"here: cannot be read ({why}); check the path"
