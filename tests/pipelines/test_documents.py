"""A range owns the lines that begin in it; a broken record costs itself alone."""

import errno
import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade_model.errors import InputError, Unfinished
from pipelines.documents import read_documents
from pipelines.pieces import EXCERPT, Part, Piece, is_sound, open_source, whole
from pipelines.tables import cells

LINES = [b'{"text": "one"}', b"", '{"text": "zwölf 十二"}'.encode(), b"   ", b'{"text": "x"}\r']


def piece(path, format, start=0, stop=None, size=None) -> Piece:
    size = path.stat().st_size if size is None else size
    stop = size if stop is None else stop
    return Piece(
        path=path.name, url=str(path), format=format, start=start, stop=stop, bytes=stop - start
    )


def read(*pieces, **columns):
    return list(read_documents(Part(index=0, pieces=pieces), "text", **columns))


def jsonl(tmp_path, *lines: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_wherever_a_file_is_cut_each_line_is_read_once_and_in_order(tmp_path):
    path = jsonl(tmp_path, *LINES)
    size = path.stat().st_size
    for first in range(size + 1):
        for second in range(first, size + 1, 7):
            cuts = [(0, first), (first, second), (second, size)]
            found = read(*(piece(path, "jsonl", *cut) for cut in cuts if cut[0] < cut[1]))
            assert [document.text for document in found] == ["one", "zwölf 十二", "x"]
            assert [document.row for document in found] == [0, 1, 2]


def test_where_is_the_byte_at_which_the_line_begins(tmp_path):
    path = jsonl(tmp_path, *LINES)
    data = path.read_bytes()
    for document in read(piece(path, "jsonl", 0, 20), piece(path, "jsonl", 20)):
        place = int(document.where.removeprefix("byte "))
        assert json.loads(data[place:].split(b"\n")[0])["text"] == document.text


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "broken_json"),
        (b"[" * 100_000, "broken_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "broken_json"),
        (b'{"text": "\xff' + b"y" * 500 + b'"}', "invalid_utf8"),
        (b'["text"]', "not_an_object"),
        (b'{"body": "' + b"x" * 500 + b'"}', "missing_text"),
        (b'{"text": null}', "missing_text"),
        (b'{"text": 3}', "text_is_no_string"),
        (b'{"text": "\\ud800"}', "lone_surrogate"),
    ],
)
def test_a_broken_line_is_set_aside_with_a_reason_and_a_short_excerpt(tmp_path, line, reason):
    path = jsonl(tmp_path, b'{"text": "a"}', line, b'{"text": "b"}')
    first, dead, last = read(piece(path, "jsonl"))
    assert (first.text, dead.text, last.text) == ("a", None, "b")
    assert (dead.reason, dead.path, dead.where) == (reason, "a.jsonl", "byte 14")
    assert 0 < len(dead.excerpt) <= EXCERPT
    assert json.dumps(dead.excerpt, ensure_ascii=False).encode()


def test_the_mark_of_the_byte_order_is_no_text(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbftwo")
    [document] = read(piece(text, "text"))
    assert document.text == "one \ufefftwo"


def invalid_text(*values: bytes | None) -> pa.Array:
    """A text column that holds these very bytes."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), raw.buffers())


def test_invalid_text_in_parquet_and_text_files_is_set_aside(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": invalid_text(b"a", b"caf\xe9", None)}), path)
    found = read(piece(path, "parquet", 0, 1))
    assert [document.text for document in found] == ["a", None, None]
    assert [document.reason for document in found] == ["", "invalid_utf8", "missing_text"]
    assert found[1].excerpt == "caf\\xe9"
    assert found[1].where == "row group 0 row 1"
    text = tmp_path / "a.txt"
    text.write_bytes(b"caf\xe9")
    [document] = read(piece(text, "text"))
    assert (document.text, document.reason) == (None, "invalid_utf8")


def test_one_invalid_cell_does_not_cost_its_column():
    values = list(cells(invalid_text(b"a", b"\xff", b"b", None)))
    assert [values[0], values[2], values[3]] == ["a", "b", None]
    assert values[1].reason == "invalid_utf8"
    with pytest.raises(UnicodeDecodeError):  # the control: Arrow's own way loses all of them
        invalid_text(b"a", b"\xff", b"b").to_pylist()


@pytest.mark.parametrize(("text", "expected"), [("é十\U0001f600", True), ("a\ud800", False)])
def test_a_text_is_sound_if_it_can_be_written(text, expected):
    assert is_sound(text) is expected


def test_a_file_that_is_not_there_or_not_readable_may_be_so_later(tmp_path):
    with pytest.raises(Unfinished, match=r"none cannot be read \(FileNotFoundError\)"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(Unfinished, match="cannot be read"), whole("a.parquet", "Parquet file"):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("error", [pa.ArrowInvalid("no magic\nbytes"), OSError("zlib: broken")])
def test_a_damaged_file_stays_damaged(error):
    damaged = pytest.raises(InputError, match="damaged Parquet file")
    with damaged as caught, whole("a.parquet", "Parquet file"):
        raise error
    assert not isinstance(caught.value, Unfinished)
    assert "bytes" not in str(caught.value)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_conversations_are_read_from_lines_and_tables(tmp_path):
    path = jsonl(tmp_path, json.dumps({"chat": [{**CHAT[0], "name": "x"}, CHAT[1]]}).encode())
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"chat": [CHAT]}), table)
    for found in (
        read(piece(path, "jsonl"), messages_column="chat"),
        read(piece(table, "parquet", 0, 1), messages_column="chat"),
    ):
        assert [document.messages for document in found] == [CHAT]
        assert found[0].text == "hi\n\nyo"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("null", "missing_messages"),
        ('"hi"', "broken_messages"),
        ("[]", "broken_messages"),
        ('["hi"]', "broken_messages"),
        ('[{"role": "user"}]', "broken_messages"),
        ('[{"role": "user", "content": 3}]', "broken_messages"),
        ('[{"role": "user", "content": "\\ud800"}]', "lone_surrogate"),
    ],
)
def test_a_broken_conversation_is_set_aside_with_a_reason(tmp_path, value, reason):
    path = jsonl(tmp_path, f'{{"messages": {value}}}'.encode())
    [document] = read(piece(path, "jsonl"), messages_column="messages")
    assert (document.text, document.messages, document.reason) == (None, None, reason)
    assert document.excerpt


def test_a_records_own_id_stands_in_its_place(tmp_path):
    path = jsonl(tmp_path, b'{"text": "a", "n": 7}', b'{"text": 3, "n": "x"}', b'{"text": "b"}')
    found = read(piece(path, "jsonl"), id_column="n")
    assert [document.where for document in found] == [
        "byte 0, id 7",
        "byte 22, id x",
        "byte 44",
    ]
    hard = jsonl(tmp_path, b'{"text": "a", "n": "\\ud800"}')
    assert read(piece(hard, "jsonl"), id_column="n")[0].where == r"byte 0, id '\ud800'"


def compressed(tmp_path, suffix, lines) -> Path:
    path = tmp_path / f"a.jsonl.{suffix}"
    codec = {"gz": "gzip", "zst": "zstd"}[suffix]
    with pa.CompressedOutputStream(str(path), codec) as file:
        for line in lines:
            file.write(line + b"\n")
    return path


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_is_unpacked_as_a_stream(tmp_path, suffix):
    """A hundred megabytes that pack to little: the first record is there before the last one is
    unpacked, and memory stays small."""
    line = json.dumps({"text": "x" * 100_000}).encode()
    path = compressed(tmp_path, suffix, (line for _ in range(1000)))
    assert path.stat().st_size < 2_000_000
    part = Part(index=0, pieces=(piece(path, "jsonl"),))
    tracemalloc.start()
    try:
        assert sum(len(d.text or "") for d in read_documents(part, "text")) == 10**8
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_where_is_the_byte_of_the_unpacked_text_too(tmp_path, suffix):
    path = compressed(tmp_path, suffix, [b'{"text": "a"}', b"", b'{"text": "b"}'])
    assert [document.where for document in read(piece(path, "jsonl"))] == ["byte 0", "byte 15"]


def test_gzip_members_one_after_the_other_are_one_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert [document.text for document in read(piece(path, "jsonl"))] == ["a", "b"]


def astray(kind: str) -> pa.Array:
    """Three rows, whose second text begins far behind the end of all texts."""
    right = pa.array(["aa", "bb", "cc"])
    offsets = np.array([0, 2, 1 << 30, 6], dtype=np.int32)
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(offsets.tobytes()), right.buffers()[2])
    if kind == "text":
        return texts
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 3), texts], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turns)


@pytest.mark.parametrize("kind", ["text", "messages"])
@pytest.mark.parametrize("form", ["arrow_file", "arrow_stream"])
def test_offsets_that_lead_out_of_an_arrow_file_are_not_followed(tmp_path, kind, form):
    """Followed, they end the process with SIGBUS or SIGSEGV."""
    batch = pa.record_batch([astray(kind)], names=[kind])
    new = pa.ipc.new_file if form == "arrow_file" else pa.ipc.new_stream
    with new(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    made = Part(index=0, pieces=(piece(tmp_path / "a.arrow", form, 0, 1),))
    columns = ("text", "messages") if kind == "messages" else ("text",)
    with pytest.raises(InputError, match="is a damaged Arrow"):
        list(read_documents(made, *columns))


@pytest.mark.parametrize("form", ["arrow_file", "arrow_stream"])
def test_conversations_of_arrow_are_read_and_invalid_text_in_them_is_set_aside(tmp_path, form):
    kinds = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
    turns = [[{"role": "user", "content": "why"}], [], None, [{"role": "user", "content": "so"}]]
    batch = pa.record_batch([pa.array(turns, kinds)], names=["m"])
    new = pa.ipc.new_file if form == "arrow_file" else pa.ipc.new_stream
    with new(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    made = Part(index=0, pieces=(piece(tmp_path / "a.arrow", form, 0, 1),))
    found = list(read_documents(made, "text", "m"))
    assert [document.text for document in found] == ["why", None, None, "so"]
    assert [document.reason for document in found[1:3]] == ["broken_messages", "missing_messages"]
