"""Scores of a given text against the factorisation they claim and against decoding itself."""

import math

import pytest
import torch

from cascade_model.likelihood import sequential
from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.packed import pack
from cascade_model.sampling import SamplingParams
from cascade_model.scoring import scored
from cascade_model.tokenizer import byte_tokenizer
from tests.tiny_models import MASK, PAD, lively_model, text_config

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
KINDS = [
    {},
    {"logits": "shifted"},
    {"logits": "shifted", "first_place": "noisy"},
    {"clean_half": "token_causal"},
    {"block_size": 1, "logits": "shifted", "first_place": "clean"},
    {"attention": "bidirectional"},
]


def scores(model, tokens, count=0) -> dict:
    found = {}
    for part in scored(model, tokens, count):
        assert not found.keys() & dict(part).keys()
        found |= dict(part)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scores_are_the_sequential_factorisation_wherever_the_text_is_cut(kind):
    model = lively_model(**kind)
    found = scores(model, TEXT)
    assert list(found) == list(range(1, len(TEXT)))
    for cut in range(1, len(TEXT)):
        expected = sequential(model, TEXT[:cut], TEXT[cut:])
        values = torch.tensor([found[place].logprob for place in range(cut, len(TEXT))])
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_best_tokens_come_first_and_none_that_is_never_drawn():
    model = lively_model()
    for place, told in scores(model, TEXT, 16).items():
        values = [value for _, value in told.top]
        assert values == sorted(values, reverse=True)
        assert dict(told.top)[TEXT[place]] == told.logprob
        assert not {MASK, PAD} & dict(told.top).keys()
        assert sum(map(math.exp, values)) == pytest.approx(1)
        assert scores(model, TEXT, 2)[place].top == told.top[:2]


def test_a_text_of_one_token_or_none_has_no_scores():
    assert scores(lively_model(), [3]) == scores(lively_model(), []) == {}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scores_are_what_the_engine_tells_of_what_it_decodes_in_sequence(kind):
    tokenizer = byte_tokenizer()
    model = Transformer(text_config(tokenizer, **kind))
    model.init_weights(0)
    params = SamplingParams(
        max_tokens=9, rule="sequential", logprobs=3, temperature=1.0, seed=1, stop_at_eos=False
    )
    prompt = list(b"abcde")
    with LLM(model.eval(), tokenizer) as llm:
        [made] = llm.generate([prompt], params)
        found = scores(llm.model, prompt + list(made.token_ids), 3)
    assert made.logprobs is not None
    for place, own in enumerate(made.logprobs, start=len(prompt)):
        assert found[place].logprob == pytest.approx(own.logprob, abs=1e-5)
        assert [token for token, _ in found[place].top] == [token for token, _ in own.top]


def test_a_packed_network_scores_as_before():
    model = lively_model().float()
    before = scores(model, TEXT)
    pack(model)
    for place, told in scores(model, TEXT).items():
        assert told.logprob == pytest.approx(before[place].logprob, abs=1e-5)
