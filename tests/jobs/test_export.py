"""A converted model goes back into its published layout, bit for bit; a trained one into it too."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.families import read_checkpoint
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import load_model, save_model, weights_digest
from jobs import convert, evaluate, export, prepare, pretrain
from tests.cascade_model.families.published_cases import DATA, file_contents


@pytest.fixture
def source(tmp_path) -> Path:
    """A LLaDA2 of mixed types, as such checkpoints are published."""
    folder = tmp_path / "llada2"
    shutil.copytree(DATA / "llada2", folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    halves = {n: t if "expert_bias" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer().to_bytes())
    return folder


def converted(source: Path, *flags: str) -> Path:
    output = source.with_name("model")
    assert convert.main(["--source", str(source), "--output", str(output), *flags]) == 0
    return output


def own_model(source: Path) -> Path:
    """A folder in this project's layout, which records no published one."""
    model, tokenizer = load_model(converted(source))
    save_model(source.with_name("own"), model, tokenizer)
    return source.with_name("own")


def exported(model: Path, *flags: str) -> Path:
    output = model.with_name("exported")
    assert export.main(["--model", str(model), "--output", str(output), *flags]) == 0
    return output


def test_convert_and_export_give_the_checkpoint_back(source):
    found = exported(converted(source))
    assert file_contents(found / "model.safetensors") == file_contents(source / "model.safetensors")
    assert (found / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((source / "config.json").read_text())
    del config["auto_map"]
    assert json.loads((found / "config.json").read_text()) == config


def test_a_trained_model_is_exported_like_the_one_it_came_from(source):
    folder = converted(source)
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.final_norm.weight.fill_(2.0)
    trained = folder.with_name("trained")
    save_model(trained, model, tokenizer)
    found = exported(trained, "--like", str(folder))
    state = load_file(found / "model.safetensors")
    assert state["model.norm.weight"].dtype == torch.bfloat16
    assert (state["model.norm.weight"] == 2.0).all()


def test_an_autoregressive_model_loses_the_rows_that_were_added(tmp_path):
    source = tmp_path / "llama"
    shutil.copytree(DATA / "ar/llama", source)
    document = json.loads(byte_tokenizer().to_bytes())
    like = document["added_tokens"][0]
    extra = [like | {"id": 257 + n, "content": f"<{n}>"} for n in range(127)]
    document["added_tokens"] = [like, *extra]
    (source / "tokenizer.json").write_text(json.dumps(document))
    model = converted(source, "--block-size", "1")
    assert load_model(model)[0].config.vocab_size == 386
    found = exported(model)
    assert file_contents(found / "model.safetensors") == file_contents(source / "model.safetensors")
    assert json.loads((found / "tokenizer.json").read_text()) == document
    assert json.loads((found / "config.json").read_text())["vocab_size"] == 384


def test_a_published_folder_itself_is_exported(source):
    found = exported(source)
    assert file_contents(found / "model.safetensors") == file_contents(source / "model.safetensors")
    assert read_checkpoint(found).config == read_checkpoint(source).config


def test_a_model_of_our_own_is_exported_as_it_is_with_a_card_that_says_what_is_not_known(source):
    own = own_model(source)
    model, _ = load_model(own)
    found = exported(own, "--licence", "apache-2.0", "--title", "Small one")
    again = load_model(found)[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    card = (found / "README.md").read_text()
    values = yaml.safe_load(card.split("---")[1])
    assert values["license"] == "apache-2.0"
    assert "# Small one" in card
    assert f"| block size | {model.config.block_size} |" in card
    assert "No run folder was given." in card
    assert "Not measured." in card
    assert export.main(["--model", str(own), "--output", str(found)]) == 2  # not empty


def test_a_store_gets_the_model_of_our_own_with_its_card_and_nothing_falls_on_the_disk(
    source, s3_url, tmp_path, monkeypatch
):
    own, output = own_model(source), s3_url.replace("/corpus", "/exported")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ["--model", str(own), "--output", output]
    assert export.main([*words, "--title", "Small one"]) == 0
    assert b"# Small one" in Folder(output).read_bytes("README.md")
    assert load_model(output)[0].config == load_model(own)[0].config
    assert not any((tmp_path / "here").iterdir())
    assert export.main(words) == 2  # not empty


def test_a_published_layout_is_refused_in_a_store_before_anything_is_written(
    source, s3_url, tmp_path, monkeypatch, capsys
):
    model, output = converted(source), s3_url.replace("/corpus", "/exported")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export.main(["--model", str(model), "--output", output]) == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "published layout cannot appear whole; write to a local folder and copy it" in told
    assert Folder(output).list() == []
    assert not any((tmp_path / "here").iterdir())


def test_a_card_may_be_edited_without_harm_to_the_model(source):
    found = exported(own_model(source))
    (found / "README.md").write_text("What its maker wants to say.")
    load_model(found)


DIES = """
import os, sys
from jobs import export
output = sys.argv[-1]
def die(event, arguments):
    if event == "open" and os.path.isdir(output):
        os._exit(9)
sys.addaudithook(die)
export.main(sys.argv[1:])
"""


@pytest.mark.parametrize("make", [own_model, converted])
def test_an_export_that_dies_as_soon_as_its_folder_is_there_has_left_the_card_in_it(source, make):
    output = source.with_name("exported")
    words = ["--model", str(make(source)), "--output", str(output)]
    died = subprocess.run([sys.executable, "-c", DIES, *words], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert "## How to use it" in (output / "README.md").read_text()


def test_the_card_of_a_trained_model_tells_what_its_run_folder_knows(tiny_corpus, tmp_path):
    words = ["--corpus", tiny_corpus, "--output", str(tmp_path / "run"), "--num-workers", "0"]
    words += ["--trainer.num-steps", "2", "--trainer.sequences-per-step", "4"]
    words += ["--trainer.evaluate-every", "2", "--held-out.sequences", "4"]
    words += ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.head-dim", "8"]
    assert pretrain.main(words) == 0
    measured = str(tmp_path / "bound.json")
    words = ["--model", str(tmp_path / "run"), "--corpus", tiny_corpus, "--output", measured]
    assert evaluate.main([*words, "--max-sequences", "4", "--untrained", "False"]) == 0
    found = exported(tmp_path / "run", "--evaluation", measured)
    card = (found / "README.md").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    digest = Corpus.open(tiny_corpus).digest
    for line in (
        "| objective | diffusion |",
        f"| corpus (digest) | {digest} |",
        "| steps | 2 |",
        "| tokens | 512 |",
        "| weight | elbo |",
        "| started from | fresh weights |",
        f"{summary['held_out_loss']:.4f} nats/token",
        "| held-out bound (NELBO) |",
        "Not stated by whoever exported it.",
        "| sequences per step | 4 |",
        "| peak learning rate | 0.001 |",
    ):
        assert line in card, line
    assert "sources" not in card
    assert load_model(found)[0].config.block_size == 4


def test_a_card_names_sources_and_start_and_no_place_of_this_machine(tmp_path):
    for name in ("web", "code"):
        rows = [{"text": f"{name} says {number * number}. " * 9} for number in range(80)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("web", "code")}
    mixture = {name: {"paths": paths[name], "weight": w} for name, w in (("web", 3), ("code", 1))}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"mixture": mixture}))
    words = ["--config", str(tmp_path / "mix.yaml"), "--output", str(tmp_path / "corpus")]
    words += ["--tokenizer", "bytes", "--sequence-length", "64", "--runner", "local"]
    assert prepare.main([*words, "--noise.block-size", "4"]) == 0
    words = ["--corpus", str(tmp_path / "corpus"), "--num-workers", "0"]
    words += ["--trainer.num-steps", "1", "--trainer.sequences-per-step", "4"]
    words += ["--model.hidden-size", "16", "--model.num-layers", "1", "--model.head-dim", "8"]
    first = str(tmp_path / "first" / "model")
    assert pretrain.main([*words, "--output", str(tmp_path / "first")]) == 0
    run = [*words, "--output", str(tmp_path / "run"), "--initial-model", first]
    assert pretrain.main(run) == 0
    card = (exported(tmp_path / "run") / "README.md").read_text()
    assert "| sources of the corpus | code (25%), web (75%) |" in card
    assert f"| started from | first/model (weights {weights_digest(first)[:12]}) |" in card
    assert str(tmp_path) not in card


def test_the_numbers_of_other_weights_are_refused(source, tmp_path, capsys):
    own, report = own_model(source), tmp_path / "bound.json"
    values = {"nats_per_token": 1.0, "standard_error": 0.1, "nats_per_byte": 0.3}
    values |= {"is_exact": False, "num_tokens": 9, "corpus_digest": "c"}
    words = ["--model", str(own), "--output", str(tmp_path / "out"), "--evaluation", str(report)]
    for weights, code, sentence in (
        ({}, 2, f"evaluation={report} is no JSON of this version's"),
        ({"weights": None}, 3, "was measured on a checkpoint and model="),
        ({"weights": "f" * 64}, 3, "was measured on the weights ffffffffffff and model="),
        ({"weights": weights_digest(own)}, 0, ""),
    ):
        report.write_text(json.dumps(values | weights))
        assert export.main(words) == code
        assert sentence in " ".join(capsys.readouterr().err.replace("│", "").split())
        assert (tmp_path / "out").exists() == (code == 0)


def test_what_is_no_evaluation_and_no_run_is_refused(source, tmp_path, capsys):
    folder = converted(source)
    for flag in ("--evaluation", "--run"):
        words = ["--model", str(folder), "--output", str(tmp_path / "out")]
        assert export.main([*words, flag, str(source)]) == 2
        assert f"{flag[2:]}={source}" in " ".join(capsys.readouterr().err.replace("│", "").split())
        assert not (tmp_path / "out").exists()
