"""Every format gives the same documents, whatever the parts."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade_model.errors import InputError
from pipelines.config import SourceConfig
from pipelines.documents import read_documents
from pipelines.sources import make_plan, plan_sources

TEXTS = [f"document {i}: " + "naïve 中文 " * (i % 7) for i in range(40)]


def read(*paths, part_bytes=1 << 20, **settings):
    """All documents of a source as (text or reason), part by part."""
    source = SourceConfig(paths=tuple(map(str, paths)), **settings)
    plan = make_plan(source, part_bytes)
    return [
        [d.text if d.text is not None else d.reason for d in read_documents(p, source.text_column)]
        for p in plan.parts
    ]


def flat(parts):
    return [each for part in parts for each in part]


def write_jsonl(path, texts=TEXTS):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 100, 333, 10**6])
def test_jsonl_cut_at_any_byte_gives_every_line_once(tmp_path, part_bytes):
    parts = read(write_jsonl(tmp_path / "a.jsonl"), part_bytes=part_bytes)
    assert flat(parts) == TEXTS


def test_a_last_line_without_newline_a_byte_order_mark_and_crlf_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert flat(read(path)) == ["a", "b"]


def test_compressed_jsonl_is_read_whole(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(plain)
    assert flat(read(tmp_path / "a.jsonl.gz", part_bytes=10)) == TEXTS
    assert flat(read(tmp_path / "a.jsonl.zst")) == TEXTS


def test_parquet_is_cut_at_row_groups(tmp_path):
    table = pa.table({"id": range(40), "text": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    parts = read(tmp_path / "a.parquet", part_bytes=1)
    assert [len(part) for part in parts] == [10, 10, 10, 10]
    assert flat(parts) == TEXTS


def test_a_hugging_face_dataset_folder_is_read(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(
        tmp_path / "two"
    )
    assert flat(read(tmp_path / "one")) == TEXTS
    assert flat(read(tmp_path / "two")) == [*TEXTS, TEXTS[3]]


def write_arrow(path, kind, table, rows=7):
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_arrow_is_cut_at_record_batches(tmp_path, kind, text):
    table = pa.table({"id": range(40), "text": pa.array(TEXTS, text)})
    path = write_arrow(tmp_path / "a.arrow", kind, table)
    parts = read(path, part_bytes=1)
    assert [len(part) for part in parts] == [7, 7, 7, 7, 7, 5]
    assert flat(parts) == TEXTS
    assert [len(part) for part in read(path, part_bytes=10**6)] == [40]


def test_a_stream_with_dictionaries_is_one_piece(tmp_path):
    kinds = pa.array(["a", "b"] * 20).dictionary_encode()
    path = write_arrow(tmp_path / "a.arrows", "stream", pa.table({"kind": kinds, "text": TEXTS}))
    parts = read(path, part_bytes=1)
    assert [len(part) for part in parts] == [40]
    assert flat(parts) == TEXTS


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_cut_arrow_file_is_one_sentence(tmp_path, kind):
    path = write_arrow(tmp_path / "a.arrow", kind, pa.table({"text": TEXTS}))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=f"damaged Arrow {kind}"):
        read(path)


def test_a_remote_file_is_read_by_ranges_not_whole(monkeypatch):
    """Of ten record batches of half a megabyte, a part that holds one reads about one."""
    import fsspec

    memory = fsspec.filesystem("memory")
    table = pa.table({"text": [str(i % 10) * 1000 for i in range(5000)]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    memory.pipe_file("/ranges/a.arrows", sink.getvalue().to_pybytes())
    source = SourceConfig(paths=("memory://ranges/a.arrows",))
    plan = make_plan(source, 1)
    assert len(plan.parts) == 10
    taken = []
    opened = memory.store["/ranges/a.arrows"]
    kind = type(opened)
    monkeypatch.setattr(
        kind, "read", lambda self, n=-1: taken.append(n) or super(kind, self).read(n)
    )
    texts = [document.text for document in read_documents(plan.parts[7], "text")]
    assert len(texts) == 500
    assert 500_000 < sum(taken) < 600_000


def test_sources_follow_each_other_and_a_part_holds_one_of_them(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(5)])
    sources = {name: SourceConfig(paths=(str(tmp_path / f"{name}.jsonl"),)) for name in "ba"}
    plan = plan_sources(sources, 40)
    assert [part.index for part in plan.parts] == list(range(len(plan.parts)))
    names = [part.source for part in plan.parts]
    assert names == sorted(names, reverse=True)
    assert [file.source for file in plan.files] == ["b", "a"]
    texts = [d.text for part in plan.parts for d in read_documents(part, "text")]
    assert texts == [f"{name}{i}" for name in "ba" for i in range(5)]
    assert plan.bytes == sum(file.bytes for file in plan.files)


def test_a_mistake_in_a_mixture_names_its_source(tmp_path):
    with pytest.raises(InputError, match=r"mixture\.web\.paths names /none"):
        plan_sources({"web": SourceConfig(paths=("/none",))}, 1)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    source = SourceConfig(paths=(str(tmp_path),))
    with pytest.raises(InputError, match=r"mixture\.web\.text_column=text is not in"):
        plan_sources({"web": source}, 1)


def test_a_column_of_conversations_is_checked(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    pq.write_table(pa.table({"m": [chat], "text": ["a"]}), tmp_path / "a.parquet")
    assert len(make_plan(SourceConfig(paths=(str(tmp_path),), messages_column="m"), 1).parts) == 1
    with pytest.raises(InputError, match="not a list of role and content"):
        make_plan(SourceConfig(paths=(str(tmp_path),), messages_column="text"), 1)
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(InputError, match=r"source\.messages_column=m needs records but .*b\.txt"):
        make_plan(SourceConfig(paths=(str(tmp_path),), messages_column="m"), 1)


def test_text_files_are_documents_in_the_order_of_their_paths_and_share_parts(tmp_path):
    for name in ("b.md", "sub/a.txt", "c.bin", "skip/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert read(tmp_path, exclude=("skip",)) == [["text of b.md", "text of sub/a.txt"]]
    assert read(tmp_path, pattern="**/*.bin") == [["text of c.bin"]]
    assert len(read(tmp_path, part_bytes=1)) == 3


def test_the_standard_library_is_a_source_without_a_download():
    plan = make_plan(SourceConfig(paths=("stdlib:",), pattern="json/*.py"), 1 << 20)
    assert [file.path for file in plan.files][:2] == [
        "stdlib:json/__init__.py",
        "stdlib:json/decoder.py",
    ]


def test_any_fsspec_url_is_a_source():
    import fsspec

    fsspec.filesystem("memory").pipe_file("/sources/a.jsonl", b'{"text": "far away"}\n')
    assert flat(read("memory://sources/a.jsonl")) == ["far away"]
    assert flat(read("memory://sources")) == ["far away"]


def test_the_plan_is_the_same_each_time_and_knows_the_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    source = SourceConfig(paths=(str(tmp_path),))
    assert make_plan(source, 100) == make_plan(source, 100)
    file = make_plan(source, 100).files[0]
    assert (file.bytes, len(file.sha256)) == ((tmp_path / "a.jsonl").stat().st_size, 64)


def test_a_missing_file_is_named():
    with pytest.raises(
        InputError, match=r"source\.paths names /none/a\.jsonl, which does not exist"
    ):
        read("/none/a.jsonl")


def test_a_folder_without_a_fitting_file_names_the_settings(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"set source\.format and source\.pattern"):
        read(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match="holds no text at all"):
        read(tmp_path)


def test_a_table_without_the_text_column_names_what_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"text_column=text is not in .* \['body', 'n'\]"):
        read(tmp_path)
    with pytest.raises(InputError, match="holds int64, not text"):
        read(tmp_path, text_column="n")


def test_a_damaged_container_is_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="damaged Parquet file"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 9999)[:40])
    with pytest.raises(InputError, match="damaged compressed file"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="no dataset folder"):
        read(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/hosts", "..", "a\\\\b", ""])
def test_a_dataset_folder_names_no_file_outside_of_itself(tmp_path, name):
    table = pa.table({"text": ["told to nobody"]})
    with pa.ipc.new_stream(tmp_path / "secret.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "hf").mkdir()
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "hf" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="is no dataset folder"):
        read(tmp_path / "hf")
    (tmp_path / "hf" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(InputError, match="is no dataset folder"):
        read(tmp_path / "hf")


def test_rows_that_a_dataset_chose_by_a_file_of_indices_are_not_all_taken(tmp_path):
    state = {"_data_files": [{"filename": "a.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="is no dataset folder"):
        read(tmp_path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="text_column=text is there more than once"):
        read(tmp_path / "a.parquet")


def test_a_file_whose_name_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("a")
    with pytest.raises(InputError, match=r"udcff\.txt' is no UTF-8; rename or exclude it"):
        read(tmp_path)
    assert read(write_jsonl(tmp_path / "a.jsonl")) == [TEXTS]
