"""The chat template that a model folder brings, as Hugging Face publishes it."""

import json

from cascade_model.commit import Folder
from cascade_model.errors import InputError

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"


def own_template(model: str) -> str | None:
    """The text of the folder's template (a local path or any fsspec URL), or None.

    A file of its own comes before the tokenizer's settings; of several named ones the default.
    """
    files = Folder(model)
    try:
        if files.exists(TEMPLATE):
            return files.read_bytes(TEMPLATE).decode()
        if not files.exists(SETTINGS):
            return None
        found = json.loads(files.read_bytes(SETTINGS)).get("chat_template")
        if isinstance(found, list):
            found = next((e["template"] for e in found if e["name"] == "default"), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"model={model} has a damaged chat template; mend it or give chat_template=plain"
        ) from None
    return found if isinstance(found, str) else None
