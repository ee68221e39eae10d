"""Both tasks are functions of (job, order): counts add up, bytes repeat, nothing is done twice."""

import dataclasses
import json

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.schema import SPLITS, TOKENIZER, Geometry, rows_of
from cascade_model.shards import read_arrow
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from pipelines import parts
from pipelines.documents import Part, Piece
from pipelines.parts import JOB, Job, MaskOrder, is_held_out, mask_part, pack_part, text_hash

GEOMETRY = Geometry(sequence_length=16, block_size=4, vocab_size=byte_tokenizer().vocab_size)
TEXTS = [f"document {i}: " + "naïve 中文 " * (i % 4) for i in range(40)]
LINES = [json.dumps({"text": text}).encode() for text in TEXTS]
LINES[7:7] = [b"{broken", b'{"text": " "}', b'{"text": "\xff"}']


def job_in(folder, tokenizer=None, **changes) -> Job:
    """A job that has been begun in a folder."""
    tokenizer = tokenizer or byte_tokenizer()
    Folder(folder).publish(TOKENIZER, tokenizer.to_bytes())
    Folder(folder / "_work").publish(JOB, b"{}")
    job = Job(
        output=str(folder),
        work=str(folder / "_work"),
        text_column="text",
        held_out_rate=0.2,
        geometry=GEOMETRY,
        noise=NoiseConfig(block_size=4),
        tokenizer_sha256=tokenizer.sha256,
    )
    return dataclasses.replace(job, **changes)


@pytest.fixture
def part(tmp_path) -> Part:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    size = path.stat().st_size
    piece = Piece(path="a.jsonl", url=str(path), format="jsonl", start=0, stop=size, bytes=size)
    return Part(index=3, pieces=(piece,))


def order_for(record, firsts=(100, 7), totals=(1000, 90)) -> MaskOrder:
    return MaskOrder(
        index=3,
        packed=record,
        firsts=dict(zip(SPLITS, firsts, strict=True)),
        totals=dict(zip(SPLITS, totals, strict=True)),
    )


def rows_in(folder, record):
    reader = read_arrow(Folder(folder), record.object, record.bytes, record.sha256)
    assert reader.num_record_batches == 1
    return rows_of(reader.get_batch(0), GEOMETRY)


def test_a_texts_split_depends_on_the_text_alone_and_the_rate_is_kept():
    texts = [f"text {i}" for i in range(4000)]
    hashes = [text_hash(text) for text in texts]
    assert hashes == [text_hash(text) for text in texts]
    assert len(set(hashes)) == len(texts)
    assert abs(sum(is_held_out(text, 0.1) for text in texts) / len(texts) - 0.1) < 0.02
    assert not any(is_held_out(text, 0.0) for text in texts)
    # A larger share keeps what a smaller one held out.
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.1))


def test_every_record_is_packed_dropped_or_dead(tmp_path, part):
    facts = pack_part(job_in(tmp_path / "out"), part).facts
    held_out = [text for text in TEXTS if is_held_out(text, 0.2)]
    assert 0 < len(held_out) < len(TEXTS)
    assert facts["documents_in"] == len(LINES)
    assert facts["dropped"] == {"empty": 1}
    assert facts["dead"] == {"broken_json": 1, "invalid_utf8": 1}
    assert facts["first_dead"]["reason"] == "broken_json"
    assert facts["splits"]["held_out"]["documents"] == len(held_out)
    for split, texts in (("held_out", held_out), ("train", sorted(set(TEXTS) - set(held_out)))):
        size = sum(len(text.encode()) for text in texts)
        assert facts["splits"][split]["bytes"] == size
        # A byte is a token, and each document has one EOS.
        assert facts["splits"][split]["tokens"] == size + len(texts)
    letters = (tmp_path / "out" / "dead_letter-00003.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in letters] == ["broken_json", "invalid_utf8"]


def test_however_text_is_handed_to_the_tokenizer_the_bytes_are_the_same(
    tmp_path, part, monkeypatch
):
    first = pack_part(job_in(tmp_path / "a"), part)
    monkeypatch.setattr(parts, "CHUNK_CHARACTERS", 1)
    assert pack_part(job_in(tmp_path / "b"), part) == first


def test_a_packed_part_is_not_packed_again(tmp_path, part, monkeypatch):
    job = job_in(tmp_path / "out")
    first = pack_part(job, part)
    monkeypatch.setattr(parts, "read_documents", None)
    assert pack_part(job, part) == first
    (tmp_path / "out" / "_work" / "part-00003.arrow.record.json").unlink()
    with pytest.raises(TypeError):  # the control: without its record it is not done
        pack_part(job, part)


def test_masking_is_draw_zero_of_the_recipe_under_the_numbers_ordered(tmp_path, part):
    job = job_in(tmp_path / "out")
    made = mask_part(job, order_for(pack_part(job, part)))
    for split, first, total in (("train", 100, 1000), ("held_out", 7, 90)):
        rows = rows_in(tmp_path / "out", made[split])
        ids = np.arange(first, first + len(rows), dtype=np.uint64)
        assert np.array_equal(rows.sequence_ids, ids)
        ranks = mask_noise.rank_of(ids, total, job.noise, 0)
        rates = mask_noise.thresholds(job.noise, 0, ranks, 4)
        assert rows.thresholds.shape == (len(rows), 0)  # not stored for blocks of 4
        bits = mask_noise.mask_bits(job.noise, 0, ids, rates, 16)
        assert np.array_equal(rows.is_masked, bits & rows.is_maskable)
        assert made[split].facts["first_sequence"] == first
        assert made[split].facts["tokens"] == rows.is_maskable.sum()


def test_masking_twice_gives_the_same_bytes_and_other_numbers_others(tmp_path, part):
    job, other, third = (job_in(tmp_path / name) for name in "abc")
    made = mask_part(job, order_for(pack_part(job, part)))
    assert mask_part(other, order_for(pack_part(other, part))) == made
    assert mask_part(job, order_for(pack_part(job, part))) == made
    moved = mask_part(third, order_for(pack_part(third, part), firsts=(101, 7)))
    assert moved["train"].sha256 != made["train"].sha256
    assert moved["held_out"].sha256 == made["held_out"].sha256


def test_a_packed_part_that_was_damaged_is_not_masked(tmp_path, part):
    job = job_in(tmp_path / "out")
    record = pack_part(job, part)
    path = tmp_path / "out" / "_work" / record.object
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusMismatch, match=r"part-00003\.arrow has sha256"):
        mask_part(job, order_for(record))
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_tokenizer_other_than_the_jobs_is_refused(tmp_path, part):
    job = job_in(tmp_path / "out", tokenizer_sha256="0" * 64)
    with pytest.raises(InputError, match=r"holds a tokenizer with sha256 .* not the job's 00000"):
        pack_part(job, part)


@pytest.mark.parametrize("is_special", [False, True])
def test_a_tokenizer_that_makes_reserved_tokens_of_text_is_refused(tmp_path, is_special):
    values = json.loads(byte_tokenizer().to_bytes())
    for token in values["added_tokens"]:
        token["special"] = is_special
    tokenizer = Tokenizer(json.dumps(values).encode(), "odd")
    path = tmp_path / "a.txt"
    path.write_text("a <|mask|> b")
    piece = Piece(path="a.txt", url=str(path), format="text", start=0, stop=12, bytes=12)
    job, part = job_in(tmp_path / "out", tokenizer), Part(index=3, pieces=(piece,))
    if is_special:  # the control: marked as special, the same words are text
        assert pack_part(job, part).facts["splits"]["train"]["tokens"] == 13
        return
    with pytest.raises(InputError, match="reserved token 258"):
        pack_part(job, part)
