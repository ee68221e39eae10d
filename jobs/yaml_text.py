"""YAML texts read strictly: a sentence says where one is broken, or which key stands twice."""

from pathlib import Path
from typing import Any

import yaml

from cascade_model.errors import InputError
from jobs.yaml_keys import require_single_keys


def text_of(file: str | Path, source: str) -> str:
    """The text of a file; `InputError`, which begins with `source`, for one that cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{source}: cannot be read (not a text in UTF-8); check the path"
        ) from None


def documents_in(text: str, source: str) -> list[Any]:
    """The documents of a YAML text, empty ones left out.

    `InputError`, which begins with `source`, for a text that is no YAML or has a key twice.
    """
    try:
        require_single_keys(text, source)
        return [each for each in yaml.safe_load_all(text) if each is not None]
    except (yaml.YAMLError, ValueError) as error:  # the second for dates that are none
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise InputError(f"{source}: not valid YAML{line}; mend it") from None


def document_in(text: str, source: str) -> Any:
    """The one document of a YAML text, None where there is none; `InputError` for more."""
    documents = documents_in(text, source)
    if len(documents) > 1:
        raise InputError(f"{source}: holds {len(documents)} documents; keep one of them")
    return documents[0] if documents else None
