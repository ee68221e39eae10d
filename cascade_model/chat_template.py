"""Conversations to tokens, and which of them are the assistant's.

A template is rendered with a mark in place of each message's content. What stands between the marks
is the template's own text, in which the names of special tokens are these tokens; the contents are
encoded apart as ordinary text, so a user cannot write a special token. Both together must be what
the template makes of the real contents. The response is what the model has to write: what comes
after the opening of an assistant's turn, up to and with the token that ends it.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cascade_model.errors import InputError
from cascade_model.jinja_chat import CHATML, PLAIN, compiled, rendered
from cascade_model.settings import check
from cascade_model.tokenizer import INFILL_NAMES, MASK_NAMES, PAD_NAMES, Encoded, Encoder, Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
_BUILT_IN = {"plain": PLAIN, "chatml": CHATML}
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    is_content: bool
    """Of a message, so ordinary text; else of the template, whose special tokens count."""
    is_response: bool


@dataclass(frozen=True, slots=True)
class ChatEncoded:
    """Conversations as tokens, one after the other."""

    encoded: Encoded
    """A text is a rendered conversation; so the sizes count the bytes of that."""
    is_response: np.ndarray
    """bool [total]."""


def template_text(spec: str) -> str:
    """The text of a template's file for its path; what is a text or built in as it is.

    `InputError` for a file that cannot be read.
    """
    if spec in _BUILT_IN or "{%" in spec or "{{" in spec:
        return spec
    try:
        return Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat_template={spec} cannot be read ({type(error).__name__}); give `plain`, "
            "`chatml`, a Jinja template's text or the path of its file"
        ) from None


def as_templates_say(role: str) -> str:
    """A role in the words of the published templates, where `developer` is `system`."""
    return "system" if role == "developer" else role


class ChatTemplate:
    """How a conversation is written down; `text` is the Jinja template."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        """Read a Jinja template as Hugging Face publishes it; `InputError` when it is none."""
        self.text = text
        self._tokenizer = tokenizer
        self._encode_own = lru_cache(maxsize=4096)(self._encode_template_text)
        self._template = compiled(text)

    @classmethod
    def of(cls, spec: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """`plain`, `chatml`, a Jinja template's text or the path of its file (`template_text`)."""
        if spec == "chatml":
            missing = {"<|im_start|>", "<|im_end|>"} - tokenizer.special_tokens.keys()
            check(
                not missing,
                f"chat_template=chatml needs the special tokens {sorted(missing)}, which this "
                "tokenizer lacks; use plain or another tokenizer",
            )
        text = template_text(spec)
        return cls(_BUILT_IN.get(text, text), tokenizer)

    def encode(
        self, conversations: Sequence[Messages], encoder: Encoder, *, open_turn: bool = False
    ) -> ChatEncoded:
        """Tokens of conversations of `{"role", "content"}`, and which are response.

        `open_turn` adds the opening of the assistant's turn, for a prompt. The contents are given
        to `encoder` all together. `InputError` names a conversation that cannot be written.
        """
        written = [self.pieces(messages, open_turn=open_turn) for messages in conversations]
        contents = [p.text for pieces in written for p in pieces if p.is_content]
        spans = iter(zip(*encoder.encode_arrays(contents).split(), strict=True))
        none = (np.empty(0, dtype=np.uint32),) * 2
        tokens, sizes, is_response = [], [], [np.empty(0, dtype=bool)]
        for pieces in written:
            spelled = [next(spans) if p.is_content else self._encode_own(p.text) for p in pieces]
            for piece, (own, _) in zip(pieces, spelled, strict=True):
                is_response.append(np.full(len(own), piece.is_response))
            together = [np.concatenate(each) for each in zip(none, *spelled, strict=True)]
            tokens.append(together[0])
            sizes.append(together[1])
        return ChatEncoded(Encoded.of(tokens, sizes), np.concatenate(is_response))

    @cached_property
    def turn_end_id(self) -> int | None:
        """The special token that ends an assistant's turn; none where the template has none."""
        special = self._special.search(self._closing) if self._special else None
        return self._tokenizer.special_tokens[special.group()] if special else None

    @property
    def bos(self) -> str | None:
        """Name of the token that a template may begin with."""
        return next((name for name in _BOS_NAMES if name in self._tokenizer.special_tokens), None)

    def prompt(self, messages: Messages) -> str:
        """The text of a conversation that is open for the assistant's answer."""
        return "".join(piece.text for piece in self.pieces(messages, open_turn=True))

    def pieces(self, messages: Messages, *, open_turn: bool = False) -> tuple[Piece, ...]:
        """A conversation in pieces, whose texts joined are the rendered template.

        `InputError` when the template refuses, changes, drops or doubles a content.
        """
        texts = _contents(messages, open_turn)
        marked, own = self._cut(messages, texts, open_turn)
        pieces: list[Piece] = []
        for place, before in zip([*marked, None], own, strict=True):
            ending = bool(pieces) and pieces[-1].is_response
            end = self._turn_end(before) if ending else 0
            answers = place is not None and messages[place]["role"] == "assistant"
            start = self._answer_start(before) if answers else len(before)
            pieces.append(Piece(before[:end], False, True))
            pieces.append(Piece(before[end:start], False, False))
            if place is not None:
                pieces.append(Piece(before[start:] + texts[place], True, answers))
        written = "".join(piece.text for piece in pieces)
        check(
            written == self._render(messages, open_turn),
            "chat_template changes the content of a message; use a template that writes contents "
            "as they are, or clean the conversation",
        )
        return tuple(piece for piece in pieces if piece.text)

    def _cut(
        self, messages: Messages, texts: list[str], open_turn: bool
    ) -> tuple[list[int], list[str]]:
        """Places of the contents as the template orders them, and its text around them.

        `texts` is left with what the template keeps of each content: some trim white space.
        """
        nonce = secrets.token_hex(16)
        marks = [f"{nonce}:{place};" if text.strip() else text for place, text in enumerate(texts)]
        bare = re.split(
            f"{nonce}:(\\d+);", self._render(_with_contents(messages, marks), open_turn)
        )
        marked, own = [int(place) for place in bare[1::2]], bare[0::2]
        wanted = [place for place, text in enumerate(texts) if text.strip()]
        check(
            sorted(marked) == wanted,
            f"chat_template writes the contents {sorted(marked)} of a conversation that has "
            f"{wanted}; use a template that writes each content once",
        )
        padded = [
            text.replace(text.strip(), mark) if text.strip() else text
            for text, mark in zip(texts, marks, strict=True)
        ]
        if padded != marks:
            around = re.split(
                f"{nonce}:\\d+;", self._render(_with_contents(messages, padded), open_turn)
            )
            check(
                len(around) == len(own), "chat_template goes by a content's white space; strip it"
            )
            _keep_white_space(texts, marked, own, around)
        return marked, own

    def _turn_end(self, after: str) -> int:
        """Where the end of an assistant's turn ends in the template's text after the content."""
        special = self._special.search(after) if self._special else None
        return special.end() if special else _common(after, self._closing)

    def _answer_start(self, before: str) -> int:
        """Where the answer begins: behind what ends a prompt, so with white space after it."""
        if not self._opening or self._opening not in before:
            return len(before)
        start = before.rindex(self._opening) + len(self._opening)
        return start if before[start:].isspace() else len(before)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def _closing(self) -> str:
        """What follows the last answer of a conversation."""
        return self._text_after("user", "assistant", open_turn=False)

    @cached_property
    def _opening(self) -> str:
        """What follows the last question of a prompt."""
        return self._text_after("user", open_turn=True)

    def _text_after(self, *roles: str, open_turn: bool) -> str:
        """The template's text behind the last content of a short conversation, if it takes one."""
        turns = [{"role": role, "content": "a"} for role in roles]
        try:
            return self._cut(turns, ["a"] * len(turns), open_turn)[1][-1]
        except InputError:
            return ""

    def _render(self, messages: Messages, open_turn: bool) -> str:
        tokenizer = self._tokenizer
        return rendered(
            self._template,
            messages=[{"role": m["role"], "content": m["content"]} for m in messages],
            add_generation_prompt=open_turn,
            bos_token=self.bos or "",
            eos_token=tokenizer.eos if tokenizer.has("eos") else "",
        )

    def _encode_template_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._tokenizer.encode_with_special(text)
        reserved = {MASK_NAMES: "mask", PAD_NAMES: "padding"}
        reserved |= dict.fromkeys(INFILL_NAMES, "infilling")
        for names, role in reserved.items():
            ids = [self._tokenizer.special_tokens.get(name, -1) for name in names]
            check(
                not np.isin(encoded.tokens, ids).any(),
                f"chat_template writes the {role} token, which only the pipeline sets; use "
                "another template",
            )
        return encoded.tokens, encoded.sizes


def _contents(messages: Messages, open_turn: bool) -> list[str]:
    """The contents of a sound conversation; what is learnt from has no empty answer."""
    check(
        isinstance(messages, Sequence) and len(messages) > 0,
        "messages is no list of messages; give at least one",
    )
    for place, message in enumerate(messages):
        here = f"messages[{place}]"
        check(isinstance(message, Mapping), f"{here} is no mapping; give role and content")
        role, content = message.get("role"), message.get("content")
        check(role in ROLES, f"{here} has role={role!r}; use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{here} has no text as content; give role and content")
        check(
            role != "assistant" or open_turn or bool(content.strip()),
            f"{here} is an empty answer; leave it out",
        )
        others = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        check(not others, f"{here} has {others[:1]}, which is not written; leave it out")
    return [message["content"] for message in messages]


def _common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_contents(messages: Messages, contents: list[str]) -> list[dict[str, str]]:
    return [
        {"role": message["role"], "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]


def _keep_white_space(
    texts: list[str], marked: list[int], own: list[str], around: list[str]
) -> None:
    """Leave to each content the outer white space that the template wrote with it.

    `own` is the template's text around the bare contents, `around` the same with white space.
    """
    kept: dict[int, list[str]] = {place: ["", ""] for place in marked}
    for before, after, bare, whole in zip(
        [None, *marked], [*marked, None], own, around, strict=True
    ):
        trail = "" if before is None else texts[before][len(texts[before].rstrip()) :]
        lead = "" if after is None else texts[after][: -len(texts[after].lstrip())]
        for end in range(min(len(trail), len(whole) - len(bare)), -1, -1):
            rest = whole[end + len(bare) :]
            if whole == trail[:end] + bare + rest and lead.endswith(rest):
                if before is not None:
                    kept[before][1] = trail[:end]
                if after is not None:
                    kept[after][0] = rest
                break
    for place, (lead, trail) in kept.items():
        texts[place] = lead + texts[place].strip() + trail
