"""The chat template that a model brings: ours, in the model folder; a published one, as it came.

A template decides what a model is told, so in a model folder of ours only one that the manifest
names is taken. Hugging Face keeps it in a file of its own or in the tokenizer's settings, GGUF in
its metadata.
"""

import json
from pathlib import Path

from cascade_model.chat_template import ChatTemplate, template_text
from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import gguf_template
from cascade_model.tokenizer import Tokenizer
from cascade_model.weights import MANIFEST, TEMPLATE, vouched_bytes

SETTINGS = "tokenizer_config.json"
DEFAULT = "plain"


def template_of(model: str | Path, tokenizer: Tokenizer, chosen: str | None = None) -> ChatTemplate:
    """The template to write chats with: the chosen one (`ChatTemplate.of`), else the model's own,
    else `plain`. Raises as `own_template`, and `InputError` for text that is no template."""
    own = None if chosen else own_template(model)
    if own is not None:  # `of` would take one without any markup for a file's name
        return ChatTemplate(own, tokenizer)
    return ChatTemplate.of(chosen or DEFAULT, tokenizer)


def text_of(model: str | Path, chosen: str | None = None) -> str:
    """The same as a text that `ChatTemplate.of` takes on any machine. Raises as `template_text` and
    `own_template`."""
    return template_text(chosen) if chosen else own_template(model) or DEFAULT


def own_template(model: str | Path) -> str | None:
    """The text of a model's template, or None where it has none.

    `model` is a model folder of ours (a local path or any fsspec URL), a published folder or a GGUF
    file. Raises `CheckpointMismatch` for a file that the manifest does not vouch for, `InputError`
    for a published one that cannot be read.
    """
    if str(model).endswith(".gguf"):
        return gguf_template(Path(model))
    files = Folder(model)
    if not files.exists(MANIFEST):
        return published_template(files)
    data = vouched_bytes(files, TEMPLATE)
    if data is None and files.exists(TEMPLATE):
        raise CheckpointMismatch(
            f"model {files.url} has a {TEMPLATE} that its manifest does not name; give it as "
            "chat_template, or put it into the published folder and convert that again"
        )
    return None if data is None else data.decode()


def published_template(files: Folder) -> str | None:
    """That of a published folder: a file of its own comes before the tokenizer's settings; of
    several named ones the default."""
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
            f"model={files.url} has a damaged chat template; mend it or give chat_template=plain"
        ) from None
    return found if isinstance(found, str) else None
