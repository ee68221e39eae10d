"""`cascade validate`: every shipped file passes, every misspelt key of one is named."""

from pathlib import Path

import pytest
import yaml

from jobs import validate

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = [str(CLUSTER / name) for name in ("serve.yaml", "kuberay-service.yaml")]


def test_the_shipped_files_are_right(capsys):
    assert validate.main(FILES) == 0
    assert capsys.readouterr().out.count(": right, 1 application\n") == 2


def key_paths(value, path=()):
    if isinstance(value, dict):
        for key, child in value.items():
            yield (*path, key)
            yield from key_paths(child, (*path, key))
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from key_paths(child, (*path, place))


def misspelt(document, path):
    """A copy with one key misspelt."""
    copy = yaml.safe_load(yaml.safe_dump(document))
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1] + "_"] = inner.pop(path[-1])
    return copy


def test_every_misspelt_key_of_the_shipped_serve_yaml_is_refused(tmp_path):
    """Those of a policy's own settings too: the class does not take them."""
    document = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    file = tmp_path / "serve.yaml"
    paths = list(key_paths(document))
    assert len(paths) > 30
    for path in paths:
        file.write_text(yaml.safe_dump(misspelt(document, path)))
        assert validate.main([str(file)]) == 2, path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace("max_replicas", "max_replica"), "no setting `max_replica`"),
        (lambda t: t.replace("serveConfigV2: |", "serveConfigV3: |"), "serveConfigV2 is no text"),
        (lambda t: t.replace("http_options", "http_option"), "http_option"),
    ],
)
def test_the_config_inside_a_rayservice_is_read_too(tmp_path, capsys, change, words):
    file = tmp_path / "service.yaml"
    file.write_text(change(Path(FILES[1]).read_text()))
    assert validate.main([str(file)]) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_one_wrong_file_does_not_hide_another(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}: 1\n")
    assert validate.main([str(tmp_path / "a"), FILES[0], str(tmp_path / "b")]) == 2
    shown = capsys.readouterr()
    assert "right" in shown.out
    assert "no setting `a`" in shown.err
    assert "no setting `b`" in shown.err
    assert validate.main([]) == 2
