"""Sequence-level distillation is the line itself: the teacher writes, and its text is learnt."""

import json
from pathlib import Path

import pytest

from cascade_model.corpus import Corpus
from jobs import distil, generate, prepare, pretrain, sft
from tests.cascade_model.corpus_making import make_corpus
from tests.jobs.test_sft import CHATS, SHAPE, STEPS

TEXTS = {"a": [f"text {i} says {i * i} " * (5 + i % 20) for i in range(40)]}
ONE = ["--trainer.num-steps", "1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    corpus = make_corpus(folder / "corpus", TEXTS)
    words = ["--corpus", corpus, "--output", str(folder / "run"), *SHAPE, *STEPS]
    words += ["--trainer.num-steps", "4"]
    assert pretrain.main([*words, "--model.block-size", "1", "--model.logits", "shifted"]) == 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def written(teacher, tmp_path_factory, ray_local) -> list[dict]:
    """What the teacher writes after each of a few prompts."""
    folder = tmp_path_factory.mktemp("written")
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"text {number} says"}) for number in range(12)]
    prompts.write_text("\n".join(lines))
    words = ["--model", str(teacher), "--input", str(prompts), "--output", str(folder / "taught")]
    words += ["--threads-per-worker", "1", "--sampling.max-tokens", "24"]
    words += ["--sampling.temperature", "1", "--sampling.stop-at-eos", "False"]
    assert generate.main(words) == 0
    shards = sorted((folder / "taught").glob("completions-*.jsonl"))
    return [json.loads(line) for path in shards for line in path.read_text().splitlines()]


def prepared(teacher, folder: Path, rows: list[dict], *more: str) -> str:
    source, output = folder / "rows.jsonl", folder / "corpus"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--source.paths", str(source), "--output", str(output), "--runner", "local"]
    words += ["--tokenizer", str(teacher / "tokenizer.json"), "--sequence-length", "64"]
    assert prepare.main([*words, "--noise.block-size", "4", "--held-out-rate", "0", *more]) == 0
    return str(output)


@pytest.mark.ray
def test_a_student_is_distilled_on_what_its_teacher_wrote(teacher, written, tmp_path):
    rows = [{"text": row["prompt"] + row["completion"]} for row in written]
    corpus = prepared(teacher, tmp_path, rows)
    assert Corpus.open(corpus).num_tokens >= 12 * 24
    words = ["--corpus", corpus, "--teacher", str(teacher), "--output", str(tmp_path / "run")]
    assert distil.main([*words, *SHAPE, *STEPS, *ONE]) == 0
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.ray
def test_prompt_and_completion_are_a_conversation_whose_answer_is_learnt(
    teacher, written, tmp_path
):
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in written
    ]
    corpus = prepared(teacher, tmp_path, rows, *CHATS)
    places = Corpus.open(corpus).rows(range(Corpus.open(corpus).num_sequences))
    assert 12 * 15 < places.is_maskable.sum() < places.is_maskable.size
    start = tmp_path / "start"
    words = ["--corpus", corpus, "--output", str(start), *SHAPE, *STEPS, *ONE]
    assert pretrain.main(words) == 0
    words = ["--corpus", corpus, "--initial-model", str(start / "model"), *STEPS, *ONE]
    assert sft.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model").is_dir()
