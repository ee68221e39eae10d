"""From conversations to a model that answers them: the real line, on a small scale."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from cascade_model.chat_template import ChatTemplate
from cascade_model.config import TrainingNoise
from cascade_model.corpus import Corpus
from cascade_model.jinja_chat import PLAIN
from cascade_model.llm import LLM
from cascade_model.own_template import own_template
from cascade_model.sampling import SamplingParams
from jobs import plan, prepare, pretrain, sft
from jobs.cli import build
from pipelines.config import PrepareConfig

RECIPES = Path(sft.__file__).parent / "recipes/sft"
ANSWERS = {
    "Sky?": "blue", "Grass?": "green", "Snow?": "white", "Coal?": "black",
    "Blood?": "red", "Lemon?": "yellow", "Night?": "dark", "Fire?": "orange",
}  # fmt: skip
SHAPE = ["--model.hidden-size", "48", "--model.num-layers", "2", "--model.num-heads", "4"]
SHAPE += ["--model.num-kv-heads", "2", "--model.head-dim", "16", "--model.intermediate-size", "96"]
STEPS = ["--trainer.sequences-per-step", "8", "--num-workers", "0", "--trainer.log-every", "20"]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    asked = {"role": "user", "content": question}
    return [asked, {"role": "assistant", "content": answer}]


def prepared(folder: Path, rows: list[dict], *more: str) -> str:
    source, output = folder / "rows.jsonl", folder / "corpus"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--source.paths", str(source), "--output", str(output), "--tokenizer", "bytes"]
    words += ["--sequence-length", "128", "--noise.block-size", "4", "--held-out-rate", "0"]
    assert prepare.main([*words, "--runner", "local", *more]) == 0
    return str(output)


CHATS = ["--source.messages-column", "messages", "--packing", "best_fit", "--dedup", "none"]


def chats(folder: Path, *more: str) -> str:
    """Every conversation many times, so that they come together in all orders."""
    found = list(ANSWERS.items()) * 12
    order = np.random.default_rng(0).permutation(len(found))
    rows = [{"messages": conversation(*found[i])} for i in order]
    return prepared(folder, rows, *CHATS, *more)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return chats(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    rows = [{"text": f"{number} and {number * 7} are numbers. " * 4} for number in range(60)]
    return prepared(tmp_path_factory.mktemp("plain"), rows)


@pytest.fixture(scope="module")
def model(plain, tmp_path_factory) -> str:
    run = tmp_path_factory.mktemp("model")
    words = ["--corpus", plain, "--output", str(run), *SHAPE, *STEPS, "--trainer.num-steps", "2"]
    assert pretrain.main(words) == 0
    return str(run / "model")


def asked(corpus, model, output, *more) -> list[str]:
    words = ["--corpus", corpus, "--initial-model", model, "--output", str(output)]
    return [*words, *STEPS, "--optimizer.peak-lr", "0.004", *more]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.replace("│", "").split())


def answers(model: str) -> dict[str, tuple[str, str]]:
    """What a model says to each question, and why it stopped."""
    params = SamplingParams(max_tokens=24, rule="low_confidence")
    with LLM.load(model) as llm:
        chat = ChatTemplate.of("plain", llm.tokenizer)
        prompts = [chat.prompt(conversation(q, "")[:1]) for q in ANSWERS]
        found = llm.generate(prompts, params)
        return {
            q: (done.text.strip(), done.finish_reason)
            for q, done in zip(ANSWERS, found, strict=True)
        }


def test_a_model_learns_to_answer_and_to_stop(corpus, model, tmp_path):
    before = answers(model)
    assert sum(before[q][0] == answer for q, answer in ANSWERS.items()) == 0
    assert sft.main(asked(corpus, model, tmp_path, "--trainer.num-steps", "200")) == 0
    after = answers(str(tmp_path / "model"))
    assert after == {q: (answer, "stop") for q, answer in ANSWERS.items()}
    assert own_template(tmp_path / "model") == PLAIN  # what it learnt to be asked by


@pytest.mark.parametrize("padding", ["never", "eos"])
def test_prompts_are_always_visible_and_an_answer_ends_with_a_learnt_end_of_text(corpus, padding):
    opened = Corpus.open(corpus)
    tokenizer, manifest = opened.tokenizer(), opened.manifest
    noise = TrainingNoise.over(opened.recipe, padding=padding)
    batch = opened.batch(0, opened.num_sequences, noise)
    assert not (batch.is_masked & ~batch.is_maskable).any()
    seen = []
    for row in range(len(batch)):
        for number in range(batch.segments[row].max() + 1):
            own = batch.segments[row] == number
            tokens, learnt = batch.clean_tokens[row, own], batch.is_maskable[row, own]
            size = np.flatnonzero(tokens != manifest.pad_id)[-1] + 1
            if padding == "eos":
                assert (tokens[size:] == manifest.eos_id).all()
                size = np.flatnonzero(tokens == manifest.eos_id)[0] + 1
            prompt = tokenizer.decode(tokens[:size][~learnt[:size]].tolist())
            answer = tokens[:size][learnt[:size]].tolist()
            assert answer[-1] == manifest.eos_id
            assert learnt[size:].all() == (padding == "eos") or size == len(tokens)
            question = prompt.removeprefix("User: ").partition("\n")[0]
            assert tokenizer.decode(answer[:-1]).strip() == ANSWERS[question]
            seen.append(question)
    assert sorted(seen) == sorted(list(ANSWERS) * 12)


def test_every_conversation_counts_the_same_unless_said_otherwise(corpus, model, tmp_path):
    assert sft.main(asked(corpus, model, tmp_path, "--trainer.num-steps", "1")) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["normaliser"] == "document"


def test_a_corpus_without_prompts_is_refused_unless_allowed(plain, model, tmp_path, capsys):
    assert sft.main(asked(plain, model, tmp_path / "run")) == 2
    assert "has no prompts" in said(capsys)
    assert not (tmp_path / "run").exists()
    allowed = ["--allow-text", "True", "--allow-cut", "True", "--trainer.num-steps", "1"]
    assert sft.main(asked(plain, model, tmp_path / "run", *allowed)) == 0


def test_conversations_that_were_cut_are_refused_unless_allowed(model, tmp_path, capsys):
    cut = chats(tmp_path, "--packing", "concat")
    assert sft.main(asked(cut, model, tmp_path / "run")) == 2
    assert "packing=concat, which parts answers from their prompts" in said(capsys)
    more = ["--allow-cut", "True", "--trainer.num-steps", "1"]
    assert sft.main(asked(cut, model, tmp_path / "run", *more)) == 0


def test_a_start_is_needed(corpus, tmp_path, capsys):
    assert sft.main(["--corpus", corpus, "--output", str(tmp_path)]) == 2
    assert "initial_model is missing" in said(capsys)


def test_the_recipes_are_for_this_job():
    read = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.iterdir()}
    config = build(sft.SftConfig, read["sft"], "sft.yaml")
    assert config.noise.complement
    corpus = build(PrepareConfig, read["prepare"], "prepare.yaml")
    assert corpus.has_chats
    assert corpus.packing == "best_fit"
    assert corpus.output == config.corpus


def test_a_plan_counts_how_often_a_conversation_comes(corpus, model, tmp_path, capsys):
    """Prompts and padding are no tokens to learn, and a pair of complements shows one sequence."""
    opened = Corpus.open(corpus)
    assert opened.num_tokens < opened.num_sequences * opened.sequence_length / 2
    words = ["sft", *asked(corpus, model, tmp_path / "run"), "--weight", "unit"]
    words += ["--trainer.sequences-per-step", str(2 * opened.num_sequences)]
    for complement, told in (("False", "6.00 x"), ("True", "3.00 x")):
        more = ["--trainer.num-steps", "3", "--noise.complement", complement]
        assert plan.main([*words, *more]) == 0
        assert f"in 3 steps, {told} the corpus" in capsys.readouterr().out
    both = 2 * opened.num_sequences
    noise = TrainingNoise.over(opened.recipe, complement=True, sequences_per_batch=both)
    assert sorted(opened.batch(0, both, noise).sequence_ids) == sorted([*range(both // 2)] * 2)


def test_a_plan_is_made_of_it_and_refuses_what_it_refuses(corpus, plain, model, tmp_path, capsys):
    words = ["sft", *asked(corpus, model, tmp_path / "run"), "--plan.device", "H100"]
    assert plan.main(words) == 0
    assert "memory" in capsys.readouterr().out
    words = ["sft", *asked(plain, model, tmp_path / "run"), "--plan.device", "H100"]
    assert plan.main(words) == 2
    assert "has no prompts" in said(capsys)
