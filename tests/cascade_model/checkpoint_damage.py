"""Ways to damage a checkpoint, drawn by a seed, and how far each goes to hide itself.

*Plain* damage changes files. *Hidden* damage makes the hashes agree again: of the file in the
manifest, and then of the manifest in COMMIT. Hashes have no key, so whoever can write to the folder
can hide a change of the *numbers* in tensors, facts or scores for good; `FORGERIES` are those, and
nothing can find them. Whatever must hold between the parts (shapes, index, headers, steps, names of
files) is found even under hashes that agree: `HIDDEN`.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random], None]


def commit_of(step: Path) -> dict:
    """COMMIT as it stands."""
    return json.loads((step / "COMMIT").read_text())


def data_of(step: Path) -> Path:
    """The attempt that counts."""
    return step / commit_of(step)["attempt"]


def a_file(step: Path, draw: random.Random) -> Path:
    """COMMIT, the manifest or a data file."""
    return draw.choice([step / "COMMIT", *sorted(data_of(step).iterdir())])


def a_data_file(step: Path, draw: random.Random) -> Path:
    """A rank's file."""
    return draw.choice(sorted(data_of(step).glob("*.safetensors")))


def flip(path: Path, draw: random.Random, least: int = 0) -> None:
    """One bit, from a byte on."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(least, len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _flip(step, draw):
    flip(a_file(step, draw), draw)


def _cut(step, draw):
    path = a_file(step, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _grow(step, draw):
    path = a_data_file(step, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def _zero(step, draw):
    path = a_data_file(step, draw)
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) - 64)
    data[start : start + 64] = bytes(64) if any(data[start : start + 64]) else b"\1" * 64
    path.write_bytes(data)


def _missing(step, draw):
    a_file(step, draw).unlink()


def _extra(step, draw):
    name = draw.choice([".metadata", "rank_00007.safetensors", "extra", "__0_0.distcp"])
    place = draw.choice([step, data_of(step)])
    (place / name).write_bytes(draw.randbytes(20))


def _swapped(step, draw):
    one, other = sorted(data_of(step).glob("*.safetensors"))
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _swapped_with_older(step, draw):
    older = step.with_name("step_00000001")
    path = a_data_file(step, draw)
    shutil.copy(data_of(older) / path.name, path)


def _stale_commit(step, draw):
    shutil.copy(step.with_name("step_00000001") / "COMMIT", step / "COMMIT")


def _stale_manifest(step, draw):
    older = step.with_name("step_00000001")
    shutil.copy(data_of(older) / "manifest.json", data_of(step) / "manifest.json")


def _older_folder(step, draw):
    """All of an older step under the newest one's name: every hash agrees, but not the step."""
    shutil.rmtree(step)
    shutil.copytree(step.with_name("step_00000001"), step)


PLAIN: dict[str, Damage] = {
    "bit flip": _flip,
    "cut": _cut,
    "longer": _grow,
    "zeros": _zero,
    "missing": _missing,
    "extra": _extra,
    "swapped": _swapped,
    "swapped with an older": _swapped_with_older,
    "stale COMMIT": _stale_commit,
    "stale manifest": _stale_manifest,
    "an older step's folder": _older_folder,
}


def with_manifest(step: Path, change: Callable[[dict], None], recommit: bool = True) -> None:
    """Change the manifest, recompute the files' hashes in it and, if asked, COMMIT's of it."""
    data, path = data_of(step), data_of(step) / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in list(manifest["files"]):
        text = (data / name).read_bytes() if (data / name).exists() else b""
        digest = hashlib.sha256(text).hexdigest()
        manifest["files"][name] = {"bytes": len(text), "sha256": digest}
    change(manifest)
    text = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    path.write_bytes(text)
    if recommit:
        digest = hashlib.sha256(text).hexdigest()
        commit = commit_of(step) | {"bytes": len(text), "sha256": digest}
        (step / "COMMIT").write_text(json.dumps(commit))


def _data_but_not_commit(step, draw):
    flip(a_data_file(step, draw), draw)
    with_manifest(step, lambda manifest: None, recommit=False)


def _header(step, draw):
    """Another type in a file's own header, which says then what the index does not."""
    path = a_data_file(step, draw)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with_manifest(step, lambda manifest: None)


def _shorter_file(step, draw):
    path = a_data_file(step, draw)
    path.write_bytes(path.read_bytes()[: -draw.randrange(1, 40)])
    with_manifest(step, lambda manifest: None)


def _longer_file(step, draw):
    _grow(step, draw)
    with_manifest(step, lambda manifest: None)


def _swapped_and_hidden(step, draw):
    _swapped(step, draw)
    with_manifest(step, lambda manifest: None)


def _step_in_facts(step, draw):
    def change(manifest):
        manifest["facts"]["step"] += 1

    with_manifest(step, change)


def _shape(step, draw):
    def change(manifest):
        entry = manifest["index"][draw.choice(sorted(manifest["index"]))]
        entry["shape"][0] += draw.choice([-1, 1])

    with_manifest(step, change)


def _dtype(step, draw):
    def change(manifest):
        entry = manifest["index"][draw.choice(sorted(manifest["index"]))]
        entry["dtype"] = draw.choice(["F64", "BF16", "I8", None])

    with_manifest(step, change)


def _hole(step, draw):
    def change(manifest):
        entry = manifest["index"][draw.choice(sorted(manifest["index"]))]
        entry["chunks"].pop()

    with_manifest(step, change)


def _escaping_file(step, draw):
    """A path that leads out of the folder."""

    def change(manifest):
        name = sorted(manifest["files"])[0]
        manifest["files"]["../../secret.safetensors"] = manifest["files"].pop(name)

    with_manifest(step, change)


def _nonsense(step, draw):
    def change(manifest):
        manifest[draw.choice(sorted(manifest))] = draw.choice([None, [], 3, "x"])

    with_manifest(step, change)


def _fewer_tensors(step, draw):
    """A tensor less in index, header and file."""

    def change(manifest):
        del manifest["index"][draw.choice(sorted(manifest["index"]))]

    with_manifest(step, change)


HIDDEN: dict[str, Damage] = {
    "data, manifest recomputed": _data_but_not_commit,
    "header": _header,
    "shorter file": _shorter_file,
    "longer file": _longer_file,
    "swapped files": _swapped_and_hidden,
    "step in facts": _step_in_facts,
    "shape": _shape,
    "type": _dtype,
    "a hole": _hole,
    "a path out of the folder": _escaping_file,
    "nonsense": _nonsense,
    "a tensor less": _fewer_tensors,
}


def _forged_number(step, draw):
    path = a_data_file(step, draw)
    flip(path, draw, least=path.stat().st_size - 16)
    with_manifest(step, lambda manifest: None)


def _forged_fact(step, draw):
    def change(manifest):
        manifest["facts"]["samples"] += 1

    with_manifest(step, change)


FORGERIES: dict[str, Damage] = {"a number": _forged_number, "samples": _forged_fact}
