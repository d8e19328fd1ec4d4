"""Save and load training state with PyTorch's distributed checkpoint (DCP).

DCP's planner knows which process holds which part of a tensor, so any layout can load the
checkpoint of any other. Parts are stored in safetensors files whose headers say where in the full
tensor they belong. DCP's Hugging Face storage has the same format, and reads these files. Nothing
is pickled: whatever is not a tensor is JSON in the manifest of the folder.

Each process writes and hashes its own files. The first process publishes the folder when all are
done. The same state in the same layout gives the same bytes. Host memory: one process's part of one
tensor.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.huggingface import read_header
from fast_llm.checkpoint.weights import (
    in_file_order,
    new_folder,
    raise_on_all,
    safetensors_header,
    tensor_bytes,
)
from fast_llm.collectives import all_gather_object, is_main, or_default_group
from fast_llm.errors import CheckpointError

LARGEST_FILE_BYTES = 2**32  # unless one part is larger; files are hashed and read in parallel


@torch.no_grad()
def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    part_of: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write `<root>/<step>` atomically. Every process calls it with the tensors it has a part of.

    `tensors`: DTensors, or tensors that are the same on all processes, named `part/name`. `info`:
    JSON. `group`: for synchronisation, with a long timeout; by default the default group.
    `part_of`: this process's part of a tensor, by name, if `tensors` hold no data (meta device).
    Raises CheckpointError on all processes if one fails. An existing folder is then unchanged.
    """
    group = or_default_group(group)
    final = root / str(step)
    what = f"{final}: could not be saved"
    with new_folder(final, what, group) as into:
        with raise_on_all(what, group):
            writer = _Writer(into)
            # DCP synchronises: if it fails, it fails on all processes.
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner() if part_of is None else _PartsPlanner(part_of),
                process_group=group,
                no_dist=group is None,
            )
        files: dict[str, dict[str, Any]] = {}
        with raise_on_all(what, group):
            files = folders.digests(into, writer.written)
        everything = {
            name: entry for part in all_gather_object(files, group) for name, entry in part.items()
        }
        with raise_on_all(what, group):
            if is_main(group):
                folders.publish(into, final, "checkpoint", step, info, everything)
    return final


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    reader: "Reader | None" = None,
) -> None:
    """Fill tensors or DTensors of any layout from a checkpoint. Every process calls it.

    Dtypes are converted. For each part (the name up to the first `/`) that is loaded, the
    checkpoint must hold the tensors that the processes together ask for, and no others. With a
    `reader` of the checkpoint, which was made before, some of its tensors may be asked for.
    Digests are compared by `folder.verify` and `folder.latest`, not here. Raises CheckpointError on
    all processes if one fails; the values of `tensors` are then undefined.
    """
    group = or_default_group(group)
    wanted = {name for names in all_gather_object(list(tensors), group) for name in names}
    with raise_on_all("", group):
        part = reader is not None
        reader = reader or Reader(path)
        _check(path, reader.read_metadata(), tensors, set() if part else wanted)
    with (
        raise_on_all(f"{path}: could not be loaded", group),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        # DCP warns that one process loads alone, which is what the caller wants.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=DefaultLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


class _PartsPlanner(DefaultSavePlanner):
    """Plans with tensors that hold no data, and writes this process's parts."""

    def __init__(self, part_of: Callable[[str], Tensor]):
        super().__init__()
        self.part_of = part_of

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        assert name is not None
        return self.part_of(name)


class _Writer(dcp.StorageWriter):
    """Writes a process's parts to safetensors files, one part at a time.

    DCP's HuggingFaceStorageWriter holds a file twice in memory, and its bytes vary between saves.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[str] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing: each writer saves once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the folder exists."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each process its number, for the names of its files."""
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's files."""
        for number, items in enumerate(_split(plan.items), start=1):
            parts = {
                item.index.fqn: (_part(item).properties.dtype, tuple(_part(item).chunk.sizes))
                for item in items
            }
            assert len(parts) == len(items), "a process has at most one part of a tensor"
            by_name = {item.index.fqn: item for item in items}
            offsets = {
                name: {"saved_offsets": list(_part(by_name[name]).chunk.offsets)}
                for name in sorted(parts)
            }
            file_name = f"shard-{plan.storage_data:05d}-{number:05d}.safetensors"
            self.written.append(file_name)
            with (self.folder / file_name).open("wb") as file:
                file.write(
                    safetensors_header(
                        in_file_order(parts), {"DCP_SHARDING_INFO": json.dumps(offsets)}
                    )
                )
                for name in in_file_order(parts):
                    tensor = planner.resolve_data(by_name[name])
                    assert isinstance(tensor, Tensor)
                    file.write(tensor_bytes(tensor))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Does nothing: the files' headers hold all metadata."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not used: the folder is given."""
        return True


class _Listed(FileSystem):
    """A file system that lists only the files `names` of a folder."""

    def __init__(self, names: list[str]):
        self.names = names

    def ls(self, path: Any) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


class Reader(dcp.HuggingFaceStorageReader):
    """Reads the files that the manifest names. DCP's own reads every safetensors file in the
    folder.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        names = sorted(folders.read_manifest(path).files)
        self.fs = _Listed(names)
        for name in names:
            read_header(path / name)
        self._metadata: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """What the headers of the files describe. They are read once."""
        if self._metadata is None:
            self._metadata = self._read_headers()
        return self._metadata

    def _read_headers(self) -> Metadata:
        try:
            return super().read_metadata()
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"{self.path}: the header of a file does not describe its parts: {error}"
            ) from error


def _check(path: Path, found: Metadata, tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    """Raise for missing, additional and incomplete tensors, which DCP accepts silently."""
    other = "it is a checkpoint of another model"
    there: dict[str, Any] = found.state_dict_metadata
    parts = {name.partition("/")[0] for name in wanted}
    extra = sorted(name for name in there.keys() - wanted if name.partition("/")[0] in parts)
    if extra:
        raise CheckpointError(f"{path}: holds {extra[0]}, which the model does not have; {other}")
    for name, tensor in tensors.items():
        if name not in there:
            raise CheckpointError(f"{path}: {name} is missing; {other}, or was saved without it")
        saved: TensorStorageMetadata = there[name]
        if tuple(saved.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: {name} has the shape {list(saved.size)}, must be {list(tensor.shape)};"
                f" {other}"
            )
        chunks = {
            tuple(chunk.offsets): math.prod(chunk.sizes)
            for chunk in saved.chunks
            if math.prod(chunk.sizes)
        }
        covered = sum(math.prod(chunk.sizes) for chunk in saved.chunks)
        if (
            covered != tensor.numel()
            or sum(chunks.values()) != covered
            or any(min(c, default=0) < 0 for c in chunks)
        ):
            raise CheckpointError(f"{path}: the parts of {name} do not cover it exactly")


def _part(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, "only tensors; other state belongs into info"
    return item.tensor_data


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items of each file."""
    files: list[list[WriteItem]] = []
    filled = 0
    for item in items:
        size = math.prod(_part(item).chunk.sizes) * _part(item).properties.dtype.itemsize
        if not files or filled + size > LARGEST_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += size
    return files
