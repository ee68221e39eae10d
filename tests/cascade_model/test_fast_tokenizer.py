"""An engine is admitted only after it gave the same tokens, and is named with what was compared."""

import numpy as np
import pytest
import tiktoken
import tokenizers

from cascade_model.errors import InputError
from cascade_model.fast_tokenizer import admit, engine_of
from cascade_model.tiktoken_engine import TiktokenEngine
from cascade_model.tokenizer import Encoded
from tests.cascade_model.tokenizer_kinds import foreign, real_texts, trained


def test_the_same_tokens_admit_the_fast_engine():
    texts = real_texts()
    admitted = admit(trained(), iter(texts))
    size = sum(len(text.encode()) for text in texts)
    assert isinstance(admitted.engine, TiktokenEngine)
    assert (admitted.name, admitted.version) == ("tiktoken", tiktoken.__version__)
    assert (admitted.sample_texts, admitted.sample_bytes) == (len(texts), size)
    assert admitted.note == (
        f"tiktoken {tiktoken.__version__} gave the same tokens as the reference engine on "
        f"{len(texts):,} texts ({size:,} bytes)"
    )


class BrokenEngine(TiktokenEngine):
    """Wrong in one token of texts that hold a word."""

    field = "tokens"

    def encode_arrays(self, texts) -> Encoded:
        right = super().encode_arrays(texts)
        tokens, sizes = right.split()
        for place, text in enumerate(texts):
            if "needle" in text:
                changed = tokens if self.field == "tokens" else sizes
                changed[place][-2:] += 1
        return Encoded.of(tokens, sizes)


class BrokenSizes(BrokenEngine):
    field = "sizes"


@pytest.mark.parametrize("broken", [BrokenEngine, BrokenSizes])
def test_a_broken_conversion_is_refused_and_the_text_shown(broken):
    texts = ["plain"] * 70 + ["a needle here", "more"]
    refused = admit(trained(), texts, broken)
    assert refused.engine is trained()
    assert (refused.name, refused.version) == ("tokenizers", tokenizers.__version__)
    assert "'a needle here'" in refused.note
    assert "reference engine is used" in refused.note
    assert (refused.sample_texts, refused.sample_bytes) == (71, 70 * 5 + 13)
    assert admit(trained(), ["plain"] * 70, broken).name == "tiktoken"


class LostText(TiktokenEngine):
    """Loses one text of a batch."""

    def encode_arrays(self, texts) -> Encoded:
        return super().encode_arrays(texts[:-1])


def test_an_engine_that_loses_a_text_is_refused():
    assert admit(trained(), ["a", "b"], LostText).engine is trained()


def test_a_tokenizer_of_another_kind_keeps_its_own_engine():
    refused = admit(foreign("unigram"), real_texts())
    assert refused.engine is foreign("unigram")
    assert refused.note.startswith(f"tiktoken {tiktoken.__version__} cannot stand for this")
    assert (refused.sample_texts, refused.sample_bytes) == (0, 0)


def test_nothing_compared_admits_nothing():
    refused = admit(trained(), [])
    assert refused.name == "tokenizers"
    assert "empty" in refused.note


def test_a_worker_builds_the_admitted_engine_from_its_name():
    text = [real_texts()[0]]
    for name in ("tiktoken", "tokenizers"):
        found = engine_of(trained(), name).encode_arrays(text)
        assert np.array_equal(found.tokens, trained().encode_arrays(text).tokens)
    with pytest.raises(InputError, match="tokenizer_engine=other is not known"):
        engine_of(trained(), "other")
    with pytest.raises(InputError, match="cannot stand for this tokenizer, as"):
        engine_of(foreign("wordpiece"), "tiktoken")
