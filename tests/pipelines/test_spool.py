"""What is spooled is what is committed, in memory or on disk."""

import pyarrow as pa
import pytest

from cascade_model.commit import Folder
from pipelines import spool
from pipelines.spool import ArrowSpool, Spool


@pytest.mark.parametrize("limit", [10, 10**6])
def test_bytes_come_out_as_they_went_in(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(spool, "SPOOL_BYTES", limit)
    spooled = Spool()
    for number in range(100):
        spooled.write(b"%d," % number)
    record = spooled.commit(Folder(tmp_path), "a.bin", {"numbers": 100})
    assert (tmp_path / "a.bin").read_bytes() == b"".join(b"%d," % n for n in range(100))
    assert record.facts == {"numbers": 100}


@pytest.mark.parametrize("limit", [10, 10**6])
def test_record_batches_make_a_whole_arrow_file(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(spool, "SPOOL_BYTES", limit)
    spooled = ArrowSpool(pa.schema([("n", pa.int64())]))
    for number in range(5):
        spooled.append([pa.array([number] * number, pa.int64())])
    spooled.finish()
    spooled.commit(Folder(tmp_path), "a.arrow")
    with pa.memory_map(str(tmp_path / "a.arrow")) as file:
        reader = pa.ipc.open_file(file)
        assert reader.num_record_batches == 5
        assert reader.read_all().column("n").to_pylist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
