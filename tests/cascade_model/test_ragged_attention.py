"""Both ways to attend in a ragged pass give what a dense mask gives."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from cascade_model.pages import PageArena
from cascade_model.ragged_attention import Piece, attention_of, by_piece, by_varlen
from tests.tiny_models import tiny_config

HEADS, KV_HEADS, SIZE = 6, 2, 16


def some_pieces(dtype: torch.dtype, device: str) -> tuple[PageArena, list[Piece]]:
    """Whole blocks, a token-causal block and a lone row, of three sequences in an arena."""
    config = tiny_config(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=SIZE, hidden_size=96)
    arena = PageArena(config, num_pages=16, page_tokens=4, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(arena.entries.shape, generator=generator)
    arena.entries.copy_(drawn.to(dtype))
    first, second, third = arena.take(3), arena.take(5), arena.take(2)
    assert first is not None
    assert second is not None
    assert third is not None
    return arena, [
        Piece(second, [16] * 4),
        Piece(second, [20] * 3),
        Piece(first, [5, 6, 7, 8]),
        Piece(third, [1]),
    ]


def dense(arena: PageArena, pieces: list[Piece], q: torch.Tensor, layer: int) -> torch.Tensor:
    """The same by one row at a time, in float64."""
    rows = []
    for row, (run, limit) in enumerate((p.run, limit) for p in pieces for limit in p.limits):
        start = run.first * arena.page_tokens
        keys, values = arena.entries[:, layer, start : start + limit].double().transpose(1, 2)
        part = F.scaled_dot_product_attention(
            q[0, :, row : row + 1].double(), keys, values, enable_gqa=True
        )
        rows.append(part)
    return torch.cat(rows, dim=1)[None]


def queries(dtype: torch.dtype, device: str, added: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((1, HEADS, 12 + added, SIZE), generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("added", [0, 4])
def test_attention_by_piece_is_that_of_each_row(added):
    arena, pieces = some_pieces(torch.float64, "cpu")
    q = queries(torch.float64, "cpu", added)
    for layer in (0, 1):
        found = attention_of(arena, pieces)(q, layer)
        assert found.shape == q.shape
        expected = dense(arena, pieces, q, layer)
        torch.testing.assert_close(found[:, :, :12], expected, rtol=1e-12, atol=1e-12)


def test_one_piece_alone():
    arena, pieces = some_pieces(torch.float64, "cpu")
    q = queries(torch.float64, "cpu", 0)[:, :, :4]
    found = by_piece(arena, pieces[:1])(q, 1)
    torch.testing.assert_close(found, dense(arena, pieces[:1], q, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", [by_piece, by_varlen])
def test_rows_that_nobody_asked_for_keep_their_shape(way):
    arena, _ = some_pieces(torch.float64, "cpu")
    q = queries(torch.float64, "cpu", 0)
    assert way(arena, [])(q, 0).shape == q.shape


def plain_varlen(q, k, v, query_starts, key_starts, max_q, max_k, *, seqused_k, **options):
    """What `varlen_attn` is documented to do, in plain torch: for the indices, not the kernel."""
    assert options == {"enable_gqa": True, "num_splits": 1}
    parts = []
    for number, used in enumerate(seqused_k.tolist()):
        rows = slice(*query_starts[number : number + 2].tolist())
        start = int(key_starts[number])
        assert rows.stop - rows.start <= max_q
        assert used <= max_k
        q_part, k_part, v_part = (
            x.transpose(0, 1) for x in (q[rows], k[start : start + used], v[start : start + used])
        )
        done = F.scaled_dot_product_attention(q_part, k_part, v_part, enable_gqa=True)
        parts.append(done.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("added", [0, 4])
def test_the_kernel_for_many_lengths_is_asked_for_the_same_rows_and_keys(monkeypatch, added):
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    arena, pieces = some_pieces(torch.float64, "cpu")
    q = queries(torch.float64, "cpu", added)
    found = by_varlen(arena, pieces)(q, 1)
    assert found.shape == q.shape
    expected = dense(arena, pieces, q, 1)
    torch.testing.assert_close(found[:, :, :12], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gpu_kernel_gives_the_same(dtype):
    arena, pieces = some_pieces(dtype, "cuda")
    q = queries(dtype, "cuda", 4)
    found = attention_of(arena, pieces)(q, 1)
    expected = dense(arena, pieces, q, 1)
    torch.testing.assert_close(found[:, :, :12].double(), expected, rtol=2e-2, atol=2e-2)
    alone = attention_of(arena, pieces[1:2])(q[:, :, 4:7], 1)
    assert torch.equal(alone, found[:, :, 4:7])
