"""The tasks are functions of (job, order): counts add up, bytes repeat, nothing is done twice."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.columns import packed_of, rows_of
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError, Unfinished
from cascade_model.fast_tokenizer import REFERENCE
from cascade_model.manifest import TOKENIZER
from cascade_model.schema import SPLITS, Geometry, batch_rows, documents_name, documents_schema
from cascade_model.shards import read_arrow
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from pipelines import encoding, intake, parts
from pipelines.cleaning import Cleaning
from pipelines.config import FilterConfig, SourceConfig
from pipelines.encoding import engine_version
from pipelines.held_out import is_held_out, text_hash
from pipelines.isolation import KILLED
from pipelines.parts import (
    JOB,
    Job,
    MaskOrder,
    hash_part,
    mask_part,
    merge_hashes,
    pack_part,
    packed_record,
)
from pipelines.pieces import Part, Piece

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
        sources={"source": SourceConfig(paths=("a",))},
        cleaning=Cleaning(filters=FilterConfig()),
        held_out_rate=0.2,
        num_parts=4,
        num_ranges=0,
        window_bytes=1 << 20,
        packing="concat",
        geometry=GEOMETRY,
        noise=NoiseConfig(block_size=4),
        tokenizer_sha256=tokenizer.sha256,
        engine=REFERENCE,
        engine_version=engine_version(REFERENCE),
        chat_template=None,
        infilling=None,
    )
    return dataclasses.replace(job, **changes)


@pytest.fixture
def part(tmp_path) -> Part:
    return part_of(tmp_path / "a.jsonl", LINES)


def part_of(path, lines, index=3) -> Part:
    path.write_bytes(b"\n".join(lines) + b"\n")
    size = path.stat().st_size
    piece = Piece(path=path.name, url=str(path), format="jsonl", start=0, stop=size, bytes=size)
    return Part(index=index, pieces=(piece,))


def lines_of(*texts):
    return [json.dumps({"text": text}).encode() for text in texts]


def order_for(record, firsts=(100, 7), source_firsts=(0, 0), totals=(1000, 90)) -> MaskOrder:
    return MaskOrder(
        index=3,
        packed=record,
        firsts=dict(zip(SPLITS, firsts, strict=True)),
        source_firsts=dict(zip(SPLITS, source_firsts, strict=True)),
        source_totals=dict(zip(SPLITS, totals, strict=True)),
    )


def packed_in(job, record):
    """The packed sequences of a part, by split."""
    work = Folder(job.work)
    reader = read_arrow(work, record.object, record.bytes, record.sha256)
    found = {split: [] for split in SPLITS}
    for index, split in enumerate(record.facts["batch_splits"]):
        found[SPLITS[split]].append(packed_of(reader.get_batch(index), job.geometry))
    assert reader.num_record_batches == len(record.facts["batch_splits"])
    return found


def documents_in(job, index=3):
    record = Folder(job.output).record(documents_name(index))
    reader = read_arrow(Folder(job.output), record.object, record.bytes, record.sha256)
    table = reader.read_all()
    assert table.schema == documents_schema()
    assert table.num_rows == record.facts["rows"]
    return table.to_pylist()


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
    monkeypatch.setattr(intake, "CHUNK_CHARACTERS", 1)
    assert pack_part(job_in(tmp_path / "b"), part) == first


def test_a_packed_part_is_not_packed_again(tmp_path, part, monkeypatch):
    job = job_in(tmp_path / "out")
    first = pack_part(job, part)
    monkeypatch.setattr(parts, "read_documents", None)
    assert pack_part(job, part) == first
    for lost in ("_work/part-00003.arrow.record.json", "documents-00003.arrow.record.json"):
        data = (tmp_path / "out" / lost).read_bytes()
        (tmp_path / "out" / lost).unlink()
        with pytest.raises(TypeError):  # the control: without its records it is not done
            pack_part(job, part)
        (tmp_path / "out" / lost).write_bytes(data)


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


def test_a_source_is_masked_by_an_order_of_its_own(tmp_path, part):
    job = job_in(tmp_path / "out")
    order = order_for(pack_part(job, part), source_firsts=(60, 2))
    rows = rows_in(tmp_path / "out", mask_part(job, order)["train"])
    own = mask_noise.rank_of(rows.sequence_ids - np.uint64(60), 1000, job.noise, 0)
    rates = mask_noise.thresholds(job.noise, 0, own + np.uint64(60), 4)
    bits = mask_noise.mask_bits(job.noise, 0, rows.sequence_ids, rates, 16)
    assert np.array_equal(rows.is_masked, bits & rows.is_maskable)


def test_masking_twice_gives_the_same_bytes_and_other_numbers_others(tmp_path, part):
    job, other, third = (job_in(tmp_path / name) for name in "abc")
    made = mask_part(job, order_for(pack_part(job, part)))
    assert mask_part(other, order_for(pack_part(other, part))) == made
    assert mask_part(job, order_for(pack_part(job, part))) == made
    moved = mask_part(third, order_for(pack_part(third, part), firsts=(101, 7)))
    assert moved["train"].sha256 != made["train"].sha256
    assert moved["held_out"].sha256 == made["held_out"].sha256


def test_a_packed_part_that_was_damaged_is_not_masked_but_packed_anew(tmp_path, part):
    job = job_in(tmp_path / "out")
    record = pack_part(job, part)
    path = tmp_path / "out" / "_work" / record.object
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Unfinished, match=r"part-00003\.arrow has sha256 .* packs this part anew"):
        mask_part(job, order_for(record))
    assert not list((tmp_path / "out").glob("shard-*"))
    assert packed_record(job, 3) is None
    assert pack_part(job, part) == record
    assert mask_part(job, order_for(record))["train"].facts["rows"] > 0


def test_a_tokenizer_other_than_the_jobs_is_refused(tmp_path, part):
    job = job_in(tmp_path / "out", tokenizer_sha256="0" * 64)
    with pytest.raises(InputError, match=r"holds a tokenizer with sha256 .* not the job's 00000"):
        pack_part(job, part)


def test_an_engine_of_another_version_than_the_jobs_stops_it_for_now(tmp_path, part):
    job = job_in(tmp_path / "out", engine_version="0.0.1")
    with pytest.raises(Unfinished, match=r"was begun with tokenizers 0\.0\.1 but this process has"):
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


def test_the_table_of_documents_says_where_each_one_stood(tmp_path, part):
    job = job_in(tmp_path / "out")
    facts = pack_part(job, part).facts
    rows = documents_in(job)
    assert [row["document_id"] for row in rows] == sorted(row["document_id"] for row in rows)
    alive = [row for row in range(len(LINES)) if row not in (7, 8, 9)]
    for found, row in zip(rows, alive, strict=True):
        text = json.loads(LINES[row])["text"]
        size = len(text.encode())
        assert found["document_id"] == 3 << 32 | row
        assert found["path"] == "a.jsonl"
        assert found["where"].startswith("byte ")
        assert (found["bytes"], found["tokens"]) == (size, size)
        assert SPLITS[found["split"]] == ("held_out" if is_held_out(text, 0.2) else "train")
    for name in ("bytes", "tokens"):
        expected = [0] * intake.HISTOGRAM_BINS
        for row in rows:
            expected[row[name].bit_length()] += 1
        assert facts[f"document_{name}"] == expected


@pytest.mark.parametrize("values", [[0, 1, 2, 3, 4, 7, 8, 2**31, 2**53 - 1, 2**53]])
def test_bit_lengths_are_pythons(values):
    assert intake.bit_lengths(np.array(values)).tolist() == [v.bit_length() for v in values]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_spans_give_back_every_documents_bytes(tmp_path, part, packing):
    job = job_in(tmp_path / "out", packing=packing)
    packed = packed_in(job, pack_part(job, part))
    texts = {3 << 32 | row: json.loads(LINES[row])["text"].encode() for row in range(len(LINES))
             if row not in (7, 8, 9)}  # fmt: skip
    for batch in [each for split in SPLITS for each in packed[split]]:
        for row in range(len(batch)):
            low, high = batch.start_offsets[row : row + 2]
            starts = [*batch.document_starts[low:high].tolist(), 16]
            for place, start, stop in zip(range(low, high), starts, starts[1:], strict=False):
                text = texts[int(batch.document_ids[place])]
                body = [t for t in batch.tokens[row, start:stop].tolist() if t < 256]
                assert bytes(body) == text[batch.span_starts[place] : batch.span_stops[place]]


def test_a_part_is_packed_in_windows_and_masked_in_whole_batches(tmp_path, monkeypatch):
    """Memory is bounded by windows; what a reader relies on is not touched by them."""
    texts = [f"document {i} " * (1 + i % 50) for i in range(300)]
    part = part_of(tmp_path / "a.jsonl", lines_of(*texts))
    job = job_in(tmp_path / "out", window_bytes=3000)
    record = pack_part(job, part)
    packed = packed_in(job, record)
    assert len(packed["train"]) > 10
    monkeypatch.setattr(intake, "CHUNK_CHARACTERS", 7)
    assert pack_part(job_in(tmp_path / "again", window_bytes=3000), part) == record
    tokens = np.concatenate([batch.tokens for batch in packed["train"]])
    monkeypatch.setattr(parts, "batch_rows", lambda geometry: 100)
    made = mask_part(job, order_for(record, totals=(10**6, 10**6)))["train"]
    reader = read_arrow(Folder(job.output), made.object, made.bytes, made.sha256)
    sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes[:-1] == [100] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 100
    rows = [rows_of(reader.get_batch(i), GEOMETRY) for i in range(len(sizes))]
    assert np.array_equal(np.concatenate([each.tokens for each in rows]), tokens)
    total = sum(len(text.encode()) + 1 for text in texts)
    assert sum(f["tokens"] for f in record.facts["splits"].values()) == total


def test_the_shards_record_batches_have_the_size_that_readers_rely_on(tmp_path, part):
    job = job_in(tmp_path / "out")
    made = mask_part(job, order_for(pack_part(job, part)))
    for record in made.values():
        assert record.facts["rows"] <= batch_rows(GEOMETRY)  # so one batch, see `rows_in`
        rows_in(tmp_path / "out", record)


def test_padding_is_counted(tmp_path, part):
    job = job_in(tmp_path / "out", packing="best_fit")
    record = pack_part(job, part)
    pad = byte_tokenizer().pad_id
    for split, batches in packed_in(job, record).items():
        assert record.facts["splits"][split]["padding"] == sum(
            int((batch.tokens == pad).sum()) for batch in batches
        )


def test_a_long_document_is_encoded_in_pieces_and_stays_one(tmp_path):
    text = "one line of it\n" * 20
    part = part_of(tmp_path / "a.jsonl", lines_of(text, "short"))
    whole = job_in(tmp_path / "a", held_out_rate=0.0)
    cut = Cleaning(max_document_bytes=32, filters=FilterConfig())
    pieces = job_in(tmp_path / "b", held_out_rate=0.0, cleaning=cut)
    assert pack_part(pieces, part) == pack_part(whole, part)
    assert [row["bytes"] for row in documents_in(pieces)] == [300, 5]


def test_equal_documents_of_all_parts_are_dropped_but_the_first(tmp_path):
    texts = [["a", "b", "a"], ["c", "b"], ["c", "d"], ["d ", "a"]]
    job = job_in(tmp_path / "out", held_out_rate=0.0, num_ranges=2)
    them = [part_of(tmp_path / f"{i}.jsonl", lines_of(*own), i) for i, own in enumerate(texts)]
    for each in reversed(them):
        hash_part(job, each)
    for number in (1, 0):
        merge_hashes(job, number)
    facts = [pack_part(job, each).facts for each in them]
    assert [each["dropped"].get("duplicate", 0) for each in facts] == [1, 1, 1, 1]
    kept = [row["document_id"] for i in range(4) for row in documents_in(job, i)]
    assert kept == [0, 1, 1 << 32, 2 << 32 | 1, 3 << 32]


CHAT = [
    {"role": "user", "content": "What is é?"},
    {"role": "assistant", "content": "A letter."},
]


def chat_part(path, *chats):
    return part_of(path, [json.dumps({"chat": chat}).encode() for chat in chats])


def chat_job(folder, **changes):
    source = SourceConfig(paths=("a",), messages_column="chat")
    changes = {"held_out_rate": 0.0, "chat_template": "plain", **changes}
    return job_in(folder, sources={"source": source}, **changes)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_of_a_conversation_only_the_responses_can_be_masked(tmp_path, packing):
    job = chat_job(tmp_path / "out", packing=packing)
    record = pack_part(job, chat_part(tmp_path / "a.jsonl", CHAT, CHAT[:1]))
    [batch] = packed_in(job, record)["train"]
    tokens, maskable = batch.tokens.reshape(-1), batch.is_maskable.reshape(-1)
    spelled = bytes(t for t in tokens.tolist() if t < 256).decode()
    assert spelled == "User: What is é?\n\nAssistant: A letter.\n\n"
    answer = bytes(t for t in tokens[maskable].tolist() if t < 256).decode()
    assert answer.strip() == "A letter."
    assert not maskable[tokens == byte_tokenizer().pad_id].any()
    assert record.facts["dropped"] == {"no_response": 1}
    split = record.facts["splits"]["train"]
    assert split["tokens"] == maskable.sum()
    assert split["bytes"] == len(answer)
    assert split["characters"] == len("A letter.")
    [row] = documents_in(job)
    assert row["bytes"] == len(spelled.encode())


def test_a_conversation_that_the_template_refuses_is_dead_alone(tmp_path):
    odd = [{"role": "wizard", "content": "?"}, CHAT[1]]
    job = chat_job(tmp_path / "out")
    facts = pack_part(job, chat_part(tmp_path / "a.jsonl", CHAT, odd, [*CHAT, CHAT[1]])).facts
    assert facts["dead"] == {"chat_template_fails": 1}
    assert facts["documents_in"] == 3
    assert facts["splits"]["train"]["documents"] == 2
    assert json.loads(facts["first_dead"]["excerpt"]) == odd


DEADLY = "this text kills"


@pytest.fixture
def deadly_engine(monkeypatch):
    """An engine that takes its process with it at one text."""
    make = encoding.engine_of

    class Deadly:
        def __init__(self, engine):
            self.engine = engine

        def encode_arrays(self, texts):
            if any(DEADLY in text for text in texts):
                os.kill(os.getpid(), signal.SIGKILL)
            return self.engine.encode_arrays(texts)

    monkeypatch.setattr(encoding, "engine_of", lambda *given: Deadly(make(*given)))


def packs_in_child(job, part) -> bool:
    """Whether a process of its own survives packing."""
    child = os.fork()
    if child == 0:
        pack_part(job, part)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.forks
def test_a_record_that_kills_the_process_is_set_aside_at_the_third_attempt(tmp_path, deadly_engine):
    texts = ["one", f"{DEADLY}, once", "two", f"{DEADLY}, twice", "three"]
    part = part_of(tmp_path / "a.jsonl", lines_of(*texts))
    job = job_in(tmp_path / "out", held_out_rate=0.0)
    assert [packs_in_child(job, part) for _ in range(3)] == [False, False, True]
    facts = pack_part(job, part).facts
    assert facts["dead"] == {KILLED: 2}
    assert facts["splits"]["train"]["documents"] == 3
    letters = (tmp_path / "out" / "dead_letter-00003.jsonl").read_text().splitlines()
    assert [json.loads(line)["excerpt"] for line in letters] == [texts[1], texts[3]]


@pytest.mark.forks
def test_deaths_with_another_cause_change_no_byte(tmp_path, part):
    job = job_in(tmp_path / "out")
    for mark in ("part-00003.arrow.attempt-0", "part-00003.arrow.attempt-1"):
        Folder(job.work).publish(mark, b"")
    assert pack_part(job, part) == pack_part(job_in(tmp_path / "calm"), part)
