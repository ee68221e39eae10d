"""Safetensors files only, whole, and inside the folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.tensor_files import Header, LoadedTensors, TensorFiles, kept

CPU = torch.device("cpu")
NUMBERS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def sharded(folder, index=None):
    for name, tensor in NUMBERS.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    names = {"a": "a.safetensors", "b": "b.safetensors"} | (index or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def all_of(files):
    with files.read(files.headers) as tensors:
        return {
            name: kept(files, tensor, None, CPU)
            for name, tensor in zip(files.headers, tensors, strict=True)
        }


def test_one_file_and_shards_give_the_same_tensors(tmp_path):
    save_file(NUMBERS, tmp_path / "model.safetensors")
    whole = TensorFiles(tmp_path, "here")
    (tmp_path / "shards").mkdir()
    parts = TensorFiles(sharded(tmp_path / "shards"), "here")
    assert whole.headers == parts.headers
    assert whole.headers == {"a": Header((2, 3), "F32"), "b": Header((4,), "BF16")}
    for files in (whole, parts):
        found = all_of(files)
        assert all(torch.equal(found[name], tensor) for name, tensor in NUMBERS.items())


def test_what_is_kept_outlives_its_file(tmp_path):
    save_file(NUMBERS, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, "here")
    with files.read(["a"]) as (tensor,):
        turned = kept(files, tensor.T, torch.float64, CPU)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert turned.is_contiguous()
    assert torch.equal(turned, NUMBERS["a"].T.double())


def test_what_is_in_memory_is_not_copied_again():
    loaded = LoadedTensors(NUMBERS)
    assert loaded.headers["b"].dtype == "BF16"
    with loaded.read(["a"]) as (tensor,):
        assert kept(loaded, tensor, None, CPU) is NUMBERS["a"]


@pytest.mark.parametrize(
    "name",
    ["../b.safetensors", "/etc/b.safetensors", "x/../../b.safetensors", "..\\b.safetensors",
     "b.bin", "c:b.safetensors"],
)  # fmt: skip
def test_an_index_that_leaves_the_folder_or_names_another_format_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"here has an index that names the file"):
        TensorFiles(sharded(tmp_path, {"b": name}), "here")


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"here lacks b.safetensors, one of 1 missing"):
        TensorFiles(tmp_path, "here")


def test_a_tensor_that_is_not_where_the_index_puts_it_is_named(tmp_path):
    with pytest.raises(CheckpointMismatch, match=r"here has no tensor b in a.safetensors"):
        TensorFiles(sharded(tmp_path, {"b": "a.safetensors", "c": "b.safetensors"}), "here")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path)
    save_file(NUMBERS, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"tensor a in a.safetensors and in b.safetensors"):
        TensorFiles(tmp_path, "here")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    (sharded(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointMismatch, match=r"damaged model.safetensors.index.json"):
        TensorFiles(tmp_path, "here")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=rf"has {name} and no model.safetensors; a pickle can run"):
        TensorFiles(tmp_path, "here")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointMismatch, match=r"no model.safetensors and no model.s"):
        TensorFiles(tmp_path, "here")


def test_a_cut_file_is_refused(tmp_path):
    save_file(NUMBERS, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-3])
    with pytest.raises(CheckpointMismatch, match=r"here has a damaged model.safetensors"):
        TensorFiles(tmp_path, "here")
