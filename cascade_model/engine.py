"""The decode engine: a scheduler and the one thread that runs it, for many threads that ask.

That thread runs rounds; everybody else only leaves requests and takes blocks. The same request
gives the same tokens, whatever else is running.
"""

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError
from cascade_model.networks import Network
from cascade_model.sampler import DecodedBlock, Plan, plan_completion, plan_infilling
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Running, Scheduler
from cascade_model.settings import check
from cascade_model.watching import Watcher

Event = DecodedBlock | BaseException


class Ticket:
    """A request in the engine; `cancel` frees its pages before the next round."""

    def __init__(self, engine: "Engine", deliver: Callable[[Event], None]) -> None:
        self._engine, self.deliver = engine, deliver
        self.sequence: Running | None = None
        self.is_over = False

    def cancel(self) -> None:
        """From any thread, any number of times; nothing more is delivered soon after."""
        self._engine.forget(self)


class Engine:
    """A scheduler and the thread that runs it; both end with `close`, with the last reference, or
    with Python."""

    def __init__(self, model: Network, config: EngineConfig | None = None) -> None:
        self.scheduler = Scheduler(model, config)
        self._worker = _Worker(self.scheduler)
        # Python must not end under a thread that is within torch: that aborts the process.
        self._end = weakref.finalize(self, self._worker.end)
        self._process = os.getpid()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.scheduler.model.parameters()).device

    @property
    def is_closed(self) -> bool:
        """Whether its thread has ended, or is told to: nothing is taken any more."""
        return self._worker.is_closed

    def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        choice: int,
        deliver: Callable[[Event], None],
        *,
        committed: Sequence[int] = (),
        steps_made: int = 0,
        has_holes: bool = False,
        watcher: Watcher | None = None,
    ) -> Ticket:
        """Leave a request; `deliver` gets its blocks, or the error that ends it, and a `watcher`
        its steps, in the engine's thread. It goes on behind the `committed` tokens of another run
        (`plan_completion`). With `has_holes` it is a text whose mask tokens are to be filled
        (`plan_infilling`). Raises `InputError` here for what cannot be decoded."""
        plan_of = plan_infilling if has_holes else plan_completion
        plan = plan_of(
            self.scheduler.model.config,
            prompt_tokens,
            params,
            choice,
            self.device,
            committed=committed,
            steps_made=steps_made,
        )
        if watcher is not None:
            plan.watch(watcher)
        return self._leave(plan, deliver)

    def _leave(self, plan: Plan, deliver: Callable[[Event], None]) -> Ticket:
        check(
            os.getpid() == self._process,
            f"this process was forked from the one with the engine, {self._process}, whose thread "
            "it lacks; load the model in the process that uses it",
        )
        self.scheduler.check(plan)
        ticket = Ticket(self, deliver)
        self._worker.take(ticket, plan)
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """End a request between two rounds."""
        worker = self._worker
        worker.orders.put(lambda: worker.forget(ticket))  # without a lock: garbage collection calls

    def close(self) -> None:
        """End the thread; requests that still run get an error, and none is taken any more."""
        self._end()


class _Worker:
    """What the thread holds. It knows its requests, and through them alone the engine: one that
    nobody asks anything of can end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """What the thread is to do between two rounds; None: to end."""
        self._tickets: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)
        self._taking = threading.Lock()
        """Held while a request is left, so that none is left behind the thread's last look."""
        self.is_closed = False

    def take(self, ticket: Ticket, plan: Plan) -> None:
        """From any thread: leave a request, and let the thread run."""
        with self._taking:
            if self.is_closed:
                raise RuntimeError("the engine is closed")
            if self._thread.ident is None:
                self._thread.start()
            self.orders.put(lambda: self.begin(ticket, plan))

    def begin(self, ticket: Ticket, plan: Plan) -> None:
        """In the thread: queue a request."""
        if ticket.is_over:  # cancelled before
            return
        self._tickets[id(ticket)] = ticket
        ticket.sequence = self.scheduler.submit(
            plan,
            lambda block: self._hand(ticket, block),
            lambda error: self._fail(ticket, error),
        )

    def forget(self, ticket: Ticket) -> None:
        """In the thread: end a request."""
        self._tickets.pop(id(ticket), None)
        if ticket.sequence is not None and not ticket.is_over:
            self.scheduler.cancel(ticket.sequence)
        ticket.is_over = True

    def end(self) -> None:
        """See `Engine.close`."""
        self.is_closed = True
        self.orders.put(None)
        is_other = self._thread is not threading.current_thread()
        if self._thread.ident is not None and is_other:
            self._thread.join()

    def _hand(self, ticket: Ticket, block: DecodedBlock) -> None:
        if block.finish_reason is not None:
            ticket.is_over = True
            self._tickets.pop(id(ticket), None)
        ticket.deliver(block)

    def _run(self) -> None:
        try:
            is_busy = False
            while self._obey(is_busy):
                try:
                    is_busy = self.scheduler.step()
                except Exception as error:
                    self._fail_all(error)
                    is_busy = False
        finally:  # whatever ended it: nobody may wait for ever
            with self._taking:
                self.is_closed = True
            while not self.orders.empty():  # what came in while it ended
                action = self.orders.get()
                if action is not None:
                    with contextlib.suppress(Exception):
                        action()
            self._fail_all(RuntimeError("the engine was closed"))

    def _obey(self, is_busy: bool) -> bool:
        """Carry out what was left; wait for it where there is nothing else to do."""
        try:
            while True:
                action = self.orders.get(block=not is_busy)
                if action is None:
                    return False
                action()
                del action  # what it holds must not wait for the next one
                is_busy = True
        except queue.Empty:
            return True

    def _fail_all(self, error: Exception) -> None:
        """A round that failed ends every request with its error; the engine lives on. Whatever it
        looks like, it is no request's own mistake."""
        if isinstance(error, InputError):
            error = RuntimeError(f"a round of the engine failed: {error}")
        for ticket in list(self._tickets.values()):
            self.forget(ticket)
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """Tell a request of its error, if anybody still listens."""
        ticket.is_over = True
        self._tickets.pop(id(ticket), None)
        with contextlib.suppress(Exception):
            ticket.deliver(error)
