"""What bench-data measures with: its text, its clock."""

import pyarrow.parquet as pq
import pytest

from tests.benchmarks.cpu_clock import spent
from tests.benchmarks.data_corpus import FILES, texts, write_corpus, write_salted


def documents_of(folder) -> list[str]:
    """Every document of a folder of Parquet files."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return [text for table in tables for text in table.column("text").to_pylist()]


def test_a_corpus_has_the_bytes_that_were_asked_for_and_each_text_once(tmp_path):
    size = write_corpus(tmp_path / "corpus", 400_000)
    found = documents_of(tmp_path / "corpus")
    assert size == sum(len(text.encode()) for text in found) >= 400_000
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(texts(400_000))
    assert len(list((tmp_path / "corpus").glob("*.parquet"))) == FILES
    before = (tmp_path / "corpus/text-0.parquet").stat().st_mtime_ns
    assert write_corpus(tmp_path / "corpus", 9) == size
    assert (tmp_path / "corpus/text-0.parquet").stat().st_mtime_ns == before


def test_salted_copies_are_all_different(tmp_path):
    write_corpus(tmp_path / "corpus", 100_000)
    write_salted(tmp_path / "corpus", tmp_path / "salted", 3)
    once, thrice = documents_of(tmp_path / "corpus"), documents_of(tmp_path / "salted")
    assert len(set(thrice)) == 3 * len(once)
    assert {text.partition("\n")[2] for text in thrice} == set(once)


ARM = """
import json, pathlib, subprocess, sys, time

def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass

def child():
    burn(0.8)
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(60)

if sys.argv[1] == 'child': child()
burn(0.5)  # imports
before = time.process_time()
flag = pathlib.Path(json.loads(sys.argv[2])['flag'])
other = subprocess.Popen([sys.executable, __file__, 'child', str(flag)])
burn(0.4)
while not flag.exists(): time.sleep(0.01)
time.sleep(0.5)  # long enough to be looked at
other.kill()
if sys.argv[1] == 'waits': other.wait()
print('noise')
print(json.dumps({'tokens': 7, 'seconds': 1.5, 'before': before}))
if sys.argv[1] == 'fails': sys.exit(3)
"""


@pytest.mark.parametrize("arm", ["waits", "leaves"])
def test_children_count_and_imports_do_not(arm, tmp_path):
    (tmp_path / "burner.py").write_text(ARM)
    found = spent("burner", arm, {"flag": str(tmp_path / "flag")}, {"PYTHONPATH": str(tmp_path)})
    assert 1.0 < found.cpu < 1.6
    assert (found.tokens, found.wall) == (7, 1.5)
    assert found.peak > 1


def test_an_arm_that_fails_stops_the_benchmark(tmp_path):
    (tmp_path / "burner.py").write_text(ARM)
    with pytest.raises(SystemExit, match="fails failed with 3"):
        spent("burner", "fails", {"flag": str(tmp_path / "flag")}, {"PYTHONPATH": str(tmp_path)})
