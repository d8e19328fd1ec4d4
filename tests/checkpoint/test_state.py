"""Training state: equal bits in every layout, strict, complete or absent after a failure."""

import errno
import json
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface, state
from fast_llm.errors import CheckpointError
from fast_llm.storage import content_digest
from tests.helpers import spawn

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Sizes that four processes cannot share evenly: seven rows, three, one, none.
SHAPES: dict[str, tuple[int, ...]] = {
    "weight/a": (7, 3),
    "weight/b": (3, 2, 2),
    "weight/c": (1,),
    "weight/d": (16, 4),
    "exp_avg/a": (7, 3),
    "exp_avg/e": (5,),
    "exp_avg/none": (0, 4),
    "exp_avg/number": (),
}
ODD_BITS = (0x7FC00001, 0xFFC0DEAD, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000)


def reference(seed: int = 0) -> dict[str, Tensor]:
    """Tensors, half of them bf16, with NaNs of several bits, -0, denormals and infinities."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        odd = torch.randint(len(ODD_BITS), shape, generator=generator)
        here = torch.rand(shape, generator=generator) < 0.3
        bits = torch.where(here, torch.tensor(ODD_BITS)[odd], bits).int()
        tensor = bits.view(torch.float32)
        found[name] = (
            (bits >> 16).short().view(torch.bfloat16) if name.startswith("exp_avg") else tensor
        )
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def spread(
    tensors: dict[str, Tensor], layout: str = "sharded", group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    if layout == "replicated":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    group = group or dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, "cpu")
    places: list[list[Placement]] = [[Shard(0)]] * 3
    if layout == "grid":  # rows over one axis; over the other: columns, the same rows, or nothing
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
        places = [[Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(0)]]
    found: dict[str, Tensor] = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        where = (
            places[i % 3 if tensor.dim() > 1 else 2] if tensor.dim() else [Replicate()] * mesh.ndim
        )
        found[name] = distribute_tensor(tensor, mesh, where, src_data_rank=None)
    return found


def exchange(root: str) -> list[str]:
    """Save from 1, 2 and 4 processes in every layout, and load each in each. Returns the paths."""
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    layouts = [(size, layout) for size in groups for layout in ("sharded", "replicated")] + [
        (4, "grid")
    ]
    mine = [(groups[size], size, layout) for size, layout in layouts if dist.get_rank() < size]
    for group, size, layout in mine:
        state.save(
            Path(root, f"{size} {layout}"),
            3,
            spread(reference(), layout, group),
            {"step": 3},
            group,
        )
    dist.barrier()
    paths = [Path(root, f"{size} {layout}", "3") for size, layout in layouts] + [
        Path(root, "plain", "3")
    ]
    for group, size, layout in mine:
        for path in paths:
            # full_tensor would need a collective for every tensor: compare this process's parts
            # instead
            expected, found = (
                spread(reference(), layout, group),
                spread(reference(seed=1), layout, group),
            )
            state.load(path, found, group)
            for name in SHAPES:
                one, other = (
                    t.to_local() if isinstance(t, DTensor) else t
                    for t in (found[name], expected[name])
                )
                assert torch.equal(bits(one), bits(other)), (size, layout, path, name)
    return [str(path) for path in paths]


def test_every_layout_loads_every_other_bit_for_bit(tmp_path: Path) -> None:
    state.save(tmp_path / "plain", 3, reference(), {})  # without processes
    paths = spawn(4, exchange, str(tmp_path))[0]
    assert len(paths) == 8
    found = reference(seed=1)
    for path in map(Path, paths):
        state.load(path, found)
        for name, tensor in reference().items():
            assert torch.equal(bits(found[name]), bits(tensor)), (path, name)
        folders.verify(path)
        # Tensors in safetensors and one manifest: nothing else, and nothing that is pickled.
        for file in path.iterdir():
            if file.name != folders.MANIFEST:
                assert file.name.endswith(".safetensors") and huggingface.read_header(file)
        assert sorted(folders.read_manifest(path).files) == sorted(
            p.name for p in path.iterdir() if p.name != folders.MANIFEST
        )
        assert [p.name for p in path.parent.iterdir()] == ["3"]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 7)
        self.two = nn.Linear(7, 3, bias=False)


def train(root: str, start: str | None, steps: int, zero: bool) -> list[Any]:
    """Train with AdamW on FSDP2, from a checkpoint or from the start. Returns the weights."""
    torch.manual_seed(0)
    model = Toy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.one, model.two, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=zero)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    tensors = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    for part in ("exp_avg", "exp_avg_sq"):
        tensors |= {
            f"{part}/{name}": optimizer.state[p][part] for name, p in model.named_parameters()
        }
    begin = 0
    if start is not None:
        state.load(Path(start), tensors)
        begin = folders.verify(Path(start)).info["step"]
        for parameter in model.parameters():
            optimizer.state[parameter]["step"].fill_(begin)
    for step in range(begin, begin + steps):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model.two(model.one(inputs)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state.save(Path(root), begin + steps, tensors, {"step": begin + steps})
    return [p.full_tensor().tolist() for p in model.parameters()]  # type: ignore[attr-defined]


def train_twice(root: str) -> tuple[list[Any], list[Any]]:
    whole = train(f"{root}/whole", None, 4, True)
    train(f"{root}/parts", None, 2, True)
    return whole, train(f"{root}/parts", f"{root}/parts/2", 2, True)


def test_training_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = spawn(2, train_twice, str(tmp_path))[0]
    assert whole == parts
    one = [p.read_bytes() for p in sorted((tmp_path / "whole" / "4").glob("*.safetensors"))]
    other = [p.read_bytes() for p in sorted((tmp_path / "parts" / "4").glob("*.safetensors"))]
    assert one == other and len(one) == 2
    elsewhere = spawn(4, train, str(tmp_path / "wide"), str(tmp_path / "parts" / "2"), 2, False)[0]
    # Four processes sum gradients in another order.
    for one_, other_ in zip(whole, elsewhere, strict=True):
        torch.testing.assert_close(torch.tensor(one_), torch.tensor(other_), rtol=1e-5, atol=1e-6)


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "LARGEST_FILE_BYTES", 300)
    path = state.save(tmp_path, 1, reference(), {})
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 3
    found = reference(seed=1)
    state.load(path, found)
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in reference().items())


def test_dtypes_are_converted(tmp_path: Path) -> None:
    path = state.save(tmp_path, 1, {"exp_avg/a": torch.tensor([1.0, 1.00390625])}, {})
    found = {"exp_avg/a": torch.zeros(2, dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one process loads alone without a warning
        state.load(path, found)
    assert found["exp_avg/a"].tolist() == [1.0, 1.0]


def test_names_and_shapes_are_strict(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, 2) for name in ("weight/a", "weight/b", "exp_avg/a")}
    path = state.save(tmp_path, 1, tensors, {})
    state.load(
        path, {"weight/a": torch.empty(3, 2), "weight/b": torch.empty(3, 2)}
    )  # one part alone
    with pytest.raises(
        CheckpointError,
        match="holds weight/b, which the model does not have; it is a checkpoint of another",
    ):
        state.load(path, {"weight/a": torch.empty(3, 2)})
    with pytest.raises(
        CheckpointError, match="exp_avg_sq/a is missing; it is a checkpoint of another model"
    ):
        state.load(path, {**tensors, "exp_avg_sq/a": torch.empty(3, 2)})
    with pytest.raises(CheckpointError, match=r"weight/a has the shape \[3, 2\], must be \[2, 3\]"):
        state.load(path, {**tensors, "weight/a": torch.empty(2, 3)})


def test_strange_files_in_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    path = state.save(tmp_path, 1, {"weight/a": torch.ones(4)}, {})
    save_file(
        {"weight/a": torch.zeros(4), "weight/evil": torch.zeros(4)},
        path / "shard-00000.safetensors",
    )
    found = {"weight/a": torch.empty(4)}
    state.load(path, found)
    assert found["weight/a"].tolist() == [1, 1, 1, 1]


def republish(path: Path, file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Make a checkpoint whose digests are right."""
    save_file(tensors, file, metadata)
    content = json.loads((path / folders.MANIFEST).read_bytes())
    content.pop("sha256")
    content["files"] = folders.digests(path, [p.name for p in path.glob("*.safetensors")])
    (path / folders.MANIFEST).write_text(json.dumps(content | {"sha256": content_digest(content)}))
    folders.verify(path)


@pytest.mark.parametrize("places", [[0], [4], [-4], [2], [2**40]])
def test_parts_must_make_up_the_whole(tmp_path: Path, places: list[int]) -> None:
    # torch leaves undefined what no file covers.
    path = state.save(tmp_path, 1, {"weight/a": torch.ones(8)}, {})
    (file,) = path.glob("*.safetensors")
    half = {"DCP_SHARDING_INFO": json.dumps({"weight/a": {"saved_offsets": places}})}
    republish(path, file, {"weight/a": load_file(file)["weight/a"][:4]}, half)
    with pytest.raises(
        CheckpointError, match=r"the parts of weight/a do not cover it exactly|must be \[8\]"
    ):
        state.load(path, {"weight/a": torch.empty(8)})


@pytest.mark.parametrize(
    "places", ["[0", "{}", '{"weight/a": 3}', '{"weight/a": {"saved_offsets": ["x"]}}']
)
def test_headers_without_places_are_named(tmp_path: Path, places: str) -> None:
    path = state.save(tmp_path, 1, {"weight/a": torch.ones(8)}, {})
    (file,) = path.glob("*.safetensors")
    republish(path, file, {"weight/a": torch.ones(8)}, {"DCP_SHARDING_INFO": places})
    with pytest.raises(CheckpointError, match="the header of a file does not describe its parts"):
        state.load(path, {"weight/a": torch.empty(8)})


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is not a complete checkpoint of this project"):
        state.load(tmp_path, {"weight/a": torch.empty(8)})
    path = state.save(tmp_path, 1, {"weight/a": torch.ones(8)}, {})
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the file is truncated or damaged"):
        state.load(path, {"weight/a": torch.empty(8)})


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    state.save(tmp_path, 5, {"weight/a": torch.zeros(8)}, {})
    state.save(tmp_path, 5, {"weight/a": torch.ones(8)}, {})
    found = {"weight/a": torch.empty(8)}
    state.load(tmp_path / "5", found)
    assert found["weight/a"].sum() == 8
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_what_json_cannot_hold_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        state.save(tmp_path, 1, {"weight/a": torch.ones(8)}, {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def attempt(root: str, failure: str) -> str:
    """Save step 2 over a good one while the last process fails.

    Returns the error on this process.
    """
    tensors = spread({"weight/a": torch.ones(1000, 8)}, "sharded")
    state.save(Path(root), 1, tensors, {})
    state.save(Path(root), 2, tensors, {"old": True})
    last = dist.get_rank() == dist.get_world_size() - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    digests, publish = folders.digests, folders.publish

    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", "the disk")

    try:
        if failure == "size" and last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        if failure == "digest" and last:
            folders.digests = fail  # type: ignore[assignment]
        if failure == "publish" and dist.get_rank() == 0:
            folders.publish = fail  # type: ignore[assignment]
        if failure == "place" and dist.get_rank() == 0:
            (Path(root) / "file").write_text("")
        state.save(
            Path(root) / "file" if failure == "place" else Path(root), 2, tensors, {"old": False}
        )
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folders.digests, folders.publish = digests, publish
    return "saved"


FAILURES = {
    "size": "File too large",
    "digest": "Input/output error (the disk)",
    "publish": "Input/output error (the disk)",
    "place": "Not a directory",
}


def attempt_all(root: str) -> list[str]:
    return [attempt(f"{root}/{failure}", failure) for failure in FAILURES]


def test_a_failure_on_one_process_is_reported_on_all_and_harms_nothing(tmp_path: Path) -> None:
    messages = spawn(3, attempt_all, str(tmp_path))
    assert messages[0] == messages[1] == messages[2]
    for (failure, expected), message in zip(FAILURES.items(), messages[0], strict=True):
        root = tmp_path / failure
        assert "2: could not be saved: " in message and expected in message, message
        assert folders.latest(root) == root / "2"
        assert folders.verify(root / "2").info == {"old": True}
        assert sorted(p.name for p in root.iterdir() if p.is_dir()) == ["1", "2"]


def load_damaged(root: str) -> str:
    tensors = spread({"weight/a": torch.ones(10)}, "sharded")
    path = state.save(Path(root), 1, tensors, {})
    dist.barrier()
    if dist.get_rank() == 0:
        next(path.glob("shard-00002*")).unlink()
    dist.barrier()
    try:
        state.load(path, tensors)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_missing_file_is_named_on_all_processes(tmp_path: Path) -> None:
    messages = spawn(2, load_damaged, str(tmp_path))
    assert len(set(messages)) == 1 and "shard-00002-00001.safetensors: no such file" in messages[0]
