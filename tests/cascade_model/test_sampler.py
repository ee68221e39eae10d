"""The denoising loop: caches, laws of committing, keys of randomness, ends."""

import pytest
import torch

from cascade_model.attention import clean_mask, dense
from cascade_model.config import SamplingParams
from cascade_model.errors import InputError
from cascade_model.model import never_emitted, vocabulary_logits
from cascade_model.sampler import CachedDenoiser, decode, sample
from tests.tiny_models import EOS, MASK, PAD, lively_model, tiny_config

AXES = [
    {"logits": "aligned"},
    {"logits": "aligned", "clean_half": "token_causal"},
    {"logits": "shifted"},
    {"logits": "shifted", "clean_half": "token_causal"},
    {"logits": "shifted", "first_place": "own"},
    {"logits": "shifted", "first_place": "noisy"},
    {"logits": "shifted", "block_size": 1},
    {"logits": "aligned", "block_size": 1},
    {"logits": "aligned", "block_size": 16},
]
PROMPT = [1, 2, 3, 4, 5, 6, 7]


class UncachedDenoiser:
    """The slow oracle: everything from the first token, in every pass, under a dense mask."""

    def __init__(self, model):
        self.model, self.config, self.passes = model, model.config, 0
        self.next_logits = None
        self.context = torch.zeros(0, dtype=torch.int64)

    def commit(self, tokens):
        self.context = torch.cat([self.context, tokens])
        length = len(self.context)
        mask = clean_mask(
            torch.zeros(1, length, dtype=torch.int32),
            self.config.block_size,
            self.config.clean_half,
        )
        self.next_logits = self._run(self.context, mask, torch.tensor([length - 1]))

    def logits(self, block, rows):
        cached, size = len(self.context), len(block)
        mask = torch.ones(1, 1, cached + size, cached + size, dtype=torch.bool)
        segments = torch.zeros(1, cached, dtype=torch.int32)
        clean = clean_mask(segments, self.config.block_size, self.config.clean_half)
        mask[:, :, :cached, :cached] = clean
        mask[:, :, :cached, cached:] = False
        return self._run(torch.cat([self.context, block]), mask, cached + rows)

    @torch.no_grad()
    def _run(self, tokens, mask, rows):
        self.passes += 1
        banned = never_emitted(self.config)
        return self.model(
            tokens[None],
            torch.arange(len(tokens))[None],
            dense(mask),
            lambda hidden, head: vocabulary_logits(hidden[0, rows], head, banned),
        )


class Recorder(CachedDenoiser):
    """Keeps every logit and every state of the current block."""

    def __init__(self, model, capacity=64):
        super().__init__(model, capacity)
        self.seen, self.given = [], []

    def logits(self, block, rows):
        self.seen.append(block.clone())
        self.given.append(super().logits(block, rows))
        return self.given[-1]


class UniformDenoiser:
    """Knows nothing: every token is as likely as any other, the banned ones apart."""

    def __init__(self, config):
        self.config, self.passes, self.next_logits = config, 0, None

    def commit(self, tokens):
        self.passes += 1
        self.next_logits = self._flat(1)

    def logits(self, block, rows):
        self.passes += 1
        return self._flat(len(rows))

    def _flat(self, count):
        flat = torch.zeros(count, self.config.vocab_size)
        flat[:, never_emitted(self.config)] = float("-inf")
        return flat


def tokens_of(blocks) -> list[int]:
    return [token for block in blocks for token in block.tokens]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_decoding_equals_uncached_decoding(axes, temperature):
    model = lively_model(**axes)
    params = SamplingParams(
        max_tokens=18, temperature=temperature, confidence_threshold=0.6, stop_at_eos=False
    )
    slow = UncachedDenoiser(model)
    with torch.inference_mode():
        expected = tokens_of(decode(slow, PROMPT, params))
    assert tokens_of(sample(model, PROMPT, params)) == expected


@pytest.mark.parametrize("axes", AXES)
def test_cached_logits_equal_uncached_logits(axes):
    model = lively_model(**axes)
    size = model.config.block_size
    fast, slow = CachedDenoiser(model, 4 * size), UncachedDenoiser(model)
    generator = torch.Generator().manual_seed(5)
    rows = torch.arange(size)
    for _ in range(3):
        block = torch.randint(0, 12, (size,), generator=generator)
        noisy = torch.where(torch.rand(size, generator=generator) < 0.5, MASK, block)
        for denoiser in (fast, slow):
            denoiser.result = denoiser.logits(noisy, rows)
            denoiser.commit(block)
        torch.testing.assert_close(fast.result, slow.result, rtol=0, atol=1e-10)
        if fast.next_logits is not None:
            torch.testing.assert_close(fast.next_logits, slow.next_logits, rtol=0, atol=1e-10)


def test_block_size_one_shifted_is_greedy_autoregressive_decoding_at_one_pass_a_token():
    model = lively_model(block_size=1, logits="shifted")
    params = SamplingParams(max_tokens=9, stop_at_eos=False)
    blocks = list(sample(model, PROMPT, params))
    context = list(PROMPT)
    for _ in range(9):
        tokens = torch.tensor([context])
        causal = dense(torch.ones(len(context), len(context), dtype=torch.bool).tril()[None, None])
        logits = model(
            tokens,
            torch.arange(len(context))[None],
            causal,
            lambda hidden, head: vocabulary_logits(hidden[:, -1], head, [PAD, MASK]),
        )
        context.append(int(logits.argmax()))
    assert tokens_of(blocks) == context[len(PROMPT) :]
    assert [block.passes for block in blocks] == [1] * 9


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("rule", ["confidence_threshold", "top_k", "sequential"])
def test_committed_tokens_never_change_and_each_step_commits_at_least_one(axes, rule):
    recorder = Recorder(lively_model(**axes))
    params = SamplingParams(max_tokens=18, rule=rule, temperature=1.0, stop_at_eos=False)
    list(decode(recorder, PROMPT, params))
    for before, after in zip(recorder.seen, recorder.seen[1:], strict=False):
        known = before != MASK
        if bool(after[known].eq(before[known]).all()) and (after != MASK).sum() > known.sum():
            continue
        # Otherwise a new block began: all masks, or (shifted) all but its first place.
        assert (after != MASK).sum() <= 1


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_mask_and_padding_are_never_emitted(axes, temperature):
    model = lively_model(**axes)
    with torch.no_grad():
        model.embed.weight[[MASK, PAD]] *= 30
    params = SamplingParams(max_tokens=24, temperature=temperature, stop_at_eos=False)
    assert not {MASK, PAD} & set(tokens_of(sample(model, PROMPT, params)))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_block_takes_no_more_steps_than_its_ceiling(axes, steps):
    params = SamplingParams(
        max_tokens=30, steps_per_block=steps, confidence_threshold=1.0, stop_at_eos=False
    )
    blocks = list(decode(UniformDenoiser(tiny_config(**axes)), PROMPT, params))
    assert max(block.steps for block in blocks) <= steps
    assert len(tokens_of(blocks)) == 30


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5, 9, 10])
def test_any_number_of_tokens_is_given_and_a_lower_one_is_a_prefix(max_tokens):
    model = lively_model()
    longest, shorter = (
        tokens_of(
            sample(model, PROMPT, SamplingParams(max_tokens=n, temperature=1.0, stop_at_eos=False))
        )
        for n in (20, max_tokens)
    )
    assert shorter == longest[:max_tokens]


def test_a_ragged_prompt_tail_opens_the_first_block():
    recorder = Recorder(lively_model())
    list(decode(recorder, PROMPT, SamplingParams(max_tokens=5, stop_at_eos=False)))
    assert recorder.seen[0].tolist() == [5, 6, 7, MASK]


def test_decoding_on_from_a_committed_prefix_gives_the_same_rest():
    model = lively_model(logits="shifted")
    params = SamplingParams(max_tokens=17, temperature=1.0, seed=9, stop_at_eos=False)
    whole = tokens_of(sample(model, PROMPT, params))
    rest = SamplingParams(max_tokens=12, temperature=1.0, seed=9, stop_at_eos=False)
    assert tokens_of(sample(model, PROMPT + whole[:5], rest)) == whole[5:]


def test_the_same_seed_gives_the_same_tokens_and_seeds_and_choices_differ():
    model = lively_model()

    def run(seed, choice=0):
        params = SamplingParams(max_tokens=24, temperature=2.0, seed=seed, stop_at_eos=False)
        return tuple(tokens_of(sample(model, PROMPT, params, choice)))

    assert run(1) == run(1)
    assert len({run(1), run(2), run(1, choice=1)}) == 3


class Scripted(UniformDenoiser):
    """Is sure of one given text, more so on the right than on the left or the other way."""

    def __init__(self, config, text, left_first=True):
        super().__init__(config)
        self.text, self.left_first = text, left_first

    def logits(self, block, rows):
        self.passes += 1
        result = self._flat(len(rows))
        for index, row in enumerate(rows.tolist()):
            result[index, self.text[row]] = 20.0 - row if self.left_first else 10.0 + row
        return result


def test_an_end_of_text_with_everything_before_it_filled_ends_early():
    params = SamplingParams(max_tokens=40, rule="top_k")
    blocks = list(decode(Scripted(tiny_config(), [1, EOS, 2, 3]), [], params))
    assert [block.tokens for block in blocks] == [[1, EOS]]
    assert (blocks[0].finish_reason, blocks[0].steps) == ("stop", 2)


def test_an_end_of_text_waits_until_everything_before_it_is_filled():
    params = SamplingParams(max_tokens=40, rule="top_k")
    blocks = list(decode(Scripted(tiny_config(), [1, EOS, 2, 3], left_first=False), [], params))
    assert [block.tokens for block in blocks] == [[1, EOS]]
    assert blocks[0].steps == 4


def test_the_end_of_text_can_be_ignored():
    params = SamplingParams(max_tokens=8, stop_at_eos=False)
    blocks = list(decode(Scripted(tiny_config(), [1, EOS, 2, 3]), [], params))
    assert tokens_of(blocks) == [1, EOS, 2, 3] * 2
    assert [block.finish_reason for block in blocks] == [None, "length"]


def test_passes_are_one_for_the_prompt_or_commit_and_one_a_step():
    params = SamplingParams(max_tokens=8, rule="top_k", steps_per_block=2, stop_at_eos=False)
    blocks = list(decode(UniformDenoiser(tiny_config()), [1, 2, 3, 4], params))
    assert [(block.passes, block.steps) for block in blocks] == [(3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("axes", "prompt", "max_tokens", "message"),
    [
        ({}, [99], 4, "99, outside the vocabulary of 16"),
        ({}, [MASK], 4, "mask token 15"),
        ({"logits": "shifted"}, [], 4, "prompt is empty"),
        ({}, [1] * 100, 40, "100 tokens plus max_tokens=40 exceeds .* 128"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_refused_with_the_cure(
    axes, prompt, max_tokens, message
):
    with pytest.raises(InputError, match=message):
        sample(lively_model(**axes), prompt, SamplingParams(max_tokens=max_tokens))
