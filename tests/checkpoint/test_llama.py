"""config.json ↔ our settings, headers of weights, and what is refused by name."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_llm.checkpoint import llama
from fast_llm.config.train import BaseModelConfig
from fast_llm.errors import CheckpointError, MissingPackage
from fast_llm.model.cost import shapes
from tests.helpers import TINY

# As meta-llama/Llama-3.1-8B publishes it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MINIMAL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_llama_3_1_as_published() -> None:
    assert llama.architecture(PUBLISHED, "config.json") == {
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "transformer": {
            "num_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "head_groups": 8,
            "kv_channels": 128,
            "ffn_hidden_size": 14336,
            "gated": True,
            "activation_type": "silu",
            "add_linear_biases": "nowhere",
            "normalization": {"type": "rms_norm", "epsilon": 1e-5},
            "rotary": {
                "type": "llama3",
                "theta": 500000.0,
                "scale_factor": 8.0,
                "low_frequency_factor": 1.0,
                "high_frequency_factor": 4.0,
                "original_context_length": 8192,
            },
        },
    }
    model = BaseModelConfig.model_validate(llama.architecture(PUBLISHED, "config.json"))
    assert sum(a * (b[0] if b else 1) for a, *b in shapes(model).values()) == 8_030_261_248


def test_both_spellings_mean_the_same() -> None:
    later = {
        k: v for k, v in PUBLISHED.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    later |= {
        "rope_parameters": {**PUBLISHED["rope_scaling"], "rope_theta": 500000.0},
        "dtype": "bfloat16",
    }
    assert llama.architecture(later, "") == llama.architecture(PUBLISHED, "")
    older = {**PUBLISHED, "rope_scaling": {**PUBLISHED["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert llama.architecture(older, "") == llama.architecture(PUBLISHED, "")


def test_what_is_absent_or_null_has_the_defaults_of_transformers() -> None:
    nulls = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rope_scaling", "quantization_config")
    )
    for config in (MINIMAL, MINIMAL | nulls):
        found = llama.architecture(config, "")
        assert found["tie_word_embeddings"] is False
        assert found["max_position_embeddings"] == 2048
        assert found["transformer"]["head_groups"] == 4
        assert found["transformer"]["kv_channels"] == 16
        assert found["transformer"]["add_linear_biases"] == "nowhere"
        assert found["transformer"]["normalization"]["epsilon"] == 1e-6
        assert found["transformer"]["rotary"] == {"type": "default", "theta": 10000.0}


@pytest.mark.parametrize(
    ("attention", "mlp", "expected"),
    [
        (True, True, "everywhere"),
        (True, False, "only_attention"),
        (False, True, "only_mlp"),
        (False, False, "nowhere"),
    ],
)
def test_biases(attention: bool, mlp: bool, expected: str) -> None:
    found = llama.architecture({**MINIMAL, "attention_bias": attention, "mlp_bias": mlp}, "")
    assert found["transformer"]["add_linear_biases"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mistral"},
            'model_type: given "mistral", must be "llama": no other models',
        ),
        ({"model_type": None}, "model_type: given null, must be"),
        ({"hidden_act": "gelu"}, 'hidden_act: given "gelu", must be "silu"'),
        (
            {"quantization_config": {"bits": 4}},
            r'quantization_config: given {"bits": 4}, must be absent: unquantized',
        ),
        (
            {"auto_map": {"AutoModel": "evil.Model"}},
            "auto_map: given .* must be absent: no code of a model is run",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout: given 0.1, must be 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope_scaling.rope_type: given "linear", must be "default"',
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            'rope_parameters.rope_type: given "yarn", must be "default" or "llama3"',
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, 'given "dynamic"'),
        (
            {"rope_scaling": ["linear"]},
            'rope_scaling: given \\["linear"\\], must be an object or null',
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: given 0.5, must be 1"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor: given 0.25, must be 1",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"num_attention_heads": 0}, "not a Llama's configuration"),
        ({"num_attention_heads": "four"}, "not a Llama's configuration"),
        ({"rope_theta": None}, "not a Llama's configuration"),
    ],
)
def test_what_a_llama_here_can_not_do_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        llama.architecture({**MINIMAL, **changes}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("key", sorted(MINIMAL.keys() - {"model_type"}))
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"config.json: {key} is missing; it is not a Llama's"
    ):
        llama.architecture({k: v for k, v in MINIMAL.items() if k != key}, "config.json")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        llama.architecture({**MINIMAL, "hidden_act": "relu", "auto_map": {"a": "b"}}, "config.json")
    assert len(str(caught.value).splitlines()) == 2


def test_exports_say_what_the_original_said_but_for_the_dtype() -> None:
    model = BaseModelConfig.model_validate(llama.architecture(PUBLISHED, ""))
    exported = llama.export_config(PUBLISHED, model, "fp32", {"bos": 1, "eos": 2})
    assert json.dumps(exported) == json.dumps(
        {**PUBLISHED, "torch_dtype": "float32"}
    )  # the order too
    later = {"dtype": "float32", **{k: v for k, v in PUBLISHED.items() if k != "torch_dtype"}}
    assert json.dumps(llama.export_config(later, model, "bf16", {})) == json.dumps(
        {**later, "dtype": "bfloat16"}
    )
    both = {"dtype": "float32", "torch_dtype": "float32", **MINIMAL}
    assert llama.export_config(both, model, "fp16", {}) == {
        **both,
        "dtype": "float16",
        "torch_dtype": "float16",
    }
    assert llama.export_config(MINIMAL, model, "bf16", {}) == {**MINIMAL, "torch_dtype": "bfloat16"}


def test_exports_from_scratch_are_complete() -> None:
    model = BaseModelConfig.model_validate(llama.architecture(PUBLISHED, ""))
    exported = llama.export_config(None, model, "bf16", {"bos": 128000, "eos": 128001})
    assert {k: v for k, v in exported.items() if k != "head_dim"} == {
        k: v for k, v in PUBLISHED.items() if k != "transformers_version"
    }
    assert exported["head_dim"] == 128
    tiny = BaseModelConfig.model_validate(TINY)
    assert (
        llama.architecture(llama.export_config(None, tiny, "fp32", {}), "")["transformer"][
            "num_layers"
        ]
        == 2
    )


# Weights


def write(path: Path, header: dict[str, Any] | bytes, data: int | None = None) -> None:
    """A safetensors file, written from the format's description alone."""
    if isinstance(header, dict) and data is None:
        data = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data or 0))


def tensors(named: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Any]:
    """The header of tensors that lie one after the other."""
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
    assert llama.check_weights(tmp_path, MODEL) == []


def test_the_head_of_a_tied_model_may_be_there(tmp_path: Path) -> None:
    tied = BaseModelConfig.model_validate({**TINY, "tie_word_embeddings": True})
    write(tmp_path / "model.safetensors", tensors(SHAPES))
    assert llama.check_weights(tmp_path, tied) == []
    write(tmp_path / "model.safetensors", tensors(shapes(tied)))
    assert llama.check_weights(tmp_path, tied) == []
    assert llama.check_weights(tmp_path, MODEL) == [
        f"{tmp_path}: the weight lm_head.weight is missing"
    ]


def test_weights_in_several_files(tmp_path: Path) -> None:
    names = list(SHAPES)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, inside in files.items():
        write(tmp_path / file, tensors({name: SHAPES[name] for name in inside}))
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert llama.check_weights(tmp_path, MODEL) == []
    index["weight_map"][names[0]] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert llama.check_weights(tmp_path, MODEL) == [
        f"{tmp_path}/model-2.safetensors: the weight {names[0]} is missing, though the index names it"
    ]
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-2.safetensors: no such file, though it is named beside"
    ):
        llama.check_weights(tmp_path, MODEL)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    named = dict(SHAPES)
    del named["model.norm.weight"]
    named["model.embed_tokens.weight"] = (99, 64)
    named["score.weight"] = (2, 64)
    write(tmp_path / "model.safetensors", tensors(named))
    at = f"{tmp_path}/model.safetensors"
    assert llama.check_weights(tmp_path, MODEL) == [
        f"{at}: model.embed_tokens.weight has the shape [99, 64], must be [256, 64]",
        f"{tmp_path}: the weight model.norm.weight is missing",
        f"{at}: the tensor score.weight is not part of this Llama",
    ]
    write(tmp_path / "model.safetensors", tensors(SHAPES, "I8"))
    problems = llama.check_weights(tmp_path, MODEL)
    assert "has the dtype I8, must be one of F64, F32, F16, BF16" in problems[0]
    assert len(problems) == 11 and problems[-1] == f"{tmp_path}: … and {len(SHAPES) - 10} more"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7, "the file is cut off or damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9, "the file is cut off or damaged"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "a does not lie where its header says"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "a does not lie where its header says"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 8, "a does not lie where its header says"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, 8, "does not lie where its header says"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, 8, "does not lie where"),
        ({"a": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 8]}}, 8, "a has an impossible shape"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "a has an impossible shape"),
        ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, 8, "a has an impossible shape"),
        ({"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}, 8, "a has the unknown dtype F9"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "a does not follow the tensor before it"),
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
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4, "a name stands twice"),
        (b"[]", 0, "not a safetensors file"),
        (b"\xff\xfe", 0, "not a safetensors file"),
        (b"[" * 100_000, 0, "not a safetensors file"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        llama.check_weights(tmp_path, MODEL)
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
        CheckpointError, match=r"model.safetensors: not a whole safetensors file: \d+ bytes"
    ):
        llama.check_weights(tmp_path, MODEL)


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", llama.LARGEST_HEADER + 1))
        file.truncate(2 * llama.LARGEST_HEADER)  # a hole, which takes no disk
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        llama.read_header(tmp_path / "model.safetensors")


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
        llama.check_weights(tmp_path, MODEL)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_files_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="has no weight_map from tensors to files"):
        llama.check_weights(tmp_path, MODEL)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: a Git LFS pointer, .* `git lfs pull`"
    ):
        llama.check_weights(tmp_path, MODEL)
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"config.json: a Git LFS pointer, .* `git lfs pull`"):
        llama.read_json(tmp_path / "config.json")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        CheckpointError, match="a pickle that could run code when read; convert it to safetensors"
    ):
        llama.check_weights(tmp_path, MODEL)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors and no .*index.json; .*model_weights: no"
    ):
        llama.check_weights(tmp_path, MODEL)


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(
        CheckpointError, match=r"config.json: no such file; .* not a complete model folder$"
    ):
        llama.read_json(path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it has Meta's own format"):
        llama.read_json(path)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            llama.read_json(path)
    with path.open("wb") as file:
        file.truncate(llama.LARGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        llama.read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a file"):
        llama.read_json(path)


# Where the model comes from


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert llama.fetch(str(tmp_path), weights=True) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: a file; give the folder"):
        llama.fetch(str(tmp_path / "file"), weights=True)


@pytest.mark.parametrize(
    "path", ["nowhere", "./org/name", "/org/name", "a/b/c", "org/", "~/name", "org/na me"]
)
def test_what_is_neither_a_folder_nor_on_the_hub(path: str) -> None:
    with pytest.raises(
        CheckpointError, match="no such folder, and not the name of a model on the Hugging Face Hub"
    ):
        llama.fetch(path, weights=True)


def test_the_hub_is_asked_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

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
    assert llama.fetch("org/name", weights=True) == tmp_path
    llama.fetch("org/name-1.0@v2", weights=False)
    assert calls == [
        ("org/name", None, ["config.json", "model.safetensors"]),
        ("org/name-1.0", "v2", ["config.json"]),
    ]


def test_without_the_network_both_possibilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **how: Any) -> str:
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = "org/name: no such folder here, and it could not be fetched .*: Name or service not known; check"
    with pytest.raises(CheckpointError, match=message) as caught:
        llama.fetch("org/name", weights=True)
    assert "\n" not in str(caught.value)


def test_the_hubs_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        MissingPackage, match=r"needs the package huggingface_hub: pip install huggingface_hub"
    ):
        llama.fetch("org/name", weights=True)
