"""The losses beside a stage's own, from the command line to the metrics."""

import json
from pathlib import Path

import pytest

from jobs import distil, pretrain
from tests.jobs.test_sft import SHAPE, said

STEPS = ["--trainer.num-steps", "3", "--trainer.sequences-per-step", "4", "--num-workers", "0"]
STEPS += ["--trainer.log-every", "1"]
CAUSAL = ["--model.clean-half", "token_causal"]
BOTH = ["--ar-weight", "0.3", "--entropy-weight", "2", "--entropy-temperature", "0.5"]


def words(corpus, output, *more) -> list[str]:
    return ["--corpus", corpus, "--output", str(output), *SHAPE, *STEPS, *more]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tiny_corpus, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    more = ["--model.block-size", "1", "--model.logits", "shifted"]
    assert pretrain.main(words(tiny_corpus, folder, *more)) == 0
    return str(folder / "model")


def test_each_loss_is_told_apart_and_the_first_is_comparable(tiny_corpus, tmp_path):
    assert pretrain.main(words(tiny_corpus, tmp_path / "both", *CAUSAL, *BOTH)) == 0
    assert pretrain.main(words(tiny_corpus, tmp_path / "plain", *CAUSAL)) == 0
    both, plain = lines(tmp_path / "both")[0], lines(tmp_path / "plain")[0]
    assert both["ce"] == pytest.approx(plain["loss"], rel=1e-6)  # before anything was learnt
    assert both["loss"] > both["ce"] + 0.3 * 0.9 * both["ar"]
    assert 0 < both["ar"] < 10
    assert "ar" not in plain


def test_a_clean_half_that_sees_ahead_is_refused_before_anything_is_written(
    tiny_corpus, tmp_path, capsys
):
    assert pretrain.main(words(tiny_corpus, tmp_path / "run", "--ar-weight", "0.3")) == 2
    assert "model.clean_half=block_causal would have a clean token predict" in said(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_same_terms_only(tiny_corpus, tmp_path, capsys):
    assert pretrain.main(words(tiny_corpus, tmp_path, *CAUSAL, *BOTH)) == 0
    other = [*BOTH, "--ar-weight", "0.1"]
    assert pretrain.main(words(tiny_corpus, tmp_path, *CAUSAL, *other)) == 3
    assert "objective.ar_weight=0.3 and this run has objective.ar_weight=0.1" in said(capsys)


def test_a_teacher_beside_growing_blocks(tiny_corpus, teacher, tmp_path):
    """One step each at block size 1, 4, the whole sequence and 4 again, all terms on."""
    schedule = tmp_path / "schedule.yaml"
    sizes = [1, 4, 64, 4]
    phases = "".join(f"  - {{block_size: {size}, share: 0.25}}\n" for size in sizes)
    schedule.write_text(f"trainer:\n  num_steps: 4\n  block_sizes:\n{phases}")
    more = ["--config", str(schedule), "--teacher", teacher, *CAUSAL, *BOTH]
    more += ["--trainer.num-steps", "4", "--model.logits", "shifted"]
    assert distil.main(words(tiny_corpus, tmp_path / "run", *more)) == 0
    found = lines(tmp_path / "run")
    assert len(found) == 4
    assert all(line["kl"] > 0 and line["ce"] > 0 for line in found)
    assert [line.get("ar") is None for line in found] == [True, False, False, False]
