"""Log-probabilities of tokens as the two OpenAI routes spell them.

A token's value is what the engine told of the decision that wrote it (`text_stream.TokenLogprob`):
in the prediction of the step that filled its place, before temperature, top-k and top-p. Of several
places that one step fills, each is told without the others. An echoed prompt has the sequential
factorisation instead (`cascade_model.scoring`), and nothing for its first token.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cascade_model.text_stream import TokenLogprob
from cascade_model.tokenizer import Tokenizer


class TokenSpelling:
    """Tokens as text and as bytes, one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_of = lru_cache(maxsize=65536)(tokenizer.token_bytes)
        self.without_text = frozenset(tokenizer.special_tokens.values())
        """Special tokens: they have a name, and no share in a choice's text."""

    def text_of(self, token: int) -> str:
        """The token's text; of one that is not whole characters `bytes:` and each as \\xNN."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class CompletionLogprobs:
    """`logprobs` of `/v1/completions`, for one choice, piece by piece."""

    def __init__(self, spelling: TokenSpelling) -> None:
        self._spelling = spelling
        self._characters = 0

    def write(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> dict[str, list[Any]]:
        """The next tokens; an offset is the token's first character, counted in the choice's text
        before any stop was cut off."""
        return {
            "tokens": [self._spelling.text_of(token) for token in tokens],
            "token_logprobs": [told and told.logprob for told in logprobs],
            "top_logprobs": [
                told and self._top(token, told)
                for token, told in zip(tokens, logprobs, strict=True)
            ],
            "text_offset": [self._place(token) for token in tokens],
        }

    def _top(self, token: int, told: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself, by their texts; of equal texts the best."""
        top: dict[str, float] = {}
        for other, value in (*told.top, (token, told.logprob)):
            top.setdefault(self._spelling.text_of(other), value)
        return top

    def _place(self, token: int) -> int:
        own = b"" if token in self._spelling.without_text else self._spelling.bytes_of(token)
        begun = sum(byte & 0xC0 != 0x80 for byte in own)  # bytes that begin a character
        inside = bool(own) and own[0] & 0xC0 == 0x80
        place = max(0, self._characters - inside)
        self._characters += begun
        return place


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Pieces of one choice's log-probabilities as one."""
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


def chat_logprobs(
    spelling: TokenSpelling, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> dict[str, list[Any]]:
    """`logprobs` of a chat's choice, or of a piece of it."""

    def spelt(token: int, logprob: float) -> dict[str, Any]:
        own = list(spelling.bytes_of(token))
        return {"token": spelling.text_of(token), "logprob": logprob, "bytes": own}

    return {
        "content": [
            {**spelt(token, told.logprob), "top_logprobs": [spelt(*other) for other in told.top]}
            for token, told in zip(tokens, logprobs, strict=True)
        ]
    }
