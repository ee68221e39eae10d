"""The `shards` command over a prepared corpus."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus
from jobs import prepare, shards
from tests.cascade_model.corpus_making import make_corpus
from tests.cascade_model.damage import Target

TEXTS = {
    "web": [f"page {i} of the web, " * (3 + i % 9) for i in range(80)],
    "code": [f"def f{i}(): return {i}\n" * 4 for i in range(30)],
}


@pytest.fixture(scope="module")
def corpus_url(tmp_path_factory) -> str:
    """Two sources of two shards each."""
    return make_corpus(tmp_path_factory.mktemp("shards") / "corpus", TEXTS, parts=2)


@pytest.fixture
def copy(corpus_url, tmp_path) -> Path:
    return Path(shutil.copytree(corpus_url, tmp_path / "corpus"))


def verify(folder, *words: str) -> int:
    return shards.main(["verify", "--corpus", str(folder), "--num-workers", "1", *words])


def test_help_and_wrong_words_list_the_actions(capsys):
    assert shards.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for action in ("verify", "show", "stats", "documents", "materialise"):
        assert f"\n  {action} " in shown
    assert shards.main([]) == 2
    assert shards.main(["verfy"]) == 2
    assert "no action 'verfy'" in capsys.readouterr().err


def test_an_action_has_help_of_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        shards.main(["verify", "--help"])
    assert end.value.code == 0
    assert "cascade shards verify" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_sound_corpus_is_verified_shard_by_shard(corpus_url, capsys, workers):
    words = ["verify", "--corpus", corpus_url, "--num-workers", workers]
    assert shards.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"ok    shard-train-{i:05d}.arrow" for i in range(4)]
    assert lines[4].startswith("shards: 4, draws: 1; all is as the manifest")


def test_a_store_that_refuses_is_one_sentence():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.shards", "stats", "--corpus", "s3://nobodys/corpus"],
        env={**environment, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2
    assert "corpus=s3://nobodys/corpus cannot be read (Unable to locate credentials)" in told
    assert "Traceback" not in told


def test_a_corpus_of_the_pipeline_is_verified(tiny_corpus, capsys):
    assert verify(tiny_corpus) == 0
    assert "shard-held_out-00000.arrow" in capsys.readouterr().out


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_every_bad_shard_is_named_and_the_code_is_3(copy, capsys):
    flip(copy / "shard-train-00001.arrow", 5000)
    (copy / "shard-train-00003.arrow").unlink()
    assert verify(copy) == 3
    told = capsys.readouterr()
    assert told.out.count("ok ") == 2
    assert "BAD   shard " in told.out
    assert "shard-train-00001.arrow has sha256" in told.out
    assert "shard-train-00003.arrow cannot be read" in told.out
    assert "bad shards: 2 of 4" in " ".join(told.err.split()).replace(" │ │ ", " ")


def test_a_flipped_footer_is_found_though_no_reader_needs_it(copy, capsys):
    size = (copy / "shard-train-00000.arrow").stat().st_size
    flip(copy / "shard-train-00000.arrow", size - 100)
    corpus = Corpus.open(str(copy))
    corpus.rows(np.arange(corpus.num_sequences))
    assert verify(copy) == 3
    assert "shard-train-00000.arrow has sha256" in capsys.readouterr().out


def test_another_tokenizer_and_a_missing_one_are_told(copy, capsys):
    path = copy / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert verify(copy) == 3
    assert "tokenizer.json has sha256" in capsys.readouterr().out
    path.unlink()
    assert verify(copy) == 3
    assert "tokenizer.json has sha256 none" in capsys.readouterr().out


def test_an_edited_manifest_is_one_sentence(copy, capsys):
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    values["eos_id"] += 1
    path.write_text(json.dumps(values))
    assert verify(copy) == 3
    assert "edited or damaged" in " ".join(capsys.readouterr().err.split())


def shown(capsys, url, *words: str) -> str:
    assert shards.main(["show", "--corpus", url, *words]) == 0
    return capsys.readouterr().out


def test_show_marks_as_many_places_as_are_masked(corpus_url, capsys):
    corpus = Corpus.open(corpus_url)
    out = shown(capsys, corpus_url, "--first-sample", "5", "--num-samples", "4")
    batch = corpus.batch(5, 4, corpus.manifest.noise)
    assert out.count("[MASK]") == batch.is_masked.sum()
    for number, sequence in enumerate(batch.sequence_ids.tolist()):
        assert f"--- sample {5 + number}, sequence {sequence}: " in out
    assert "\x1b" not in out


def test_show_in_color_keeps_the_text_whole(corpus_url, capsys):
    corpus = Corpus.open(corpus_url)
    out = shown(capsys, corpus_url, "--num-samples", "2", "--color", "always")
    assert "\x1b[7m" in out
    plain = out.replace("\x1b[7m", "").replace("\x1b[0m", "")
    batch = corpus.batch(0, 2, corpus.manifest.noise)
    for row in range(2):
        for number in range(batch.segments[row].max() + 1):
            mine = (batch.segments[row] == number) & batch.is_maskable[row]
            text = corpus.tokenizer().decode(batch.clean_tokens[row][mine], skip_special=False)
            assert text in plain


def test_show_has_prompts_too_which_are_never_masked(copy, capsys):
    mine = Target(copy, 0, np.random.default_rng(0), copy, copy)
    each = mine.rows()
    maskable = each.is_maskable.copy()
    maskable[:, :10] = False
    mine.change(is_maskable=maskable, is_masked=each.is_masked & maskable)
    corpus = Corpus.open(str(copy))
    batch = corpus.batch(0, 40, corpus.manifest.noise)
    out = shown(capsys, str(copy), "--num-samples", "40")
    assert out.count("[MASK]") == batch.is_masked.sum()
    prompts = batch.clean_tokens[~batch.is_maskable[:, 0], :10]
    assert len(prompts) > 3
    assert all(corpus.tokenizer().decode(prompt) in out for prompt in prompts)


def test_stats_are_those_of_manifest_and_masks(corpus_url, capsys):
    assert shards.main(["stats", "--corpus", corpus_url]) == 0
    out = capsys.readouterr().out
    corpus = Corpus.open(corpus_url)
    batch = corpus.batch(0, corpus.num_sequences, corpus.manifest.noise)
    assert f"{corpus.num_tokens:,}" in out
    assert "source web: " in out
    assert "512/1024 of the samples" in out
    found = shards.mask_rates(corpus, corpus.num_sequences)
    assert found["masked"] == batch.is_masked.sum() / batch.is_maskable.sum()
    assert sum(found["rates"]) == pytest.approx(1)
    assert found["mean_rate"] == pytest.approx(float((batch.thresholds / 2**32).mean()))
    assert all(0.05 < share < 0.15 for share in found["rates"])
    few = shards.mask_rates(corpus, 5)
    assert few["mean_rate"] != found["mean_rate"]


def test_stats_of_sequences_without_a_response(tmp_path, capsys):
    chat = [{"role": "user", "content": "why " * 90}, {"role": "assistant", "content": "so"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    words = ["--output", str(tmp_path / "corpus"), "--source.paths", str(tmp_path / "a.jsonl")]
    words += ["--source.messages-column", "messages", "--tokenizer", "bytes", "--runner", "local"]
    words += ["--sequence-length", "64", "--held-out-rate", "0"]
    assert prepare.main(words) == 0
    corpus = Corpus.open(str(tmp_path / "corpus"))
    prompts = [
        sample
        for sample in range(6)
        if not corpus.batch(sample, 1, NoiseConfig()).is_maskable.any()
    ]
    assert 0 in prompts
    words = ["stats", "--corpus", str(tmp_path / "corpus"), "--max-sequences", "1"]
    assert shards.main(words) == 0
    assert "masked          0.0000" in capsys.readouterr().out


def test_what_is_printed_of_a_document_moves_no_cursor_and_ends_no_line(tmp_path, capsys):
    line = json.dumps({"text": "one\x1b[2J\u202etwo\n", "id": "a\tb\nc"})
    (tmp_path / "a.jsonl").write_text(line + "\n")
    words = ["--output", str(tmp_path / "corpus"), "--source.paths", str(tmp_path / "a.jsonl")]
    words += ["--source.id-column", "id", "--tokenizer", "bytes", "--runner", "local"]
    assert prepare.main([*words, "--held-out-rate", "0"]) == 0
    capsys.readouterr()
    url = str(tmp_path / "corpus")
    words = ["documents", "--corpus", url, "--step", "1", "--batch-size", "1"]
    assert shards.main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [len(each.split("\t")) for each in listed] == [6, 6]
    assert r"id a\tb\nc" in listed[1]
    text = shown(capsys, url, "--num-samples", "1", "--color", "never")
    assert text.replace("\n", "").isprintable()


def test_documents_of_a_step_are_lines_that_lead_to_the_text(corpus_url, capsys):
    words = ["documents", "--corpus", corpus_url, "--step", "3", "--batch-size", "8"]
    assert shards.main(words) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    corpus = Corpus.open(corpus_url)
    batch = corpus.batch(16, 8, corpus.manifest.noise)
    assert list(dict.fromkeys(int(row["sample"]) for row in rows)) == list(range(16, 24))
    assert next(int(r["sequence"]) for r in rows if r["sample"] == "16") == batch.sequence_ids[0]
    assert all(row["path"].startswith("part-") for row in rows)
    seeded = [*words, "--seed", "5"]
    assert shards.main(seeded) == 0
    assert capsys.readouterr().out.splitlines()[1:] != lines


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["documents", "--step", "0", "--batch-size", "4"], "step=0"),
        (["documents", "--step", "1", "--batch-size", "0"], "batch_size=0"),
        (["show", "--first-sample", "-1"], "first_sample=-1"),
        (["show", "--num-samples", "0"], "num_samples=0"),
        (["stats", "--max-sequences", "0"], "max_sequences=0"),
        (["materialise", "--draws", "1"], "draws=1"),
        (["verify", "--num-workers", "0"], "num_workers=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(corpus_url, capsys, words, named):
    assert shards.main([words[0], "--corpus", corpus_url, *words[1:]]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_materialised_draws_are_verified_and_a_bad_one_is_named(copy, capsys, workers):
    words = ["materialise", "--corpus", str(copy), "--draws", "3", "--num-workers", workers]
    assert shards.main(words) == 0
    assert "3 draws" in capsys.readouterr().out
    assert shards.main(words) == 0
    assert "0 of them new" in capsys.readouterr().out
    assert verify(copy) == 0
    assert "shards: 4, draws: 3" in capsys.readouterr().out
    flip(copy / "draw-0002-shard-train-00001.arrow", 1500)
    assert verify(copy) == 3
    told = capsys.readouterr().out
    assert "draw-0002-shard-train-00001.arrow has sha256" in told
    assert told.count("BAD") == 1


def test_a_draw_of_other_bits_is_found_by_verify(copy, capsys, monkeypatch):
    def shifted(manifest, split, draw, ids, maskable):
        return real(manifest, split, draw + 1, ids, maskable)

    from cascade_model import draws

    real = draws.masked_in
    monkeypatch.setattr(draws, "masked_in", shifted)
    words = ["materialise", "--corpus", str(copy), "--draws", "2", "--num-workers", "1"]
    assert shards.main(words) == 0
    monkeypatch.undo()
    assert verify(copy) == 3
    assert capsys.readouterr().out.count("has another mask than draw 1 of its recipe") == 4
