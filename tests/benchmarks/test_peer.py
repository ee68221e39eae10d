"""The peer's loop gets our network itself: the same logits as one pass over everything."""

import torch

from cascade_model.attention import grouped_clean
from tests.benchmarks.engine import block_model
from tests.benchmarks.peer import AsSdar


def test_block_after_block_gives_the_logits_of_one_whole_pass():
    network = block_model(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
                          intermediate_size=64)  # fmt: skip
    tokens = torch.tensor([[5, 9, 2, 11, 4, 4, 7, 3, 8, 1, 6, 2]])
    places, visible = torch.arange(12)[None], torch.ones(3, 3).tril()
    mask = visible.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1)[None]
    attend = grouped_clean(torch.zeros_like(tokens, dtype=torch.int32), 4, "block_causal")
    with torch.no_grad():
        whole = network(tokens, places, attend, lambda hidden, head: head(hidden))
        model, pieces = AsSdar(network, 12), []
        for start, end in ((0, 8), (8, 12), (8, 12)):  # a block's steps write the same rows again
            found = model.model(
                input_ids=tokens[:, start:end],
                attention_mask=mask[:, start:end, :end],
                position_ids=places[:, start:end],
            )
            pieces.append(model.lm_head(found.last_hidden_state))
    assert model.passes == 3
    torch.testing.assert_close(torch.cat(pieces[:2], dim=1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(pieces[2], whole[:, 8:], rtol=0, atol=1e-5)
