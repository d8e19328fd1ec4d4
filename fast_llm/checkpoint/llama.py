"""What `format: llama` means: a Hugging Face folder, its config.json ↔ our settings, the headers of its weights.

config.json is read in both its spellings, the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and
that of transformers 5 (`rope_parameters`, `dtype`), and exported in the one it had. Of the weights only
headers are read here, by hand and with every length checked, so that mistakes show before torch is loaded.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
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
LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
LARGEST_JSON = 2**26  # bytes
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of the dtypes that weights may have
_OTHER_WIDTHS = {"I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2} | dict.fromkeys(
    ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
)


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
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise CheckpointError(
            f"{path}: no such folder, and not the name of a model on the Hugging Face Hub (organisation/name);"
            " fetch it with `git lfs install` and `git clone https://huggingface.co/<name>`"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackage("huggingface_hub", f"{path} is no folder here; fetching it from the Hub") from error
    patterns = ["*.json", "*.jinja", "tokenizer.model", "*.txt", "*.md"] + (["*.safetensors"] if weights else [])
    try:
        # Only what lies directly in the repository: some hold a second copy of the weights in a folder.
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])
        return Path(found)
    except Exception as error:  # the Hub's client, requests and the disk each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: no such folder here, and it could not be fetched from the Hugging Face Hub: {reason};"
            " check the name, the network, and for gated models `hf auth login`"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that people may have got wrong. Raises CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(
                min(os.fstat(file.fileno()).st_size, LARGEST_JSON) + 1
            )  # makes room for all that it is asked for
        if data.startswith(_LFS_START):
            raise CheckpointError(f"{path}: {_LFS}")
        if len(data) > LARGEST_JSON:
            raise CheckpointError(f"{path}: larger than {LARGEST_JSON >> 20} MiB; not a model's")
        content = json.loads(data)
    except FileNotFoundError as error:
        original = any((path.parent / name).exists() for name in ("params.json", "consolidated.00.pth"))
        hint = " (it has Meta's own format; take the folder in Hugging Face format)" if original else ""
        raise CheckpointError(f"{path}: no such file; {path.parent} is not a complete model folder{hint}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


_LFS_START = b"version https://git-lfs"
_LFS = "a Git LFS pointer, not the file itself; fetch it with `git lfs install` and `git lfs pull` in its folder"


def architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of `model.base_model` that a config.json stands for.

    Raises CheckpointError for what is no Llama of versions 1 to 3.2.
    """
    problems = []

    def refuse(key: str, given: Any, allowed: str) -> None:
        problems.append(f"{source}: {key}: given {json.dumps(given)[:80]}, must be {allowed}")

    if config.get("model_type") != "llama":
        refuse("model_type", config.get("model_type"), '"llama": no other models can be trained here')
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], '"silu"')
    if config.get("quantization_config"):
        refuse("quantization_config", config["quantization_config"], "absent: unquantized weights are trained")
    if config.get("auto_map"):
        refuse("auto_map", config["auto_map"], "absent: no code of a model is run")
    if config.get("attention_dropout"):
        refuse("attention_dropout", config["attention_dropout"], "0: there is no dropout")
    # In transformers, too, rope_scaling goes before rope_parameters, and what these hold before what is beside them.
    spelling = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(spelling) or {}
    if not isinstance(rope, dict):
        refuse(spelling, rope, "an object or null")
        rope = {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        refuse(f"{spelling}.rope_type", kind, '"default" or "llama3"')
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) not in (1, None):
        refuse("partial_rotary_factor", rope.get("partial_rotary_factor", config.get("partial_rotary_factor")), "1")
    if problems:
        raise CheckpointError("\n".join(problems))
    try:
        rotary: dict[str, Any] = {
            "type": kind,
            "theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        }
        if kind == "llama3":
            trained = rope.get("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
            rotary |= {
                "scale_factor": float(rope["factor"]),
                "low_frequency_factor": float(rope["low_freq_factor"]),
                "high_frequency_factor": float(rope["high_freq_factor"]),
                "original_context_length": config.get("original_max_position_embeddings", trained),
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
                "head_groups": _given(config, "num_key_value_heads", lambda: heads),
                "kv_channels": _given(config, "head_dim", lambda: config["hidden_size"] // heads),
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
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: not a Llama's configuration: {error}") from error


def _given(config: Mapping[str, Any], key: str, default: Callable[[], Any]) -> Any:
    """null is as good as absent."""
    value = config.get(key)
    return default() if value is None else value


def export_config(
    source: Mapping[str, Any] | None, model: BaseModelConfig, dtype: str, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of an export: the source's, key by key, with another dtype; without a source a complete one.

    `tokens`: ids `bos` and `eos`.
    """
    if source is not None:
        spellings = [key for key in ("torch_dtype", "dtype") if key in source] or ["torch_dtype"]
        return {**source, **dict.fromkeys(spellings, TORCH_DTYPES[dtype])}
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
    """Which safetensors file holds each tensor, from the one file's header or the index. Raises CheckpointError."""
    single = folder / "model.safetensors"
    if single.exists():  # before the index, as transformers does
        return dict.fromkeys(read_header(single), single)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise CheckpointError(f"{index}: has no weight_map from tensors to files")
        for name in sorted(set(listed.values())):
            if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
                raise CheckpointError(
                    f"{index}: the file name {name[:80]!r} is not that of a safetensors file in this folder"
                )
        return {tensor: folder / name for tensor, name in listed.items()}
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder}: holds pytorch_model.bin, a pickle that could run code when read; convert it to safetensors"
            " (AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) where you trust it)"
        )
    raise CheckpointError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; fetch the weights, or set"
        " pretrained.model_weights: no to start from random ones"
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes, shapes and places of a safetensors file's tensors; every number is checked.

    Raises CheckpointError unless the tensors fill the file exactly.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if _LFS_START.startswith(head) and len(head) == 8:
                raise CheckpointError(f"{path}: {_LFS}")
            length = int.from_bytes(head, "little")
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: not a whole safetensors file: {size} bytes, of which the header would be {length}"
                )
            header: dict[str, dict[str, Any]] = json.loads(file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        spans = []
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            count = (_WIDTHS | _OTHER_WIDTHS).get(tensor["dtype"])
            if count is None:
                raise CheckpointError(f"{path}: {name} has the unknown dtype {str(tensor['dtype'])[:20]}")
            for extent in tensor["shape"]:
                if type(extent) is not int or not 0 <= extent < 2**63:
                    raise CheckpointError(f"{path}: {name} has an impossible shape")
                count *= extent
            if type(begin) is not int or type(end) is not int or not 0 <= begin <= end or end - begin != count:
                raise CheckpointError(f"{path}: {name} does not lie where its header says; the file is damaged")
            spans.append((begin, end, name))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, though it is named beside; fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{path}: {name} does not follow the tensor before it; the file is damaged")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size} bytes, but its tensors need {8 + length + at}; the file is cut off or damaged: fetch it again"
        )
    return header


def is_spare(name: str) -> bool:
    """Whether published folders may hold this tensor besides a model's: frequencies, which are computed, and the head
    of a tied model, which repeats the embedding."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def check_weights(folder: Path, model: BaseModelConfig) -> list[str]:
    """What is wrong with the weights of a folder, from their headers; at most eleven lines.

    Raises CheckpointError for files that can not be read at all.
    """
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
        elif tensor["dtype"] not in _WIDTHS:
            problems.append(
                f"{files[name]}: {name} has the dtype {tensor['dtype']}, must be one of {', '.join(_WIDTHS)}"
            )
    problems += [
        f"{path}: the tensor {name} is not part of this Llama"
        for name, path in files.items()
        if name not in expected and not is_spare(name)
    ]
    return problems if len(problems) <= 10 else [*problems[:10], f"{folder}: … and {len(problems) - 10} more"]
