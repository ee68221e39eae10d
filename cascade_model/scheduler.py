"""Continuous batching at the level of one forward pass.

Every running sequence stands at some block and step and wants one `Pass`. A round runs as many of
these together as the row budget allows: denoising and commits first, in turn, then chunks of long
prompts. First done, first out. Keys and values live in runs of pages; when they run short, known
prefixes go first, then the youngest sequence gives its pages up and computes them again later.
What a sequence decodes depends on none of this.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.config import check
from cascade_model.networks import Network
from cascade_model.packed import pack
from cascade_model.pages import PageArena, Run
from cascade_model.passes import Pass
from cascade_model.prefix_cache import PrefixCache
from cascade_model.ragged import Job, run_together
from cascade_model.sampler import DecodedBlock, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits of one engine."""

    max_sequences: int = 32
    """Sequences that run at once."""
    rows_per_round: int = 512
    """Rows of one forward pass, unless a single pass that cannot be cut needs more."""
    cache_bytes: int = 1 << 30
    """Keys and values of all sequences and known prefixes."""
    prefix_share: float = 0.25
    """Of the pages, how many known prefixes may hold; 0 switches the prefix cache off."""
    page_tokens: int = 32
    """Rounded up to whole blocks."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "rows_per_round", "cache_bytes", "page_tokens"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 <= self.prefix_share < 1.0,
            f"prefix_share={self.prefix_share} must be at least 0 and below 1; use 0.25",
        )


@dataclass(slots=True)
class Counters:
    """What an engine did so far."""

    rounds: int = 0
    passes: int = 0
    rows: int = 0
    prefix_tokens: int = 0
    """Prompt tokens that the prefix cache spared."""
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class Running:
    """One sequence in the engine."""

    plan: Plan
    loop: Generator[Pass | Window, Tensor, None]
    deliver: Callable[[DecodedBlock], None]
    """Called with each block as soon as it is done."""
    fail: Callable[[Exception], None]
    """Called with the error that ended this sequence alone."""
    wanted: Pass | None = None
    """The pass that the sequence waits for; none before its first."""
    runs: dict[int, Run] = field(default_factory=dict)
    """Its pages, per stream."""
    written: dict[int, int] = field(default_factory=dict)
    """Per stream, how many leading entries are in its pages."""
    published: int = 0
    """Committed tokens that the prefix cache was offered."""
    was_passed_over: bool = False
    """Had no room in the last round; goes first in the next."""
    is_done: bool = False

    @property
    def rows(self) -> int:
        """Rows of the pass it waits for."""
        return 0 if self.wanted is None else len(self.wanted.tokens)


def _raise(error: Exception) -> None:
    raise error


class Scheduler:
    """Sequences of one model; not thread-safe, one thread calls `step` over and over.

    The model is packed: it can be decoded with, but no longer trained or saved.
    """

    def __init__(self, model: Network, config: SchedulerConfig | None = None) -> None:
        pack(model)
        self.model, self.config = model, config or SchedulerConfig()
        self.block_size = model.config.block_size
        self.counters = Counters()
        self.arena = arena_of(model, self.config)
        known_pages = int(self.arena.num_pages * self.config.prefix_share)
        self.prefixes = PrefixCache(self.arena, known_pages)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []

    def check(self, plan: Plan) -> None:
        """Refuse (`InputError`) a request that can never fit; safe from any thread."""
        tokens, size = len(plan.canvas) * plan.num_streams, self.arena.page_tokens
        needed = self.arena.pages_for(len(plan.canvas)) * plan.num_streams
        check(
            needed <= self.arena.num_pages,
            f"the request needs keys and values of {tokens} tokens and cache_bytes="
            f"{self.config.cache_bytes} holds {self.arena.num_pages * size}; shorten the request "
            "or raise cache_bytes",
        )

    def submit(
        self,
        plan: Plan,
        deliver: Callable[[DecodedBlock], None],
        fail: Callable[[Exception], None] = _raise,
    ) -> Running:
        """Queue a request that `check` let pass."""
        sequence = Running(plan=plan, loop=plan.loop(), deliver=deliver, fail=fail)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Running) -> None:
        """Forget a sequence and free its pages; at any time between two steps, more than once."""
        sequence.is_done = True
        sequence.loop.close()
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> bool:
        """One round: admit, run one forward pass, hand out its logits. False when idle."""
        self._admit()
        chosen = self._choose()
        if not chosen:
            if self.running:
                raise RuntimeError("no running sequence has room for its next pass")
            return False
        jobs = [Job(piece, sequence.runs[piece.stream]) for sequence, piece in chosen]
        self.counters.rounds += 1
        self.counters.passes += len(jobs)
        self.counters.rows += sum(len(job.wanted.tokens) for job in jobs)
        answers = run_together(self.model, self.arena, jobs)
        for (sequence, piece), logits in zip(chosen, answers, strict=True):
            self._answer(sequence, piece, logits)
        return True

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there is room for their first pass."""
        while self.waiting and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            if sequence.wanted is None:
                self._advance(sequence, None)
                self._use_known_prefix(sequence)
            if not sequence.is_done and not self._has_room(sequence, may_preempt=False):
                return
            self.waiting.popleft()
            if not sequence.is_done:
                self.running.append(sequence)

    def _choose(self) -> list[tuple[Running, Pass]]:
        """What runs in this round: short passes first, so that no long prompt holds them up."""
        budget = self.config.rows_per_round
        chosen: list[tuple[Running, Pass]] = []
        for sequence in sorted(self.running, key=lambda s: (not s.was_passed_over, s.rows)):
            if sequence not in self.running:  # preempted by one before it
                continue
            has_room = self._has_room(sequence, may_preempt=not chosen)
            piece = self._next_piece(sequence, max(budget, 1)) if has_room else None
            fits = piece is not None and (not chosen or len(piece.tokens) <= budget)
            sequence.was_passed_over = not fits
            if piece is not None and fits:
                chosen.append((sequence, piece))
                budget -= len(piece.tokens)
        return chosen

    def _next_piece(self, sequence: Running, budget: int) -> Pass:
        """Entries that a preempted sequence lost, a chunk of what it waits for, or all of it."""
        wanted = sequence.wanted
        assert wanted is not None
        written = sequence.written.get(wanted.stream, 0)
        if written < wanted.start:
            plan = sequence.plan
            lost = plan.context.rewrite(plan.canvas, wanted.stream, wanted.start)
            return lost.behind(written).chunk(budget, self.block_size)
        return wanted.chunk(budget, self.block_size)

    def _answer(self, sequence: Running, done: Pass, logits: Tensor) -> None:
        """Note what was written; when the wanted pass is complete, let the sequence go on."""
        wanted, end = sequence.wanted, done.end
        assert wanted is not None
        sequence.written[done.stream] = end
        if end <= wanted.start:
            return
        if end < wanted.end:
            sequence.wanted = wanted.behind(end)
            return
        settled = sequence.plan.context.committed  # before the next pass is planned
        self._advance(sequence, logits)
        self._publish(sequence, settled)
        if sequence.is_done:
            self.cancel(sequence)

    def _advance(self, sequence: Running, reply: Tensor | None) -> None:
        """Run the sequence's own code until it wants a pass or is done; its failure is its own."""
        try:
            event = sequence.loop.send(reply)  # type: ignore[arg-type]
            while isinstance(event, Window):
                block = sequence.plan.block(event)
                sequence.is_done = block.finish_reason is not None
                sequence.deliver(block)
                if sequence.is_done:
                    return
                event = next(sequence.loop)
            sequence.wanted = event
        except StopIteration:
            sequence.is_done = True
        except Exception as error:
            sequence.is_done = True
            sequence.fail(error)

    def _use_known_prefix(self, sequence: Running) -> None:
        """Copy the keys and values of a beginning that was computed before."""
        wanted = sequence.wanted
        if wanted is None or wanted.stream or wanted.start or sequence.plan.num_streams > 1:
            return
        ends = wanted.cuts(self.block_size)
        found = self.prefixes.find(wanted.tokens[: ends[-1] if ends else 0])
        run = None if found is None else self.arena.take(self._pages_of(sequence))
        if found is None or run is None:
            return
        source, count = found
        self.arena.copy(source, run, count)
        sequence.runs[0], sequence.written[0] = run, count
        sequence.wanted, sequence.published = wanted.behind(count), count
        self.counters.prefix_tokens += count

    def _publish(self, sequence: Running, committed: int) -> None:
        """Offer committed tokens to those that come: the prompt's at once, the rest at the end."""
        is_news = committed > sequence.published and (sequence.is_done or not sequence.published)
        if is_news and 0 in sequence.runs and sequence.plan.num_streams == 1:
            tokens = sequence.plan.canvas[:committed].tolist()
            self.prefixes.publish(tokens, sequence.runs[0])
            sequence.published = committed

    def _pages_of(self, sequence: Running) -> int:
        """Pages of one stream when everything is written."""
        return self.arena.pages_for(len(sequence.plan.canvas))

    def _has_room(self, sequence: Running, *, may_preempt: bool) -> bool:
        """Make the pages of the wanted pass long enough, at others' cost where that is allowed."""
        wanted = sequence.wanted
        assert wanted is not None
        need = self.arena.pages_for(max(wanted.visible, wanted.end))
        run = sequence.runs.get(wanted.stream)
        if run is not None and run.count >= need:
            return True
        if sequence.plan.num_streams > 1 or not sequence.plan.context.can_rewrite:
            return self._take_all(sequence, may_preempt)
        for count in (min(self._pages_of(sequence), 2 * need), need):
            if self._grow(sequence, wanted.stream, count):
                return True
        while self.prefixes.evict() or (may_preempt and self._preempt_other(sequence)):
            if self._grow(sequence, wanted.stream, need):
                return True
        return self._start_over(sequence, wanted.stream, need)

    def _take_all(self, sequence: Running, may_preempt: bool) -> bool:
        """Everything at once, for a sequence of two streams or one that cannot start over: it never
        grows, so it can never be stuck between its own runs."""
        count = self._pages_of(sequence)
        self._release(sequence)
        while True:
            runs = [self.arena.take(count) for _ in range(sequence.plan.num_streams)]
            taken = [run for run in runs if run is not None]
            if len(taken) == len(runs):
                sequence.runs = dict(enumerate(taken))
                return True
            for run in taken:
                self.arena.give_back(run)
            if not (self.prefixes.evict() or (may_preempt and self._preempt_other(sequence))):
                return False

    def _grow(self, sequence: Running, stream: int, count: int) -> bool:
        """Move to a longer run, if there is one."""
        new = self.arena.take(count)
        if new is None:
            return False
        old = sequence.runs.get(stream)
        if old is not None:
            self.arena.copy(old, new, old.count * self.arena.page_tokens)
            self.arena.give_back(old)
        sequence.runs[stream] = new
        return True

    def _start_over(self, sequence: Running, stream: int, count: int) -> bool:
        """The last resort in a scattered arena: give the short run up, and compute it again."""
        old = sequence.runs.get(stream)
        if old is None or not sequence.plan.context.can_rewrite:
            return False
        self.arena.give_back(sequence.runs.pop(stream))
        sequence.written.pop(stream, None)
        return self._grow(sequence, stream, count)

    def _preempt_other(self, sequence: Running) -> bool:
        """Send the youngest other sequence that can compute its pages again back to the queue."""
        for other in reversed(self.running):
            if other is not sequence and other.runs and other.plan.context.can_rewrite:
                self._release(other)
                self.running.remove(other)
                self.waiting.appendleft(other)
                self.counters.preemptions += 1
                return True
        return False

    def _release(self, sequence: Running) -> None:
        for run in sequence.runs.values():
            self.arena.give_back(run)
        sequence.runs.clear()
        sequence.written.clear()


def arena_of(model: Network, config: SchedulerConfig) -> PageArena:
    """The pages that `cache_bytes` buys, each of whole blocks."""
    shape, weight = model.config, next(model.parameters())
    size = shape.block_size if shape.attention == "block_causal" else 1
    page = -(-config.page_tokens // size) * size
    numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * page
    page_bytes = numbers * weight.element_size()
    check(
        config.cache_bytes >= page_bytes,
        f"cache_bytes={config.cache_bytes} holds not one page of {page} tokens, which takes "
        f"{page_bytes}; raise cache_bytes",
    )
    num_pages = config.cache_bytes // page_bytes
    return PageArena(
        shape, num_pages=num_pages, page_tokens=page, dtype=weight.dtype, device=weight.device
    )
