"""A stream that outlives its sampler: the engine's own blocks, cut off after every block."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Sequence

import pytest
import torch

from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import TextStream, complete
from cascade_model.tokenizer import byte_tokenizer
from jobs.openai_protocol import ApiError
from jobs.resuming import NoRoom, Patience, Pulse, SamplerLost, resuming, told_whole
from tests.tiny_models import text_config

PROMPT = list(b"def find(")
PARAMS = SamplingParams(max_tokens=22, temperature=1.0, seed=5, logprobs=2, max_steps=24)
SHORT = Patience(seconds=0.4)


@pytest.fixture(scope="module")
def llm():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    model = Transformer(text_config(tokenizer, max_sequence_length=256))
    model.init_weights(0)
    with LLM(model.eval(), tokenizer) as llm:
        yield llm
    torch.set_num_threads(before)


class Samplers:
    """Samplers over one engine. `lives` are the blocks that each one in turn gives before it dies;
    none: it lives. Where they are used up, nobody is left."""

    def __init__(self, llm: LLM, lives: list[int | None], weights: str = "w", choice: int = 0,
                 tokens: list[int] = PROMPT):  # fmt: skip
        self.llm, self.lives, self.weights, self.choice = llm, list(lives), weights, choice
        self.tokens = tokens
        self.asked: list[tuple[int, int]] = []
        self.closed = 0

    async def __call__(self, params, committed, steps_made):
        if not self.lives:
            raise SamplerLost
        life = self.lives.pop(0)
        self.asked.append((len(committed), steps_made))
        try:
            if life == -1:
                raise SamplerLost
            yield {"weights": self.weights}
            stream = self.llm.stream_blocks(
                self.tokens,
                params,
                self.choice,
                committed=committed,
                steps_made=steps_made,
                has_holes=self.llm.config.mask_id in self.tokens,
            )
            count = 0
            async for block in stream:
                if count == life:
                    raise SamplerLost
                yield dataclasses.asdict(block)
                count += 1
        finally:
            self.closed += 1


def blocks_of(source, params=PARAMS, patience=SHORT, **changes) -> list[dict]:
    """The whole stream."""
    settings = {"weights": "w", "pulse": Pulse(), "patience": patience, **changes}

    async def gather():
        return [block async for block in resuming(source, params, **settings)]

    return asyncio.run(asyncio.wait_for(gather(), timeout=240))


def without_passes(blocks: list[dict]) -> list[dict]:
    return [{**block, "passes": None} for block in blocks]


def test_a_loss_after_any_block_changes_nothing_but_the_passes(llm):
    whole = blocks_of(Samplers(llm, [None]))
    assert len(whole) > 4
    for life in range(len(whole)):
        source, losses = Samplers(llm, [life, None]), []
        again = blocks_of(source, on_loss=lambda losses=losses: losses.append(1))
        assert without_passes(again) == without_passes(whole)
        done = whole[:life]
        tokens, steps = sum(len(b["tokens"]) for b in done), sum(b["steps"] for b in done)
        assert source.asked == [(0, 0), (tokens, steps)]
        assert (losses, source.closed) == ([1], 2)
        extra = [b["passes"] - a["passes"] for a, b in zip(whole, again, strict=True)]
        assert [each for place, each in enumerate(extra) if place != life] == [0] * (len(whole) - 1)
        assert 0 <= extra[life] <= 1  # what was committed is read once more


def test_a_loss_within_a_hole_leaves_its_filling_as_it_is():
    tokenizer = byte_tokenizer()
    model = Transformer(text_config(tokenizer, attention="bidirectional"))
    model.init_weights(0)
    with LLM(model.eval(), tokenizer) as llm:
        tokens = llm.prompt_tokens("def find(", "): return", 22)
        whole = blocks_of(Samplers(llm, [None], tokens=tokens))
        assert sum(len(block["tokens"]) for block in whole) == 22
        for life in range(len(whole)):
            again = blocks_of(Samplers(llm, [life, None], tokens=tokens))
            assert without_passes(again) == without_passes(whole)


def test_every_pair_of_losses_changes_nothing(llm):
    whole = blocks_of(Samplers(llm, [None]))
    for first in range(len(whole)):
        for second in range(len(whole) - first):
            again = blocks_of(Samplers(llm, [first, second, None]))
            assert without_passes(again) == without_passes(whole)


def test_without_resumption_the_same_loss_is_an_error(llm):
    with pytest.raises(ApiError) as lost:
        blocks_of(Samplers(llm, [2, None]), patience=Patience(losses=0))
    assert (lost.value.status, lost.value.body["error"]["code"]) == (503, "sampler_lost")


def test_each_choice_goes_on_as_itself(llm):
    texts = set()
    for choice in range(3):
        whole = blocks_of(Samplers(llm, [None], choice=choice))
        again = blocks_of(Samplers(llm, [1, 1, None], choice=choice))
        assert without_passes(again) == without_passes(whole)
        texts.add(str([block["tokens"] for block in whole]))
    assert len(texts) == 3


def completed(llm, blocks: list[dict], stop=()):
    """The text side of a stream, as the ingress runs it."""
    text = TextStream(llm.tokenizer.decode, stop)
    chunks = []
    for block in blocks:
        chunks.append(text.push(**block))
        if chunks[-1].finish_reason is not None:
            break
    return complete(iter(chunks))


def test_a_stop_string_that_spans_the_loss_still_cuts(llm):
    whole = blocks_of(Samplers(llm, [None]))
    text = completed(llm, whole).text
    seen = 0
    for life in range(1, len(whole)):
        edge = len(
            completed(
                llm, [*whole[: life - 1], {**whole[life - 1], "finish_reason": "length"}]
            ).text
        )
        stop = text[edge - 1 : edge + 1]
        if len(stop) < 2 or "\ufffd" in stop:
            continue
        seen += 1
        again = blocks_of(Samplers(llm, [life, None]))
        cut = completed(llm, again, [stop])
        assert cut.text == text[: text.index(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert seen


def test_a_sampler_that_is_dead_before_its_greeting_costs_a_moment_only(llm):
    whole = blocks_of(Samplers(llm, [None]))
    again = blocks_of(Samplers(llm, [-1, -1, 2, -1, -1, -1, -1, None]), patience=Patience(losses=1))
    assert without_passes(again) == without_passes(whole)


def test_a_request_that_kills_every_sampler_is_not_sent_to_all_of_them(llm):
    source = Samplers(llm, [2, 0, 0, 0, 0, None])
    with pytest.raises(ApiError) as lost:
        blocks_of(source, patience=Patience(losses=2))
    assert lost.value.body["error"]["code"] == "sampler_lost"
    assert len(source.asked) == 3


def test_with_nobody_left_the_stream_ends_with_an_error_in_time(llm):
    began = time.monotonic()
    with pytest.raises(ApiError) as lost:
        blocks_of(Samplers(llm, [2]))
    assert lost.value.body["error"]["code"] == "sampler_lost"
    assert SHORT.seconds <= time.monotonic() - began < SHORT.seconds + 5


def test_a_sampler_that_comes_back_in_time_goes_on(llm):
    whole = blocks_of(Samplers(llm, [None]))
    source = Samplers(llm, [3])

    async def run():
        async def new_replica():
            await asyncio.sleep(0.3)
            source.lives.append(None)

        task = asyncio.create_task(new_replica())
        settings = {"weights": "w", "pulse": Pulse(), "patience": Patience(seconds=20)}
        found = [block async for block in resuming(source, PARAMS, **settings)]
        await task
        return found

    assert without_passes(asyncio.run(run())) == without_passes(whole)


def test_other_weights_are_refused_before_and_after_a_loss(llm):
    with pytest.raises(ApiError) as refused:
        blocks_of(Samplers(llm, [None] * 99, weights="other"))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (503, "model_changed")
    source = Samplers(llm, [2] + [None] * 99)

    async def changing(params, committed, steps_made):
        source.weights = "other" if committed else "w"
        async for item in source(params, committed, steps_made):
            yield item

    with pytest.raises(ApiError) as refused:
        blocks_of(changing)
    assert refused.value.body["error"]["code"] == "model_changed"


def test_no_room_is_a_429_at_first_and_a_pause_later(llm):
    whole = blocks_of(Samplers(llm, [None]))
    source, refusals = Samplers(llm, [2, None]), []

    async def full(params, committed, steps_made):
        if len(committed) and len(refusals) < 3:
            refusals.append(1)
            raise NoRoom
        async for item in source(params, committed, steps_made):
            yield item

    assert without_passes(blocks_of(full, patience=Patience(seconds=9))) == without_passes(whole)
    assert len(refusals) == 3

    async def never(params, committed, steps_made):
        raise NoRoom
        yield

    with pytest.raises(ApiError) as refused:
        blocks_of(never)
    assert refused.value.status == 429


def test_a_full_house_is_waited_for_as_long_as_it_speaks():
    pulse = Pulse()

    async def slow(params, committed, steps_made):
        for _ in range(8):
            await asyncio.sleep(0.1)
            pulse.beat()
        yield {"weights": "w"}
        yield {"tokens": [1], "passes": 1, "steps": 1, "finish_reason": "length"}

    assert len(blocks_of(slow, pulse=pulse)) == 1

    async def dead(params, committed, steps_made):
        await asyncio.sleep(60)
        yield {"weights": "w"}

    with pytest.raises(ApiError):
        blocks_of(dead, pulse=pulse)


def test_an_error_of_the_engine_is_no_loss(llm):
    async def broken(params, committed, steps_made):
        yield {"weights": "w"}
        raise ValueError("a round failed")

    with pytest.raises(ValueError, match="a round failed"):
        blocks_of(broken)


def test_a_deadline_counts_from_when_a_sampler_has_the_request():
    """The wait for the first one is not part of it, that for the next ones is."""
    left, asked, greeted = [], [], []

    async def slow(params, committed, steps_made):
        left.append(params.deadline_seconds)
        asked.append(time.monotonic())
        if len(asked) in (1, 4):
            raise SamplerLost  # nobody is there
        await asyncio.sleep(0.2)  # nobody has room
        greeted.append(time.monotonic())
        yield {"weights": "w"}
        await asyncio.sleep(0.1)
        if len(asked) < 5:
            raise SamplerLost
        yield {"tokens": [1], "passes": 1, "steps": 1, "finish_reason": "length"}

    blocks_of(slow, params=SamplingParams(deadline_seconds=60.0), patience=Patience(seconds=20))
    assert left[:2] == [60.0, 60.0]
    spent = [60.0 - each for each in left[2:]]
    since = [each - greeted[0] for each in asked[2:]]
    assert all(0 < own <= most for own, most in zip(spent, since, strict=True))
    waits = [after - before for before, after in itertools.pairwise(spent)]
    assert waits[0] > 0.25  # the second sampler's queue and work
    assert waits[1] > 0  # the pause behind one that was not there


def test_a_deadline_that_is_over_leaves_a_moment():
    left = []

    async def late(params, committed, steps_made):
        left.append(params.deadline_seconds)
        yield {"weights": "w"}
        await asyncio.sleep(0.2)
        if len(left) < 2:
            raise SamplerLost
        yield {"tokens": [1], "passes": 1, "steps": 1, "finish_reason": "length"}

    blocks_of(late, params=SamplingParams(deadline_seconds=0.1))
    assert left == [0.1, 1e-3]


def test_a_reader_that_lags_gives_its_place_up_and_reads_the_same(llm):
    whole = blocks_of(Samplers(llm, [None]))
    source = Samplers(llm, [None] * 9)

    async def run():
        found = []
        patience = Patience(blocks_ahead=2)
        stream = resuming(source, PARAMS, weights="w", pulse=Pulse(), patience=patience)
        async for block in stream:
            found.append(block)
            if len(found) == 1:  # two more blocks wait, and the sampler is let go
                async with asyncio.timeout(60):
                    while not source.closed:
                        await asyncio.sleep(0.001)
        return found

    assert without_passes(asyncio.run(run())) == without_passes(whole)
    assert 2 <= len(source.asked) == source.closed


def test_leaving_early_closes_the_sampler(llm):
    source = Samplers(llm, [None])

    async def run():
        stream = resuming(source, PARAMS, weights="w", pulse=Pulse(), patience=SHORT)
        async for _ in stream:
            break
        await stream.aclose()
        return source.closed

    assert asyncio.run(run()) == 1


def test_the_end_of_all_streams_reaches_those_that_run_and_those_that_wait():
    pulse, patience = Pulse(), Patience(seconds=60)

    async def runs(params, committed, steps_made):
        yield {"weights": "w"}
        yield {"tokens": [1], "passes": 1, "steps": 1, "finish_reason": None}
        await asyncio.sleep(60)

    async def waits(params, committed, steps_made):
        await asyncio.sleep(60)
        yield {"weights": "w"}

    async def told(source) -> tuple[int, str]:
        blocks = 0
        try:
            async for _ in resuming(source, PARAMS, weights="w", pulse=pulse, patience=patience):
                blocks += 1
        except ApiError as error:
            return blocks, str(error.body["error"]["code"])
        return blocks, "whole"

    async def run():
        tasks = [asyncio.create_task(told(source)) for source in (runs, waits)]
        await asyncio.sleep(0.2)
        assert len(pulse.running) == 1
        pulse.end(ApiError(503, "over", code="server_ending"))
        return await asyncio.gather(*tasks)

    found = asyncio.run(asyncio.wait_for(run(), timeout=120))
    assert found == [(1, "server_ending"), (0, "server_ending")]
    assert not pulse.running
    late = asyncio.run(asyncio.wait_for(told(runs), timeout=120))
    assert late == (0, "server_ending")  # nobody begins behind the end


# One item, such as the scores of a text


async def one_item_of(lives: Sequence[str], pulse: Pulse, patience: Patience):
    """What `told_whole` makes of samplers that live so, and how many were lost over it. The last
    one stands for all that follow."""
    asked, losses = [], []

    async def source():
        asked.append(lives[min(len(asked), len(lives) - 1)])
        if asked[-1] == "silent":
            await asyncio.sleep(60)
        if asked[-1] == "full":
            raise NoRoom
        yield {"weights": "other" if asked[-1] == "other" else "w"}
        if asked[-1] == "hangs":
            await asyncio.sleep(60)
        if asked[-1] == "dies":
            raise SamplerLost
        yield {"scores": [None, 0.5]}

    settings = {"weights": "w", "pulse": pulse, "patience": patience}
    try:
        told = await told_whole(source, on_loss=lambda: losses.append(1), **settings)
    except ApiError as error:
        told = (error.status, error.body["error"]["code"])
    return told, len(losses)


def one_item(*lives: str):
    return asyncio.run(asyncio.wait_for(one_item_of(lives, Pulse(), SHORT), timeout=120))


def test_one_item_comes_from_another_sampler_where_one_dies_over_it():
    told = {"scores": [None, 0.5]}
    assert one_item("lives") == (told, 0)
    assert one_item("dies", "dies", "lives") == (told, 2)
    assert one_item("dies", "full", "lives") == (told, 1)
    assert one_item("dies") == ((503, "sampler_lost"), SHORT.losses + 1)


def test_one_item_is_refused_where_no_sampler_can_give_it():
    assert one_item("full") == ((429, "rate_limit_exceeded"), 0)
    assert one_item("other") == ((503, "model_changed"), 0)
    began = time.monotonic()
    assert one_item("silent") == ((503, "sampler_lost"), 0)
    assert SHORT.seconds <= time.monotonic() - began < SHORT.seconds + 5


def test_the_end_of_all_streams_ends_one_item_too():
    pulse, patience = Pulse(), Patience(seconds=60)

    async def run():
        items = [one_item_of([life], pulse, patience) for life in ("silent", "hangs")]
        tasks = [asyncio.create_task(item) for item in items]
        await asyncio.sleep(0.2)
        assert len(pulse.running) == 1
        pulse.end(ApiError(503, "over", code="server_ending"))
        return await asyncio.gather(*tasks, one_item_of(["lives"], pulse, patience))

    found = asyncio.run(asyncio.wait_for(run(), timeout=120))
    assert found == [((503, "server_ending"), 0)] * 3
    assert not pulse.running
