"""One row of the input: a prompt or a chat with its settings, or the reason why it is neither."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cascade_model.errors import InputError
from pipelines.documents import json_object
from pipelines.pieces import EXCERPT, Dead, is_sound
from pipelines.prompts import LinesHash, Part, raw_rows
from pipelines.row_settings import Decoding, decoding_of, settings_in

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names of the input's columns."""

    prompt: str = "prompt"
    """Text to continue."""
    messages: str = "messages"
    """A chat ([{role, content}, ...]); used where the prompt column is missing."""
    suffix: str = "suffix"
    """Text that follows the completion of a prompt; may be missing."""
    id: str = "id"
    """Carried to the output; where it is missing, the row's number."""
    params: str = "params"
    """Settings of the row's own (`row_settings`); may be missing."""
    settings: tuple[str, ...] = ()
    """Columns that are settings themselves, under their own names."""

    @property
    def all(self) -> set[str]:
        """Every column that is read."""
        named = {self.prompt, self.messages, self.suffix, self.id, self.params}
        return named | set(self.settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row to answer."""

    row: int
    id: str
    text: str
    """What to continue; empty where it is a chat."""
    decoding: Decoding
    suffix: str | None = None
    """What follows the completion."""
    messages: tuple[Message, ...] | None = None
    """A chat to answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadRow:
    """One row that cannot be answered, with the beginning of what it held."""

    row: int
    reason: str
    input: str
    detail: str = ""
    """What is wrong, where the reason does not tell it all."""


class DeadRowError(ValueError):
    """A row that cannot be answered; the message is the reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_part(part: Part, columns: Columns, common: Decoding) -> Iterator[Prompt | DeadRow]:
    """The part's rows in order, each with its settings; a broken one comes as a `DeadRow`.

    `InputError` at the end where the file is no longer what was planned: by the bytes of its lines,
    or in a table, which is not hashed by parts, by the number of its rows.
    """
    lines, count = LinesHash(), 0
    for row, raw in enumerate(raw_rows(part, columns.all), part.first_row):
        count += 1
        if isinstance(raw, bytes):
            lines.add(raw)
        try:
            yield prompt_of(row, raw, columns, common)
        except DeadRowError as error:
            shown = _shown(raw)
            yield DeadRow(row=row, reason=error.reason, input=shown, detail=error.detail)
    if count != part.num_rows or (part.sha256 and lines.hexdigest() != part.sha256):
        raise InputError(f"input={part.url} changed while the job ran; start a new output")


def prompt_of(row: int, raw: bytes | dict[str, Any], columns: Columns, common: Decoding) -> Prompt:
    """A row, a line of JSON or its cells by name, as a prompt; `DeadRowError` where it is none."""
    values = json_object(raw) if isinstance(raw, bytes) else raw
    if isinstance(values, Dead):
        raise DeadRowError(values.reason)
    text, messages, suffix, given = (
        _alive(values.get(name))
        for name in (columns.prompt, columns.messages, columns.suffix, columns.id)
    )
    name = str(row if given is None else given)
    chat = None
    if text is None and messages is not None:
        if suffix:
            raise DeadRowError("suffix_of_a_chat")
        text, chat = "", _chat(messages)
    sound, behind = _texts(text, suffix, name, is_chat=chat is not None)
    return Prompt(
        row=row,
        id=name,
        text=sound,
        decoding=_decoding(row, values, columns, common),
        suffix=behind,
        messages=chat,
    )


def _texts(text: Any, suffix: Any, name: str, *, is_chat: bool) -> tuple[str, str | None]:
    """Prompt and suffix, where they can be used."""
    if text is None:
        raise DeadRowError("missing_prompt")
    if not isinstance(text, str):
        raise DeadRowError("prompt_is_no_string")
    if not isinstance(suffix, str | None):
        raise DeadRowError("suffix_is_no_string")
    if not text and not suffix and not is_chat:
        raise DeadRowError("empty_prompt")
    if not all(map(is_sound, (text, suffix or "", name))):
        raise DeadRowError("lone_surrogate")
    return text, suffix


def _decoding(row: int, values: dict[str, Any], columns: Columns, common: Decoding) -> Decoding:
    """The row's settings; a column of its own comes before the same name among the params."""
    own = {name: _alive(values.get(name)) for name in columns.settings}
    try:
        params = settings_in(_alive(values.get(columns.params)))
        given = params | {name: value for name, value in own.items() if value is not None}
        return decoding_of(row, given, common)
    except InputError as error:
        told = str(error).encode("utf-8", "backslashreplace").decode()
        raise DeadRowError("bad_setting", told) from None


def _alive(value: Any) -> Any:
    if isinstance(value, Dead):
        raise DeadRowError(value.reason)
    return value


def _chat(messages: Any) -> tuple[Message, ...]:
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_chat or not messages:
        raise DeadRowError("broken_messages")
    kept = [{k: v for k, v in message.items() if v is not None} for message in messages]
    texts = (text for message in kept for text in (*message, *message.values()))
    if not all(is_sound(text) for text in texts if isinstance(text, str)):
        raise DeadRowError("lone_surrogate")
    return tuple(kept)


def _shown(raw: bytes | dict[str, Any]) -> str:
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else repr(raw)
    return text[:EXCERPT]
