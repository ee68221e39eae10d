"""The console command: a list of stages, each handed its own arguments."""

import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cascade


def test_help_lists_every_stage(capsys):
    assert cascade.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {stage} " in shown for stage in cascade.STAGES)


def test_no_stage_and_a_wrong_stage_end_with_code_2(capsys):
    assert cascade.main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert cascade.main(["pretain"]) == 2
    assert capsys.readouterr().err == "cascade: no stage 'pretain'; did you mean `pretrain`?\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretrian"], "cascade: no stage 'pretrian'; did you mean `pretrain`?"),
        (["distill"], "cascade: no stage 'distill'; did you mean `distil`?"),
        (["tokeniser"], "cascade: no stage 'tokeniser'; did you mean `tokenizer`?"),
        (["plan", "pretrian"], "cascade plan: no action 'pretrian'; did you mean `pretrain`?"),
        (["shards", "verfy"], "cascade shards: no action 'verfy'; did you mean `verify`?"),
        (["plan", "x"], "cascade plan: no action 'x'; known are pretrain, distil, sft"),
    ],
)
def test_a_misspelt_word_is_told_in_one_sentence_with_the_one_that_was_meant(words, told, capsys):
    assert cascade.main(words) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{told}\n")


def test_a_word_like_no_stage_is_told_with_all_of_them(capsys):
    assert cascade.main(["qqq"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.endswith(f"known are {', '.join(cascade.STAGES)}\n")


def test_every_stage_is_a_job_and_every_job_with_a_main_a_stage():
    jobs = Path(cascade.__file__).parent
    is_main = re.compile(r"^main = (command|actions)\(", re.MULTILINE)
    mains = {p.stem for p in jobs.glob("*.py") if is_main.search(p.read_text())}
    assert mains == set(cascade.STAGES)
    assert all(callable(importlib.import_module(f"jobs.{stage}").main) for stage in mains)


def test_a_stage_gets_the_rest_of_the_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr("jobs.evaluate.main", lambda words: seen.append(words) or 3)
    assert cascade.main(["evaluate", "--model", "m"]) == 3
    assert seen == [["--model", "m"]]


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"set -o pipefail; {sys.executable} -m jobs.cascade prepare --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("words", [["--help"], ["evaluate", "--help"]])
def test_the_command_runs_as_a_module(words):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cascade", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: cascade" in done.stdout
