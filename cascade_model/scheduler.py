"""Continuous batching at the level of one forward pass.

Every running sequence stands at some block and step and wants one `Pass`. A round runs as many of
these together as the row budget allows: denoising and commits first, then chunks of long prompts,
each in its turn. First done, first out. A beginning that another sequence has computed, or is just
computing, is copied. Keys and values live in runs of pages; when they run short, known prefixes go
first, then the youngest sequence gives its pages up and computes them again later. What a sequence
decodes depends on none of this.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from cascade_model.counters import Counters
from cascade_model.engine_config import EngineConfig, Room, room_of
from cascade_model.errors import DoesNotFit, InputError
from cascade_model.networks import Network
from cascade_model.packed import pack
from cascade_model.pages import PageArena, Run
from cascade_model.passes import Pass
from cascade_model.prefix_cache import Beginning, PrefixCache
from cascade_model.ragged import Job, run_together
from cascade_model.running import Running
from cascade_model.sampler import DecodedBlock, Plan


def _raise(error: Exception) -> None:
    raise error


class Scheduler:
    """Sequences of one model; not thread-safe, one thread calls `step` over and over.

    The model is packed: it can be decoded with, but no longer trained or saved.
    """

    def __init__(self, model: Network, config: EngineConfig | None = None) -> None:
        pack(model)
        self.model, self.config = model, config or EngineConfig()
        self.block_size = model.config.block_size
        self.counters = self._sums = Counters()
        """As of the last round; never written to once it stands here, so any thread may read it."""
        self.arena = arena_of(model, self.config)
        self.room = Room(page_tokens=self.arena.page_tokens, num_pages=self.arena.num_pages)
        known_pages = int(self.arena.num_pages * self.config.prefix_share)
        self.prefixes = PrefixCache(self.arena, known_pages)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._number = 0
        self._note()

    def check(self, plan: Plan) -> None:
        """Refuse (`DoesNotFit`) a request that can never fit; safe from any thread."""
        if len(plan.canvas) > self.room.longest(plan.num_streams):
            raise DoesNotFit(
                f"the request needs keys and values of {len(plan.canvas) * plan.num_streams} "
                f"tokens and cache_bytes={self.config.cache_bytes} holds {self.room.longest()}; "
                "shorten the request or raise cache_bytes"
            )

    def submit(
        self,
        plan: Plan,
        deliver: Callable[[DecodedBlock], None],
        fail: Callable[[Exception], None] = _raise,
    ) -> Running:
        """Queue a request that `check` let pass."""
        self._number += 1
        sequence = Running(
            plan=plan, loop=plan.loop(), deliver=deliver, fail=fail, number=self._number
        )
        self.waiting.append(sequence)
        self._note()
        return sequence

    def cancel(self, sequence: Running) -> None:
        """Forget a sequence; at any time between two steps, more than once. Its pages are free, or
        known prefixes."""
        sequence.is_done = True
        sequence.loop.close()
        self._leave_behind(sequence)
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._note()

    def step(self) -> bool:
        """One round: admit, run one forward pass, hand out its logits. False when idle."""
        try:
            return self._round()
        finally:
            self._note()

    def _round(self) -> bool:
        self._admit()
        self._copy_beginnings()
        chosen = self._choose()
        if not chosen:
            if self.running:
                raise RuntimeError("no running sequence has room for its next pass")
            return False
        jobs = [Job(piece, sequence.runs[piece.stream]) for sequence, piece in chosen.items()]
        self._sums.rounds += 1
        self._sums.passes += len(jobs)
        self._sums.rows += sum(len(job.wanted.tokens) for job in jobs)
        answers = run_together(self.model, self.arena, jobs)
        for (sequence, piece), logits in zip(chosen.items(), answers, strict=True):
            self._answer(sequence, piece, logits)
        return True

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there is room for their first pass."""
        while self.waiting and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            if sequence.wanted is None:
                self._sums.tokens += sequence.advance(None)
                sequence.beginning = self._beginning(sequence)
            self.prefixes.find(sequence.beginning)  # what it will copy is dropped last
            if not sequence.is_done and not self._has_room(sequence, may_preempt=False):
                return
            self.waiting.popleft()
            if not sequence.is_done:
                sequence.is_new = sequence.beginning.pages > 0
                self._sums.prefix_lookups += sequence.is_new
                self.running.append(sequence)

    def _beginning(self, sequence: Running) -> Beginning:
        """The whole pages that a first pass writes for good; none where nothing is shared."""
        wanted, page = sequence.wanted, self.arena.page_tokens
        if wanted is None or not self._shares(sequence):
            return Beginning()
        ends = list(wanted.cuts(self.block_size))
        return Beginning.of(wanted.tokens[: ends[-1] if ends else 0], page)

    def _shares(self, sequence: Running) -> bool:
        return self.config.prefix_share > 0 and sequence.plan.num_streams == 1

    def _copy_beginnings(self) -> None:
        """New sequences copy what is known of their beginning; where an older one is about to write
        more of it, they wait for that. The oldest waits for nobody, so one of them always runs."""
        for sequence in self.running:
            sequence.awaited = 0
        for number, sequence in enumerate(self.running):
            if not sequence.is_new:
                continue
            older = self.running[:number]
            source, known = self._most_known(sequence, older)
            for writer in older:
                shared = writer.beginning.shared(sequence.beginning)
                if shared > known:
                    rows = shared * self.arena.page_tokens - writer.entries()
                    writer.awaited = min(rows, writer.awaited or rows)
                    break
            else:
                sequence.is_new = False
                if source is not None:
                    self._copy(source, known, sequence)

    def _most_known(self, sequence: Running, older: list[Running]) -> tuple[Run | None, int]:
        """Who has most of a sequence's beginning, and how many pages of it."""
        wanted, size = sequence.beginning, self.arena.page_tokens
        source, most = self.prefixes.find(wanted) or (None, 0)
        for other in older:
            pages = min(other.beginning.shared(wanted), other.entries() // size)
            if pages > most:
                source, most = other.runs[0], pages
        return source, most

    def _copy(self, source: Run, pages: int, sequence: Running) -> None:
        """Begin with keys and values that another sequence computed."""
        assert sequence.wanted is not None
        count = pages * self.arena.page_tokens
        self.arena.copy(source, sequence.runs[0], count)
        sequence.written[0] = count
        sequence.wanted = sequence.wanted.behind(count)
        self._sums.prefix_hits += 1
        self._sums.prefix_tokens += count

    def _choose(self) -> dict[Running, Pass]:
        """What runs in this round: short passes first, so that no long prompt holds them up, and
        what somebody waits for as if it were theirs. Half of the rows go before that to those that
        had no place in the last rounds."""
        able = [sequence for sequence in self.running if not sequence.is_new]
        late = sorted((s for s in able if s.passed_over), key=lambda s: (-s.passed_over, s.rows))
        half, chosen = max(1, self.config.rows_per_round // 2), {}
        self._fill(chosen, late, half)
        rows = sum(len(piece.tokens) for piece in chosen.values())
        soon = sorted(able, key=lambda s: s.awaited or s.rows)
        self._fill(chosen, soon, max(half, self.config.rows_per_round - rows))
        for sequence in able:
            sequence.passed_over = 0 if sequence in chosen else sequence.passed_over + 1
        return chosen

    def _fill(self, chosen: dict[Running, Pass], order: list[Running], budget: int) -> None:
        """Choose, in this order, what has room and fits into the rows; at least one whatever it
        takes."""
        for sequence in order:
            if chosen and budget <= 0:
                return
            if sequence in chosen or sequence not in self.running:  # preempted by one before it
                continue
            if self._has_room(sequence, may_preempt=not chosen):
                piece = sequence.next_piece(max(budget, 1), self.block_size)
                if not chosen or len(piece.tokens) <= budget:
                    chosen[sequence] = piece
                    budget -= len(piece.tokens)

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
        sequence.settled = sequence.plan.context.committed  # before the next pass is planned
        self._sums.tokens += sequence.advance(logits)
        if sequence.is_done:
            self.cancel(sequence)

    def _leave_behind(self, sequence: Running) -> None:
        """Leave the pages of committed tokens to those that come."""
        if 0 in sequence.runs and self._shares(sequence):
            count = min(sequence.settled, sequence.entries())
            tokens = sequence.plan.canvas[:count].tolist()
            beginning = Beginning.of(tokens, self.arena.page_tokens)
            if self.prefixes.adopt(beginning, sequence.runs[0]):
                del sequence.runs[0]

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
        if not may_preempt and self._in_reach(sequence) < need:
            return False  # known prefixes would be dropped for nothing
        while self.prefixes.evict() or (may_preempt and self._preempt_younger(sequence)):
            if self._grow(sequence, wanted.stream, need):
                return True
        return self._start_over(sequence, wanted.stream, need)

    def _take_all(self, sequence: Running, may_preempt: bool) -> bool:
        """Everything at once, for a sequence of two streams or one that cannot start over: it never
        grows, so it can never be stuck between its own runs."""
        count = self._pages_of(sequence)
        self._release(sequence)
        if not may_preempt and self._in_reach(sequence) < count * sequence.plan.num_streams:
            return False
        while True:
            runs = [self.arena.take(count) for _ in range(sequence.plan.num_streams)]
            taken = [run for run in runs if run is not None]
            if len(taken) == len(runs):
                sequence.runs = dict(enumerate(taken))
                return True
            for run in taken:
                self.arena.give_back(run)
            if not (self.prefixes.evict() or (may_preempt and self._preempt_younger(sequence))):
                return False

    def _in_reach(self, sequence: Running) -> int:
        """Pages that a sequence has or could have without preempting anybody."""
        own = sum(run.count for run in sequence.runs.values())
        return own + self.arena.free_pages + self.prefixes.pages

    def _grow(self, sequence: Running, stream: int, count: int) -> bool:
        """Lengthen a run, or move to a longer one, if there is room."""
        old = sequence.runs.get(stream)
        if old is not None and self.arena.extend(old, count):
            return True
        new = self.arena.take(count)
        if new is None:
            return False
        if old is not None:
            self.arena.copy(old, new, old.count * self.arena.page_tokens)
            self.arena.give_back(old)
        sequence.runs[stream] = new
        return True

    def _start_over(self, sequence: Running, stream: int, count: int) -> bool:
        """The last resort in a scattered arena: give the short run up, and compute it again."""
        old = sequence.runs.get(stream)
        if old is None or not self.arena.fits_in_place_of(old, count):
            return False
        self.arena.give_back(sequence.runs.pop(stream))
        sequence.written.pop(stream, None)
        return self._grow(sequence, stream, count)

    def _preempt_younger(self, sequence: Running) -> bool:
        """Send the youngest sequence back to the queue, if it is younger than this one and can
        compute its pages again."""
        able = [s for s in self.running if s.runs and s.plan.context.can_rewrite]
        youngest = max(able, key=lambda s: s.number, default=sequence)
        if youngest.number <= sequence.number:
            return False
        self._release(youngest)
        self.running.remove(youngest)
        self.waiting.appendleft(youngest)
        self._sums.preemptions += 1
        return True

    def _release(self, sequence: Running) -> None:
        for run in sequence.runs.values():
            self.arena.give_back(run)
        sequence.runs.clear()
        sequence.written.clear()

    def _note(self) -> None:
        """Publish the counters."""
        free, known = self.arena.free_pages, self.prefixes.pages
        self.counters = replace(
            self._sums,
            running=len(self.running),
            waiting=len(self.waiting),
            pages_held=self.arena.num_pages - free - known,
            pages_known=known,
            pages_free=free,
        )


def arena_of(model: Network, config: EngineConfig) -> PageArena:
    """The pages that `cache_bytes` buys, each of whole blocks."""
    weight = next(model.parameters())
    room = room_of(model.config, config, weight.element_size())
    try:
        return PageArena(
            model.config,
            num_pages=room.num_pages,
            page_tokens=room.page_tokens,
            dtype=weight.dtype,
            device=weight.device,
        )
    except RuntimeError:  # what torch raises where memory cannot be had, its GPU's error included
        raise InputError(
            f"cache_bytes={config.cache_bytes} is more than this machine's memory gives; lower it"
        ) from None
