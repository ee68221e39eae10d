"""The input as a list of files: folders, dataset folders, the hub's cache, a store."""

import json
from pathlib import Path

import datasets
import fsspec
import pytest

from cascade_model.errors import InputError
from cascade_model.sampling import SamplingParams
from pipelines.prompt_input import HUB, input_urls
from pipelines.prompt_rows import Columns, read_part
from pipelines.prompts import plan
from pipelines.row_settings import Decoding


def texts(urls: list[str]) -> list[str]:
    common = Decoding(params=SamplingParams())
    parts, _ = plan(urls, 3)
    return [row.text for part in parts for row in read_part(part, Columns(), common)]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.arrow", "note.txt"):
        (tmp_path / name).touch()
    names = [Path(url).name for url in input_urls(str(tmp_path))]
    assert names == ["a.parquet", "b.jsonl", "c.arrow"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \*.jsonl"):
        input_urls(str(tmp_path / "empty"))


def dataset(count: int, name: str = "row") -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [f"{name} {i}" for i in range(count)]})


def test_a_dataset_folder_is_read_in_its_own_order(tmp_path):
    dataset(11).save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(input_urls(str(tmp_path / "one"))) == [f"row {i}" for i in range(11)]


def test_a_split_is_chosen_by_name(tmp_path):
    both = datasets.DatasetDict({"train": dataset(4), "test": dataset(2, "test")})
    both.save_to_disk(tmp_path / "both")
    assert texts(input_urls(str(tmp_path / "both"), "test")) == ["test 0", "test 1"]
    with pytest.raises(InputError, match=r"split=None and input=.* has train, test; name one"):
        input_urls(str(tmp_path / "both"))
    with pytest.raises(InputError, match=r"split=dev and .* has train, test"):
        input_urls(str(tmp_path / "both"), "dev")
    dataset(2).save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match=r"split=test and .* has no splits"):
        input_urls(str(tmp_path / "one"), "test")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where `datasets` prepares, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_dataset_is_loaded_as_the_hub_would_have_it(tmp_path, cache):
    """`datasets` takes a folder of files for a dataset's repository."""
    (tmp_path / "data").mkdir()
    for split, count in (("train", 5), ("test", 2)):
        lines = [json.dumps({"prompt": f"{split} {i}"}) + "\n" for i in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines))
    urls = input_urls(f"{HUB}{tmp_path / 'data'}", "test")
    assert texts(urls) == ["test 0", "test 1"]
    assert all(str(tmp_path / "cache") in url for url in urls)
    with pytest.raises(InputError, match=r"split=dev cannot be loaded .*; check the names"):
        input_urls(f"{HUB}{tmp_path / 'data'}", "dev")


@pytest.mark.parametrize("split", [None, "train[:5]", "train+test"])
def test_the_hub_is_asked_for_one_whole_split(split):
    with pytest.raises(InputError, match="needs the name of one split"):
        input_urls(f"{HUB}owner/name", split)


def test_what_chooses_from_a_dataset_is_refused_elsewhere(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"split=train and input=.* is no dataset"):
        input_urls(str(tmp_path / "a.jsonl"), "train")
    with pytest.raises(InputError, match="subset=en chooses from a dataset of the hub"):
        input_urls(str(tmp_path / "a.jsonl"), subset="en")
    with pytest.raises(InputError, match="does not exist"):
        input_urls(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="cannot be opened"):
        input_urls("nonsense://x")


def test_files_of_a_store_are_found_and_read(tmp_path, s3_url):
    system = fsspec.filesystem("s3")
    system.pipe(f"{s3_url}/b.jsonl", b'{"prompt": "b"}\n')
    dataset(7).save_to_disk(tmp_path / "one", num_shards=2)
    system.put(str(tmp_path / "one"), f"{s3_url}/one", recursive=True)
    assert input_urls(s3_url) == [f"{s3_url}/b.jsonl"]
    assert texts(input_urls(s3_url)) == ["b"]
    assert texts(input_urls(f"{s3_url}/one")) == [f"row {i}" for i in range(7)]
