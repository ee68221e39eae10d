"""The sequential factorisation against one pass a token, and the estimates against enumeration."""

import itertools
import math

import pytest
import torch

from cascade_model.attention import clean_mask, dense
from cascade_model.canvas import Change
from cascade_model.errors import InputError
from cascade_model.likelihood import difference, monte_carlo, sequential
from cascade_model.model import vocabulary_logits
from cascade_model.passes import Runner
from cascade_model.sampler import denoise, drive, plan_completion
from cascade_model.sampling import SamplingParams
from tests.tiny_models import MASK, PAD, lively_model

PROMPT, ANSWER = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9]
BIDIRECTIONAL = {"attention": "bidirectional"}
AUTOREGRESSIVE = {"block_size": 1, "logits": "shifted", "first_place": "clean"}
KINDS = [
    {},
    {"logits": "shifted"},
    {"logits": "shifted", "first_place": "own"},
    {"logits": "shifted", "first_place": "noisy"},
    {"clean_half": "token_causal"},
    {"logits": "shifted", "clean_half": "token_causal"},
    {"block_size": 1},
    AUTOREGRESSIVE,
    BIDIRECTIONAL,
    BIDIRECTIONAL | {"logits": "shifted"},
    BIDIRECTIONAL | {"logits": "shifted", "first_place": "own"},
]


def decoded_log_probabilities(model, prompt, answer):
    """What decoding from left to right sees: finished blocks, the block's left, masks."""
    config, found = model.config, []
    size = config.block_size
    for index, token in enumerate(answer):
        known = prompt + answer[:index]
        place = len(known)
        if config.attention == "bidirectional":
            canvas = known + [MASK] * (len(answer) - index)
            first, mask = 0, None
        else:
            first = place // size * size
            canvas = known + [MASK] * (-(-(place + 1) // size) * size - place)
            mask = clean_mask(
                torch.zeros(1, len(canvas), dtype=torch.int32), size, config.clean_half
            )
            mask[..., first:, first:] = True
        row = place
        if config.logits == "shifted" and not (config.first_place == "own" and place == first):
            row = place - 1
        logits = model(
            torch.tensor([canvas]),
            torch.arange(len(canvas))[None],
            dense(mask),
            lambda hidden, head, row=row: vocabulary_logits(hidden[:, row], head, [PAD, MASK]),
        )
        found.append(float(logits[0].detach().log_softmax(-1)[token]))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sequential_is_what_left_to_right_decoding_gives_each_token(kind, rows):
    model = lively_model(**kind)
    found = sequential(model, PROMPT, ANSWER, rows_per_forward=rows)
    expected = decoded_log_probabilities(model, PROMPT, ANSWER)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Forced:
    """A strategy of the sampler that writes a given text from left to right and keeps its
    log-probabilities."""

    def __init__(self, text):
        self.text, self.found = text, []

    def _open(self, canvas, window):
        places = torch.arange(window.start, min(window.end, len(self.text)))
        return places[canvas[places] == MASK]

    def is_done(self, canvas, window):
        return len(self._open(canvas, window)) == 0

    def places(self, canvas, window):
        return self._open(canvas, window)

    def step(self, canvas, window, prediction):
        place = int(prediction.places[0])
        logits = prediction.logits[0].index_fill(0, torch.tensor([PAD, MASK]), float("-inf"))
        self.found.append(float(logits.log_softmax(-1)[self.text[place]]))
        return Change(prediction.places[:1], torch.tensor([self.text[place]]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sequential_is_what_the_sampler_itself_computes(kind):
    model, strategy = lively_model(**kind), Forced(PROMPT + ANSWER)
    params = SamplingParams(max_tokens=len(ANSWER), rule="sequential")
    plan = plan_completion(model.config, PROMPT, params)
    loop = denoise(plan.context, plan.canvas, plan.windows, strategy)
    for _ in drive(loop, Runner(model, len(plan.canvas))):
        pass
    found = torch.tensor(strategy.found, dtype=torch.float64)
    torch.testing.assert_close(found, sequential(model, PROMPT, ANSWER), rtol=1e-9, atol=1e-9)


def test_sequential_likelihoods_of_all_continuations_add_up_to_one():
    model = lively_model(vocab_size=5, mask_id=4, pad_id=3, eos_id=2, block_size=2)
    answers = itertools.product(range(3), repeat=3)
    total = sum(math.exp(float(sequential(model, [1], list(a)).sum())) for a in answers)
    assert total == pytest.approx(1, rel=1e-12)


def test_a_block_takes_one_sequence_for_each_of_its_places():
    model = lively_model()
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    sequential(model, PROMPT, ANSWER * 4, rows_per_forward=64)
    assert seen == [(4, 2 * 36)]


def test_an_autoregressive_model_takes_one_pass():
    model = lively_model(**AUTOREGRESSIVE)
    seen = []
    model.embed.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    found = sequential(model, PROMPT, ANSWER)
    assert seen == [(1, 13)]
    logits = model(
        torch.tensor([PROMPT + ANSWER]),
        torch.arange(13)[None],
        dense(torch.ones(13, 13, dtype=torch.bool).tril()[None, None]),
        lambda hidden, head: vocabulary_logits(hidden, head, [PAD, MASK]),
    ).detach()
    chain = logits[0, 5:-1].log_softmax(-1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0]
    torch.testing.assert_close(found, chain, rtol=1e-12, atol=1e-12)


def enumerated_bound(model, prompt, answer, unit):
    """The exact bound of one unit of unknown places: all counts, all subsets of each."""
    config, total = model.config, 0.0
    first = len(prompt) // config.block_size * config.block_size
    tail = -(len(prompt) + len(answer)) % config.block_size if unit == "block" else 0
    for count in range(1, len(answer) + 1):
        for chosen in itertools.combinations(range(len(answer)), count):
            noisy = [MASK if i in chosen else t for i, t in enumerate(answer)]
            canvas = prompt + noisy + [MASK] * tail
            mask = None
            if unit == "block":
                segments = torch.zeros(1, len(canvas), dtype=torch.int32)
                mask = clean_mask(segments, config.block_size, "block_causal")
                assert first + config.block_size == len(canvas)
            logits = model(
                torch.tensor([canvas]),
                torch.arange(len(canvas))[None],
                dense(mask),
                lambda hidden, head: vocabulary_logits(hidden[0], head, [PAD, MASK]),
            ).detach()
            values = logits.log_softmax(-1)
            nats = sum(float(values[len(prompt) + i, answer[i]]) for i in chosen)
            total += nats * len(answer) / count / math.comb(len(answer), count) / len(answer)
    return total


@pytest.mark.parametrize(
    ("kind", "unit", "answer"),
    [
        (BIDIRECTIONAL, "answer", [2, 6, 5, 3]),
        ({}, "block", [2, 6]),
        ({"block_size": 8}, "block", [2, 9]),
    ],
)
def test_monte_carlo_is_an_unbiased_estimate_of_the_exact_count_bound(kind, unit, answer):
    model = lively_model(**kind)
    found = monte_carlo(model, PROMPT, answer, num_groups=64, rows_per_forward=64, seed=1)
    exact = enumerated_bound(model, PROMPT, answer, unit)
    assert abs(found.mean - exact) <= 3 * found.standard_error + 1e-12
    assert len(found.groups) == 64


def test_blocks_add_up_given_the_clean_text_before_them():
    model = lively_model()
    prompt, answer = PROMPT + ANSWER[:2], [5, 3, 5, 8, 9, 7, 9, 3]
    both = monte_carlo(model, prompt, answer, num_groups=64, rows_per_forward=64)
    first = enumerated_bound(model, prompt, answer[:4], "block")
    second = enumerated_bound(model, prompt + answer[:4], answer[4:], "block")
    assert abs(both.mean - first - second) <= 3 * both.standard_error


def test_a_single_unknown_token_needs_one_sample_and_has_no_error():
    found = monte_carlo(lively_model(**BIDIRECTIONAL), PROMPT, [7])
    expected = sequential(lively_model(**BIDIRECTIONAL), PROMPT, [7])
    assert found.mean == pytest.approx(float(expected), rel=1e-12)
    assert found.standard_error == 0


def test_monte_carlo_of_an_autoregressive_model_is_its_likelihood():
    model = lively_model(**AUTOREGRESSIVE)
    found = monte_carlo(model, PROMPT, ANSWER)
    assert found.mean == pytest.approx(float(sequential(model, PROMPT, ANSWER).sum()), rel=1e-12)
    assert found.standard_error == 0


def test_compared_answers_share_their_masks_so_that_noise_cancels():
    model = lively_model(**BIDIRECTIONAL)
    left = monte_carlo(model, PROMPT, ANSWER, seed=3)
    right = monte_carlo(model, PROMPT, [*ANSWER[:-1], 10], seed=3)
    other = monte_carlo(model, PROMPT, [*ANSWER[:-1], 10], seed=4)
    same = difference(left, right)
    assert same.mean == pytest.approx(left.mean - right.mean)
    assert same.standard_error < 0.7 * difference(left, other).standard_error
    assert difference(left, left).standard_error == 0


def test_estimates_do_not_depend_on_how_rows_are_batched():
    model = lively_model()
    one = monte_carlo(model, PROMPT, ANSWER, num_groups=2, rows_per_forward=5)
    two = monte_carlo(model, PROMPT, ANSWER, num_groups=2, rows_per_forward=64)
    assert one.groups == pytest.approx(two.groups, rel=1e-12)


def test_what_cannot_be_scored_is_refused():
    model = lively_model(logits="shifted")
    with pytest.raises(InputError, match="give a prompt"):
        sequential(model, [], ANSWER)
    with pytest.raises(InputError, match="give a prompt"):
        monte_carlo(model, [], ANSWER)
    with pytest.raises(InputError, match="no tokens"):
        sequential(model, PROMPT, [])
    with pytest.raises(InputError, match="token id 99"):
        sequential(model, PROMPT, [99])
    assert len(sequential(lively_model(), [], ANSWER)) == len(ANSWER)
