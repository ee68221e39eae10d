"""The arms of `text`: ways to write on from prompts, each a function of (prompts, new tokens)."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cascade_model.contexts import BlockCausal
from cascade_model.engine_config import EngineConfig
from cascade_model.families import export
from cascade_model.networks import Network
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from cascade_model.weights import load_model, read_published

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6)
PARENT, PUBLISHED = "parent, B = 1", "parent, transformers"


@dataclass(frozen=True, slots=True)
class Written:
    """What an arm wrote behind some prompts, decoding them together."""

    texts: list[list[int]]
    passes: int
    """Forward passes, each counted once for every prompt that it served."""
    rows: int
    """Rows fed to the network."""


Write = Callable[[list[list[int]], int], Written]


def arms_of(model: Network, parent: Network, folder: str, dtype: torch.dtype) -> dict[str, Write]:
    """Every arm by name; `folder` is the parent's."""
    arms = {
        PARENT: ours(parent, SamplingParams()),
        PUBLISHED: by_transformers(folder, dtype),
        "one token a step": ours(model, SamplingParams(rule="low_confidence")),
    }
    for is_first_alone, ending in ((True, ""), (False, ", first step whole")):
        for threshold in THRESHOLDS:
            params = SamplingParams(confidence_threshold=threshold)
            write = ours(model, params, is_first_alone=is_first_alone)
            arms[f"confidence {threshold:g}{ending}"] = write
    return arms


def ours(model: Network, params: SamplingParams, *, is_first_alone: bool = True) -> Write:
    """This project's engine: its scheduler, without the thread and the text stream around it."""
    # No known prefixes: every call pays for its prompts.
    scheduler = Scheduler(model, EngineConfig(prefix_share=0.0, cache_bytes=1 << 26))

    def write(prompts: list[list[int]], count: int) -> Written:
        before = replace(scheduler.counters)
        whole = replace(params, max_tokens=count, stop_at_eos=False)  # all texts of one length
        texts: list[list[int]] = [[] for _ in prompts]
        for prompt, text in zip(prompts, texts, strict=True):
            plan = plan_completion(model.config, prompt, whole)
            assert isinstance(plan.context, BlockCausal)
            plan.context.is_first_alone = is_first_alone
            scheduler.submit(plan, lambda block, text=text: text.extend(block.tokens))
        while scheduler.step():
            pass
        after = scheduler.counters
        return Written(texts, after.passes - before.passes, after.rows - before.rows)

    return write


def by_transformers(folder: str, dtype: torch.dtype) -> Write:
    """`generate` of transformers with the parent's weights, greedy, with its cache."""
    model = as_published(folder, dtype)
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def write(prompts: list[list[int]], count: int) -> Written:
        ids = torch.tensor(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        texts = found[:, ids.shape[1] :].tolist()
        return Written(texts, len(texts) * count, ids.numel() + len(texts) * (count - 1))

    return write


def as_published(folder: str, dtype: torch.dtype) -> Any:
    """The parent as transformers reads it, from the layout in which it was published."""
    from transformers import AutoModelForCausalLM

    origin = read_published(folder)
    if origin is None:
        raise SystemExit(f"PARENT={folder} was made from no published checkpoint; convert one")
    network, tokenizer = load_model(folder)
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "published"
        export(network, target, origin.config, dtypes=origin.dtypes, tokenizer=tokenizer)
        return AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
