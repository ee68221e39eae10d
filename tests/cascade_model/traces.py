"""Requests in a scheduler, with the bits of every logit that they were given."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from cascade_model.engine_config import EngineConfig
from cascade_model.networks import Network
from cascade_model.sampler import DecodedBlock, Plan, plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Ask:
    """A request."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of a request."""

    tokens: tuple[int, ...]
    logits: tuple[str, ...]
    """One digest for each pass: of the bits of every logit that was read."""
    margin: float
    """Of its closest decision; see `cascade_model.decisions`."""


class Recorded(Plan):
    """A plan that keeps what its passes are answered."""

    replies: list[Tensor]

    def loop(self):
        inner, reply = super().loop(), None
        while True:
            try:
                event = inner.send(reply)  # type: ignore[arg-type]
            except StopIteration:
                return
            reply = yield event
            if reply is not None:
                self.replies.append(reply.clone())


class Watch:
    """A request in a scheduler, and what was seen of it."""

    def __init__(
        self,
        scheduler: Scheduler,
        ask: Ask,
        committed: Sequence[int] = (),
        steps_made: int = 0,
    ) -> None:
        weight = next(scheduler.model.parameters())
        plan = plan_completion(
            scheduler.model.config,
            list(ask.prompt),
            ask.params,
            0,
            weight.device,
            committed=committed,
            steps_made=steps_made,
        )
        self.plan = Recorded(**{field.name: getattr(plan, field.name) for field in fields(plan)})
        self.plan.replies = []
        self.blocks: list[DecodedBlock] = []
        self.had_pages = self.was_preempted = False
        self.company = 0
        scheduler.check(self.plan)
        self.sequence = scheduler.submit(self.plan, self.blocks.append)

    def look(self, scheduler: Scheduler) -> None:
        """Between two rounds."""
        self.was_preempted |= self.had_pages and self.sequence in scheduler.waiting
        self.had_pages |= bool(self.sequence.runs)
        self.company = max(self.company, len(scheduler.running))

    def trace(self) -> Trace:
        """Once it is done."""
        assert self.sequence.is_done
        read = [logits for logits in self.plan.replies if len(logits)]
        bits = [hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest() for logits in read]
        tokens = tuple(token for block in self.blocks for token in block.tokens)
        margins = [block.margin for block in self.blocks if block.margin is not None]
        return Trace(tokens, tuple(bits), min(margins, default=math.nan))


def page_tokens(model: Network) -> int:
    """Two blocks, so that short requests have several pages."""
    return max(4, 2 * model.config.block_size)


def scheduler_of(model: Network, pages: int | None = None, **settings: Any) -> Scheduler:
    """An engine whose arena has this many pages; unless told, room for 6400 tokens."""
    shape, page = model.config, page_tokens(model)
    pages = pages or 6400 // page
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    size = pages * page * token * next(model.parameters()).element_size()
    scheduler = Scheduler(model, EngineConfig(cache_bytes=size, page_tokens=page, **settings))
    assert scheduler.arena.num_pages == pages
    return scheduler


def finish(scheduler: Scheduler, watches: Sequence[Watch]) -> None:
    """Run to the end."""
    while scheduler.step():
        for watch in watches:
            watch.look(scheduler)


def run(
    model: Network, watched: Sequence[Ask], others: Sequence[Ask] = (), **settings: Any
) -> tuple[Scheduler, list[Watch]]:
    """Decode requests in one engine, the others submitted before them."""
    scheduler = scheduler_of(model, **settings)
    for other in others:
        Watch(scheduler, other)
    watches = [Watch(scheduler, ask) for ask in watched]
    finish(scheduler, watches)
    return scheduler, watches
