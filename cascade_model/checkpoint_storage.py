"""torch's distributed checkpointing (DCP) over our own files.

DCP plans who writes what, gives replicated tensors to one rank each and reads any sharding back
into any other. Its storage is ours: safetensors and JSON, where its own would be pickles. Only
tensors go in; whatever else a planner would serialise has no place here.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cascade_model.checkpoint_files import (
    Checkpoint,
    Chunk,
    Entry,
    File,
    is_whole,
    layout,
)
from cascade_model.checkpoint_reading import read_parts
from cascade_model.commit import Folder, reason_of
from cascade_model.errors import InputError, Unfinished, of_store
from cascade_model.hashing import HashingWriter
from cascade_model.staging import Part
from cascade_model.tensor_files import DTYPES

# DCP warns each time when one process works alone, which is what was asked for then.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 8 << 20
STATE = "state"
"""The one thing that is saved: DCP keeps books on each of them, which takes 0.1 ms of training."""
Seal = Callable[[dict[str, Entry], dict[str, File]], None]
AtWork = Callable[[Callable[[], Any]], Any]
"""Does this rank's part of something, and returns its result when all ranks have done theirs."""


class PartsPlanner(DefaultSavePlanner):
    """Plans the parts that `HostCopy` staged; names stay flat, as they are."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the staged parts."""
        super().set_up_planner(state_dict[STATE], storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """One item for each part of this rank that holds anything."""
        parts: dict[str, Part] = self.state_dict
        self.plan = SavePlan([_item(n, p) for n, p in parts.items() if 0 not in p.data.shape])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The staged numbers."""
        return self.state_dict[index.fqn].data


class Writer(StorageWriter):
    """Writes one file per rank into a folder of this attempt's own; `seal` is the last act.

    `check` is asked on the first rank before anything is written. What the storage refuses is an
    `Unfinished`, which travels between ranks; DCP tells all of them, so they agree. `at_work` does
    this rank's writing.
    """

    def __init__(
        self, data: Folder, check: Callable[[], None], seal: Seal, at_work: AtWork
    ) -> None:
        self._data, self._check, self._seal, self._at_work = data, check, seal, at_work

    def reset(self, checkpoint_id: Any = None) -> None:
        """A writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Ask whether this process may write here."""
        self._rank = kwargs["rank"]
        if is_coordinator:
            with _storage_errors(self._data):
                self._check()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file; its bytes and hash go to the first rank with the results."""
        file = f"rank_{self._rank:05d}.safetensors"
        done: Future[list[WriteResult]] = Future()

        def put() -> HashingWriter | None:
            if not plan.items:
                return None
            with _storage_errors(self._data):
                return self._data.put(file, lambda out: _write(out, plan, planner, file))

        written = self._at_work(put)
        stored = written and (file, File(bytes=written.bytes, sha256=written.sha256))
        done.set_result([WriteResult(item.index, _size(item), stored) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: the index of all files."""
        stored = {result.index: result.storage_data for rank in results for result in rank}
        index = {
            name: _entry(name, tensor, lambda i: stored[i][0])
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        with _storage_errors(self._data):
            self._seal(index, dict(stored.values()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by a name."""
        return False


class Reader(StorageReader):
    """Reads a verified checkpoint; each file that is needed is read once and hashed again.

    `at_work` does this rank's reading.
    """

    def __init__(self, found: Checkpoint, at_work: AtWork) -> None:
        self._found, self._at_work = found, at_work

    def reset(self, checkpoint_id: Any = None) -> None:
        """A reader is used once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest's index in DCP's words."""
        return Metadata({name: _metadata(entry) for name, entry in self._found.index.items()})

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors; `CheckpointMismatch` where a file is not what was written."""
        wanted: dict[str, dict[tuple[str, tuple[int, ...]], list[ReadItem]]] = {}
        files = {(n, c.offsets): c.file for n, e in self._found.index.items() for c in e.chunks}
        for item in plan.items:
            key = (item.storage_index.fqn, tuple(item.storage_index.offset or ()))
            wanted.setdefault(files[key], defaultdict(list))[key].append(item)

        def fill() -> None:
            for file, items in wanted.items():
                self._fill(file, items, planner)

        self._at_work(fill)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(
        self,
        file: str,
        items: dict[tuple[str, tuple[int, ...]], list[ReadItem]],
        planner: LoadPlanner,
    ) -> None:
        parts = read_parts(self._found, file, lambda name, chunk: (name, chunk.offsets) in items)
        for name, chunk, data in parts:
            numbers = torch.frombuffer(data, dtype=DTYPES[self._found.index[name].dtype])
            numbers = numbers.reshape(chunk.sizes)
            for item in items[name, chunk.offsets]:
                source = numbers
                for axis, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    source = source.narrow(axis, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by a name."""
        return False


def load_planner() -> DefaultLoadPlanner:
    """Names stay flat, and every tensor that is asked for must be there."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def cause_of(error: BaseException | None) -> BaseException | None:
    """What made DCP fail on some rank: what stops a run before what does not."""
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    return next((each for each in causes if not isinstance(each, InputError)), causes[0])


def _item(name: str, part: Part) -> WriteItem:
    data = part.data
    return WriteItem(
        index=MetadataIndex(name, part.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=part.offsets, sizes=data.shape),
            properties=TensorProperties(dtype=data.dtype),
            size=part.shape,
        ),
    )


def _size(item: WriteItem) -> int:
    return item.tensor_storage_size() or 0


def _write(out: BinaryIO, plan: SavePlan, planner: SavePlanner, file: str) -> None:
    """A safetensors file whose every byte before the data follows from the index."""
    index: dict[str, Entry] = {}
    for item in plan.items:
        assert item.tensor_data is not None
        chunk = _chunk(item.tensor_data.chunk, file)
        dtype = _SPELLED[item.tensor_data.properties.dtype]
        index[item.index.fqn] = Entry(
            dtype=dtype, shape=tuple(item.tensor_data.size), chunks=(chunk,)
        )
    expected, items = layout(index, file), {item.index.fqn: item for item in plan.items}
    out.write(expected.header)
    for name, _, _ in expected.parts:
        tensor = planner.resolve_data(items[name])
        assert isinstance(tensor, torch.Tensor)
        view: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(view), _PIECE):
            out.write(view[start : start + _PIECE])


def _chunk(chunk: ChunkStorageMetadata, file: str) -> Chunk:
    return Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=file)


def _entry(
    name: str, tensor: TensorStorageMetadata, file_of: Callable[[MetadataIndex], str]
) -> Entry:
    """A tensor's line of the index."""
    chunks = [_chunk(c, file_of(MetadataIndex(name, c.offsets))) for c in tensor.chunks]
    entry = Entry(
        dtype=_SPELLED[tensor.properties.dtype],
        shape=tuple(tensor.size),
        chunks=tuple(sorted(chunks, key=lambda chunk: chunk.offsets)),
    )
    if not is_whole(entry):
        raise ValueError(f"{name} is not sharded by its rows alone: {tensor.chunks}")
    return entry


def _metadata(entry: Entry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(c.offsets), sizes=torch.Size(c.sizes))
            for c in entry.chunks
        ],
    )


@contextmanager
def _storage_errors(data: Folder) -> Iterator[None]:
    """What a disk or a store refuses, as one sentence that can be sent to the other ranks."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise Unfinished(f"{data.url} cannot be written ({reason_of(error)})") from None
    except Exception as error:
        if (told := of_store(error)) is None:
            raise
        raise told from None
