"""validate: YAMLs that say where things run, read strictly, before anything is started with them.

Serve, KubeRay and parts of Ray's launcher accept a misspelt key in silence. This names every file
with what was read of it, or with each mistake and its place, and checks the settings of our own
applications as `cascade serve` does.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cascade_model.errors import InputError
from cascade_model.nearest import cure
from cascade_model.settings import check
from jobs import kuberay_yaml, launcher_yaml
from jobs.cli import command
from jobs.serve import check_serve_config
from jobs.unread import every_setting, foreign_args
from jobs.yaml_text import documents_in, text_of

_UNREAD = "not one of CASCADE's, not checked"


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Serve configs, RayClusters, RayJobs and RayServices of KubeRay, YAMLs of Ray's launcher."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The files; each may hold several documents."""

    def __post_init__(self) -> None:
        check(bool(self.files), "files: give at least one, such as cluster/serve.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One document, or a file that cannot be read."""

    name: str = ""
    """Its kind, and its own name if it has one."""
    read: str = ""
    """What was looked at; none: nothing."""
    mistakes: tuple[str, ...] = ()
    """A sentence each, which begins with the file."""


def run(config: ValidateConfig) -> dict[str, list[Judged]]:
    """Check every file and tell of each; refuse at the end if one is wrong."""
    found = {file: judged_file(file) for file in config.files}
    for file, documents in found.items():
        print("\n".join(lines_of(file, documents)), flush=True)
    wrong = [file for file, documents in found.items() if any(each.mistakes for each in documents)]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(found)} file{'' if len(found) == 1 else 's'} wrong; "
            "mend what the lines above name"
        )
    return found


def lines_of(file: str, documents: list[Judged]) -> list[str]:
    """One line for a file that is right, one for each mistake of any other."""
    mistakes = [mistake for each in documents for mistake in each.mistakes]
    if mistakes:
        return mistakes
    told = "; ".join(f"{each.name}: {each.read or _UNREAD}" for each in documents)
    return [f"{file}: {'right' if any(each.read for each in documents) else 'not checked'}; {told}"]


def judged_file(file: str) -> list[Judged]:
    """Every document of the file."""
    try:
        documents = documents_of(file)
    except InputError as error:
        return [Judged(mistakes=(str(error),))]
    if len(documents) == 1:
        return _parts(documents[0], file)
    numbered = enumerate(documents, 1)
    return [part for n, each in numbered for part in _parts(each, f"{file}: document {n}")]


def documents_of(file: str) -> list[Any]:
    """The documents of a YAML file, empty ones left out; `InputError` for a file that is none."""
    documents = documents_in(text_of(file, file), file)
    check(bool(documents), f"{file}: holds no document; check the path")
    return documents


def _parts(document: Any, source: str) -> list[Judged]:
    """The document, or each item of one that is a List of Kubernetes."""
    kind = document.get("kind") if isinstance(document, dict) else None
    if not (isinstance(kind, str) and kind.endswith("List") and "items" in document):
        return [judged(document, source)]
    items = document["items"]
    if not isinstance(items, list):
        return [Judged(mistakes=(f"{source}: {kind}: `items` is no list; write `- kind:` lines",))]
    return [
        part
        for index, item in enumerate(items)
        for part in _item(item, f"{source}: {kind}: items[{index}]")
    ] or [Judged(name=f"{kind} without items")]


def _item(item: Any, source: str) -> list[Judged]:
    if isinstance(item, dict) and "kind" not in item:
        return [_kubernetes(item, source)]
    return _parts(item, source)


def judged(document: Any, source: str) -> Judged:
    """One document by what it is; `source` begins every sentence."""
    if not isinstance(document, dict) or not document:
        return Judged(mistakes=(f"{source}: holds no mapping; write `name: value` lines",))
    if {"apiVersion", "kind"} & document.keys():
        return _kubernetes(document, source)
    known = {"launcher": launcher_yaml.schema()["properties"], "serve": _serve_keys()}
    shared = {name: len(document.keys() & keys) for name, keys in known.items()}
    if not any(shared.values()):
        return Judged(
            mistakes=(
                f"{source}: no setting `{next(iter(document))}` in a Serve config, a KubeRay "
                "resource or a YAML of Ray's launcher; check the path (`cascade STAGE --config` "
                "reads a stage's own)",
            )
        )
    if shared["launcher"] > shared["serve"]:
        mistakes = launcher_yaml.launcher_mistakes(document, source)
        name = "YAML of Ray's launcher"
        read = "" if mistakes else launcher_yaml.was_read(document)
        return Judged(name=name, read=read, mistakes=tuple(mistakes))
    return _serve(document, source)


def _kubernetes(document: dict[str, Any], source: str) -> Judged:
    kind, version = document.get("kind"), document.get("apiVersion")
    metadata = document.get("metadata")
    own = metadata.get("name", "") if isinstance(metadata, dict) else ""
    name = f"{kind} {own}".rstrip()
    if kind in kuberay_yaml.KINDS:
        source = f"{source}: {name}"
        mistakes = kuberay_yaml.kuberay_mistakes(document, source)
        read = "" if mistakes else kuberay_yaml.was_read(document)
        return Judged(name=name, read=read, mistakes=tuple(mistakes))
    if kind is None:
        return Judged(mistakes=(f"{source}: `kind` is missing; add it",))
    if str(version).startswith("ray.io/") and kind != "RayCronJob":
        known = cure(str(kind), kuberay_yaml.KINDS)
        return Judged(mistakes=(f"{source}: no kind {kind} in {version}; {known}",))
    return Judged(name=name)


def _serve(document: dict[str, Any], source: str) -> Judged:
    try:
        check_serve_config(document, source)
    except InputError as error:
        return Judged(mistakes=(str(error),))
    number = len(document["applications"])
    count = f"{number} application{'' if number == 1 else 's'}"
    return Judged(name=f"Serve config of {count}", read=every_setting(foreign_args(document)))


def _serve_keys() -> set[str]:
    from ray.serve.schema import ServeDeploySchema

    return set(ServeDeploySchema.model_fields)


main = command(ValidateConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
