"""An output that cannot be written is one sentence in every stage, before any work."""

import importlib

import pytest

STAGES = {
    "prepare": ["--source.paths", "stdlib:"],
    "tokenizer": ["--source.paths", "stdlib:"],
    "pretrain": ["--corpus", "CORPUS", "--num-workers", "0"],
    "distil": ["--corpus", "CORPUS", "--num-workers", "0", "--teacher", "none"],
    "sft": ["--corpus", "CORPUS", "--num-workers", "0", "--initial-model", "none"],
    "teach": ["--corpus", "CORPUS", "--teacher", "none", "--runner", "local"],
    "convert": ["--source", "none"],
    "export": ["--model", "none"],
    "evaluate": ["--model", "none", "--corpus", "none"],
    "generate": ["--model", "none", "--input", "none"],
    "demo": [],
}


VERBS = {"tokenizer": ["train"]}


@pytest.mark.parametrize("output", ["/dev/null/x", "/proc/x/y"])
@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"distil", "sft"}))  # they read models first
def test_an_output_that_cannot_be_written_is_named_first(stage, output, tiny_corpus, capsys):
    words = [tiny_corpus if word == "CORPUS" else word for word in STAGES[stage]]
    main = importlib.import_module(f"jobs.{stage}").main
    assert main([*VERBS.get(stage, []), "--output", output, *words]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "output=/" in said
    assert "cannot be" in said
    assert "Traceback" not in said


def test_every_stage_that_has_an_output_is_among_them():
    from jobs.cascade import STAGES as ALL

    assert set(STAGES) == set(ALL) - {"serve", "shards", "plan", "validate"}
