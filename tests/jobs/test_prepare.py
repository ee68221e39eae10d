"""The command: a table on success, one box and an exit code on a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_model.corpus import Corpus
from jobs import prepare
from jobs.cli import parse

RECIPE = Path(prepare.__file__).parent / "recipes/demo/prepare.yaml"


def arguments(output, source, *more):
    return ["--output", str(output), "--source.paths", str(source), "--runner", "local", *more]


def test_the_demo_recipe_parses_and_takes_five_megabytes_of_real_text():
    from pipelines.sources import make_plan

    config = parse(prepare.PrepareConfig, ["--config", str(RECIPE)])
    plan = make_plan(config.source, config.part_bytes)
    assert sum(file.bytes for file in plan.files) > 5_000_000
    assert len(plan.parts) > 4


def test_the_table_names_what_was_prepared(documents_jsonl, tmp_path, capsys):
    output = tmp_path / "corpus"
    code = prepare.main(arguments(output, documents_jsonl, "--tokenizer", "bytes"))
    shown = capsys.readouterr().out
    assert code == 0
    assert Corpus.open(str(output)).digest in shown
    assert "tokens_per_second" in shown
    [note] = [line for line in shown.splitlines() if line.startswith("tokenizer_engine")]
    assert "engine" in note.partition(" ")[2]
    [report] = [line.split()[1] for line in shown.splitlines() if line.startswith("report ")]
    assert Path(report).is_file()
    assert prepare.main(arguments(output, documents_jsonl, "--tokenizer", "bytes")) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"{output} was finished before and is left as it is\n")
    assert "tokens_per_second" not in again


@pytest.mark.parametrize(("short", "is_told"), [(2, True), (60, False)])
def test_the_table_names_what_was_rearranged_and_says_where_that_is_little(
    tmp_path, capsys, short, is_told
):
    lengths = [3] * short + [100] * (80 - short)
    texts = [f"{number} " * length for number, length in enumerate(lengths)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    more = ["--tokenizer", "bytes", "--sequence-length", "32", "--infill-rate", "1"]
    assert prepare.main(arguments(tmp_path / "corpus", source, *more, "--held-out-rate", "0")) == 0
    said = capsys.readouterr()
    assert f"\nrearranged          {short}\n" in said.out
    told = f"infill_rate=1.0 rearranged {short} of 80 documents only"
    assert (told in said.err) == is_told
    assert "longer than sequence_length=32" in said.err or not is_told


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--sequence-length", "100"], "sequence_length=100 is not a multiple"),
        (["--tokenizer", "none.json"], "tokenizer=none.json cannot be read"),
        (["--source.paths", "none.jsonl"], "which does not exist"),
        (["--source.paths"], "source.paths is empty"),
        (["--filters.min-letter-share", "2"], "filters.min_letter_share=2.0 must be in 0..1"),
    ],
)
def test_a_mistake_is_one_box_and_exit_code_2(documents_jsonl, tmp_path, capsys, more, sentence):
    output = tmp_path / "corpus"
    assert prepare.main(arguments(output, documents_jsonl, *more)) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in shown
    assert "Traceback" not in shown
    assert not output.exists()


def test_the_table_tells_why_documents_are_left_out(tmp_path, capsys):
    texts = [f"sentence number {i}" for i in range(40)]
    lines = [f'{{"text": "{text}"}}' for text in [*texts, *texts[:3], "short"]]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join([*lines, "broken"]) + "\n")
    more = ["--tokenizer", "bytes", "--max-dead-rate", "0.1", "--filters.min-words", "2"]
    assert prepare.main(arguments(tmp_path / "corpus", source, *more)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "dropped             4 (3 duplicate, 1 min_words)" in shown
    assert "dead                1 (1 broken_json)" in shown


def test_the_data_side_loads_no_torch():
    program = "import sys, pipelines.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
