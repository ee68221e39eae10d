"""Documents to tokens: the tokenizer engine, long texts in pieces, conversations by a template."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tokenizers

from cascade_model import tiktoken_engine
from cascade_model.chat_template import ChatTemplate
from cascade_model.commit import Folder
from cascade_model.errors import InputError, Unfinished
from cascade_model.fast_tokenizer import REFERENCE, Encoder, engine_of
from cascade_model.manifest import TOKENIZER
from cascade_model.tokenizer import Encoded, Tokenizer
from pipelines.cleaning import pieces
from pipelines.documents import Message
from pipelines.infilling import Infilling, rearranged


@dataclass(frozen=True, slots=True)
class DocumentEncoder:
    """What turns documents into tokens; a document's tokens depend on it alone."""

    tokenizer: Tokenizer
    engine: Encoder
    template: ChatTemplate | None
    max_piece_bytes: int
    infilling: Infilling | None = None

    def texts(self, texts: Sequence[str]) -> Encoded:
        """The tokens of plain texts; the pieces of a long one are encoded apart and joined."""
        cut = [pieces(text, self.max_piece_bytes) for text in texts]
        encoded = self.engine.encode_arrays([piece for each in cut for piece in each])
        self._refuse(encoded, ("mask", "pad", "eos"))
        if len(encoded.lengths) == len(texts):
            return encoded
        firsts = np.cumsum([0, *(len(each) for each in cut[:-1])])
        lengths = np.add.reduceat(encoded.lengths, firsts)
        return Encoded(encoded.tokens, lengths, encoded.sizes)

    def rearranged(self, texts: Sequence[str], encoded: Encoded) -> tuple[Encoded, int]:
        """Encoded texts with those rearranged that the job rearranges, and how many these are."""
        if self.infilling is None:
            return encoded, 0
        return rearranged(encoded, texts, self.infilling, self.texts)

    def chats(self, chats: Sequence[list[Message]]) -> tuple[Encoded, np.ndarray, list[int]]:
        """The tokens of conversations, which of them are responses (bool), and the places of those
        that the template does not take, which are left out."""
        assert self.template is not None
        try:
            found = self.template.encode(list(chats), self.engine)
        except InputError:
            refused = [i for i, chat in enumerate(chats) if not self._takes(chat)]
            taken = [chat for i, chat in enumerate(chats) if i not in set(refused)]
            found = self.template.encode(taken, self.engine)
        else:
            refused = []
        # A template may end its turns with the token that ends a document.
        self._refuse(found.encoded, ("mask", "pad"))
        return found.encoded, found.is_response, refused

    def _takes(self, chat: list[Message]) -> bool:
        assert self.template is not None
        try:
            self.template.encode([chat], self.engine)
        except InputError:
            return False
        return True

    def _refuse(self, encoded: Encoded, roles: tuple[str, ...]) -> None:
        """No text may turn into a token that only the pipeline sets."""
        reserved = [getattr(self.tokenizer, f"{role}_id") for role in roles]
        reserved += self.infilling.ids if self.infilling else ()
        found = np.isin(encoded.tokens, np.array(reserved, dtype=np.uint32))
        if found.any():
            raise InputError(
                "tokenizer turns ordinary text into the reserved token "
                f"{int(encoded.tokens[found][0])}; use a tokenizer.json that marks its mask, "
                "padding, end and infilling tokens as special"
            )


@lru_cache(maxsize=2)
def tokenizer_of(output: str, sha256: str) -> Tokenizer:
    """A job's tokenizer from its corpus folder, read once per process."""
    tokenizer = Tokenizer(Folder(output).read_bytes(TOKENIZER), f"{output}/{TOKENIZER}")
    if tokenizer.sha256 != sha256:
        raise InputError(
            f"output={output} holds a tokenizer with sha256 {tokenizer.sha256[:12]}, not the job's "
            f"{sha256[:12]}; delete the folder and run again"
        )
    return tokenizer


def engine_version(engine: str) -> str:
    """The version of an engine's library in this process."""
    return tokenizers.__version__ if engine == REFERENCE else tiktoken_engine.VERSION


@lru_cache(maxsize=2)
def encoder_of(
    output: str,
    sha256: str,
    engine: str,
    version: str,
    template: str | None,
    max_piece_bytes: int,
    infilling: Infilling | None,
) -> DocumentEncoder:
    """A job's encoder, made once per process; `Unfinished` where the engine is another version
    than the job's, as its tokens might be others."""
    here = engine_version(engine)
    if here != version:
        raise Unfinished(
            f"output={output} was begun with {engine} {version} but this process has {here}; "
            "install the same version everywhere and run the same command again"
        )
    tokenizer = tokenizer_of(output, sha256)
    return DocumentEncoder(
        tokenizer,
        engine_of(tokenizer, engine),
        None if template is None else ChatTemplate.of(template, tokenizer),
        max_piece_bytes,
        infilling,
    )
