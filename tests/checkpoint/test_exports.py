"""Exports compared with transformers, and with those of other processes and file sizes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fast_llm.checkpoint import folder, huggingface, state, weights
from fast_llm.config.model import BaseModelConfig
from fast_llm.errors import CheckpointError
from fast_llm.model.decoder import CausalLM
from fast_llm.models import FAMILIES, llama
from fast_llm.models.parameters import shapes
from fast_llm.tensors import torch_dtype
from tests.helpers import TINY, spawn

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROTARY = {"type": "llama3", "theta": 5e5, "scale_factor": 4.0, "original_context_length": 64}
MODEL = BaseModelConfig.model_validate(
    {**TINY, "transformer": {**TINY["transformer"], "rotary": ROTARY}}
)
TIED = BaseModelConfig.model_validate({**TINY, "tie_word_embeddings": True})
SMALL = {"tokenizer_config.json": b'{"a": 1}', "LICENSE": b"free"}
FEW = 20_000  # parameters in a file: the embedding alone has 16,384


def random_weights(model: BaseModelConfig = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes(model).items()
    }
    return {name: t + 1 if "norm" in name else t for name, t in noise.items()}


def spread(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as DTensors, sharded as FSDP2 shards them."""
    if not dist.is_initialized():
        return tensors
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)
        for name, t in tensors.items()
    }


def export(
    path: str, dtype: str = "bf16", parameters_per_file: int = 10**9, model: BaseModelConfig = MODEL
) -> None:
    weights.export_hugging_face(
        Path(path),
        spread(random_weights(model)),
        config=llama.FAMILY.export_config(None, model, dtype, {"bos": 1, "eos": 2}),
        dtype=dtype,
        files=SMALL,
        parameters_per_file=parameters_per_file,
        step=3,
    )


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("parameters_per_file", [10**9, FEW])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [(MODEL, "bf16"), (TIED, "fp16"), (MODEL, "fp32")],
    ids=["bf16", "tied", "fp32"],
)
def test_transformers_computes_the_same(
    tmp_path: Path, model: BaseModelConfig, dtype: str, parameters_per_file: int
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "export"
    export(str(path), dtype, parameters_per_file, model)
    theirs, reported = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(
        reported[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), reported
    rounded = {name: t.to(torch_dtype(dtype)).float() for name, t in random_weights(model).items()}
    ours = CausalLM(model)
    ours.load_state_dict(
        rounded
        | ({"lm_head.weight": rounded["model.embed_tokens.weight"]} if model is TIED else {})
    )
    tokens = torch.randint(256, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        found = ours(tokens, torch.arange(100).expand(2, -1))
    # Both compute in fp32 with the same weights; sums in another order differ by some 1e-7 of
    # logits near 1.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1, "logits that are nearly zero would agree with anything"
    manifest = folder.verify(path)
    assert (manifest.kind, manifest.step) == ("export", 3)
    assert {name: (path / name).read_bytes() for name in SMALL} == SMALL
    assert len(list(path.glob("*.safetensors"))) == (
        1 if parameters_per_file > FEW else 6 if model is TIED else 7
    )


def test_several_files_and_their_index(tmp_path: Path) -> None:
    """Index and bits equal those of transformers; no file is larger than the limit."""
    export(str(tmp_path / "export"), "bf16", FEW)
    path = tmp_path / "export"
    index = json.loads((path / weights.INDEX).read_text())
    expected = random_weights()
    assert list(index) == ["metadata", "weight_map"]
    assert index["metadata"]["total_size"] == sum(
        2 * tensor.numel() for tensor in expected.values()
    )
    assert (
        sorted(index["weight_map"]) == list(index["weight_map"])
        and index["weight_map"].keys() == expected.keys()
    )
    files = sorted({*index["weight_map"].values()})
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file in files:
        tensors = load_file(path / file)
        assert set(tensors) == {
            name for name, where in index["weight_map"].items() if where == file
        }
        assert sum(t.numel() for t in tensors.values()) <= FEW
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name].bfloat16())
        with safe_open(path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}, "transformers refuses files without it"


def test_the_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    """The file equals that of safetensors, also with several dtypes, scalars and empty tensors."""
    tensors = {
        "b": torch.randn(3, 2),
        "a": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(2, dtype=torch.float64),
        "transposed": torch.randn(3, 4).t(),
    }
    assert weights.save_weights(tensors, tmp_path, None, 10**9) == ["model.safetensors"]
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(str(tmp_path / "one"))
    monkeypatch.setattr(weights, "BATCH_BYTES", 1000)
    export(str(tmp_path / "many"))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def exports_of_two(root: str) -> None:
    export(f"{root}/two")
    export(f"{root}/two-cut", "fp32", FEW)


def test_bytes_depend_on_the_weights_alone(tmp_path: Path) -> None:
    """Repeated exports, from one process or two, have the same bytes and the same manifest."""
    export(str(tmp_path / "one"))
    export(str(tmp_path / "again"))
    export(str(tmp_path / "one-cut"), "fp32", FEW)
    spawn(2, exports_of_two, str(tmp_path))
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "again") == contents(tmp_path / "two")
    assert contents(tmp_path / "one-cut") == contents(tmp_path / "two-cut")
    assert sorted(os.listdir(tmp_path)) == ["again", "one", "one-cut", "two", "two-cut"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        export(str(tmp_path / "export"), parameters_per_file=FEW)
        state.save(tmp_path, 1, {"weight/a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    for path in (tmp_path / "export", tmp_path / "1"):
        assert path.stat().st_mode & 0o777 == 0o777 & ~mask
        for file in path.iterdir():
            assert file.stat().st_mode & 0o777 == mode, file


def test_there_and_back(tmp_path: Path) -> None:
    """Folder → weights → checkpoint → weights → folder: equal bytes, for any file size."""
    export(str(tmp_path / "first"), "bf16", FEW)
    source = huggingface.read_json(tmp_path / "first" / "config.json")
    assert huggingface.check_weights(tmp_path / "first", MODEL) == []
    loaded = {name: torch.full(shape, 9.0) for name, shape in shapes(MODEL).items()}
    weights.load_weights(loaded, tmp_path / "first", FAMILIES["llama"])
    path = state.save(tmp_path, 1, {f"weight/{name}": t for name, t in loaded.items()}, {})
    back = {name: torch.empty(shape) for name, shape in shapes(MODEL).items()}
    state.load(path, {f"weight/{name}": t for name, t in back.items()})
    for name, tensor in random_weights().items():
        assert torch.equal(bits(back[name]), bits(tensor.bfloat16().float()))
    weights.export_hugging_face(
        tmp_path / "second",
        back,
        config=llama.FAMILY.export_config(source, MODEL, "bf16", {}),
        dtype="bf16",
        files=SMALL,
        parameters_per_file=FEW,
        step=3,
    )
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def load_spread(path: str) -> int:
    """Fill DTensors and compare this process's parts. Returns how many of them are empty."""
    expected = random_weights() | {"odd": torch.arange(21.0).view(7, 3), "row": torch.ones(1, 4)}
    if dist.get_rank() == 0:
        Path(path).mkdir()
        weights_of_one = {name: t.bfloat16() for name, t in expected.items()}
        save_file(weights_of_one, f"{path}/model.safetensors", {"format": "pt"})
    dist.barrier()
    found = spread({name: torch.full(t.shape, 9.0) for name, t in expected.items()})
    weights.load_weights(found, Path(path), FAMILIES["llama"])
    empty = 0
    for name, tensor in spread(
        {name: t.bfloat16().float() for name, t in expected.items()}
    ).items():
        mine = found[name]
        assert isinstance(mine, DTensor) and isinstance(tensor, DTensor)
        assert torch.equal(bits(mine.to_local()), bits(tensor.to_local())), name
        empty += mine.to_local().numel() == 0
    return empty


def test_loading_into_shards(tmp_path: Path) -> None:
    """Shards may be uneven or empty."""
    assert spawn(2, load_spread, str(tmp_path / "model")) == [0, 1]


def test_loading_into_plain_tensors(tmp_path: Path) -> None:
    """Into another dtype than the file's; additional tensors of published folders are ignored."""
    tensors = random_weights(TIED) | {
        "lm_head.weight": torch.ones(2),
        "model.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(
        {name: t.half() for name, t in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    found = {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes(TIED).items()}
    weights.load_weights(found, tmp_path, FAMILIES["llama"])
    assert all(torch.equal(tensor, tensors[name].half().double()) for name, tensor in found.items())


def test_loading_what_does_not_fit(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    with pytest.raises(CheckpointError, match="1 weights are missing, first c"):
        weights.load_weights({"a": a, "b": b, "c": c}, tmp_path, FAMILIES["llama"])
    with pytest.raises(
        CheckpointError, match="holds 1 tensors that the model does not have, first b"
    ):
        weights.load_weights({"a": a}, tmp_path, FAMILIES["llama"])
    with pytest.raises(CheckpointError, match=r"b has the shape \[3\], must be \[4\]"):
        weights.load_weights({"a": a, "b": c}, tmp_path, FAMILIES["llama"])
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / weights.INDEX).write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"y\.safetensors"):
        weights.load_weights({"a": a, "b": b}, tmp_path, FAMILIES["llama"])
    (tmp_path / weights.INDEX).write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "c": "x.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        weights.load_weights({"a": a, "c": c}, tmp_path, FAMILIES["llama"])
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        weights.load_weights({"a": a, "c": c}, tmp_path, FAMILIES["llama"])


def test_beyond_fp16(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="a has values beyond fp16's range; choose bf16 or fp32"
    ):
        weights.save_weights({"a": torch.tensor([1e5])}, tmp_path, "fp16", 10**9)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), "fp32"), (-float("inf"), None), (float("inf"), "bf16"), (3.4e38, "bf16")],
)
def test_what_is_not_finite_is_not_exported(tmp_path: Path, value: float, dtype: str) -> None:
    """A weight that only rounding makes infinite is refused too: bf16 ends at 3.39e38."""
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: could not be written: a holds NaN or infinities",
    ):
        weights.save_weights({"a": torch.tensor([1.0, value, 2.0])}, tmp_path, dtype, 10**9)


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def fault(*args: Any, **kwargs: Any) -> None:
    raise ZeroDivisionError("a fault of ours")


BREAKS = {  # what fails, and on which process
    "export: begin on 0": (folder, "begin", full, 0),
    "export: publish on 0": (folder, "publish", full, 0),
    "export: write on 0": (Path, "open", full, 0),
    "export: gather on 1": (weights, "_split", fault, -1),
    "save: write on 0": (state._Writer, "write_data", full, 0),
    "save: write on 1": (state._Writer, "write_data", full, 1),
    "save: fault on 1": (state._Writer, "write_data", fault, 1),
    "load: read on 1": (state.Reader, "read_data", full, 1),
}


def fail_each(root: str) -> dict[str, str]:
    """Make a good export and checkpoint, then each failure. Returns what this process saw."""
    export(f"{root}/export")
    tensors = {f"weight/{name}": tensor for name, tensor in spread(random_weights()).items()}
    state.save(Path(root), 1, tensors, {})
    before = contents(Path(root) / "export")
    seen = {}
    for case, (where, name, replacement, rank) in BREAKS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank in (-1, dist.get_rank()):
                monkeypatch.setattr(where, name, replacement)
            try:
                if case.startswith("export"):
                    export(f"{root}/export", "fp32")
                elif case.startswith("save"):
                    state.save(Path(root), 1, tensors, {"new": True})
                else:
                    state.load(
                        Path(root) / "1", {name: tensor.clone() for name, tensor in tensors.items()}
                    )
                seen[case] = "no error"
            except (Exception, CheckpointException) as error:  # DCP's error is not an Exception
                seen[case] = f"{type(error).__name__}: {error}"
        dist.barrier()
        assert sorted(os.listdir(root)) == ["1", "export"], f"{case}: leftovers"
        assert contents(Path(root) / "export") == before
        assert folder.verify(Path(root) / "1").info == {}
        dist.barrier()
    state.load(Path(root) / "1", tensors)  # the processes can still communicate
    return seen


def test_an_error_on_one_process_is_one_on_all(tmp_path: Path) -> None:
    """A full disk raises CheckpointError, not torch's errors, and older files stay."""
    first, second = spawn(2, fail_each, str(tmp_path), timeout=60)
    for case in BREAKS:
        if BREAKS[case][2] is full:
            # Only the first process knows the hidden folder that it writes an export to.
            assert first[case] == second[case] or case == "export: write on 0", case
            for seen in (first[case], second[case]):
                assert (
                    seen.startswith(f"CheckpointError: {tmp_path}")
                    and "No space left on device" in seen
                )
                assert "\n" not in seen
        else:
            assert "a fault of ours" in first[case] and "a fault of ours" in second[case]
