"""validate: Serve YAMLs read strictly, before anything is deployed.

Serve and KubeRay accept any misspelt key of a Serve config in silence. This names the first one of
each file with its place, and checks the settings of our own applications as `cascade serve` does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from cascade_model.errors import InputError
from cascade_model.settings import check
from jobs.cli import command
from jobs.serve import validate_serve_config


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Serve YAMLs, or RayService YAMLs of KubeRay with one inside."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The files."""

    def __post_init__(self) -> None:
        check(bool(self.files), "files: give at least one, such as cluster/serve.yaml")


def run(config: ValidateConfig) -> dict[str, int]:
    """Check every file; all mistakes are told together, one a file."""
    found: dict[str, int] = {}
    mistakes = []
    for file in config.files:
        try:
            found[file] = sum(
                len(validate_serve_config(file, text)["applications"]) for text in texts_of(file)
            )
        except InputError as error:
            mistakes.append(str(error))
            continue
        print(f"{file}: right, {found[file]} application{'' if found[file] == 1 else 's'}")
    if mistakes:
        raise InputError("\n".join(mistakes))
    return found


def texts_of(file: str) -> list[str | None]:
    """The Serve configs inside a file of RayServices; none, for the file itself, in any other."""
    try:
        documents = list(yaml.safe_load_all(Path(file).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return [None]  # what is wrong with it is told by who reads it next
    services = [
        each for each in documents if isinstance(each, dict) and each.get("kind") == "RayService"
    ]
    return [_embedded(file, each) for each in services] or [None]


def _embedded(file: str, service: dict) -> str:
    spec = service.get("spec")
    text = spec.get("serveConfigV2") if isinstance(spec, dict) else None
    check(isinstance(text, str), f"{file}: spec.serveConfigV2 is no text; write it behind a `|`")
    return str(text)


main = command(ValidateConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
