"""Continuous batching: the same tokens in any company, room for all, no page lost."""

import functools
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cascade_model.config import ExpertsConfig
from cascade_model.engine_config import EngineConfig
from cascade_model.errors import DoesNotFit, InputError
from cascade_model.networks import Network, build_network
from cascade_model.sampler import plan_completion, sample
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Running, Scheduler
from tests.cascade_model.traces import Ask, Watch
from tests.tiny_models import lively_model, tiny_config

SOFTMAX = ExpertsConfig(
    num_experts=6, experts_per_token=2, intermediate_size=12, shared_intermediate_size=8
)
SIGMOID = ExpertsConfig(
    num_experts=6, experts_per_token=2, intermediate_size=12, router="sigmoid_groups",
    num_groups=2, groups_per_token=1, renormalise=True, weight_scale=2.5, router_bias=True,
    first_dense_layers=1,
)  # fmt: skip
CAUSAL = {
    "aligned": {},
    "token-causal": {"clean_half": "token_causal"},
    "shifted": {"logits": "shifted"},
    "shifted token-causal": {"logits": "shifted", "clean_half": "token_causal"},
    "shifted, noisy row": {"logits": "shifted", "first_place": "noisy"},
    "shifted, own row": {"logits": "shifted", "first_place": "own"},
    "autoregressive": {"logits": "shifted", "block_size": 1},
    "softmax experts": {"experts": SOFTMAX},
    "sigmoid experts": {"experts": SIGMOID},
}
BIDIRECTIONAL = {
    "bidirectional": {"attention": "bidirectional", "block_size": 8},
    "bidirectional, shifted": {"attention": "bidirectional", "block_size": 8, "logits": "shifted"},
}
NETWORKS = {
    "dit": {"network": "dit", "num_kv_heads": 4, "tied_head": False},
    "gpt2": {"network": "gpt2", "num_kv_heads": 4},
}
FAMILIES = CAUSAL | BIDIRECTIONAL | NETWORKS
MIXED = [
    {"temperature": 1.0, "seed": 1},
    {"rule": "low_confidence", "steps_per_block": 2},
    {"temperature": 0.7, "confidence_threshold": 0.2, "seed": 3},
    {"rule": "entropy_bound", "entropy_bound": 0.4},
    {"guidance_scale": 1.0, "temperature": 1.0},
    {"remask_threshold": 0.8},
    {"editing_threshold": 0.3},
    {"rule": "random", "seed": 5},
]
Request = tuple[tuple[int, ...], SamplingParams]


@functools.cache
def model_of(family: str) -> Network:
    """Float64, with logits that differ clearly between inputs."""
    axes = FAMILIES[family]
    if "network" not in axes:
        return lively_model(max_sequence_length=1024, **axes)
    model = build_network(tiny_config(**axes))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.4
        parameter.data.copy_(drawn + name.endswith("norm.weight"))
    return model.double().eval()


@functools.cache
def alone(family: str, request: Request, choice: int = 0) -> list[int]:
    """What `sample` gives, with no scheduler at all."""
    prompt, params = request
    blocks = sample(model_of(family), list(prompt), params, choice)
    return [token for block in blocks for token in block.tokens]


def all_alone(family: str, wanted: Sequence[Request]) -> list[list[int]]:
    return [alone(family, request) for request in wanted]


def scheduler_of(family: str, pages: int = 200, **settings) -> Scheduler:
    """A small one: its arena has this many pages, of 8 tokens unless told."""
    model, size = model_of(family), settings.setdefault("page_tokens", 8)
    shape = model.config
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 8
    made = Scheduler(model, EngineConfig(cache_bytes=pages * size * token, **settings))
    assert made.arena.num_pages == pages
    return made


def requests(count: int, seed: int = 0, **changes) -> list[Request]:
    """Prompts and settings of all kinds."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        prompt = tuple(chance.randrange(13) for _ in range(chance.randrange(1, 40)))
        settings = {"max_tokens": chance.randrange(1, 20)} | MIXED[number % len(MIXED)] | changes
        made.append((prompt, SamplingParams(**settings)))
    return made


def submit(scheduler: Scheduler, request: Request, tokens: list[int], choice: int = 0) -> Running:
    """Leave a request whose tokens are appended to a list."""
    plan = plan_completion(scheduler.model.config, list(request[0]), request[1], choice)
    scheduler.check(plan)
    return scheduler.submit(plan, lambda block: tokens.extend(block.tokens))


def finish(scheduler: Scheduler) -> None:
    """Run to the end, which comes."""
    for _ in range(5000):
        if not scheduler.step():
            return
    raise AssertionError("the scheduler never becomes idle")


def decode_all(
    scheduler: Scheduler, wanted: Sequence[Request], *, at_once: bool = True
) -> list[list[int]]:
    """Tokens of every request, submitted all at once or one every other round."""
    results: list[list[int]] = [[] for _ in wanted]
    for request, tokens in zip(wanted, results, strict=True):
        submit(scheduler, request, tokens)
        if not at_once:
            scheduler.step()
            scheduler.step()
    finish(scheduler)
    return results


def assert_all_pages_accounted_for(scheduler: Scheduler) -> None:
    """Every page is one sequence's, a known prefix's, or free."""
    held = [run for sequence in scheduler.running for run in sequence.runs.values()]
    known = [entry.run for entry in scheduler.prefixes._entries]
    pages = [page for run in held + known for page in range(run.first, run.first + run.count)]
    assert len(pages) == len(set(pages))
    counters = scheduler.counters
    assert counters.pages_held == sum(run.count for run in held)
    assert counters.pages_known == sum(run.count for run in known)
    assert counters.pages_free == scheduler.arena.num_pages - len(pages)
    assert not any(sequence.runs for sequence in scheduler.waiting)


def assert_nothing_left(scheduler: Scheduler) -> None:
    assert not scheduler.running
    assert not scheduler.waiting
    assert_all_pages_accounted_for(scheduler)
    while scheduler.prefixes.evict():
        pass
    assert scheduler.arena.free_pages == scheduler.arena.num_pages


# The same tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_request_gives_the_same_tokens_alone_and_in_company(family, at_once):
    wanted = requests(16)
    scheduler = scheduler_of(family, max_sequences=9)
    assert decode_all(scheduler, wanted, at_once=at_once) == all_alone(family, wanted)
    assert not at_once or scheduler.counters.rounds < scheduler.counters.passes / 2
    assert_nothing_left(scheduler)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_rounds_cut_prompts_and_change_nothing(family):
    wanted = requests(8)
    scheduler = scheduler_of(family, rows_per_round=6, page_tokens=4, prefix_share=0.0)
    assert decode_all(scheduler, wanted) == all_alone(family, wanted)
    assert (scheduler.counters.prefix_lookups, scheduler.counters.prefix_tokens) == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_memory_pressure_sequences_give_way_and_lose_nothing(family):
    wanted = requests(16)
    scheduler = scheduler_of(family, pages=16, prefix_share=0.3)
    assert decode_all(scheduler, wanted) == all_alone(family, wanted)
    if family not in BIDIRECTIONAL:  # these take all they need before they begin
        assert scheduler.counters.preemptions > 0
    assert_nothing_left(scheduler)


def test_the_younger_gives_way_and_the_older_is_done_first():
    """Equal requests that grow into each other: every preempted one is younger than those who run
    on, and they finish in the order in which they came."""
    scheduler = scheduler_of("aligned", pages=16, prefix_share=0.0)
    params = SamplingParams(max_tokens=40, rule="sequential", stop_at_eos=False)
    sequences = [submit(scheduler, ((1, 2, 3, number), params), []) for number in range(4)]
    done: list[int] = []
    while scheduler.step():
        done += [s.number for s in sequences if s.is_done and s.number not in done]
        running = [s.number for s in scheduler.running]
        waiting = [s.number for s in scheduler.waiting]
        assert not running or not waiting or max(running) < min(waiting)
    assert scheduler.counters.preemptions > 0
    assert done == sorted(done)


def test_who_cannot_be_let_in_leaves_known_beginnings_alone():
    scheduler = scheduler_of("aligned", pages=40, prefix_share=0.5)
    page = scheduler.arena.page_tokens
    known = tuple(number % 13 for number in range(8 * page))
    short = SamplingParams(max_tokens=4, stop_at_eos=False)
    decode_all(scheduler, [((*known, 1), short)])
    before = scheduler.counters.pages_known
    assert before >= 8
    held = SamplingParams(max_tokens=20 * page, rule="sequential", stop_at_eos=False)
    submit(scheduler, (tuple(range(1, 13)) * page, held), [])
    scheduler.step()
    large = SamplingParams(max_tokens=8, stop_at_eos=False)
    waiting = submit(scheduler, ((*known, *known, *known, *known, 2), large), [])
    scheduler.step()
    assert waiting in scheduler.waiting
    assert scheduler.counters.pages_known == before


@pytest.mark.parametrize("family", BIDIRECTIONAL)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("pages", [200, 16])
def test_approximate_caches_give_the_same_tokens_in_company(family, cache, pages):
    """Stale keys and values could not be computed again: such a sequence keeps its pages."""
    settings = {"cache": cache, "block_length": 4, "stop_at_eos": False}
    wanted = requests(10, **settings) + requests(4, seed=1)
    scheduler = scheduler_of(family, pages=pages, max_sequences=6)
    assert decode_all(scheduler, wanted) == all_alone(family, wanted)
    assert_nothing_left(scheduler)


# Known beginnings


@pytest.mark.parametrize("family", CAUSAL)
def test_a_known_beginning_is_not_computed_again(family):
    prompt = [number % 13 for number in range(64)]
    wanted = [((*prompt, number), SamplingParams(max_tokens=6)) for number in range(4)]
    scheduler = scheduler_of(family)
    found = [decode_all(scheduler, [item])[0] for item in wanted]
    assert found == all_alone(family, wanted)
    counters = scheduler.counters
    assert (counters.prefix_lookups, counters.prefix_hits, counters.prefix_tokens) == (4, 3, 3 * 64)
    assert_nothing_left(scheduler)


def test_a_turn_of_a_conversation_finds_the_turns_before_it():
    scheduler = scheduler_of("aligned", page_tokens=4)
    params = SamplingParams(max_tokens=12, stop_at_eos=False)
    first = decode_all(scheduler, [((1, 2, 3, 4, 5), params)])[0]
    second = ((1, 2, 3, 4, 5, *first, 6, 7), params)
    assert decode_all(scheduler, [second]) == [alone("aligned", second)]
    assert scheduler.counters.prefix_tokens >= 12


def logits(scheduler: Scheduler, request: Request) -> list[torch.Tensor]:
    """What each pass of a request is answered."""
    watch = Watch(scheduler, Ask(*request))
    finish(scheduler)
    return watch.plan.replies


def assert_same_logits(family: str, scheduler: Scheduler, request: Request) -> None:
    """As where nothing is known: a stale entry would show here long before it changes a token."""
    expected = logits(scheduler_of(family, prefix_share=0.0), request)
    torch.testing.assert_close(logits(scheduler, request), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", list(CAUSAL)[:7])
@pytest.mark.parametrize("steps", [1, None])
def test_only_clean_entries_become_known(family, steps):
    """Prompts that end just before, on and behind the edges of pages and blocks, and go on."""
    scheduler = scheduler_of(family)
    params = SamplingParams(max_tokens=10, steps_per_block=steps, stop_at_eos=False)
    for length in (7, 8, 15, 24):
        prompt = tuple((number + length) % 13 for number in range(length))
        for _ in range(2):
            assert_same_logits(family, scheduler, (prompt, params))
            prompt = (*prompt, *alone(family, (prompt, params))[:9], 3)
    assert scheduler.counters.prefix_hits >= 4


@pytest.mark.parametrize("family", list(CAUSAL)[:7])
def test_only_clean_entries_of_a_cancelled_request_become_known(family):
    """Its last block is half full, or full and not yet committed."""
    params = SamplingParams(max_tokens=9, rule="sequential", stop_at_eos=False)
    for rounds in range(1, 9):
        scheduler = scheduler_of(family, page_tokens=4)
        found: list[int] = []
        first = submit(scheduler, (TEXT[:9], params), found)
        for _ in range(rounds):
            scheduler.step()
        scheduler.cancel(first)
        assert_same_logits(family, scheduler, ((*TEXT[:9], *found, 3, 4, 5, 6), params))
        assert scheduler.counters.prefix_hits == 1


def rows_of(family: str, request: Request, choice: int) -> int:
    """Rows that a request takes where nothing is shared."""
    scheduler = scheduler_of(family, prefix_share=0.0)
    submit(scheduler, request, [], choice)
    finish(scheduler)
    return scheduler.counters.rows


@pytest.mark.parametrize(
    ("family", "rows_per_round"), [("aligned", 512), *((family, 16) for family in CAUSAL)]
)
def test_a_prompt_asked_for_many_times_at_once_is_computed_once(family, rows_per_round):
    prompt = tuple(number % 13 for number in range(65))
    request = (prompt, SamplingParams(max_tokens=8, temperature=1.0, stop_at_eos=False))
    scheduler = scheduler_of(family, rows_per_round=rows_per_round)
    found: list[list[int]] = [[] for _ in range(8)]
    for choice, tokens in enumerate(found):
        submit(scheduler, request, tokens, choice)
    finish(scheduler)
    assert found == [alone(family, request, choice) for choice in range(8)]
    everything = sum(rows_of(family, request, choice) for choice in range(8))
    assert scheduler.counters.rows == everything - 7 * 64
    assert_nothing_left(scheduler)


def test_a_beginning_is_copied_as_soon_as_so_much_of_it_is_written():
    """Two prompts share 16 tokens of 96: the second waits for these and not for the rest."""
    scheduler = scheduler_of("aligned", rows_per_round=16)
    params = SamplingParams(max_tokens=4, stop_at_eos=False)
    submit(scheduler, (tuple(i % 13 for i in range(96)), params), [])
    other = submit(scheduler, (tuple(min(i, 16) % 13 for i in range(30)), params), [])
    scheduler.step()
    assert other.is_new
    scheduler.step()
    assert not other.is_new
    assert scheduler.counters.prefix_tokens == 16


@pytest.mark.parametrize("end", ["cancelled", "preempted", "failed"])
def test_who_waits_for_a_beginning_goes_on_when_its_writer_is_gone(end):
    scheduler = scheduler_of("aligned", rows_per_round=16)
    request = (tuple(i % 13 for i in range(70)), SamplingParams(max_tokens=8))
    found: list[list[int]] = [[], [], []]
    first, *_ = [submit(scheduler, request, tokens) for tokens in found]
    scheduler.step()
    scheduler.step()
    if end == "cancelled":
        scheduler.cancel(first)
    elif end == "preempted":
        first.number = 99  # as if it had come last
        assert scheduler._preempt_younger(scheduler.running[1])
    else:
        first.fail = lambda error: None
        first.loop.close()  # what it wants next never comes
    finish(scheduler)
    kept = found if end == "preempted" else found[1:]
    assert kept == [alone("aligned", request)] * len(kept)
    assert_nothing_left(scheduler)


# Who runs when


def rounds_until_done(scheduler: Scheduler, sequence: Running) -> int:
    rounds = 0
    while not sequence.is_done:
        assert scheduler.step()
        rounds += 1
    return rounds


LONG = tuple(number % 13 for number in range(600))
EIGHT = SamplingParams(max_tokens=8, rule="sequential", stop_at_eos=False)
SHORT = {"another text": ((1, 2, 3), EIGHT), "the same beginning": ((*LONG[:16], 1, 2), EIGHT)}


@pytest.mark.parametrize("text", SHORT)
@pytest.mark.parametrize("long", [1, 2, 4])
def test_a_short_request_does_not_wait_for_long_ones(text, long):
    """Each long prompt takes ten rounds and more; the short one still gets a pass in every round,
    or in every round but one where the longest of all is just writing its beginning."""

    def begin() -> Scheduler:
        return scheduler_of("aligned", pages=400, rows_per_round=32)

    scheduler = begin()
    expected = rounds_until_done(scheduler, submit(scheduler, SHORT[text], []))
    scheduler, done = begin(), []
    for number in range(long):
        params = SamplingParams(max_tokens=64, stop_at_eos=False)
        prompt = LONG if number == 0 else LONG[number : 300 + number]
        submit(scheduler, (prompt, params), done)
    found = rounds_until_done(scheduler, submit(scheduler, SHORT[text], []))
    assert found == expected + (text == "the same beginning")
    assert not done
    assert scheduler.counters.rows <= 32 * scheduler.counters.rounds


def test_who_computes_its_lost_pages_again_holds_up_nobody():
    scheduler = scheduler_of("aligned", pages=400, rows_per_round=32, prefix_share=0.0)
    request = SHORT["another text"]
    expected = rounds_until_done(scheduler, submit(scheduler, request, []))
    long = submit(scheduler, (LONG, SamplingParams(max_tokens=64, stop_at_eos=False)), [])
    while long.settled == 0:
        scheduler.step()
    short = submit(scheduler, request, [])
    long.number = 99  # as if it had come last
    assert scheduler._preempt_younger(short)
    assert rounds_until_done(scheduler, short) == expected
    assert 0 < long.entries() < len(LONG)


@pytest.mark.parametrize("short", [1, 12])
def test_a_long_prompt_gets_its_turn_among_short_requests(short):
    """Short ones keep coming, perhaps more than fit; the long one cannot even be cut."""
    scheduler, done = scheduler_of("bidirectional", rows_per_round=32), []
    params = SamplingParams(max_tokens=4)
    long = submit(scheduler, ((1,) * 100, params), done)
    for _ in range(60):
        for _ in range(short):
            submit(scheduler, ((1, 2, 3), params), [])
        scheduler.step()
    assert long.is_done


def test_a_pass_that_cannot_be_cut_does_not_hold_up_short_ones():
    scheduler = scheduler_of("bidirectional", rows_per_round=32)
    short = SHORT["another text"]
    expected = rounds_until_done(scheduler, submit(scheduler, short, []))
    submit(scheduler, ((1,) * 100, SamplingParams(max_tokens=20)), [])
    assert rounds_until_done(scheduler, submit(scheduler, short, [])) == expected


# Room


def test_a_cache_of_less_than_a_page_is_refused():
    with pytest.raises(InputError, match="cache_bytes=10 holds not one page"):
        Scheduler(model_of("aligned"), EngineConfig(cache_bytes=10))


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_what_can_never_fit_is_refused_before_anything_is_taken(guidance):
    """Guidance keeps two caches."""
    scheduler = scheduler_of("aligned", pages=4 if guidance else 2)
    params = SamplingParams(max_tokens=6, guidance_scale=guidance, stop_at_eos=False)
    largest = ((1,) * 10, params)
    assert decode_all(scheduler, [largest]) == [alone("aligned", largest)]
    streams = 2 if guidance else 1
    text = f"keys and values of {20 * streams} tokens and cache_bytes=.* holds {16 * streams}"
    with pytest.raises(DoesNotFit, match=text):
        submit(scheduler, ((1,) * 11, params), [])
    assert_nothing_left(scheduler)


def test_the_failure_of_one_sequence_is_its_own():
    scheduler = scheduler_of("aligned")
    wanted, errors, good = requests(6, seed=9), [], []

    def refuse(block):
        raise OSError("the reader is gone")

    for number, (prompt, params) in enumerate(wanted):
        deliver = refuse if number == 2 else lambda block: good.extend(block.tokens)
        plan = plan_completion(scheduler.model.config, list(prompt), params)
        scheduler.submit(plan, deliver, errors.append)
    finish(scheduler)
    assert [str(error) for error in errors] == ["the reader is gone"]
    rest = [tokens for number, tokens in enumerate(all_alone("aligned", wanted)) if number != 2]
    assert sorted(good) == sorted(itertools.chain(*rest))
    assert_nothing_left(scheduler)


@pytest.mark.parametrize("family", ["aligned", "shifted", "bidirectional"])
def test_cancelling_at_any_step_loses_no_page(family):
    """With known prefixes, and sequences that wait, were preempted, or have two streams."""
    seen: set[str] = set()
    for rounds in range(0, 36, 3):
        scheduler = scheduler_of(family, pages=16, max_sequences=5, prefix_share=0.3)
        decode_all(scheduler, [((1,) * 20, SamplingParams(max_tokens=2))])
        found: list[list[int]] = [[] for _ in range(10)]
        wanted = [*requests(9, seed=1, stop_at_eos=False), ((1,) * 20, MANY)]
        made = [submit(scheduler, *pair) for pair in zip(wanted, found, strict=True)]
        for _ in range(rounds):
            scheduler.step()
        for sequence in made:
            seen |= state_of(scheduler, sequence)
        random.Random(rounds).shuffle(made)
        for sequence in made:
            scheduler.cancel(sequence)
            scheduler.cancel(sequence)
            assert_all_pages_accounted_for(scheduler)
        assert not scheduler.step()
        assert_nothing_left(scheduler)
        for request, tokens in zip(wanted, found, strict=True):
            assert tokens == alone(family, request)[: len(tokens)]
    assert seen >= {"running", "waiting", "two streams"}
    assert family == "bidirectional" or seen >= {"preempted", "known prefix"}


MANY = SamplingParams(max_tokens=16, stop_at_eos=False)


def state_of(scheduler: Scheduler, sequence: Running) -> set[str]:
    """What cancelling finds it at."""
    is_waiting = sequence in scheduler.waiting
    found = {"waiting" if is_waiting else "running"}
    found |= {"preempted"} if is_waiting and sequence.plan.context.passes > 1 else set()
    found |= {"two streams"} if len(sequence.runs) == 2 else set()
    return found | ({"known prefix"} if scheduler.prefixes.pages else set())


# What is counted


def test_counters_say_what_was_done_and_who_holds_what():
    scheduler = scheduler_of("aligned", pages=40, max_sequences=1)
    params = SamplingParams(max_tokens=8, rule="sequential", stop_at_eos=False)
    blocks = []
    plan = plan_completion(scheduler.model.config, [1] * 16, params)
    scheduler.submit(plan, blocks.append)
    submit(scheduler, ((1,) * 17, params), [])
    assert (scheduler.counters.waiting, scheduler.counters.running) == (2, 0)
    scheduler.step()
    counters = scheduler.counters
    assert (counters.waiting, counters.running, counters.rounds) == (1, 1, 1)
    assert (counters.passes, counters.rows, counters.tokens) == (1, 20, 0)
    assert (counters.pages_held, counters.pages_known, counters.pages_free) == (3, 0, 37)
    finish(scheduler)
    assert counters.rounds == 1, "what was read does not change"
    counters = scheduler.counters
    assert (counters.waiting, counters.running) == (0, 0)
    assert counters.passes == 2 * sum(block.passes for block in blocks) == 16
    assert counters.tokens == 16
    assert counters.tokens_per_pass == 1.0
    assert (counters.prefix_lookups, counters.prefix_hits, counters.prefix_tokens) == (2, 1, 16)
    assert counters.rows == (20 + 3 * 4 + 8 + 3 * 4) + (3 * 4 + 8 + 3 * 4 + 8)
    assert (counters.pages_held, counters.pages_known, counters.pages_free) == (0, 3, 37)
    assert scheduler_of("aligned").counters.tokens_per_pass == 0.0


# Whatever happens

TEXT = tuple(number % 13 for number in range(40))
POOL: list[Request] = [
    (prompt, SamplingParams(**({"max_tokens": 10} | settings)))
    for prompt, settings in zip(
        [TEXT[:3], TEXT[:17], TEXT, (*TEXT[:16], 5, 5), (*TEXT[:24], 7), TEXT[5:], TEXT[:8], (1,)],
        MIXED,
        strict=True,
    )
]


class Company(RuleBasedStateMachine):
    """Requests come, go on and are given up in any order, in an arena of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[Running] = []
        self.asked: list[tuple[Request, int]] = []
        self.found: list[list[int]] = []
        self.cancelled: set[int] = set()

    @initialize(
        family=st.sampled_from(["aligned", "shifted", "token-causal", "bidirectional"]),
        pages=st.integers(14, 60),
        rows_per_round=st.sampled_from([4, 20, 64]),
        max_sequences=st.integers(1, 8),
        prefix_share=st.sampled_from([0.0, 0.3, 0.8]),
    )
    def begin(self, family, pages, **settings):
        self.family = family
        self.scheduler = scheduler_of(family, pages=pages, page_tokens=8, **settings)

    @rule(number=st.integers(0, len(POOL) - 1), choice=st.integers(0, 1), count=st.integers(1, 3))
    def submit(self, number, choice, count):
        for _ in range(count):
            self.found.append([])
            self.asked.append((POOL[number], choice))
            made = submit(self.scheduler, POOL[number], self.found[-1], choice)
            self.sequences.append(made)

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.scheduler.step()

    @precondition(lambda self: self.sequences)
    @rule(number=st.integers(0))
    def cancel(self, number):
        number %= len(self.sequences)
        if not self.sequences[number].is_done:
            self.cancelled.add(number)
        self.scheduler.cancel(self.sequences[number])

    @invariant()
    def no_page_is_lost(self):
        if hasattr(self, "scheduler"):
            assert_all_pages_accounted_for(self.scheduler)
            assert len(self.scheduler.running) <= self.scheduler.config.max_sequences

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        finish(self.scheduler)
        for number, (request, choice) in enumerate(self.asked):
            expected = alone(self.family, request, choice)
            if number in self.cancelled:
                expected = expected[: len(self.found[number])]
            assert self.found[number] == expected
        assert_nothing_left(self.scheduler)


Company.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
test_any_history_ends_with_all_pages_free_and_the_tokens_of_each_alone = Company.TestCase
