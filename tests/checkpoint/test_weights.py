"""Weights in and out of safetensors: the same bits and bytes whatever they are spread over."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import weights as module
from fast_llm.checkpoint.weights import export_llama, load_weights, save_weights
from fast_llm.errors import CheckpointError
from tests.helpers import spawn

# More rows than processes, fewer, and as many; vectors; names that do not sort as they come.
SHAPES = {"z": (7, 3), "a": (3, 4), "norm": (5,), "b.2": (8, 2), "b.10": (1, 6)}


def reference(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def layouts() -> dict[str, dict[str, Tensor]]:
    """The same weights in every layout that the processes allow."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {
        "rows": {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in reference().items()},
        "plain": reference(),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        places = {
            "columns": [Shard(0), Shard(1)],
            "rows twice": [Shard(0), Shard(0)],
            "copies": [Replicate(), Shard(0)],
        }
        found |= {
            name: {
                key: distribute_tensor(tensor, grid, where if tensor.dim() > 1 else [Shard(0), Replicate()])
                for key, tensor in reference().items()
            }
            for name, where in places.items()
        }
    return found


def round_trip(folder: str) -> None:
    for name, weights in layouts().items():
        here = Path(folder, f"{dist.get_world_size()} {name}")
        if dist.get_rank() == 0:
            here.mkdir()
        dist.barrier()
        for dtype, size in (("bf16", 30), ("fp32", 10**6)):
            if dist.get_rank() == 0:
                (here / dtype).mkdir()
            dist.barrier()
            save_weights(weights, here / dtype, dtype, size)
            dist.barrier()
        expected = {key: tensor.clone() for key, tensor in weights.items()}
        for tensor in weights.values():
            tensor.zero_()
        load_weights(weights, here / "fp32")
        for key, tensor in weights.items():
            one, other = (t.to_local() if hasattr(t, "to_local") else t for t in (tensor, expected[key]))
            assert torch.equal(one, other), (name, key)


def test_bytes_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    for world in (1, 2, 4):
        spawn(world, round_trip, str(tmp_path))
    control = tmp_path / "control"
    for dtype, size in (("bf16", 30), ("fp32", 10**6)):
        (control / dtype).mkdir(parents=True)
        names = save_weights(reference(), control / dtype, dtype, size)
        for folder in tmp_path.iterdir():
            assert sorted(p.name for p in (folder / dtype).iterdir()) == sorted(names)
            for name in names:
                assert (folder / dtype / name).read_bytes() == (control / dtype / name).read_bytes(), (folder, name)
    assert len(list(tmp_path.iterdir())) == 1 + 2 + 2 + 5


def test_files_are_as_safetensors_writes_them(tmp_path: Path) -> None:
    mixed: dict[str, Tensor] = {**reference(), "half": torch.ones(3, dtype=torch.bfloat16), "number": torch.tensor(2.0)}
    assert save_weights(mixed, tmp_path, None, 10**6) == ["model.safetensors"]
    save_file(mixed, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_files_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 50)  # bytes, so that files are written in several goes
    names = save_weights(reference(), tmp_path, "bf16", 30)
    assert names == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 2 * (21 + 12 + 5 + 16 + 6)
    found = {}
    for name in names[:-1]:
        for key, tensor in load_file(tmp_path / name).items():
            assert index["weight_map"][key] == name
            found[key] = tensor
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[key], tensor.bfloat16()) for key, tensor in reference().items())


def test_weights_are_converted_when_read(tmp_path: Path) -> None:
    save_weights(reference(torch.bfloat16), tmp_path, None, 10**6)
    found = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    load_weights(found, tmp_path)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in reference(torch.bfloat16).items())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save_weights(reference(), tmp_path, None, 10**6)
    with pytest.raises(CheckpointError, match="2 weights are missing, first more"):
        load_weights({**reference(), "zz": torch.ones(1), "more": torch.ones(1)}, tmp_path)
    with pytest.raises(CheckpointError, match="holds 1 tensors that the model has not, first norm"):
        load_weights({name: tensor for name, tensor in reference().items() if name != "norm"}, tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: norm has the shape \[5\], must be \[6\]"):
        load_weights({**reference(), "norm": torch.ones(6)}, tmp_path)


def test_frequencies_and_the_head_of_a_tied_model_are_passed_over(tmp_path: Path) -> None:
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(3)}
    save_weights({**reference(), **spare}, tmp_path, None, 10**6)
    found = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    load_weights(found, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in reference().items())


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(SHAPES, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: can not be read: .*[Hh]eader"):
        load_weights(reference(), tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: can not be read: No such file"):
        load_weights(reference(), tmp_path)


def test_what_fp16_can_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="big has values beyond fp16's range; choose bf16 or fp32"):
        save_weights({"big": torch.tensor([70000.0])}, tmp_path, "fp16", 10**6)


def test_exports_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(tmp_path / "1", reference())
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "1").iterdir()} == {0o640}


def export(path: Path, weights: dict[str, Tensor], **changes: Any) -> None:
    how: dict[str, Any] = {
        "config": {"model_type": "llama"},
        "dtype": "bf16",
        "files": {"tokenizer.json": b"{}"},
        "parameters_per_file": 10**6,
        "step": 1,
    }
    export_llama(path, weights, **(how | changes))


def test_an_export_is_published_with_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "export" / "llama" / "1"
    export(path, reference())
    manifest = folders.verify(path)
    assert (manifest.kind, manifest.step) == ("export", 1)
    assert sorted(manifest.files) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in path.parent.iterdir()] == ["1"]


def fill_the_disk(root: str) -> list[str]:
    """Export while the first process may not write: first large files, then folders, then flushes."""
    messages = []
    weights = layouts()["rows"]
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


def test_a_full_disk_is_told_on_all_processes_and_harms_nothing(tmp_path: Path) -> None:
    messages = spawn(3, fill_the_disk, str(tmp_path))
    assert messages[0] == messages[1] == messages[2]
    size, begin, digests = messages[0]
    assert "model-00001-of-00003.safetensors: could not be written: File too large" in size
    assert begin == digests == f"{tmp_path}/1: could not be exported: No space left on device"
    assert sorted(folders.verify(tmp_path / "1").files) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
