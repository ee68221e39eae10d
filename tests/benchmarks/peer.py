"""`make bench-peer`: a published engine's loop and ours, the same weights, greedy, in turns.

`ollada` (MIT, on PyPI) decodes SDAR with a cache of its own loop: every block is denoised, then fed
once more to store its keys and values. Its function is called as it stands, around our network: two
lines of its interface, no server. Two things are replaced in it and no more. Its draw from the
softmax becomes the argmax with its own probability, so that both loops must write the same tokens.
And keys and values go to our preallocated cache instead of one that is concatenated anew in every
pass, which is in its favour.
"""

import argparse
import copy
import importlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cascade_model.attention import dense
from cascade_model.engine_config import EngineConfig
from cascade_model.kv_cache import KVCache
from cascade_model.model import Transformer
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from tests.benchmarks.engine import block_model, in_turns
from tests.benchmarks.report import Row, publish

PROMPT, BLOCK = 64, 4
ABSENT = "engine.peer: skipped, ollada is not installed; `make bench-peer` installs and runs it"


class AsSdar:
    """Our network behind the interface that ollada's loop drives: `model`, `lm_head`, `device`."""

    device = torch.device("cpu")

    def __init__(self, network: Transformer, capacity: int) -> None:
        self.network, self.lm_head, self.passes = network, network.head, 0
        weight = network.embed.weight
        self.cache = KVCache(network.config, capacity, weight.dtype, weight.device)

    def eval(self) -> None:
        self.network.eval()

    def model(
        self, *, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_
    ) -> SimpleNamespace:
        """Rows [1, r] that see what `attention_mask` [1, r, visible] shows: hidden states.

        What a pass without `store_kv` leaves in the cache is written over by the next one of its
        block, so that every pass may store.
        """
        self.passes += 1
        rows, visible = attention_mask.shape[1:]
        mask = None if bool(attention_mask.all()) else attention_mask[:, None].bool()
        slot = self.cache.slot(visible - rows, rows, visible)
        hidden = self.network(
            input_ids, position_ids, dense(mask), lambda hidden, head: hidden, slot
        )
        return SimpleNamespace(last_hidden_state=hidden)


def peer() -> Any:
    """ollada's loop, greedy; `SystemExit` 0 with a line where it is not installed."""
    try:
        version("ollada")
    except PackageNotFoundError:
        print(ABSENT)
        raise SystemExit(0) from None
    module: Any = importlib.import_module("ollada.adapters.sdar")
    module._sample = greedy
    return module


def greedy(logits: Tensor, **_) -> tuple[Tensor, Tensor]:
    """The most probable tokens and their probabilities."""
    shares, tokens = logits.softmax(dim=-1).max(dim=-1)
    return tokens, shares


def rows(module: Any, rounds: int, gen: int) -> Iterator[Row]:
    """Time and passes of both loops at K = 1, 2, 4."""
    network = block_model(hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64,
                          intermediate_size=768, block_size=BLOCK)  # fmt: skip
    plain = copy.deepcopy(network)  # the scheduler packs its own
    prompt = torch.randint(0, 8000, (PROMPT,), generator=torch.Generator().manual_seed(7))
    for steps in (1, 2, 4):
        params = SamplingParams(
            max_tokens=gen, rule="low_confidence", steps_per_block=steps, stop_at_eos=False
        )
        # Made once, as a server does; no known prefixes, since the same prompt comes again.
        scheduler = Scheduler(network, EngineConfig(prefix_share=0.0, cache_bytes=1 << 26))
        texts, passes = {}, {}

        def ours(params=params, scheduler=scheduler, texts=texts, passes=passes) -> None:
            text, before = [], scheduler.counters.passes
            plan = plan_completion(network.config, prompt.tolist(), params)
            scheduler.submit(plan, lambda block: text.extend(block.tokens))
            while scheduler.step():
                pass
            texts["ours"], passes["ours"] = text, scheduler.counters.passes - before

        def theirs(steps=steps, texts=texts, passes=passes) -> None:
            model = AsSdar(plain, PROMPT + gen)
            canvas = module._block_diffusion_generate(
                model,
                prompt[None],
                network.config.mask_id,
                gen_length=gen,
                block_length=BLOCK,
                denoising_steps=steps,
                remasking_strategy="low_confidence_static",
                mask_contract="tensor",
            )
            texts["theirs"], passes["theirs"] = canvas[0, PROMPT:].tolist(), model.passes

        found = in_turns(rounds, ours=ours, theirs=theirs)
        if texts["ours"] != texts["theirs"]:
            raise SystemExit(f"engine.peer K={steps}: the two loops gave different tokens")
        name = f"engine.peer ollada {version('ollada')}, B={BLOCK} K={steps}, {gen} tokens"
        yield Row(f"{name}: its time / ours", found["theirs"] / found["ours"], "x")
        yield Row(f"{name}: ours", gen / found["ours"], "tokens/s")
        share = f"{passes['theirs']}/{passes['ours']}"
        yield Row(f"{name}: its passes / ours", passes["theirs"] / passes["ours"], share)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=512)
    options = parser.parse_args()
    found = list(rows(peer(), options.rounds, options.new_tokens))
    return publish("peer", found, threads=torch.get_num_threads(), dtype="float32", seed=0)


if __name__ == "__main__":
    raise SystemExit(main())
