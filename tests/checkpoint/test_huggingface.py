"""Model folders: headers of weights, small files, fetching, and each refusal by name."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_llm.checkpoint import huggingface
from fast_llm.config.model import BaseModelConfig
from fast_llm.errors import CheckpointError, MissingPackage
from fast_llm.models.parameters import shapes
from tests.helpers import TINY


def write(path: Path, header: dict[str, Any] | bytes, data: int | None = None) -> None:
    """Write a safetensors file from the description of the format."""
    if isinstance(header, dict) and data is None:
        data = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data or 0))


def tensors(named: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Any]:
    """The header of tensors that are stored in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in named.items():
        size = {"BF16": 2, "F32": 4, "I8": 1}[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header


MODEL = BaseModelConfig.model_validate(TINY)
SHAPES = shapes(MODEL)


def test_whole_weights_have_no_problems(tmp_path: Path) -> None:
    spare = {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    write(tmp_path / "model.safetensors", tensors(SHAPES | spare))
    assert huggingface.check_weights(tmp_path, MODEL) == []


def test_the_head_of_a_tied_model_may_be_there(tmp_path: Path) -> None:
    tied = BaseModelConfig.model_validate({**TINY, "tie_word_embeddings": True})
    write(tmp_path / "model.safetensors", tensors(SHAPES))
    assert huggingface.check_weights(tmp_path, tied) == []
    write(tmp_path / "model.safetensors", tensors(shapes(tied)))
    assert huggingface.check_weights(tmp_path, tied) == []
    assert huggingface.check_weights(tmp_path, MODEL) == [
        f"{tmp_path}: the weight lm_head.weight is missing"
    ]


def test_weights_in_several_files(tmp_path: Path) -> None:
    names = list(SHAPES)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, inside in files.items():
        write(tmp_path / file, tensors({name: SHAPES[name] for name in inside}))
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert huggingface.check_weights(tmp_path, MODEL) == []
    index["weight_map"][names[0]] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert huggingface.check_weights(tmp_path, MODEL) == [
        f"{tmp_path}/model-2.safetensors: the weight {names[0]} is missing, though the index names"
        " it"
    ]
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-2.safetensors: no such file, but the index names it"
    ):
        huggingface.check_weights(tmp_path, MODEL)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    named = dict(SHAPES)
    del named["model.norm.weight"]
    named["model.embed_tokens.weight"] = (99, 64)
    named["score.weight"] = (2, 64)
    write(tmp_path / "model.safetensors", tensors(named))
    at = f"{tmp_path}/model.safetensors"
    assert huggingface.check_weights(tmp_path, MODEL) == [
        f"{at}: model.embed_tokens.weight has the shape [99, 64], must be [256, 64]",
        f"{tmp_path}: the weight model.norm.weight is missing",
        f"{at}: the tensor score.weight is not part of this Llama",
    ]
    write(tmp_path / "model.safetensors", tensors(SHAPES, "I8"))
    problems = huggingface.check_weights(tmp_path, MODEL)
    assert "has the dtype I8, must be one of F64, F32, F16, BF16" in problems[0]
    assert len(problems) == 11 and problems[-1] == f"{tmp_path}: … and {len(SHAPES) - 10} more"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7,
            "the file is truncated or damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9,
            "the file is truncated or damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4,
            "the offsets of a do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8,
            "the offsets of a do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8,
            "the offsets of a do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, 8,
            "the offsets of a do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8,
            "the offsets of a do not fit its shape"),
        ({"a": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 8]}}, 8, "a has an"
            " impossible shape"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "a has an impossible"
            " shape"),
        ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, 8, "a has an impossible"
            " shape"),
        ({"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}, 8, "a has the unknown dtype"
            " F9"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "a does not follow the"
            " tensor before it"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
            "b does not follow the tensor before it",
        ),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not a safetensors file"),
        ({"a": 7}, 8, "not a safetensors file"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}',
            4,
            "a name occurs twice",
        ),
        (b"[]", 0, "not a safetensors file"),
        (b"\xff\xfe", 0, "not a safetensors file"),
        (b"[" * 100_000, 0, "not a safetensors file"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        huggingface.check_weights(tmp_path, MODEL)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 0) + b"{}",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\0." + b"\0" * 100,
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: not a complete safetensors file: \d+ bytes"
    ):
        huggingface.check_weights(tmp_path, MODEL)


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", huggingface.LARGEST_HEADER + 1))
        file.truncate(2 * huggingface.LARGEST_HEADER)  # a sparse range, which takes no disk space
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        huggingface.read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "model.bin",
        "..",
        "",
        "a\0.safetensors",
    ],
)
def test_no_file_of_an_index_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is not that of a safetensors file in this folder"):
        huggingface.check_weights(tmp_path, MODEL)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to files"):
        huggingface.check_weights(tmp_path, MODEL)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: a Git LFS pointer, .* `git lfs pull`"
    ):
        huggingface.check_weights(tmp_path, MODEL)
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"config.json: a Git LFS pointer, .* `git lfs pull`"):
        huggingface.read_json(tmp_path / "config.json")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        CheckpointError, match="a pickle that could run code when read; convert it to safetensors"
    ):
        huggingface.check_weights(tmp_path, MODEL)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors and no .*index.json; .*model_weights: no"
    ):
        huggingface.check_weights(tmp_path, MODEL)


def test_invalid_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(
        CheckpointError, match=r"config.json: no such file; .* not a complete model folder$"
    ):
        huggingface.read_json(path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it has Meta's own format"):
        huggingface.read_json(path)
    (tmp_path / "params.json").unlink()
    (tmp_path / "model.q4.gguf").touch()
    with pytest.raises(CheckpointError, match="it holds GGUF weights, which are quantized"):
        huggingface.read_json(path)
    with pytest.raises(CheckpointError, match="it holds GGUF weights, which are quantized"):
        huggingface.weight_files(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match="it holds an adapter; merge it into its model"):
        huggingface.read_json(path)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            huggingface.read_json(path)
    with path.open("wb") as file:
        file.truncate(huggingface.LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        huggingface.read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a file"):
        huggingface.read_json(path)


# The sources of a model.


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert huggingface.fetch(str(tmp_path), weights=True) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: a file; give the folder"):
        huggingface.fetch(str(tmp_path / "file"), weights=True)


@pytest.mark.parametrize(
    "path", ["nowhere", "./org/name", "/org/name", "a/b/c", "org/", "~/name", "org/na me"]
)
def test_what_is_neither_a_folder_nor_on_the_hub(path: str) -> None:
    with pytest.raises(
        CheckpointError, match="no such folder, and not the name of a model on the Hugging Face Hub"
    ):
        huggingface.fetch(path, weights=True)


def test_the_hub_is_asked_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils._paths import filter_repo_objects

    offered = [
        "config.json",
        "model.safetensors",
        "consolidated.00.pth",
        "onnx/model.onnx",
        "additional/a.safetensors",
    ]
    calls = []

    def download(name: str, **how: Any) -> str:
        taken = filter_repo_objects(offered, ignore_patterns=how["ignore_patterns"])
        calls.append((name, how["revision"], list(taken)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert huggingface.fetch("org/name", weights=True) == tmp_path
    huggingface.fetch("org/name-1.0@v2", weights=False)
    assert calls == [
        ("org/name", None, ["config.json", "model.safetensors"]),
        ("org/name-1.0", "v2", ["config.json"]),
    ]


def test_without_the_network_both_possibilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **how: Any) -> str:
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = (
        "org/name: not a local folder, and downloading it .* failed: Name or service not known;"
        " check"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        huggingface.fetch("org/name", weights=True)
    assert "\n" not in str(caught.value)


def test_the_hubs_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingPackage, match=r"needs the package huggingface_hub: pip install huggingface_hub"
    ):
        huggingface.fetch("org/name", weights=True)
