"""Who sees whom in training, and the grouped way against the dense oracle."""

import pytest
import torch

from cascade_model.attention import (
    clean_mask,
    dense,
    grouped_clean,
    grouped_training,
    prefix_mask,
    training_mask,
)


def picture(mask: torch.Tensor) -> list[str]:
    return ["".join("1" if seen else "." for seen in row) for row in mask[0, 0].tolist()]


def one_document(length: int) -> torch.Tensor:
    return torch.zeros(1, length, dtype=torch.int32)


def test_the_doubled_mask_of_two_blocks_of_two():
    assert picture(training_mask(one_document(4), 2, "block_causal")) == [
        "11......",
        "11......",
        "..1111..",
        "..1111..",
        "....11..",
        "....11..",
        "....1111",
        "....1111",
    ]


def test_block_size_one_is_causal_on_the_clean_half_and_self_plus_earlier_on_the_noisy():
    assert picture(training_mask(one_document(3), 1, "block_causal")) == [
        "1.....",
        ".1.1..",
        "..111.",
        "...1..",
        "...11.",
        "...111",
    ]


def test_one_block_as_long_as_the_sequence_sees_itself_and_nothing_clean():
    mask = training_mask(one_document(4), 4, "block_causal")[0, 0]
    assert mask[:4, :4].all()
    assert not mask[:4, 4:].any()


def test_a_token_causal_clean_half_sees_no_token_ahead():
    mask = training_mask(one_document(6), 3, "token_causal")[0, 0, 6:, 6:]
    assert torch.equal(mask, torch.ones(6, 6, dtype=torch.bool).tril())


def test_documents_do_not_see_each_other():
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    for mask in (
        training_mask(segments, 2, "block_causal"),
        clean_mask(segments, 2, "token_causal"),
    ):
        columns = segments.repeat(1, mask.shape[-1] // 8)
        foreign = columns[:, :, None] != columns[:, None, :]
        assert not (mask[:, 0] & foreign).any()


def test_a_prefix_mask_shows_each_row_what_its_limit_says():
    assert prefix_mask(torch.tensor([5, 5, 5]), 5) is None
    mask = prefix_mask(torch.tensor([3, 4, 5]), 5)
    assert mask is not None
    assert picture(mask) == ["111..", "1111.", "11111"]


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
@pytest.mark.parametrize(("block_size", "group"), [(1, 8), (4, 8), (4, 4), (8, 5), (24, 64)])
@pytest.mark.parametrize("noisy", [True, False])
def test_grouped_attention_equals_the_dense_oracle_forward_and_backward(
    clean_half, block_size, group, noisy
):
    generator = torch.Generator().manual_seed(block_size + group)
    segments = torch.zeros(2, 24, dtype=torch.int32)
    segments[1, 8:] = 1  # two documents in the second row
    if noisy:
        oracle = dense(training_mask(segments, block_size, clean_half))
        attend = grouped_training(segments, block_size, clean_half, group)
    else:
        oracle = dense(clean_mask(segments, block_size, clean_half))
        attend = grouped_clean(segments, block_size, clean_half, group)
    length = 48 if noisy else 24
    results = []
    inputs = [
        torch.randn(2, heads, length, 4, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    ]
    slope = torch.randn(2, 4, length, 4, dtype=torch.float64, generator=generator)
    for way in (oracle, attend):
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
        out = way(q, k, v)
        (out * slope).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_without_clean_queries_the_noisy_half_stays_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 4, generator=generator) for _ in range(3))
    attend = grouped_training(one_document(8), 2, "block_causal", 4)
    torch.testing.assert_close(attend(q[:, :, :8], k, v), attend(q, k, v)[:, :, :8])
