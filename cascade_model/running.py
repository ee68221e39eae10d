"""One sequence in the engine: the pass it waits for, and which of its entries are in its pages."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.pages import Run
from cascade_model.passes import Pass
from cascade_model.prefix_cache import Beginning
from cascade_model.sampler import DecodedBlock, Plan


@dataclass(slots=True, eq=False)
class Running:
    """A request from `Scheduler.submit` to its end; the scheduler alone writes to it."""

    plan: Plan
    loop: Generator[Pass | Window, Tensor, None]
    deliver: Callable[[DecodedBlock], None]
    """Called with each block as soon as it is done."""
    fail: Callable[[Exception], None]
    """Called with the error that ended this sequence alone."""
    number: int
    """Order of submission: of two sequences the one with the higher number is younger."""
    wanted: Pass | None = None
    """The pass that the sequence waits for; none before its first."""
    runs: dict[int, Run] = field(default_factory=dict)
    """Its pages, per stream."""
    written: dict[int, int] = field(default_factory=dict)
    """Per stream, how many leading entries are in its pages."""
    settled: int = 0
    """Leading tokens whose entries in stream 0 are final, as far as they are in its pages."""
    beginning: Beginning = field(default_factory=Beginning)
    """What its first pass writes for good: others may copy it, and it may copy theirs."""
    is_new: bool = True
    """Has pages and has not yet looked who knows its beginning."""
    awaited: int = 0
    """Rows that a new sequence waits for, to copy them; 0: nobody does."""
    passed_over: int = 0
    """Rounds in a row in which it had no place."""
    is_done: bool = False

    @property
    def rows(self) -> int:
        """Rows until its next answer: those of the pass it waits for, and of entries it lost."""
        wanted = self.wanted
        assert wanted is not None
        return wanted.end - min(self.entries(wanted.stream), wanted.start)

    def entries(self, stream: int = 0) -> int:
        """Leading entries that are in its pages."""
        return self.written.get(stream, 0)

    def next_piece(self, budget: int, block_size: int) -> Pass:
        """Entries that a preempted sequence lost, a chunk of what it waits for, or all of it."""
        wanted = self.wanted
        assert wanted is not None
        written = self.entries(wanted.stream)
        if written < wanted.start:
            lost = self.plan.context.rewrite(self.plan.canvas, wanted.stream, wanted.start)
            return lost.behind(written).chunk(budget, block_size)
        return wanted.chunk(budget, block_size)

    def advance(self, reply: Tensor | None) -> int:
        """Run the sequence's own code until it wants a pass or is done; its failure is its own.

        `reply` are the logits of the pass it waited for, none at first. Gives how many tokens it
        handed out.
        """
        count = 0
        try:
            event = self.loop.send(reply)  # type: ignore[arg-type]
            while isinstance(event, Window):
                block = self.plan.block(event)
                self.is_done = block.finish_reason is not None
                count += len(block.tokens)
                self.deliver(block)
                if self.is_done:
                    return count
                event = next(self.loop)
            self.wanted = event
        except StopIteration:
            self.is_done = True
        except Exception as error:
            self.is_done = True
            self.fail(error)
        return count
