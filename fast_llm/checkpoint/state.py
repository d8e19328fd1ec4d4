"""Training state in and out, through torch's distributed checkpoint (DCP).

DCP's planner knows which process holds which part of a tensor, so that a checkpoint of one layout is read by
any other. The parts lie in safetensors files whose headers say where in the whole they belong, as DCP's own
Hugging Face storage has them; that one reads them too. Nothing is pickled: everything that is not a tensor is
JSON in the folder's manifest.

Each process writes and hashes its own files; the first publishes the folder when all are done. The same state
in the same layout gives the same bytes. Host memory: one process's part of one tensor, or with `stage` of all of them:
then training may change them while a thread writes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
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
    all_gather_object,
    in_file_order,
    is_main,
    or_default_group,
    raise_on_all,
    safetensors_header,
    tensor_bytes,
)
from fast_llm.errors import CheckpointError
from fast_llm.tensors import local_part

LARGEST_FILE_BYTES = (
    2**32
)  # bytes, if no single part is larger; files are hashed and read in parallel


@torch.no_grad()
def stage(tensors: Mapping[str, Tensor], into: dict[str, Tensor]) -> None:
    """Copy this process's part of each tensor to host memory: `into`, which is made once and serves for every save.

    Waits for no other process. Raises RuntimeError if there is no memory.
    """
    for name, tensor in tensors.items():
        local = local_part(tensor)
        if name not in into:  # pinned memory: the device copies by itself, at the speed of the bus
            into[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        into[name].copy_(local, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()


def staged_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What `stage` takes of host memory."""
    return sum(local_part(tensor).nbytes for tensor in tensors.values())


@torch.no_grad()
def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    parts: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `<root>/<step>`, whole or not at all; every process calls it with the tensors that it has a part of.

    `tensors`: tensors, the same on all processes, or DTensors, named `part/name`; `info`: what JSON can hold.
    `group`: on which processes wait for one another, the default one if not given; give one with patience.
    `parts`: what `stage` made of `tensors`, to be written instead of their present values.
    Raises CheckpointError on all processes if one fails; what stood there is still there then.
    """
    group = or_default_group(group)
    final = root / str(step)
    what = f"{final}: could not be saved"
    partial: Path | None = None
    try:
        with raise_on_all(what, group):
            if is_main(group):
                partial = folders.begin(final)
        into = all_gather_object(partial, group)[0]
        assert into is not None
        with raise_on_all(what, group):
            writer = _Writer(into)
            # DCP has an agreement of its own: where it fails, it fails on all processes.
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner() if parts is None else _StagedPlanner(parts),
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
            if partial is not None:
                folders.publish(partial, final, "checkpoint", step, info, everything)
    except BaseException:
        if partial is not None:
            rmtree(partial, ignore_errors=True)
        raise
    return final


def load(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill tensors or DTensors of any layout from a checkpoint, converting dtypes; every process calls it.

    Of each part (the name up to the first `/`) that is asked for, all tensors must be asked for, by some process, and be
    there.
    Digests are not compared here: `folder.verify` and `folder.latest` do. Raises CheckpointError on all processes
    if one fails; `tensors` are undefined then.
    """
    group = or_default_group(group)
    wanted = {name for names in all_gather_object(list(tensors), group) for name in names}
    with raise_on_all("", group):
        reader = _Reader(path)
        _check(path, reader.read_metadata(), tensors, wanted)
    with raise_on_all(f"{path}: could not be loaded", group), torch.no_grad():
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=DefaultLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )


class _StagedPlanner(DefaultSavePlanner):
    """Plans by the tensors themselves, and has their staged parts written."""

    def __init__(self, parts: Mapping[str, Tensor]):
        super().__init__()
        self.parts = parts

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.parts[write_item.index.fqn]


class _Writer(dcp.StorageWriter):
    """Writes a process's parts to safetensors files, one part after the other.

    DCP's own HuggingFaceStorageWriter holds a file twice in memory, and its bytes differ from time to time.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[str] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each process its number, for the names of its files."""
        return [replace(plan, storage_data=number) for number, plan in enumerate(plans, start=1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this process is to write."""
        for number, items in enumerate(_split(plan.items), start=1):
            parts = {
                item.index.fqn: (_part(item).properties.dtype, tuple(_part(item).chunk.sizes))
                for item in items
            }
            assert len(parts) == len(items), "a process has one part of a tensor at most"
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
        """The headers say it all."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not used: the folder is given."""
        return True


class _Listed(FileSystem):
    """A folder in which only some files are seen."""

    def __init__(self, names: list[str]):
        self.names = names

    def ls(self, path: Any) -> list[str]:
        return [str(Path(path) / name) for name in self.names]


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the files that a manifest names; DCP's own reads whatever safetensors lie in the folder."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        names = sorted(folders.read_manifest(path).files)
        self.fs = _Listed(names)
        for name in names:
            read_header(path / name)

    def read_metadata(self) -> Metadata:
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
                f"{self.path}: a file's header does not say which parts it holds: {error}"
            ) from error


def _check(path: Path, found: Metadata, tensors: Mapping[str, Tensor], wanted: set[str]) -> None:
    """DCP itself leaves what no file covers as it was, and reads over what is there besides."""
    other = "it is a checkpoint of another model"
    there: dict[str, Any] = found.state_dict_metadata
    parts = {name.partition("/")[0] for name in wanted}
    strange = sorted(name for name in there.keys() - wanted if name.partition("/")[0] in parts)
    if strange:
        raise CheckpointError(f"{path}: holds {strange[0]}, which the model has not; {other}")
    for name, tensor in tensors.items():
        if name not in there:
            raise CheckpointError(f"{path}: {name} is missing; {other}, or one without it")
        saved: TensorStorageMetadata = there[name]
        if tuple(saved.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{path}: {name} has the shape {list(saved.size)}, must be {list(tensor.shape)}; {other}"
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
            raise CheckpointError(f"{path}: the parts of {name} do not make up the whole")


def _part(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, "what is not a tensor belongs into info"
    return item.tensor_data


def _split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """What goes into each file."""
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
