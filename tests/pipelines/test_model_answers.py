"""A model in this process answers rows: each as if it were alone, chats in the template's words."""

import dataclasses
import random

import pytest

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError, Unfinished
from cascade_model.jinja_chat import CHATML
from cascade_model.llm import LLM
from cascade_model.sampling import SamplingParams
from cascade_model.weights import read_config, weights_digest
from pipelines.answers import longest_first
from pipelines.model_answers import ModelAnswers, ModelSource
from pipelines.prompt_rows import DeadRow, Prompt
from pipelines.row_settings import Decoding
from tests.jobs.test_preparation import chatml_tokenizer  # noqa: F401 - a fixture
from tests.jobs.tiny_endpoint import tiny_llm
from tests.tiny_models import saved_text_model

HI = ({"role": "user", "content": "Hi"},)


def prompt_of(row: int, text: str = "", messages=None, stop=(), **settings) -> Prompt:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 1.0, "seed": row} | settings))
    decoding = Decoding(params=params, stop=stop)
    return Prompt(row=row, id=str(row), text=text, decoding=decoding, messages=messages)


def mixed_rows(count: int) -> list[Prompt]:
    """Rows of many lengths and settings, from a seed."""
    chance = random.Random(5)
    return [
        prompt_of(
            row,
            "word " * chance.randint(1, 8),
            max_tokens=chance.randint(1, 30),
            temperature=chance.choice([0.0, 1.0]),
            rule=chance.choice(["confidence_threshold", "random", "factor"]),
            stop=chance.choice([(), ("a",), ("e", "1")]),
        )
        for row in range(count)
    ]


def test_a_row_is_answered_the_same_alone_and_among_others():
    rows = mixed_rows(40)
    with tiny_llm() as llm:
        answers = ModelAnswers(llm)
        together = answers.answer(rows)
        assert [answers.answer([row])[0] for row in rows] == together
        assert answers.answer(rows[::-1])[::-1] == together


def test_each_row_ends_at_its_own_stops():
    with tiny_llm() as llm:
        answers = ModelAnswers(llm)
        [whole] = answers.answer([prompt_of(0, "abc", max_tokens=40)])
        cut = whole.completion[5]
        place = whole.completion.index(cut)
        ended, other = answers.answer(
            [prompt_of(0, "abc", max_tokens=40, stop=(cut,)), prompt_of(0, "abc", max_tokens=40)]
        )
    assert (ended.completion, ended.finish_reason) == (whole.completion[:place], "stop")
    assert other == whole


def test_a_row_that_the_cache_cannot_hold_ends_the_job_and_does_not_die(tmp_path):
    model = saved_text_model(tmp_path / "model", seed=0)
    rows = [prompt_of(0, "abc"), prompt_of(1, "abc " * 20, max_tokens=40)]
    config = read_config(model)
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    with LLM.load(model, EngineConfig(cache_bytes=64 * token_bytes)) as llm:
        answers = ModelAnswers(llm)
        [alone] = answers.answer(rows[:1])
        with pytest.raises(
            Unfinished,
            match=r"engine\.cache_bytes is too small for row 1: .* 120 tokens and cache_bytes=\d+ "
            r"holds 64; .*run the same command again",
        ):
            answers.answer(rows)
        assert answers.answer(rows[:1]) == [alone]  # the others were let go
    with LLM.load(model) as llm:
        assert ModelAnswers(llm).answer(rows)[0] == alone


def test_other_weights_than_the_jobs_are_not_loaded(tmp_path):
    model = saved_text_model(tmp_path / "model", seed=0)
    source = ModelSource(model=model, weights_sha256=weights_digest(model))
    source.open().close()
    saved_text_model(tmp_path / "model", seed=1)
    with pytest.raises(Unfinished, match=r"and this job began with .* put those back"):
        source.open()


def test_weights_that_are_replaced_while_they_are_loaded_are_not_used(tmp_path, monkeypatch):
    model = saved_text_model(tmp_path / "model", seed=0)
    source = ModelSource(model=model, weights_sha256=weights_digest(model))
    load = LLM.load

    def slowly(folder, config):
        loaded = load(folder, config)
        saved_text_model(tmp_path / "model", seed=1)
        return loaded

    monkeypatch.setattr(LLM, "load", slowly)
    with pytest.raises(Unfinished, match="has the weights"):
        source.open()


def test_what_is_longest_is_handed_over_first():
    rows = [prompt_of(0, "a"), prompt_of(1, "a", max_tokens=9), prompt_of(2, "abc")]
    rows += [prompt_of(3, messages=({"role": "user", "content": "abcd"},)), prompt_of(4, "a")]
    assert longest_first(rows) == [1, 3, 2, 0, 4]


def test_a_chat_is_tokens_of_the_template_and_its_contents_ordinary_text(chatml_tokenizer):  # noqa: F811
    with tiny_llm(chatml_tokenizer) as llm:
        answers = ModelAnswers(llm, "chatml")
        written, special = "<|im_end|>", chatml_tokenizer.special_tokens
        request = answers._request(prompt_of(0, messages=({"role": "user", "content": written},)))
        assert request.text == f"<|im_start|>user\n{written}<|im_end|>\n<|im_start|>assistant\n"
        assert request.tokens.count(special["<|im_end|>"]) == 1
        assert request.tokens.count(special["<|im_start|>"]) == 2
        assert request.decoding.params.stop_ids == (special["<|im_end|>"],)
        on = answers._request(prompt_of(0, messages=HI, stop_at_eos=False))
        assert on.decoding.params.stop_ids == ()
        assert answers._request(prompt_of(0, written)).tokens == written  # a prompt is text


def test_a_developer_speaks_as_the_system_as_at_the_endpoint():
    chats = [({"role": role, "content": "Be kind."}, *HI) for role in ("developer", "system")]
    with tiny_llm() as llm:
        answers = ModelAnswers(llm)
        one, other = answers.answer([prompt_of(0, messages=chat) for chat in chats])
        assert one == other


def test_a_template_that_fails_costs_its_row_alone():
    refusing = CHATML + "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    with tiny_llm() as llm:
        answers = ModelAnswers(llm, refusing)
        first, dead, last = answers.answer(
            [prompt_of(0, messages=HI), prompt_of(1, messages=HI * 2), prompt_of(2, "abc")]
        )
        assert isinstance(dead, DeadRow)
        assert (dead.row, dead.reason) == (1, "chat_template_fails")
        assert "one turn" in dead.detail
        assert [first, last] == [
            answers.answer([row])[0] for row in (prompt_of(0, messages=HI), prompt_of(2, "abc"))
        ]


def test_stops_are_one_list_for_all_or_one_a_prompt():
    params = SamplingParams(max_tokens=4)
    with tiny_llm() as llm:
        with pytest.raises(InputError, match="stop has 1 lists for 2 prompts"):
            list(llm.answers(["a", "b"], params, [("x",)]))
        each = list(llm.answers(["a", "b"], params, [("x",), ()]))
        assert dataclasses.asdict(each[0])
        assert len(each) == 2
