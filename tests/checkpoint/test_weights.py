"""Weights to and from safetensors: equal bytes in every layout, and a full disk."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint.weights import export_hugging_face, load_weights, save_weights
from fast_llm.errors import CheckpointError
from fast_llm.models import FAMILIES
from tests.helpers import spawn

# More rows than processes, fewer, and as many; vectors; names that do not sort as they come.
SHAPES = {"z": (7, 3), "a": (3, 4), "norm": (5,), "b.2": (8, 2), "b.10": (1, 6)}


def reference() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def layouts(group: dist.ProcessGroup) -> dict[str, dict[str, Tensor]]:
    """The same weights in every layout of a group of processes."""
    row, grid = DeviceMesh.from_group(group, "cpu"), None
    places: dict[str, list[Any]] = {"rows": [Shard(0)]}
    if dist.get_world_size(group) == 4:
        grid = init_device_mesh("cpu", (2, 2))
        places |= {
            "columns": [Shard(0), Shard(1)],
            "rows twice": [Shard(0), Shard(0)],
            "copies": [Replicate(), Shard(0)],
        }
    found = {"plain": reference()}
    for layout, where in places.items():
        mesh = row if len(where) == 1 or grid is None else grid
        found[layout] = {
            name: distribute_tensor(
                tensor,
                mesh,
                where if tensor.dim() > 1 else [Shard(0), Replicate()][: mesh.ndim],
                src_data_rank=None,
            )
            for name, tensor in reference().items()
        }
    return found


def round_trips(root: str) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    for size, group in groups.items():
        if dist.get_rank() >= size:
            continue
        for name, weights in layouts(group).items():
            here = Path(root, f"{size} {name}")
            for dtype, limit in (("bf16", 30), ("fp32", 10**6)):
                (here / dtype).mkdir(parents=True, exist_ok=True)
                save_weights(weights, here / dtype, dtype, limit, group)
            dist.barrier(group)
            expected = {key: tensor.clone() for key, tensor in weights.items()}
            for tensor in weights.values():
                tensor.zero_()
            load_weights(weights, here / "fp32", FAMILIES["llama"], group)
            for key, tensor in weights.items():
                one, other = (
                    t.to_local() if isinstance(t, DTensor) else t for t in (tensor, expected[key])
                )
                assert torch.equal(one, other), (size, name, key)


def test_bytes_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    spawn(4, round_trips, str(tmp_path))
    control = tmp_path / "control"
    for dtype, limit in (("bf16", 30), ("fp32", 10**6)):
        (control / dtype).mkdir(parents=True)
        names = save_weights(reference(), control / dtype, dtype, limit)
        for folder in tmp_path.iterdir():
            assert sorted(p.name for p in (folder / dtype).iterdir()) == sorted(names)
            for name in names:
                assert (folder / dtype / name).read_bytes() == (
                    control / dtype / name
                ).read_bytes(), (folder, name)
    assert len(list(tmp_path.iterdir())) == 1 + 2 + 2 + 5


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(SHAPES, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: cannot be read: .*[Hh]eader"):
        load_weights(reference(), tmp_path, FAMILIES["llama"])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: cannot be read: No such file"):
        load_weights(reference(), tmp_path, FAMILIES["llama"])


def export(path: Path, weights: dict[str, Tensor], **changes: Any) -> None:
    how: dict[str, Any] = {
        "config": {"model_type": "llama"},
        "dtype": "bf16",
        "files": {"tokenizer.json": b"{}"},
        "parameters_per_file": 10**6,
        "step": 1,
    }
    export_hugging_face(path, weights, **(how | changes))


def fill_the_disk(root: str) -> list[str]:
    """Export while the first process cannot write: weight files, then small files, then flushes."""
    messages = []
    assert dist.group.WORLD is not None
    weights = layouts(dist.group.WORLD)["rows"]
    export(Path(root, "1"), weights)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin, digests = folders.begin, folders.digests

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    for failure in ("size", "begin", "digests"):
        if dist.get_rank() == 0:
            if failure == "size":
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            else:
                setattr(folders, failure, fail)
        try:
            export(Path(root, "1"), weights, parameters_per_file=30, config={})
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folders.begin, folders.digests = begin, digests
    return messages


def test_a_full_disk_is_reported_on_all_processes_and_harms_nothing(tmp_path: Path) -> None:
    messages = spawn(3, fill_the_disk, str(tmp_path))
    assert messages[0] == messages[1] == messages[2]
    size, begin, digests = messages[0]
    assert "model-00001-of-00003.safetensors: could not be written: File too large" in size
    assert begin == digests == f"{tmp_path}/1: could not be exported: No space left on device"
    assert sorted(folders.verify(tmp_path / "1").files) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
