"""`cascade validate`: every shipped file passes and says what was read of it; every misspelt key of
one is named, in a line that begins with the file."""

from pathlib import Path

import pytest
import yaml

from jobs import validate
from jobs.kuberay_yaml import KNOWN_TO

CLUSTER = Path(__file__).parents[2] / "cluster"
SERVE, SERVICE = str(CLUSTER / "serve.yaml"), str(CLUSTER / "kuberay-service.yaml")

SHIPPED = {
    "aws.yaml": "right; YAML of Ray's launcher: every setting, but not those in node_config",
    "kuberay-cluster.yaml": "right; RayCluster cascade: every setting",
    "kuberay-job.yaml": "right; ConfigMap cascade-pretrain: not one of CASCADE's, not checked; "
    "RayJob cascade-pretrain: every setting, but not the values in runtimeEnvYAML",
    "kuberay-service.yaml": "right; RayService cascade: every setting, those in serveConfigV2 too",
    "local.yaml": "right; YAML of Ray's launcher: every setting",
    "serve.yaml": "right; Serve config of 1 application: every setting",
}


def test_each_shipped_file_is_right_in_one_line_that_says_what_was_read(capsys):
    assert set(SHIPPED) == {path.name for path in CLUSTER.glob("*.yaml")}
    assert validate.main([str(CLUSTER / name) for name in SHIPPED]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [f"{CLUSTER / name}: {told}" for name, told in SHIPPED.items()]
    assert shown.err == ""


def told_of(file: Path, text: str, capsys) -> list[str]:
    """The lines about a wrong file, without its name, which each must begin with."""
    file.write_text(text)
    assert validate.main([str(file)]) == 2
    shown = capsys.readouterr()
    assert "1 of 1 file wrong" in shown.err
    lines = shown.out.splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


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
    ("old", "new", "told"),
    [
        ("max_replicas: 16", "max_replica: 16", "spec.serveConfigV2: applications[0].args: no "
         "setting `max_replica`; did you mean `max_replicas`?"),
        ("http_options", "http_option", "spec.serveConfigV2: no setting `http_option`; did you "
         "mean `http_options`?"),
        ("streams_per_replica: 8", "streams_per_replica: -8", "spec.serveConfigV2: "
         "applications[0].args: streams_per_replica=-8 must be at least 1"),
        ("serveConfigV2: |", "serveConfigV3: |", "no setting `spec.serveConfigV3` in "
         f"{KNOWN_TO}; did you mean `spec.serveConfigV2`?"),
        ("minReplicas: 1", "minReplica: 1", "no setting "
         f"`spec.rayClusterConfig.workerGroupSpecs[0].minReplica` in {KNOWN_TO}; did you mean "
         "`spec.rayClusterConfig.workerGroupSpecs[0].minReplicas`?"),
        ("minReplicas: 1", "minReplicas: 9", "sampler: minReplicas=9 is above maxReplicas=8; "
         "lower it"),
        ("kind: RayService", "kind: RayServise", "no kind RayServise in ray.io/v1; did you mean "
         "`RayService`?"),
        ("apiVersion: ray.io/v1", "apiVersion: ray.io/v2", '`apiVersion` is "ray.io/v2"; it must '
         "be ray.io/v1"),
    ],
)  # fmt: skip
def test_a_rayservice_is_read_inside_and_outside_of_its_serve_config(
    tmp_path, capsys, old, new, told
):
    text = Path(SERVICE).read_text()
    assert old in text
    [line] = told_of(tmp_path / "f.yaml", text.replace(old, new), capsys)
    assert line.removeprefix("RayService cascade: ") == told


def test_every_misspelt_key_of_the_shipped_rayservice_is_refused(tmp_path, capsys):
    """Read from the file to the line, as a user does; names below these are the user's own."""
    document = yaml.safe_load(Path(SERVICE).read_text())
    free = {"rayStartParams", "labels", "requests", "limits"}
    paths = [path for path in key_paths(document) if not free & set(path[:-1])]
    assert len(paths) > 80
    for index, path in enumerate(paths):
        file = tmp_path / f"{index}.yaml"
        file.write_text(yaml.safe_dump(misspelt(document, path)))
    files = [str(tmp_path / f"{index}.yaml") for index in range(len(paths))]
    assert validate.main(files) == 2
    told = capsys.readouterr().out.splitlines()
    for file, path in zip(files, paths, strict=True):
        assert any(line.startswith(f"{file}: ") and str(path[-1]) in line for line in told), path


@pytest.mark.parametrize("name", [SERVE, SERVICE])
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path, capsys, name):
    """Serve would take the last one in silence."""
    text = Path(name).read_text()
    line = next(each for each in text.splitlines() if "import_path:" in each)
    twice = text.replace(line, f"{line}\n{line.replace('- ', '  ')}")
    [told] = told_of(tmp_path / "twice.yaml", twice, capsys)
    assert "applications[0].import_path` stands at line" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1", "no setting `a` in a Serve config"),
        ("- 1", "holds no mapping"),
        ("", "holds no document"),
        ("a: [", "not valid YAML at line 1"),
        ("apiVersion: v1", "`kind` is missing; add it"),
        ("{}", "holds no mapping"),
        ("apiVersion: v1\nkind: Secret\n---\na: 1", "document 2: no setting `a`"),
        (f"{Path(SERVE).read_text()}---\n- 1", "document 2: holds no mapping"),
    ],
)
def test_what_is_none_of_these_is_told(tmp_path, capsys, text, told):
    [line] = told_of(tmp_path / "f.yaml", text, capsys)
    assert line.startswith(told)


def test_a_kind_that_is_not_ours_is_neither_right_nor_wrong(tmp_path, capsys):
    file = tmp_path / "f.yaml"
    claim = (
        "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: shared}\nspec: {sizze: 1}"
    )
    file.write_text(f"---\n{claim}\n---\napiVersion: ray.io/v1\nkind: RayCronJob\n---\n")
    assert validate.main([str(file)]) == 0
    unread = "not one of CASCADE's, not checked"
    assert capsys.readouterr().out == (
        f"{file}: not checked; PersistentVolumeClaim shared: {unread}; RayCronJob: {unread}\n"
    )


def test_the_settings_of_an_application_that_is_not_ours_are_not_called_right(tmp_path, capsys):
    file = tmp_path / "f.yaml"
    foreign = {"name": "x", "import_path": "other:app", "route_prefix": "/x", "args": {"any": 1}}
    file.write_text(yaml.safe_dump({"applications": [foreign]}))
    assert validate.main([str(file)]) == 0
    told = "Serve config of 1 application: every setting, but not the args of other:app"
    assert capsys.readouterr().out == f"{file}: right; {told}\n"


SERVED_BY_OTHERS = """
apiVersion: ray.io/v1
kind: RayService
metadata: {name: models}
spec:
  serveConfigV2: |
    applications:
    - name: models
      import_path: ray.serve.llm:build_openai_app
      route_prefix: /
      args:
        llm_configs: [{model_loading_config: {model_id: small}}]
  rayClusterConfig:
    headGroupSpec:
      template:
        spec:
          containers: [{name: ray-head, image: "rayproject/ray:2.60.0"}]
"""


def test_the_args_of_others_are_unread_in_a_rayservice_too(tmp_path, capsys):
    file = tmp_path / "f.yaml"
    file.write_text(SERVED_BY_OTHERS)
    assert validate.main([str(file)]) == 0
    assert capsys.readouterr().out == (
        f"{file}: right; RayService models: every setting, those in serveConfigV2 too, but not the "
        "args of ray.serve.llm:build_openai_app\n"
    )


def listed(*documents, kind="List") -> str:
    """What `kubectl get -o yaml` writes of several."""
    return yaml.safe_dump({"apiVersion": "v1", "kind": kind, "items": list(documents)})


def test_each_item_of_a_list_is_read(tmp_path, capsys):
    file = tmp_path / "f.yaml"
    service = yaml.safe_load(SERVED_BY_OTHERS)
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "shared"}}
    for kind in ("List", "RayServiceList"):
        file.write_text(listed(claim, service, kind=kind))
        assert validate.main([str(file)]) == 0
        told = capsys.readouterr().out
        assert "PersistentVolumeClaim shared: not one of CASCADE's" in told
        assert "RayService models: every setting" in told
    service["spec"]["serveConfig"] = service["spec"].pop("serveConfigV2")
    told = told_of(file, listed(claim, service), capsys)
    assert told[0].startswith("List: items[1]: RayService models: no setting `spec.serveConfig` in")
    [told] = told_of(file, f"{listed(claim)}---\n{listed(claim, 5)}", capsys)
    assert told.startswith("document 2: List: items[1]: holds no mapping")
    [told] = told_of(file, listed({"applications": []}), capsys)
    assert told == "List: items[0]: `kind` is missing; add it"
    [told] = told_of(file, "kind: List\nitems: 5", capsys)
    assert told.startswith("List: `items` is no list")
    file.write_text(listed())
    assert validate.main([str(file)]) == 0
    assert "not checked; List without items" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["applications", "deployments"])
@pytest.mark.parametrize("within", [False, True])
def test_what_is_no_list_in_a_serve_config_is_told(tmp_path, capsys, place, within):
    broken = {"applications": 5}
    if place == "deployments":
        broken = {"applications": [{"import_path": "a:b", "deployments": 5}]}
    text = yaml.safe_dump(broken)
    if within:
        service = yaml.safe_load(SERVED_BY_OTHERS)
        service["spec"]["serveConfigV2"] = text
        text = yaml.safe_dump(service)
    [told] = told_of(tmp_path / "f.yaml", text, capsys)
    assert f"{place}` must be a list of mappings" in told
    assert told.startswith("RayService models: spec.serveConfigV2: " if within else "`app")


def test_one_wrong_file_does_not_hide_another_and_each_has_lines_of_its_own(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}: 1\n")
    files = [str(tmp_path / "a"), SERVE, str(tmp_path / "b"), str(tmp_path / "none")]
    assert validate.main(files) == 2
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 4
    for file, line, told in zip(
        files, lines, ("no setting `a`", "right", "no setting `b`", "cannot be read"), strict=True
    ):
        assert line.startswith(f"{file}: {told}")
    assert "3 of 4 files wrong" in shown.err
    assert validate.main([]) == 2
