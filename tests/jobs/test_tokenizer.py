"""Training a tokenizer by itself gives what `prepare` would train."""

import json

import pytest

from cascade_model.tokenizer import Tokenizer
from jobs import prepare, tokenizer


@pytest.fixture
def source(tmp_path):
    lines = [f"Document {i}: {'der Hund und die Katze ' * (i % 7)} {i * i}" for i in range(400)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def run(source, output, *more: str) -> int:
    words = ["train", "--output", str(output), "--source.paths", str(source)]
    return tokenizer.main([*words, "--vocab-size", "400", *more])


def told(capsys) -> dict[str, str]:
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def complaint(capsys) -> str:
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_it_is_the_tokenizer_that_prepare_trains(source, tmp_path, capsys):
    assert run(source, tmp_path / "new/tokenizer.json", "--held-out-rate", "0.1") == 0
    summary = told(capsys)
    found = Tokenizer.from_file(tmp_path / "new")
    assert (summary["sha256"], summary["vocab_size"]) == (found.sha256, "400")
    words = ["--output", str(tmp_path / "corpus"), "--source.paths", str(source)]
    words += ["--vocab-size", "400", "--held-out-rate", "0.1", "--runner", "local"]
    assert prepare.main(words) == 0
    assert Tokenizer.from_file(tmp_path / "corpus").sha256 == found.sha256


def test_bytes_per_token_is_that_of_text_that_was_not_trained_on(source, tmp_path, capsys):
    assert run(source, tmp_path / "a.json", "--held-out-rate", "0.25") == 0
    summary = told(capsys)
    trained, held_out = (
        int(summary[name].replace(",", "")) for name in ("trained_on_bytes", "held_out_bytes")
    )
    total = sum(len(json.loads(line)["text"]) for line in source.read_text().splitlines())
    assert trained + held_out == total
    assert 0.1 < held_out / total < 0.4
    assert 1.0 < float(summary["bytes_per_token"]) < 10.0
    assert run(source, tmp_path / "b.json", "--held-out-rate", "0") == 0
    assert told(capsys)["bytes_per_token"] == "None"


def test_a_sample_that_ends_inside_a_document_does_not_measure_it(source, tmp_path, capsys):
    size = ["--sample-bytes", "200"]
    assert run(source, tmp_path / "a.json", "--held-out-rate", "0", *size) == 0
    assert told(capsys)["held_out_bytes"] == "0"


def test_another_tokenizer_is_never_overwritten(source, tmp_path, capsys):
    output = tmp_path / "tokenizer.json"
    assert run(source, output) == 0
    assert run(source, output) == 0
    before = output.read_bytes()
    assert run(source, output, "--sample-bytes", "3000") == 2
    assert "exists with other content" in complaint(capsys)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "x/"], "names no file"),
        (["--vocab-size", "10"], "vocab_size=10 is below"),
        (["--held-out-rate", "1"], "held_out_rate=1.0 must be"),
        (["--sample-bytes", "0"], "sample_bytes=0"),
        (["--part-bytes", "0"], "part_bytes=0"),
        (["--source.paths", "/none"], "does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(source, tmp_path, capsys, words, sentence):
    assert run(source, tmp_path / "t.json", *words) == 2
    assert sentence in complaint(capsys)
    assert not (tmp_path / "t.json").exists()


def test_no_action_lists_them(capsys):
    assert tokenizer.main([]) == 2
    assert "train" in capsys.readouterr().out


def test_a_source_without_text_is_one_sentence(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": null}\n')
    assert run(empty, tmp_path / "t.json") == 2
    assert "holds no text to train on" in complaint(capsys)
