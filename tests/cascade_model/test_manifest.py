"""The manifest survives the trip through JSON, and its digest is the corpus's identity."""

import dataclasses
import json

import pytest

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import (
    DocumentsEntry,
    InfillEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
)


def manifest() -> Manifest:
    shard = ShardEntry(
        name="a", object="a", rows=1, tokens=9, bytes=3, sha256="00", batches_sha256="11",
        first_sequence=0,
    )  # fmt: skip
    source = SourceEntry(name="s", first_sequence=0, num_sequences=1, num_tokens=9, share=1024)
    table = DocumentsEntry(name="d", object="d", bytes=2, sha256="22", rows=1)
    split = SplitEntry(
        num_sequences=1,
        num_tokens=9,
        num_bytes=20,
        num_documents=1,
        shards=(shard,),
        sources=(source,),
    )
    return Manifest(
        sequence_length=12,
        block_size=4,
        vocab_size=300,
        mask_id=2,
        pad_id=1,
        eos_id=0,
        tokenizer_sha256="ab",
        noise=NoiseConfig(block_size=4),
        prepare={"part_bytes": 1},
        sources=({"path": "é", "bytes": 1, "sha256": "cd"},),
        counts={"documents": 1},
        splits={"train": split},
        documents=(table,),
    )


def test_the_manifest_comes_back_from_json_with_its_digest():
    found = Manifest.from_json(manifest().to_json(), "here")
    assert found == manifest()
    assert json.loads(manifest().to_json())["digest"] == found.digest


def test_the_digest_does_not_depend_on_an_attempts_own_object_names():
    data = manifest().to_json()
    other = Manifest.from_json(data.replace(b'"object": "a"', b'"object": "a~1"'), "here")
    assert other != manifest()
    assert other.digest == manifest().digest
    other = Manifest.from_json(data.replace(b'"object": "d"', b'"object": "d~1"'), "here")
    assert other != manifest()
    assert other.digest == manifest().digest


def test_what_is_said_of_infilling_is_part_of_it_and_nothing_is_said_of_none():
    entry = InfillEntry(rate=0.5, ids=(4, 5, 6), num_documents=3)
    told = dataclasses.replace(manifest(), infill=entry)
    assert Manifest.from_json(told.to_json(), "here") == told
    assert told.digest != manifest().digest
    assert b"infill" not in manifest().to_json()
    # The digest that this manifest had before there was infilling.
    assert manifest().digest == "e391590410598fcb81e5d852f4f610f01f49780858194608197a807c1efe70ec"
    values = json.loads(manifest().to_json())
    with pytest.raises(CorpusMismatch, match="edited or damaged"):
        Manifest.from_json(json.dumps(values | {"infill": None}).encode(), "here")


def test_an_edited_manifest_is_refused():
    with pytest.raises(CorpusMismatch, match="edited or damaged"):
        Manifest.from_json(manifest().to_json().replace(b'"mask_id": 2', b'"mask_id": 3'), "here")


def test_a_manifest_of_another_format_names_both_versions():
    data = manifest().to_json().replace(b'"format_version": 2', b'"format_version": 1')
    with pytest.raises(CorpusMismatch, match="version 1 but this program reads 2"):
        Manifest.from_json(data, "here")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"digest": 1, "format_version": 2}', b"\xff"]
)
def test_a_broken_manifest_is_one_sentence(data):
    with pytest.raises(CorpusMismatch, match="damaged"):
        Manifest.from_json(data, "here")
