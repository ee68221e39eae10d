"""Prompts are the same however the input is cut; a broken row costs itself alone."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade_model.errors import InputError, Unfinished
from cascade_model.sampling import SamplingParams
from pipelines import prompts as reader
from pipelines.prompt_rows import Columns, DeadRow, Prompt, read_part
from pipelines.prompts import plan, require_columns
from pipelines.row_settings import Decoding, row_seed

COMMON = Decoding(params=SamplingParams(max_tokens=7, seed=3), stop=("END",))

LINES = [
    b'{"prompt": "one", "id": "first"}\n',
    b"\n",
    b'{"prompt": "two"}\r\n',
    b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
    b"{broken\n",
    b'{"prompt": "' + b"x" * 300 + b'"}',
]
BROKEN = [
    (b"{broken", "broken_json"),
    (b"[" * 100_000, "broken_json"),
    (b'{"prompt": "\xff"}', "invalid_utf8"),
    (b'"a text"', "not_an_object"),
    (b'{"text": "no prompt"}', "missing_prompt"),
    (b'{"prompt": null}', "missing_prompt"),
    (b'{"prompt": 7}', "prompt_is_no_string"),
    (b'{"prompt": ""}', "empty_prompt"),
    (b'{"prompt": "a\\ud800"}', "lone_surrogate"),
    (b'{"prompt": "a", "id": "\\udfff"}', "lone_surrogate"),
    (b'{"prompt": "", "suffix": ""}', "empty_prompt"),
    (b'{"suffix": "a"}', "missing_prompt"),
    (b'{"prompt": "a", "suffix": 7}', "suffix_is_no_string"),
    (b'{"prompt": "a", "suffix": "\\ud800"}', "lone_surrogate"),
    (b'{"messages": [{"role": "user", "content": "a"}], "suffix": "b"}', "suffix_of_a_chat"),
    (b'{"messages": "Hi"}', "broken_messages"),
    (b'{"messages": []}', "broken_messages"),
    (b'{"messages": [{"role": "user"}]}', "broken_messages"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone_surrogate"),
]


def plain(row: int, text: str) -> Prompt:
    """A prompt with the job's settings."""
    params = SamplingParams(max_tokens=7, seed=row_seed(3, row))
    decoding = Decoding(params=params, stop=("END",))
    return Prompt(row=row, id=str(row), text=text, decoding=decoding)


def rows_of(parts, columns=None) -> list[Prompt | DeadRow]:
    return [row for part in parts for row in read_part(part, columns or Columns(), COMMON)]


def read(path, rows_per_part=100, **columns):
    return rows_of(plan([str(path)], rows_per_part)[0], Columns(**columns))


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 100])
def test_however_the_input_is_cut_the_rows_are_the_same(jsonl, rows_per_part):
    parts, digest = plan([str(jsonl)], rows_per_part)
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [part.num_rows for part in parts][:-1] == [rows_per_part] * (len(parts) - 1)
    found = rows_of(parts)
    assert [row.row for row in found] == [0, 1, 2, 3, 4]
    assert found == read(jsonl, 4)
    assert digest == plan([str(jsonl)], 4)[1]


def test_where_a_file_ends_is_part_of_the_inputs_digest(tmp_path):
    rows = b'{"prompt": "a"}\n' * 3
    (tmp_path / "one.jsonl").write_bytes(rows * 2)
    for name in ("first.jsonl", "second.jsonl"):
        (tmp_path / name).write_bytes(rows)
    whole, digest = plan([str(tmp_path / "one.jsonl")], 4)
    halves, other = plan([str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")], 4)
    assert [part.num_rows for part in whole] == [4, 2]  # the bytes are the same, the parts not
    assert [part.num_rows for part in halves] == [3, 3]
    assert digest != other


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_is_not_the_planned_one_is_told_at_the_end_of_its_part(tmp_path, kind):
    write = {"jsonl": as_jsonl, "parquet": as_parquet}[kind]
    path = write(tmp_path / f"a.{kind}", [{"prompt": "a"}, {"prompt": "b"}])
    parts, _ = plan([str(path)], 5)
    assert len(rows_of(parts)) == 2
    write(path, [{"prompt": "a"}])
    found = []
    with pytest.raises(InputError, match=rf"a\.{kind} changed while the job ran"):
        found.extend(read_part(parts[0], Columns(), COMMON))
    assert found == [plain(0, "a")]


def test_a_row_group_is_decoded_once_for_all_its_parts(tmp_path, monkeypatch):
    table = pa.table({"prompt": [f"row {i}" for i in range(40)], "other": list(range(40))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    decode, decoded = pq.ParquetFile.read_row_group, []

    def counted(self, group, **settings):
        decoded.append(group)
        return decode(self, group, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    parts, _ = plan([str(tmp_path / "a.parquet")], 3)
    with ThreadPoolExecutor(8) as pool:  # a worker has several parts at once
        early = list(pool.map(lambda part: rows_of([part]), parts[:6]))
    found = [row for rows in early for row in rows] + rows_of(parts[6:])
    assert [row.text for row in found] == table["prompt"].to_pylist()
    assert decoded == [0, 1]


def test_a_file_that_was_written_anew_is_decoded_anew(tmp_path):
    for size in (2, 3):
        path = as_parquet(tmp_path / "a.parquet", [{"prompt": f"{size} {i}"} for i in range(size)])
        assert [row.text for row in read(path)] == [f"{size} {i}" for i in range(size)]


def test_a_rows_id_is_its_own_or_its_number(jsonl):
    found = read(jsonl)
    assert [row.id for row in found if isinstance(row, Prompt)] == ["first", "1", "2", "4"]


def test_a_chat_comes_as_its_messages(jsonl):
    assert read(jsonl)[2].messages == ({"role": "user", "content": "Hi"},)


def test_a_suffix_comes_with_its_prompt_from_either_format(tmp_path):
    rows = [{"prompt": "a", "after": "b"}, {"prompt": "", "after": "c"}, {"prompt": "d"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    for name in ("prompts.jsonl", "prompts.parquet"):
        found = read(tmp_path / name, suffix="after")
        assert [(row.text, row.suffix) for row in found] == [("a", "b"), ("", "c"), ("d", None)]
        assert read(tmp_path / name)[0] == plain(0, "a")


def test_a_part_never_crosses_a_file(tmp_path, jsonl):
    other = tmp_path / "more.jsonl"
    other.write_text('{"prompt": "z"}\n')
    parts, _ = plan([str(jsonl), str(other)], 3)
    assert [part.num_rows for part in parts] == [3, 2, 1]
    assert rows_of(parts)[-1] == plain(5, "z")


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_row_dies_alone_and_its_letter_can_be_written(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    first, dead, last = read(path)
    assert (first.text, last.text, last.row) == ("a", "b", 2)
    assert isinstance(dead, DeadRow)
    assert dead.reason == reason
    assert len(dead.input) <= 200
    assert json.dumps(dead.input, ensure_ascii=False).encode()


@pytest.mark.parametrize("head", [b"", b"\n", b" \r\n"])
@pytest.mark.parametrize("rows_per_part", [1, 5])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, head, rows_per_part):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + head + b'{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row.text for row in read(path, rows_per_part)] == ["a", "b"]


def test_a_byte_order_mark_further_down_is_broken(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n')
    assert read(path)[1].reason == "broken_json"


def test_parquet_parts_read_their_own_rows(tmp_path):
    table = pa.table({"prompt": [f"row {i}" for i in range(23)], "id": list(range(100, 123))})
    pq.write_table(table, tmp_path / "prompts.parquet", row_group_size=4)
    found = read(tmp_path / "prompts.parquet", 5)
    assert [row.text for row in found] == table["prompt"].to_pylist()
    assert [row.id for row in found] == [str(i) for i in range(100, 123)]


def invalid_text(*values: bytes) -> pa.Array:
    """A text column that holds these very bytes."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_invalid_text_in_parquet_dies_alone(tmp_path):
    contents = invalid_text(b"Hi", b"\xff", b"Hi")
    messages = pa.ListArray.from_arrays(
        pa.array([0, 1, 2, 3], pa.int32()),
        pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], ["role", "content"]),
    )
    table = pa.table(
        {
            "prompt": invalid_text(b"a", b"b", b"\xe9"),
            "messages": messages,
            "unused": invalid_text(b"\xff", b"\xff", b"\xff"),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found[0].text == "a"
    assert [row.reason for row in found[1:]] == ["invalid_utf8"] * 2
    [alive, dead, other] = read(tmp_path / "a.parquet", prompt="none")
    said = ({"role": "user", "content": "Hi"},)
    assert (alive.messages, dead.reason, other.messages) == (said, "invalid_utf8", said)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_an_empty_input_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="holds no rows"):
        plan([str(tmp_path / "empty.jsonl")], 5)


def test_a_missing_damaged_or_compressed_input_is_refused(tmp_path):
    with pytest.raises(Unfinished, match=r"none\.jsonl cannot be read"):
        plan([str(tmp_path / "none.jsonl")], 5)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match=r"bad\.parquet is a damaged Parquet file"):
        plan([str(tmp_path / "bad.parquet")], 5)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz is compressed; unpack it"):
        plan(["a.jsonl.gz"], 5)


def test_a_misspelt_column_is_told_with_those_that_are_there(tmp_path, jsonl):
    table = pa.table({"question": ["a"], "n": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    require_columns([str(jsonl)], "prompt", "messages")
    with pytest.raises(InputError, match=r"prompt_column=prompt .*\['question', 'n'\]; name one"):
        require_columns([str(jsonl), str(tmp_path / "a.parquet")], "prompt", "messages")
    with pytest.raises(InputError, match=r"prompt_column=promt .*\['prompt', 'id', 'messages'\]"):
        require_columns([str(jsonl)], "promt", "chat")
    require_columns([str(tmp_path / "a.parquet")], "question", "messages")


def test_a_file_of_broken_rows_is_left_to_the_rows_themselves(tmp_path):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    require_columns([str(tmp_path / "a.jsonl")], "prompt", "messages")


def test_columns_are_looked_for_in_the_first_rows_only(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n{"prompt": "a"}\n')
    require_columns([str(path)], "prompt", "messages")
    monkeypatch.setattr(reader, "_PROBED", 2)
    with pytest.raises(InputError, match=r"which has \['n'\]"):
        require_columns([str(path)], "prompt", "messages")


@pytest.mark.parametrize("kind", ["stream", "file", "dictionary"])
@pytest.mark.parametrize("rows_per_part", [1, 4, 5, 100])
def test_arrow_parts_read_their_own_rows(tmp_path, kind, rows_per_part):
    texts = pa.array([f"row {i}" for i in range(23)])
    column = texts.dictionary_encode() if kind == "dictionary" else texts
    table = pa.table({"prompt": column, "other": list(range(23))})
    opened = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    path = tmp_path / "prompts.arrow"
    with opened(path, table.schema) as writer:
        for start, stop in ((0, 4), (4, 4), (4, 13), (13, 23)):
            writer.write_table(table.slice(start, stop - start))
    found = read(path, rows_per_part)
    assert [row.text for row in found] == texts.to_pylist()
    assert [row.row for row in found] == list(range(23))


def test_invalid_text_in_arrow_dies_alone(tmp_path):
    table = pa.table({"prompt": invalid_text(b"a", b"\xff", b"c")})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    first, dead, last = read(tmp_path / "a.arrow")
    assert (first.text, dead.reason, last.text) == ("a", "invalid_utf8", "c")


SETTINGS = [
    {"prompt": "a"},
    {"prompt": "b", "params": {"temperature": 0.5, "stop": "x", "seed": 9}},
    {"prompt": "c", "params": {"max_tokens": 3, "stop": ["x", "y"]}, "temperature": 1.5},
    {"prompt": "d", "params": {"temperature": 0.1}, "temperature": 2.0},
    {"prompt": "e", "params": {"rule": "factor", "stop_ids": [4, 5]}},
]


def as_parquet(path: Path, rows: list) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def as_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_a_row_may_have_settings_of_its_own(tmp_path, kind):
    if kind == "jsonl":
        path = as_jsonl(tmp_path / "a.jsonl", SETTINGS)
    elif kind == "parquet":
        rows = [{**row} for row in SETTINGS]
        rows[1]["params"] = {**rows[1]["params"], "stop": ["x"]}  # one type a column
        path = as_parquet(tmp_path / "a.parquet", rows)
    else:
        rows = [{**row, "params": json.dumps(row.get("params", {}))} for row in SETTINGS]
        path = as_parquet(tmp_path / "a.parquet", rows)
    decoded = [row.decoding for row in read(path, settings=("temperature",))]
    params = [each.params for each in decoded]
    assert [each.temperature for each in params] == [0.0, 0.5, 1.5, 2.0, 0.0]
    assert [each.max_tokens for each in params] == [7, 7, 3, 7, 7]
    assert [each.seed for each in params] == [9 if i == 1 else row_seed(3, i) for i in range(5)]
    assert [each.stop for each in decoded] == [("END",), ("x",), ("x", "y"), ("END",), ("END",)]
    assert (params[4].rule, params[4].stop_ids) == ("factor", (4, 5))


def test_a_column_that_nobody_named_is_no_setting(tmp_path):
    [row] = read(as_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "temperature": 1.0, "seed": 2}]))
    assert row == plain(0, "a")


def test_whole_numbers_of_a_column_with_gaps_are_whole(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "max_tokens": pa.array([5.0, None])})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", settings=("max_tokens",))
    assert [row.decoding.params.max_tokens for row in found] == [5, 7]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"temprature": 1.0}, "temprature is no setting of a row; did you mean `temperature`?"),
        ({"logprobs": 1}, "logprobs is no setting of a row"),
        ({"temperature": 11.0}, "temperature=11.0 must be in 0..10"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be a whole number"),
        ({"rule": "best"}, "rule='best' must be one of"),
        ({"stop": 3}, "stop=3 must be a text or a list of texts"),
        ({"min_steps_per_block": 4, "steps_per_block": 2}, "min_steps_per_block=4 is above"),
        ("warm", "'warm' holds no settings"),
        ([1], "[1] holds no settings"),
    ],
)
def test_a_wrong_setting_costs_its_row_alone(tmp_path, params, sentence):
    rows = [{"prompt": "a"}, {"prompt": "b", "params": params}, {"prompt": "c"}]
    first, dead, last = read(as_jsonl(tmp_path / "a.jsonl", rows))
    assert (first.text, dead.reason, last.text) == ("a", "bad_setting", "c")
    assert sentence in dead.detail


def test_a_column_of_settings_must_be_in_a_table(tmp_path):
    table = as_parquet(tmp_path / "a.parquet", [{"prompt": "a", "seed": 1}])
    lines = as_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    require_columns([str(table)], "prompt", "messages", ["seed"])
    with pytest.raises(InputError, match=r"setting_columns has top_p, which is not in .*'seed'"):
        require_columns([str(table)], "prompt", "messages", ["seed", "top_p"])
    require_columns([str(lines)], "prompt", "messages", ["top_p"])
