"""The engine: many askers and one thread, and the same tokens for each."""

import asyncio
import queue
import threading
import time
from dataclasses import asdict, replace

import pytest

from cascade_model.errors import InputError
from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.requests import check_prompt
from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import TextStream, TokenLogprob
from cascade_model.tokenizer import byte_tokenizer
from tests.tiny_models import text_config

TOKENIZER = byte_tokenizer()
CONFIG = text_config(TOKENIZER, num_layers=2)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_model(), TOKENIZER)


def tiny_model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(0)
    return model.eval()


def test_log_probabilities_are_the_same_in_any_company_and_cut_at_stops(llm):
    asking = [
        SamplingParams(max_tokens=18, temperature=1.0, seed=seed, logprobs=2, stop_at_eos=False)
        for seed in range(4)
    ]
    alone = [llm.generate(["Hello"], params)[0] for params in asking]
    assert llm.generate(["Hello"] * 4, asking) == alone
    stop = alone[0].text[6:8]
    [cut] = llm.generate(["Hello"], asking[0], stop=[stop])
    assert len(cut.token_ids) < 18
    assert cut.logprobs == alone[0].logprobs[: len(cut.token_ids)]
    chunks = list(llm.chunks("Hello", asking[0]))
    assert sum((chunk.logprobs for chunk in chunks), ()) == alone[0].logprobs
    plain = replace(asking[0], logprobs=None)
    assert replace(alone[0], logprobs=None) == llm.generate(["Hello"], plain)[0]


def test_blocks_that_crossed_a_border_as_dicts_become_the_same_chunks(llm):
    params = SamplingParams(max_tokens=12, logprobs=2, report_margin=True, stop_at_eos=False)
    text = TextStream(TOKENIZER.decode)
    blocks = llm.blocks(TOKENIZER.encode("Hello"), params)
    chunks = [text.push(**asdict(block)) for block in blocks]
    assert chunks == list(llm.chunks("Hello", params))
    assert {type(one) for chunk in chunks for one in chunk.logprobs} == {TokenLogprob}


def test_the_margin_of_a_completion_is_the_smallest_of_its_blocks(llm):
    params = SamplingParams(max_tokens=22, temperature=1.0, report_margin=True, stop_at_eos=False)
    margins = [block.margin for block in llm.blocks(TOKENIZER.encode("Hello"), params)]
    assert len(set(margins)) > 3
    assert all(0 <= margin <= 1 for margin in margins)
    [whole] = llm.generate(["Hello"], params)
    assert whole.margin == min(margins)
    assert [chunk.margin for chunk in llm.chunks("Hello", params)] == margins
    assert llm.generate(["Hello"] * 3, params) == [whole] * 3
    [plain] = llm.generate(["Hello"], replace(params, report_margin=False))
    assert plain == replace(whole, margin=None)


def test_an_end_of_text_token_is_told_of_too(llm):
    params = SamplingParams(max_tokens=60, temperature=3.0, seed=1, logprobs=0)
    [whole] = llm.generate(["Hello"], params)
    assert whole.token_ids[-1] == TOKENIZER.eos_id
    assert len(whole.logprobs) == len(whole.token_ids)


def test_a_stream_joins_to_what_generate_returns(llm):
    params = SamplingParams(max_tokens=18, temperature=1.0, seed=3, stop_at_eos=False)
    chunks = list(llm.chunks("Hello", params))
    [whole] = llm.generate(["Hello"], params)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
    assert len(whole.token_ids) == 18
    assert whole.finish_reason == "length"
    assert whole.passes >= sum(whole.steps_per_block)
    assert whole.text == TOKENIZER.decode(list(whole.token_ids))


def test_a_stop_string_ends_the_decoding_and_later_blocks_are_never_computed(llm):
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5, stop_at_eos=False)
    [free] = llm.generate(["Hello"], params)
    stop = free.text[6:8]
    [cut] = llm.generate(["Hello"], params, stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.passes < free.passes


def test_many_threads_get_the_same_tokens_as_one(llm):
    each = [SamplingParams(max_tokens=16, temperature=1.0, seed=seed) for seed in range(6)]
    alone = [llm.generate(["abc"], params)[0] for params in each]
    found = [None] * len(each)

    def decode(index: int) -> None:
        found[index] = llm.generate(["abc"], each[index])[0]

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(each))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_prompts_and_params_go_in_pairs(llm):
    params = [SamplingParams(max_tokens=length, stop_at_eos=False) for length in (3, 6)]
    first, second = llm.generate(["a", [98, 99]], params)
    assert (len(first.token_ids), len(second.token_ids)) == (3, 6)


def test_the_text_of_a_special_token_in_a_prompt_is_ordinary_text(llm):
    tokens = TOKENIZER.encode("<|mask|><|pad|><|endoftext|>")
    assert not {CONFIG.mask_id, CONFIG.pad_id, CONFIG.eos_id} & set(tokens)
    params = SamplingParams(max_tokens=4, stop_at_eos=False)
    assert len(llm.generate(["<|mask|>"], params)[0].token_ids) == 4


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 4, "prompt is empty"),
        ([CONFIG.vocab_size], 4, "outside the vocabulary"),
        ([-1], 4, "outside the vocabulary"),
        ([1, CONFIG.mask_id], 4, "mask or padding token"),
        ([1, CONFIG.pad_id], 4, "mask or padding token"),
        ([1] * 100, 29, "over the context of 128"),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_refused_in_one_sentence(prompt, max_tokens, words):
    with pytest.raises(InputError, match=words):
        check_prompt(CONFIG, prompt, max_tokens)


def test_the_longest_prompt_that_fits_is_taken():
    check_prompt(CONFIG, [1] * 100, 28)


def test_blocks_for_an_event_loop_are_the_same(llm):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=2, stop_at_eos=False)
    tokens = TOKENIZER.encode("Hello")

    async def gather() -> list[list[int]]:
        async def one() -> list[int]:
            return [t async for block in llm.stream_blocks(tokens, params) for t in block.tokens]

        return await asyncio.gather(*(one() for _ in range(4)))

    alone = [token for block in llm.blocks(tokens, params) for token in block.tokens]
    assert asyncio.run(gather()) == [alone] * 4


def test_a_refused_prompt_leaves_the_others_alone(llm):
    params = SamplingParams(max_tokens=6, stop_at_eos=False)
    answers = {a.index: a.result for a in llm.answers(["a", [], "b", [1] * 500], params)}
    assert isinstance(answers[1], InputError)
    assert isinstance(answers[3], InputError)
    assert [answers[0], answers[2]] == llm.generate(["a", "b"], params)
    with pytest.raises(InputError, match="prompt is empty"):
        llm.generate(["a", []], params)


def test_a_round_that_fails_ends_its_requests_and_the_engine_lives_on(llm, monkeypatch):
    params = SamplingParams(max_tokens=6, stop_at_eos=False)
    expected = llm.generate(["a"], params)
    scheduler = llm.engine.scheduler
    step = scheduler.step

    def fail() -> bool:
        if scheduler.waiting or scheduler.running:
            raise MemoryError("no room")
        return step()

    monkeypatch.setattr(scheduler, "step", fail)
    with pytest.raises(MemoryError, match="no room"):
        llm.generate(["a"], params)
    monkeypatch.undo()
    assert llm.generate(["a"], params) == expected


def test_a_closed_engine_tells_those_who_wait():
    own = LLM(tiny_model(), TOKENIZER)
    params = SamplingParams(max_tokens=100, stop_at_eos=False)
    blocks = own.blocks(TOKENIZER.encode("Hello"), params)
    next(blocks)
    own.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(blocks)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        own.generate(["x"], params)
    own.close()


class LateOrders:
    """The engine's orders, where the thread is told to end just before an order arrives."""

    def __init__(self) -> None:
        self._orders = queue.SimpleQueue()
        self.get, self.empty = self._orders.get, self._orders.empty

    def put(self, order) -> None:
        self._orders.put(None)
        time.sleep(0.2)  # the thread ends, or waits for this order
        self._orders.put(order)


def test_a_request_that_comes_while_the_thread_ends_is_told_once():
    own = LLM(tiny_model(), TOKENIZER)
    own.engine._worker.orders = LateOrders()
    told = []
    own.engine.submit([1, 2, 3], SamplingParams(max_tokens=4), 0, told.append)
    until(lambda: told)
    own.close()
    assert [str(error) for error in told] == ["the engine was closed"]


def test_bytes_that_are_not_yet_a_character_are_held_back():
    """A byte-fallback decoder shows one replacement character for each pending byte."""
    data = "a\N{EURO SIGN}b".encode()

    def decode(tokens):
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError as error:
            whole = bytes(tokens)[: error.start].decode()
            return whole + "\N{REPLACEMENT CHARACTER}" * (len(tokens) - error.start)

    stream, texts = TextStream(decode), []
    for byte in data:
        texts.append(stream.push([byte], passes=1, steps=1, finish_reason=None).text)
    assert texts == ["a", "", "", "\N{EURO SIGN}", "b"]


def until(is_so, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
