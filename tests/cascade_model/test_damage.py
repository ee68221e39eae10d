"""Three hundred damaged corpora: each refused by the name of its shard, and no crash."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from tests.cascade_model.corpus_making import make_corpus
from tests.cascade_model.damage import KINDS, MEANING, Target

COUNT = 300
PARTS = 3


def texts(word: str) -> dict[str, list[str]]:
    return {"all": [f"{word} {i} " * (3 + i % 11) for i in range(45)]}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """The corpus, one of other texts, and an earlier preparation of the first."""
    folder = tmp_path_factory.mktemp("corpora")
    make_corpus(folder / "sound", texts("word"), parts=PARTS)
    make_corpus(folder / "foreign", texts("wort"), parts=PARTS)
    old = NoiseConfig(block_size=4, seed=8)
    make_corpus(folder / "stale", texts("word"), parts=PARTS, noise=old)
    return {name: folder / name for name in ("sound", "foreign", "stale")}


@pytest.fixture(scope="module")
def damaged(corpora, tmp_path_factory) -> list[tuple[Path, str, str]]:
    """Folder, kind and shard of each damaged copy."""
    root, made = tmp_path_factory.mktemp("damaged"), []
    for number in range(COUNT):
        kind, rng = KINDS[number % len(KINDS)], np.random.default_rng(number)
        folder, index = root / f"{number:03d}-{kind.__name__}", int(rng.integers(PARTS))
        shutil.copytree(corpora["sound"], folder)
        target = Target(folder, index, rng, corpora["foreign"], corpora["stale"])
        name = target.entry.name
        kind(target)
        made.append((folder, kind.__name__, name))
    return made


def answers(mode: str, folders: list[Path]) -> list[dict[str, str]]:
    """What a process of its own says of each folder; a crash would leave lines out."""
    command = [sys.executable, "-m", "tests.cascade_model.damage", mode, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_corpora_they_are_made_from_are_sound(corpora):
    assert all("read" in answer for answer in answers("checked", list(corpora.values())))


def test_every_damaged_shard_is_refused_by_name_and_none_crashes(damaged):
    found = answers("checked", [folder for folder, _, _ in damaged])
    assert len(found) == COUNT
    missed = [
        (kind, answer)
        for (_, kind, name), answer in zip(damaged, found, strict=True)
        if name not in answer.get("refused", "")
    ]
    assert not missed
    assert {kind for _, kind, _ in damaged} == {kind.__name__ for kind in KINDS}


def test_without_the_checks_damage_gets_through(damaged):
    """The control: of what is wrong in meaning only, a reader that believes notices little.

    Damage that could crash such a reader is left out.
    """
    risky = {"offsets_astray", "list_astray", "foreign_columns", "rows_missing", "empty_cells"}
    names = {kind.__name__ for kind in MEANING} - risky
    chosen = [folder for folder, kind, _ in damaged if kind in names]
    found = answers("unchecked", chosen)
    assert len(found) == len(chosen) > 100
    assert sum("read" in answer for answer in found) > 0.9 * len(chosen)


def test_a_damaged_record_batch_header_never_crashes(corpora, tmp_path):
    """Headers with flipped bits that everything vouches for: refused, or read as some values."""
    folders = []
    for number in range(120):
        rng, folder = np.random.default_rng(number), tmp_path / str(number)
        shutil.copytree(corpora["sound"], folder)
        target = Target(folder, 0, rng, corpora["foreign"], corpora["stale"])
        data = bytearray(target.path.read_bytes())
        record = Folder(folder).record(target.entry.name)
        assert record is not None
        [[offset, length, _]] = record.facts["batches"]
        header = 8 + int.from_bytes(data[offset + 4 : offset + 8], "little")
        for place in rng.integers(0, header, int(rng.integers(1, 4))):
            data[offset + place] ^= 1 << int(rng.integers(8))
        target.trust(bytes(data), offset, length)
        folders.append(folder)
    found = answers("checked", folders)
    assert len(found) == len(folders)
    assert sum("refused" in answer for answer in found) > 30
