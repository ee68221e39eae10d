"""The cache gives right bytes or none, and never takes more room than it may."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cascade_model.errors import InputError
from cascade_model.shard_cache import CacheConfig, ShardCache, WrongBytes

MEGA = 1 << 20


def item(number: int, size: int = 100_000) -> tuple[str, bytes]:
    data = np.random.default_rng(number).bytes(size)
    return hashlib.sha256(data).hexdigest(), data


def cache_in(folder: Path, max_bytes: int = MEGA) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(folder), max_bytes=max_bytes))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def never() -> bytes:
    raise AssertionError("fetched although it was there")


def test_bytes_are_fetched_once_and_outlive_the_object(tmp_path):
    name, data = item(1)
    assert cache_in(tmp_path).get(name, lambda: data) == data
    assert cache_in(tmp_path).get(name, never) == data


def test_a_folder_of_its_own_goes_with_the_object():
    cache = ShardCache(CacheConfig())
    name, data = item(1)
    cache.get(name, lambda: data)
    folder = cache._folder
    assert len(files(folder)) == 1
    del cache
    assert not folder.exists()


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"\0" + d[1:], lambda d: b""])
def test_a_damaged_file_is_fetched_again_and_mended(tmp_path, damage):
    name, data = item(1)
    cache = cache_in(tmp_path)
    cache.get(name, lambda: data)
    [path] = files(tmp_path)
    path.write_bytes(damage(data))
    assert cache.get(name, lambda: data) == data
    assert cache.get(name, never) == data


def test_wrong_bytes_are_refused_and_not_kept(tmp_path):
    name, data = item(1)
    with pytest.raises(WrongBytes) as caught:
        cache_in(tmp_path).get(name, lambda: data + b"x")
    assert caught.value.actual == hashlib.sha256(data + b"x").hexdigest()
    assert not files(tmp_path)


def test_the_bound_holds_at_every_moment_and_the_least_recently_used_go(tmp_path):
    cache = cache_in(tmp_path)
    first, first_data = item(0)
    for number in range(40):
        name, data = item(number)
        cache.get(name, lambda data=data: data)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= MEGA
        os.utime(tmp_path / name[:2] / name, ns=(number, number))  # clocks may be coarse
        cache.get(first, lambda: first_data)  # in use all the time
    assert cache.get(first, never) == first_data
    assert len(files(tmp_path)) >= 7
    last, last_data = item(39)
    assert cache.get(last, never) == last_data
    gone, _ = item(1)
    with pytest.raises(AssertionError, match="fetched although"):
        cache.get(gone, never)


def test_what_is_larger_than_the_bound_is_passed_through(tmp_path):
    name, data = item(1, MEGA + 1)
    assert cache_in(tmp_path).get(name, lambda: data) == data
    assert not files(tmp_path)


def test_an_unfinished_file_and_a_lost_sum_do_no_harm(tmp_path):
    cache = cache_in(tmp_path)
    for number in range(5):
        name, data = item(number)
        cache.get(name, lambda data=data: data)
    (tmp_path / name[:2] / "0.tmp").write_bytes(b"x" * 900_000)
    for text in ("", "no number"):
        (tmp_path / "total").write_text(text)
        other, other_data = item(17 + len(text))
        cache.get(other, lambda other_data=other_data: other_data)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= MEGA


PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from tests.cascade_model.test_shard_cache import cache_in, item, files, MEGA
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache = cache_in(folder)
rng = np.random.default_rng(seed)
for turn in range(150):
    name, data = item(int(rng.integers(25)))
    assert cache.get(name, lambda: data) == data
    if turn % 10 == 3 and (found := files(folder)):
        try:
            found[rng.integers(len(found))].write_bytes(b"damage")
        except FileNotFoundError:
            pass
"""


def test_several_processes_share_a_folder_and_its_bound(tmp_path):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    running = [subprocess.Popen([*command, str(seed)]) for seed in range(3)]
    largest = 0
    while any(process.poll() is None for process in running):
        sizes = []
        for path in files(folder):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
    assert [process.returncode for process in running] == [0, 0, 0]
    # Files come and go while they are counted: one of each process at most.
    assert 600_000 < largest <= MEGA + 3 * 100_000
    assert sum(path.stat().st_size for path in files(folder)) <= MEGA


def test_threads_share_one_object(tmp_path):
    cache, wrong = cache_in(tmp_path), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            name, data = item(int(rng.integers(20)), 50_000)
            if cache.get(name, lambda data=data: data) != data:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(path.stat().st_size for path in files(tmp_path)) <= MEGA


def test_a_bound_below_one_record_batch_is_refused():
    with pytest.raises(InputError, match=r"cache\.max_bytes=100 .*1048576"):
        CacheConfig(max_bytes=100)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache\.folder=.*file/below cannot be made"):
        cache_in(tmp_path / "file" / "below")
