"""Model folders: round trips, and mismatches refused with both values."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import read_checkpoint
from cascade_model.model import Transformer
from cascade_model.networks import build_network, network_with
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import (
    Published,
    load_model,
    read_config,
    read_published,
    require_text,
    save_model,
    weights_digest,
)
from tests.cascade_model.families import published_cases as published
from tests.tiny_models import tiny_config

TOKENIZER = byte_tokenizer()


def small_model(seed: int = 0, **changes) -> Transformer:
    values = {
        "vocab_size": TOKENIZER.vocab_size,
        "hidden_size": 8,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "intermediate_size": 12,
        "mask_id": TOKENIZER.mask_id,
        "pad_id": TOKENIZER.pad_id,
        "eos_id": TOKENIZER.eos_id,
        "tokenizer_sha256": TOKENIZER.sha256,
    }
    model = Transformer(ModelConfig(**(values | changes)))
    model.init_weights(seed)
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", small_model(), TOKENIZER)
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_equal_with_its_config_and_tokenizer(tmp_path, tied):
    model = small_model(tied_head=tied, logits="shifted")
    save_model(tmp_path / "model", model, TOKENIZER)
    loaded, tokenizer = load_model(tmp_path / "model")
    assert loaded.config == model.config == read_config(tmp_path / "model")
    assert tokenizer.sha256 == TOKENIZER.sha256
    assert (loaded.head.weight is loaded.embed.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_folder_holds_four_files_and_nothing_stays_beside_it(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_twice_gives_the_same_bytes_and_another_model_replaces_them(folder):
    first = weights_digest(folder)
    save_model(folder, small_model(), TOKENIZER)
    assert weights_digest(folder) == first
    save_model(folder, small_model(seed=1), TOKENIZER)
    assert weights_digest(folder) != first


def test_the_dtype_is_chosen_at_loading(folder):
    assert load_model(folder, torch.bfloat16)[0].embed.weight.dtype == torch.bfloat16


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no model folder"):
        save_model(tmp_path, small_model(), TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_corpus_is_not_replaced_though_it_has_a_manifest(tiny_corpus, tmp_path):
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    with pytest.raises(InputError, match="exists and is no model folder"):
        save_model(corpus, small_model(), TOKENIZER)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before


def test_a_foreign_tokenizer_is_refused_with_both_digests(tmp_path):
    model = small_model(tokenizer_sha256="abc")
    with pytest.raises(CheckpointMismatch, match=f"tokenizer abc and got {TOKENIZER.sha256[:12]};"):
        save_model(tmp_path / "model", model, TOKENIZER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_altered_file_is_refused_with_both_digests(folder, name):
    recorded = json.loads((folder / "manifest.json").read_text())["files"][name]["sha256"]
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointMismatch, match=f"{name} with sha256 .* records {recorded[:12]};"):
        load_model(folder)


def test_a_missing_manifest_means_an_unfinished_folder(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"no manifest.json, so it is no finished model"):
        load_model(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointMismatch, match=r"lacks tokenizer.json"):
        load_model(folder)


def test_a_cut_weights_file_with_a_fitting_manifest_is_still_refused(folder):
    import hashlib

    data = (folder / "model.safetensors").read_bytes()[:-10]
    (folder / "model.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointMismatch, match=r"damaged model.safetensors"):
        load_model(folder)


def test_saving_tensors_of_our_own_never_needs_pickle(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder.parent / "copy.safetensors")
    assert set(tensors) == {name for name, _ in small_model().named_parameters()}


def test_what_a_model_was_published_as_is_kept_with_it(tmp_path):
    assert read_published_of(tmp_path / "own", None) is None
    origin = Published(config={"model_type": "llada", "n_layers": 2}, dtypes={"a": "F32"})
    assert read_published_of(tmp_path / "other", origin) == origin


def read_published_of(folder, origin):
    save_model(folder, small_model(), TOKENIZER, origin)
    load_model(folder)
    return read_published(folder)


def test_a_published_folder_is_loaded_like_one_of_ours(tmp_path):
    folder = published.copied("llada", tmp_path / "llada")
    model, tokenizer = load_model(folder)
    read = read_checkpoint(folder)
    assert tokenizer is None
    assert model.config == read.config == read_config(folder)
    expected = network_with(read.config, read.state, "").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    origin = read_published(folder)
    assert origin is not None
    assert origin.config == read.published


def test_a_published_folder_is_known_by_its_files(tmp_path):
    first, second = (published.copied("llada", tmp_path / name) for name in "ab")
    assert weights_digest(first) == weights_digest(second)
    (second / "tokenizer.json").write_bytes(TOKENIZER.to_bytes())
    assert weights_digest(first) != weights_digest(second)
    tokenizer = load_model(second)[1]
    assert require_text(tokenizer, second).sha256 == TOKENIZER.sha256


def test_a_model_without_a_tokenizer_is_refused_where_text_is_needed():
    with pytest.raises(CheckpointMismatch, match=r"model here has no tokenizer.json"):
        require_text(None, "here")


def test_our_own_config_without_a_manifest_is_no_published_folder(folder):
    shutil.move(folder / "manifest.json", folder / "elsewhere")
    with pytest.raises(CheckpointMismatch, match=r"no manifest.json, so it is no finished model"):
        read_config(folder)


def test_each_tensor_may_keep_its_type(tmp_path):
    model = small_model().to(torch.bfloat16)
    model.final_norm.float()
    save_model(tmp_path / "model", model, TOKENIZER)
    kept = load_model(tmp_path / "model", dtype=None)[0]
    assert kept.embed.weight.dtype == torch.bfloat16
    assert kept.final_norm.weight.dtype == torch.float32


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer_sha256=tokenizer.sha256)
    model = build_network(config)
    with pytest.raises(CheckpointMismatch, match="has 16 rows for tokens"):
        save_model(tmp_path / "model", model, tokenizer)
    assert not (tmp_path / "model").exists()


def test_a_run_folder_is_told_from_its_model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointMismatch, match=r"it is a run; give .*/model"):
        load_model(tmp_path)


def test_a_model_folder_in_a_store_is_written_read_and_refused_when_damaged(s3_url):
    save_model(s3_url, small_model(), TOKENIZER)
    save_model(s3_url, small_model(seed=1), TOKENIZER)
    found, tokenizer = load_model(s3_url)
    wanted = small_model(seed=1).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    assert tokenizer.sha256 == TOKENIZER.sha256
    assert read_config(s3_url) == small_model().config
    before = weights_digest(s3_url)
    save_model(s3_url, small_model(), TOKENIZER)
    assert weights_digest(s3_url) != before
    Folder(s3_url).replace("model.safetensors", b"x")
    with pytest.raises(CheckpointMismatch, match="with sha256"):
        load_model(s3_url)


def test_a_writer_that_was_killed_in_a_store_can_write_again(s3_url):
    """Its first act was to take the old manifest away; what else is there is nobody's model."""
    save_model(s3_url, small_model(), TOKENIZER)
    Folder(s3_url).remove("manifest.json")
    save_model(s3_url, small_model(seed=1), TOKENIZER)
    assert load_model(s3_url)[1].sha256 == TOKENIZER.sha256
    Folder(s3_url).remove("manifest.json")
    Folder(s3_url).replace("config.json", b'{"model_type": "llama"}')
    with pytest.raises(InputError, match="exists and is no model folder"):
        save_model(s3_url, small_model(), TOKENIZER)
