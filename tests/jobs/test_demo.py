"""The demonstration's own parts: what it gathers, what it shows and when it fails."""

import json
import socket
import sys

import pytest

from cascade_model.errors import InputError
from jobs import demo

PROMPT = "def f"
HELD_OUT = {
    "nats_per_token": 3.25,
    "standard_error": 0.01,
    "nats_per_byte": 1.1,
    "is_exact": False,
    "untrained": {"nats_per_token": 7.6, "standard_error": 0.02},
    "unigram_nats_per_token": 5.0,
    "below_unigram": 1.75,
}
RUN = {"tokens": 1000, "tokens_per_second": 50.5, "first_loss": 7.5, "last_loss": 3.5}
ANSWER = {"choices": [{"text": "():\n    pass"}], "usage": {"completion_tokens": 6}}


@pytest.fixture
def folder(tmp_path):
    """What the stages leave behind, with one file that no manifest vouches for."""
    train = {"num_documents": 7, "num_tokens": 123456, "num_sequences": 964}
    row = {"prompt": PROMPT, "completion": "oo(x):", "num_tokens": 6, "passes": 3}
    files = {
        "corpus/manifest.json": {"splits": {"train": train}},
        "completions/manifest.json": {"files": [{"object": "part.a.jsonl"}]},
        "completions/part.a.jsonl": row,
        "completions/part.b.jsonl": {"prompt": "stale"},
        **{f"{name}/summary.json": RUN for name in ("teacher", "pretrain", "distil")},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def summary(folder):
    teacher = {**HELD_OUT, "is_exact": True}
    measured = {"teacher": teacher, "pretrain": HELD_OUT, "distil": HELD_OUT}
    return demo.summarise(folder, measured, ANSWER, {"prepare": 4.04, "serve": 9.0}, 99.96)


def test_the_summary_gathers_what_the_stages_left(folder, summary):
    assert (summary["documents"], summary["tokens"], summary["sequences"]) == (7, 123456, 964)
    assert [row["prompt"] for row in summary["completions"]] == [PROMPT]
    assert summary["seconds"] == {"prepare": 4.0, "serve": 9.0}
    assert summary["folder"] == str(folder)
    json.dumps(summary)


def test_the_table_says_what_happened_stage_by_stage(folder, summary):
    rows = {}
    for line in demo.table(summary).strip("\n").splitlines():
        name, _, value = line.strip().partition("  ")
        rows.setdefault(name, []).append(value.strip())
    assert rows["prepared"] == ["123,456 tokens in 964 sequences of 7 documents"]
    assert rows["block diffusion: trained"] == ["1,000 tokens at 50/s"]
    assert rows["loss before -> after"] == ["7.500 -> 3.500"] * 3
    assert rows["held-out likelihood"] == ["3.250 ± 0.010 nats/token, 1.100 nats/byte"]
    assert len(rows["held-out bound"]) == 2
    assert rows["untrained model"] == ["7.600 ± 0.020 nats/token"]
    assert rows["distilled below it by"] == ["1.750 nats/token"]
    assert rows["tokens per forward"] == ["2.00 (6 tokens, 3 passes)"]
    assert json.loads(rows["sample"][0]) == "def f ⟶ oo(x):"
    assert json.loads(rows["endpoint answered"][0]) == "():\n    pass"
    assert rows["seconds"] == ["100 (prepare 4, serve 9)"]
    assert rows["run folder"] == [str(folder)]


@pytest.mark.parametrize("gain", [0.299, -1.0, float("nan")])
def test_a_model_that_learnt_too_little_fails_the_demonstration(summary, gain):
    demo.require_gain(summary)
    summary["evaluations"]["distil"] = {**HELD_OUT, "below_unigram": gain}
    with pytest.raises(InputError, match=r"nats per token below the unigram .* asks for 0.3"):
        demo.require_gain(summary)


def test_a_stage_that_fails_ends_the_demonstration_with_its_name(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    steps = demo.Timer()
    with pytest.raises(InputError, match="the stage `evaluate` ended with code 1"):
        steps.stage("evaluate", name="x")
    assert list(steps.seconds) == ["evaluate x"]


def test_an_endpoint_that_ends_early_or_never_answers_is_told_with_its_log(tmp_path):
    class Server:
        returncode = None

        def poll(self):
            return self.returncode

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(InputError, match=r"not ready within 0 s; see .*serve.log"):
        demo.wait_until_ready(url, Server(), tmp_path / "serve.log", seconds=0.1)  # type: ignore[arg-type]
    Server.returncode = 2
    with pytest.raises(InputError, match=r"ended with code 2; see .*serve.log"):
        demo.wait_until_ready(url, Server(), tmp_path / "serve.log")  # type: ignore[arg-type]
