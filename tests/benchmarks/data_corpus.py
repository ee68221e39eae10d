"""The text of bench-data: what lies on the machine, written once to Parquet of eight files.

Python sources of the standard library and of the installed packages, and the documentation that
Debian packages bring; nothing is downloaded. Every document is taken once, in the order of its
digest, so that the kinds are mixed and a smaller corpus is a prefix of a larger one.
"""

import gzip
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILES = 8
_ROWS = 32
"""Documents of a row group; small ones keep the files alike."""
_LARGEST = 1 << 20
_DOCUMENTATION = Path("/usr/share/doc")


def write_corpus(folder: Path, most_bytes: int) -> int:
    """Write documents of together at least `most_bytes` of text (if there are); returns the bytes.

    A folder that is there already is taken as it is.
    """
    marker = folder / "bytes"
    if marker.exists():
        return int(marker.read_text())
    folder.mkdir(parents=True)
    size = write_parquet(folder, texts(most_bytes))
    marker.write_text(str(size))
    return size


def texts(most_bytes: int) -> Iterator[str]:
    """Documents by rising digest of their paths, each text once, until there are enough bytes."""
    seen, left = set(), most_bytes
    for path in _paths():
        text = _text(path)
        digest = hashlib.sha256(text.encode()).digest()
        if left <= 0:
            return
        if text.strip() and digest not in seen:
            seen.add(digest)
            left -= len(text.encode())
            yield text


@cache
def _paths() -> tuple[Path, ...]:
    """Every file that may hold text, by rising digest of its path."""
    folders = sysconfig.get_paths()
    found = set(_DOCUMENTATION.rglob("*"))
    for root in (folders["stdlib"], folders["purelib"]):
        found.update(Path(root).rglob("*.py"))
    return tuple(sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest()))


def _text(path: Path) -> str:
    """A file's text; empty where it is none, or a very long one."""
    try:
        if not path.is_file() or path.is_symlink() or path.stat().st_size > _LARGEST:
            return ""
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode() if len(data) <= _LARGEST and b"\0" not in data else ""
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def write_parquet(folder: Path, documents: Iterable[str]) -> int:
    """Documents, dealt to the files group by group; returns their bytes."""
    schema = pa.schema([("text", pa.string())])
    writers = [
        pq.ParquetWriter(folder / f"text-{number}.parquet", schema) for number in range(FILES)
    ]
    size = 0
    for number, group in enumerate(_groups(documents)):
        size += sum(len(text.encode()) for text in group)
        writers[number % FILES].write_table(pa.table({"text": group}, schema=schema))
    for writer in writers:
        writer.close()
    return size


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in documents:
        group.append(text)
        if len(group) == _ROWS:
            yield group
            group = []
    if group:
        yield group


def write_salted(source: Path, target: Path, copies: int) -> int:
    """A corpus `copies` times as large: each copy's documents begin with a line of its number."""
    marker = target / "bytes"
    if marker.exists():
        return int(marker.read_text())
    target.mkdir(parents=True)
    salted = (
        f"# copy {copy}\n{text}"
        for copy in range(copies)
        for path in sorted(source.glob("*.parquet"))
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS)
        for text in batch.column("text").to_pylist()
    )
    size = write_parquet(target, salted)
    marker.write_text(str(size))
    return size
