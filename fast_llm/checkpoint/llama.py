"""What `format: llama` means: a Hugging Face folder, its config.json ↔ our settings, the headers of its weights.

config.json is read in both its spellings, the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and
that of transformers 5 (`rope_parameters`, `dtype`), and exported in the one it had. Of the weights only
headers are read here, by hand and with every length checked, so that mistakes show before torch is loaded.
"""

import json
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from fast_llm.config.train import BaseModelConfig
from fast_llm.errors import CheckpointError, MissingPackage
from fast_llm.model.cost import shapes

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
)
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LARGEST_HEADER = 100 * 2**20  # bytes
_WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


def fetch(path: str, weights: bool) -> Path:
    """The folder of a model: itself, or downloaded from the Hub (`organisation/name`, also `…@revision`).

    Without `weights` only its small files are downloaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: a file; give the folder with config.json and the weights")
    name, _, revision = path.partition("@")
    if path.startswith((".", "/", "~")) or name.count("/") != 1 or not all(name.split("/")):
        raise CheckpointError(
            f"{path}: no such folder, and not the name of a model on the Hugging Face Hub (organisation/name);"
            " fetch it with `git lfs install` and `git clone https://huggingface.co/<name>`"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackage("huggingface_hub", "hf", f"{path} is no folder here; fetching it from the Hub") from error
    patterns = ["*.json", "*.jinja", "tokenizer.model", "*.txt", "*.md"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: no such folder here, and it could not be fetched from the Hugging Face Hub: {reason};"
            " check the name, the network, and for gated models `hf auth login`"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that people may have got wrong."""
    try:
        data = path.read_bytes() if path.stat().st_size < LARGEST_HEADER else b""
        if data.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: {_LFS}")
        content = json.loads(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {path.parent} is not a complete model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


_LFS = "a Git LFS pointer, not the file itself; fetch it with `git lfs install` and `git lfs pull` in its folder"


def architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of `model.base_model` that a config.json stands for.

    Raises CheckpointError for what is no Llama of versions 1 to 3.2.
    """
    problems = []

    def refuse(key: str, allowed: str) -> None:
        problems.append(f"{source}: {key}: given {json.dumps(config.get(key))[:80]}, must be {allowed}")

    if config.get("model_type") != "llama":
        refuse("model_type", "llama: other models can not be trained here")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "silu")
    for key in ("quantization_config", "auto_map"):
        if config.get(key):
            refuse(
                key,
                "absent: "
                + ("unquantized weights are trained" if key.startswith("q") else "no code of a model is run"),
            )
    if config.get("attention_dropout"):
        refuse("attention_dropout", "0: there is no dropout")
    if problems:
        raise CheckpointError("\n".join(problems))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{source}: rope_scaling: given type {kind}, must be default or llama3")
    try:
        rotary: dict[str, Any] = {
            "type": kind,
            "theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        }
        if kind == "llama3":
            rotary |= {
                "scale_factor": float(rope["factor"]),
                "low_frequency_factor": float(rope["low_freq_factor"]),
                "high_frequency_factor": float(rope["high_freq_factor"]),
                "original_context_length": int(rope["original_max_position_embeddings"]),
            }
        heads = config["num_attention_heads"]
        biases = (bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False)))
        return {
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": config.get("max_position_embeddings", 2048),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "transformer": {
                "num_layers": config["num_hidden_layers"],
                "hidden_size": config["hidden_size"],
                "num_attention_heads": heads,
                "head_groups": config.get("num_key_value_heads") or heads,
                "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
                "ffn_hidden_size": config["intermediate_size"],
                "gated": True,
                "activation_type": "silu",
                "add_linear_biases": {
                    (False, False): "nowhere",
                    (True, True): "everywhere",
                    (True, False): "only_attention",
                    (False, True): "only_mlp",
                }[biases],
                "normalization": {"type": "rms_norm", "epsilon": float(config.get("rms_norm_eps", 1e-6))},
                "rotary": rotary,
            },
        }
    except KeyError as error:
        raise CheckpointError(f"{source}: {error.args[0]} is missing; it is not a Llama's configuration") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: not a Llama's configuration: {error}") from error


def export_config(
    source: Mapping[str, Any] | None, model: BaseModelConfig, dtype: str, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of an export: the source's, key by key, with another dtype; without a source a complete one.

    `tokens`: ids `bos` and `eos`.
    """
    if source is not None:
        key = "dtype" if "dtype" in source and "torch_dtype" not in source else "torch_dtype"
        return {**source, key: TORCH_DTYPES[dtype]}
    t = model.transformer
    rotary = t.rotary
    scaling = None
    if rotary.type == "llama3":
        scaling = {
            "factor": rotary.scale_factor,
            "low_freq_factor": rotary.low_frequency_factor,
            "high_freq_factor": rotary.high_frequency_factor,
            "original_max_position_embeddings": rotary.original_context_length,
            "rope_type": "llama3",
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": t.add_linear_biases in ("everywhere", "only_attention"),
        "attention_dropout": 0.0,
        "bos_token_id": tokens.get("bos"),
        "eos_token_id": tokens.get("eos"),
        "head_dim": t.kv_channels,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": t.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": t.add_linear_biases in ("everywhere", "only_mlp"),
        "model_type": "llama",
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.head_groups,
        "pretraining_tp": 1,
        "rms_norm_eps": t.normalization.epsilon,
        "rope_scaling": scaling,
        "rope_theta": rotary.theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def weight_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor, from the index or the one file's header."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise CheckpointError(f"{index}: has no weight_map from tensors to files")
        for name in set(listed.values()):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: the file name {name} is not that of a safetensors file in this folder")
        return {tensor: folder / name for tensor, name in listed.items()}
    single = folder / "model.safetensors"
    if single.exists():
        return dict.fromkeys(read_header(single), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: holds pytorch_model.bin, a pickle that could run code when read; convert it to safetensors"
            " (AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) where you trust it)"
        )
    raise CheckpointError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; is this a model folder?"
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes, shapes and places of a safetensors file's tensors; every number is checked."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if head == b"version ":
                raise CheckpointError(f"{path}: {_LFS}")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a whole safetensors file ({size} bytes, header of {length})")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = []
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            count = _WIDTHS[tensor["dtype"]]
            for extent in tensor["shape"]:
                if not isinstance(extent, int) or extent < 0:
                    raise CheckpointError(f"{path}: {name} has the shape {tensor['shape']}")
                count *= extent
            if not 0 <= begin <= end <= size - 8 - length or end - begin != count:
                raise CheckpointError(
                    f"{path}: {name} does not lie where its header says; the file is cut off or damaged"
                )
            spans.append((begin, end, name))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, though the index names it; fetch it (`git lfs pull`)") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    spans.sort()
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise CheckpointError(f"{path}: {one} and {other} overlap")
    result: dict[str, dict[str, Any]] = header
    return result


def check_weights(folder: Path, model: BaseModelConfig) -> list[str]:
    """What is wrong with the weights of a folder, from their headers."""
    expected = shapes(model)
    files = weight_files(folder)
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    problems = []
    for name, shape in expected.items():
        if name not in files:
            problems.append(f"{folder}: the weight {name} is missing")
            continue
        tensor = headers[files[name]].get(name)
        if tensor is None:
            problems.append(f"{files[name]}: the weight {name} is missing, though the index names it")
        elif tuple(tensor["shape"]) != shape:
            problems.append(f"{files[name]}: {name} has the shape {tensor['shape']}, must be {list(shape)}")
    for name in files:
        # Rotary frequencies are computed; a tied head repeats the embedding.
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            problems.append(f"{files[name]}: the tensor {name} is not part of a Llama")
    return problems if len(problems) <= 10 else [*problems[:10], f"… and {len(problems) - 10} more"]
