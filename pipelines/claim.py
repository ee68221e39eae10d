"""Whose a corpus folder is: claimed for one job, gone on with by the same one, refused to others.

A job is known by its identity: the settings and source files that its bytes depend on. It stands in
the work folder while the job runs, and in the manifest for good.
"""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from cascade_model.commit import RECORD_SUFFIX, Folder
from cascade_model.corpus import read_manifest
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.manifest import CURE, MANIFEST, TOKENIZER, Manifest
from cascade_model.schema import SPLITS, documents_name
from cascade_model.settings import leaves
from pipelines.parts import JOB, dead_letter_name, shard_name
from pipelines.report import REPORT_HTML, REPORT_JSON
from pipelines.sources import Plan

WORK = "_work"
_RUN = "run-"
_READERS = 16
"""Files that are asked for at a time."""


def finished(folder: Folder, identity: dict[str, Any]) -> Manifest | None:
    """The manifest when the job is done; refuses a corpus of another job or with lost files."""
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(folder)
    theirs = {"prepare": manifest.prepare, "sources": list(manifest.sources)}
    _require_same(theirs, identity, folder)
    _require_whole(folder, manifest)
    folder.remove(WORK)
    return manifest


def begin(folder: Folder, identity: dict[str, Any]) -> None:
    """Claim an empty folder, or check that an unfinished one is of this very job."""
    work = folder / WORK
    if work.exists(JOB):
        _require_same(json.loads(work.read_bytes(JOB)), identity, folder)
    else:
        names = [name for name in folder.list() if name != WORK]
        names += [f"{WORK}/{name}" for name in work.list()]
        if names:
            raise InputError(
                f"output={folder.url} already holds {names[0]!r} but no corpus; choose an empty "
                "folder"
            )
        work.publish(JOB, json.dumps(identity, sort_keys=True).encode())
    work.publish(_RUN + uuid.uuid4().hex, b"")


def take_back(folder: Folder, plan: Plan) -> None:
    """Remove the units of a job that cannot be finished, unless another run worked on it too."""
    work = folder / WORK
    if sum(name.startswith(_RUN) for name in work.list()) > 1:
        return
    work.remove(JOB)  # first: a task that still runs then writes nothing more
    units = {TOKENIZER, REPORT_JSON, REPORT_HTML}
    for part in plan.parts:
        units |= {dead_letter_name(part.index), documents_name(part.index)}
        units |= {shard_name(split, part.index) for split in SPLITS}
    units |= {unit + RECORD_SUFFIX for unit in units}
    for name in folder.list():
        if name.partition("~")[0] in units:
            folder.remove(name)
    folder.remove(WORK)


def _require_whole(folder: Folder, manifest: Manifest) -> None:
    """Refuse a finished corpus whose files are gone or cut, as `prepare` would not mend it."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    entries = [*shards, *manifest.documents]
    if not folder.exists(TOKENIZER):
        raise CorpusMismatch(f"{folder.path(TOKENIZER)} is gone; {CURE}")
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(partial(_size_of, folder), (entry.object for entry in entries))
        for entry, size in zip(entries, found, strict=True):
            if size != entry.bytes:
                now = "is gone" if size is None else f"has {size} bytes"
                raise CorpusMismatch(
                    f"{folder.path(entry.object)} {now} but the manifest says {entry.bytes} bytes; "
                    f"{CURE}"
                )


def _size_of(folder: Folder, name: str) -> int | None:
    try:
        return folder.size(name)
    except FileNotFoundError:
        return None


def _require_same(theirs: dict[str, Any], ours: dict[str, Any], folder: Folder) -> None:
    """Name the first setting in which two jobs differ."""
    old, new = leaves(theirs["prepare"]), leaves(ours["prepare"])
    for name in [*new, *(name for name in old if name not in new)]:
        if name not in old or name not in new or old[name] != new[name]:
            made = f"with {name}={old[name]!r}" if name in old else f"without {name}"
            now = repr(new[name]) if name in new else "no such setting"
            raise InputError(
                f"output={folder.url} was made {made} but this run has {now}; choose another "
                "output or delete the folder"
            )
    if theirs != ours:
        raise InputError(
            f"output={folder.url} was made from other source files than its sources hold now; "
            "choose another output or delete the folder"
        )
