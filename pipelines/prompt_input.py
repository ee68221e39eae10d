"""The input of `generate` as a list of files: a file, a folder, or a Hugging Face dataset.

A dataset of the hub is downloaded and prepared by `datasets`, without its code, into the cache of
this machine (`HF_HOME`); what is read from then on are the Arrow files there.
"""

import posixpath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cascade_model.commit import reason_of
from cascade_model.errors import InputError, Unfinished
from cascade_model.settings import check
from pipelines.prompts import ARROW
from pipelines.sources import dataset_files, is_dataset

HUB = "hub:"
"""Stands before the name of a dataset of the hub."""
SUFFIXES = (".jsonl", ".parquet", *ARROW)


def input_urls(source: str, split: str | None = None, subset: str | None = None) -> list[str]:
    """The input's files: a folder's in the order of their names, a dataset's in its own.

    `split` and `subset` choose from a dataset. Raises `InputError` for what is not there or holds
    no prompts, `Unfinished` where the hub cannot be reached.
    """
    if source.startswith(HUB):
        return _hub_files(source.removeprefix(HUB), split, subset)
    check(subset is None, f"subset={subset} chooses from a dataset of the hub; leave it out")
    try:
        system, path = fsspec.core.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"input={source} cannot be opened ({error}); use a local path or an fsspec URL"
        ) from None
    if not system.exists(path):
        raise InputError(
            f"input={source} does not exist; give a file or folder of prompts, or {HUB}OWNER/NAME"
        )
    is_file = system.isfile(path)
    if not is_file and is_dataset(system, str(path)):
        found = [posixpath.join(str(path), n) for n in _chosen(system, str(path), source, split)]
    else:
        check(split is None, f"split={split} and input={source} is no dataset; leave it out")
        if is_file:
            return [source]
        names = (str(name) for name in system.ls(path, detail=False))
        found = sorted(name for name in names if name.endswith(SUFFIXES))
        check(
            bool(found),
            f"input={source} holds no *.jsonl, no *.parquet and no *.arrow; give a file of prompts",
        )
    return (
        found if isinstance(system, LocalFileSystem) else list(map(system.unstrip_protocol, found))
    )


def _chosen(system: Any, root: str, source: str, split: str | None) -> list[str]:
    """The files of the one split that is asked for, or that there is."""
    splits = dataset_files(system, root, f"input={source}")
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    check(
        split in splits and split != "",
        f"split={split} and input={source} has {', '.join(filter(None, splits)) or 'no splits'}; "
        "name one of them",
    )
    return splits[split or ""]


def _hub_files(name: str, split: str | None, subset: str | None) -> list[str]:
    """The Arrow files of a split, which `datasets` keeps in its cache."""
    check(
        split is not None and split.replace("_", "").replace(".", "").isalnum(),
        f"split={split} and input={HUB}{name} needs the name of one split, whole; use train",
    )
    import datasets

    try:
        data = datasets.load_dataset(name, subset, split=split)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"input={HUB}{name} with subset={subset} and split={split} cannot be loaded "
            f"({reason_of(error)}); check the names"
        ) from None
    except Exception as error:  # the hub's and the network's own
        raise Unfinished(
            f"input={HUB}{name} cannot be loaded now ({type(error).__name__}: {reason_of(error)}); "
            "check network and rights and run the same command again"
        ) from None
    return [entry["filename"] for entry in data.cache_files]  # type: ignore[union-attr]
