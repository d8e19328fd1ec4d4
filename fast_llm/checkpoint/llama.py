"""What `format: llama` means: a Hugging Face folder, its config.json ↔ our settings, the headers of its weights.

config.json is read in both its spellings, the published one (`rope_theta`, `rope_scaling`, `torch_dtype`) and
that of transformers 5 (`rope_parameters`, `dtype`), and exported in the one it had. Of the weights only
headers are read here, by hand and with every length checked, so that mistakes show before torch is loaded.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Callable, Container, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.checkpoint.folder import MANIFEST
from fast_llm.config.train import BaseModelConfig
from fast_llm.errors import CheckpointError, MissingPackage
from fast_llm.model.cost import shapes

logger = logging.getLogger("fast_llm")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Weights in any format, what trainers keep with them, archives and unfinished files: no small files.
_LARGE_FILES = tuple(
    "*." + ending for ending in ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5")
)
_LARGE_FILES += (
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.npz",
    "*.npy",
    "*.pkl",
    "*.pickle",
    "*.tflite",
)
_LARGE_FILES += (
    "*.mlmodel",
    "*.distcp",
    "*.zip",
    "*.tar",
    "*.gz",
    "*.tgz",
    "*.bz2",
    "*.xz",
    "*.7z",
    "*.zst",
)
_LARGE_FILES += ("*.parquet", "*.arrow", "*.partial", "*.incomplete", "*.lock")
LARGEST_SMALL = 2**26  # bytes of a small file
LARGEST_TOKENIZER = 2**28  # bytes of tokenizer.json and the like
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
LARGEST_TOTAL = 2**29  # bytes of all small files: every process holds them
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
LARGEST_JSON = 2**26  # bytes
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of the dtypes that weights may have
_OTHER_WIDTHS = {
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
} | dict.fromkeys(
    ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
)


def fetch(path: str, weights: bool) -> Path:
    """The folder of a model: itself, or downloaded from the Hub (`organisation/name`, also `…@revision`).

    Without `weights` only its small files are downloaded, with those in sub-folders.
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
        raise MissingPackage(
            "huggingface_hub", f"{path} is no folder here; fetching it from the Hub"
        ) from error
    # Of weights only what lies directly in the repository: some hold a second copy in a folder.
    ignored = [".*", "*/.*", *(f"*/{pattern}" for pattern in _LARGE_FILES)]
    ignored += [pattern for pattern in _LARGE_FILES if pattern != "*.safetensors" or not weights]
    try:
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=ignored))
    except Exception as error:  # the Hub's client, requests and the disk each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: no such folder here, and it could not be fetched from the Hugging Face Hub: {reason};"
            " check the name, the network, and for gated models `hf auth login`"
        ) from error


def small_files(folder: Path) -> dict[str, bytes]:
    """What an export has from its model's folder, by the path in it (`additional_chat_templates/tools.jinja`).

    That is everything but weights and their index, hidden files, other models in sub-folders, and files that
    are too large (`LARGEST_SMALL`). What is left out and is no weight is logged.
    """
    found: dict[str, bytes] = {}
    left_out: list[str] = []
    total = 0
    for at, folders, names in os.walk(folder):
        below = Path(at)
        # A sub-folder with a config.json is another model: a checkpoint of a trainer, an adapter.
        folders[:] = sorted(
            n for n in folders if n[0] != "." and not (below / n / "config.json").exists()
        )
        left_out += [
            str((below / n).relative_to(folder)) for n in folders if (below / n).is_symlink()
        ]
        for path in (below / name for name in sorted(names) if _is_small(name)):
            name = path.relative_to(folder).as_posix()
            limit = LARGEST_TOKENIZER if name in _TOKENIZER else LARGEST_SMALL
            if not path.is_file():  # a pipe, or a link to nothing
                left_out.append(name)
                continue
            size = path.stat().st_size
            if size > limit or total + size > LARGEST_TOTAL or _leads_out(path, folder):
                left_out.append(name)
                continue
            found[name] = path.read_bytes()
            total += size
    if left_out and os.environ.get("RANK", "0") == "0":
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        logger.warning(
            f"{folder}: exports will not have {', '.join(left_out[:3])}{more}: larger than"
            f" {LARGEST_SMALL >> 20} MiB, not a file, or a link out of the folder."
        )
    return found


def _is_small(name: str) -> bool:
    ours = name.startswith(".") or name == MANIFEST or name.endswith(".index.json")
    return not ours and not any(fnmatch(name.lower(), pattern) for pattern in _LARGE_FILES)


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a link leads to a file that no model's folder holds: a repository could so publish its reader's secrets.

    Links within the folder are followed, and into the folder of the linked config.json or tokenizer.json: that is
    another model's, or the Hub's cache, where every file is a link to a blob.
    """
    real = os.path.realpath(path)
    allowed = [os.path.realpath(folder)]
    for name in ("config.json", "tokenizer.json"):
        parent, target = os.path.split(os.path.realpath(folder / name))
        if target == name or os.path.basename(parent) == "blobs":
            allowed.append(parent)
    return not any(os.path.commonpath((real, root)) == root for root in allowed)


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
        original = any(
            (path.parent / name).exists() for name in ("params.json", "consolidated.00.pth")
        )
        hint = (
            " (it has Meta's own format; take the folder in Hugging Face format)"
            if original
            else ""
        )
        raise CheckpointError(
            f"{path}: no such file; {path.parent} is not a complete model folder{hint}"
        ) from error
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
        refuse(
            "model_type", config.get("model_type"), '"llama": no other models can be trained here'
        )
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], '"silu"')
    if config.get("quantization_config"):
        refuse(
            "quantization_config",
            config["quantization_config"],
            "absent: unquantized weights are trained",
        )
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
        refuse(
            "partial_rotary_factor",
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor")),
            "1",
        )
    if problems:
        raise CheckpointError("\n".join(problems))
    try:
        rotary: dict[str, Any] = {
            "type": kind,
            "theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        }
        if kind == "llama3":
            trained = rope.get(
                "original_max_position_embeddings", config.get("max_position_embeddings", 2048)
            )
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
                "normalization": {
                    "type": "rms_norm",
                    "epsilon": float(config.get("rms_norm_eps", 1e-6)),
                },
                "rotary": rotary,
            },
        }
    except KeyError as error:
        raise CheckpointError(
            f"{source}: {error.args[0]} is missing; it is not a Llama's configuration"
        ) from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: not a Llama's configuration: {error}") from error


def _given(config: Mapping[str, Any], key: str, default: Callable[[], Any]) -> Any:
    """null is as good as absent."""
    value = config.get(key)
    return default() if value is None else value


def export_config(
    source: Mapping[str, Any] | None,
    model: BaseModelConfig,
    dtype: str,
    tokens: Mapping[str, int | None],
    sequence_length: int = 0,
) -> dict[str, Any]:
    """config.json of an export: the source's, key by key, but for what training changed; without a source a complete one.

    `tokens`: ids `bos` and `eos`. `sequence_length`: in tokens, what the model was trained with.
    """
    if source is not None:
        later = (
            "dtype" if "rope_parameters" in source else "torch_dtype"
        )  # transformers 5's spelling, or before
        spellings = [key for key in ("torch_dtype", "dtype") if key in source] or [later]
        changed = {**source, **dict.fromkeys(spellings, TORCH_DTYPES[dtype])}
        if bool(source.get("tie_word_embeddings", False)) != model.tie_word_embeddings:
            changed["tie_word_embeddings"] = model.tie_word_embeddings
        return with_length(changed, sequence_length)
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
        "max_position_embeddings": max(model.max_position_embeddings, sequence_length),
        "mlp_bias": t.add_linear_biases in ("everywhere", "only_mlp"),
        "model_type": "llama",
        "num_attention_heads": t.num_attention_heads,
        "num_hidden_layers": t.num_layers,
        "num_key_value_heads": t.head_groups,
        "pretraining_tp": 1,
        "rms_norm_eps": t.normalization.epsilon,
        "rope_scaling": scaling,
        "rope_theta": float(rotary.theta),
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": TORCH_DTYPES[dtype],
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def with_length(config: Mapping[str, Any], sequence_length: int) -> dict[str, Any]:
    """A config.json that states at least this context length, in tokens. Rotary angles stay what they are."""
    before = config.get("max_position_embeddings") or 2048
    if sequence_length <= before:
        return dict(config)
    changed = {**config, "max_position_embeddings": sequence_length}
    for spelling in ("rope_scaling", "rope_parameters"):
        rope, original = config.get(spelling) or {}, "original_max_position_embeddings"
        if (
            rope.get("rope_type", rope.get("type", "default")) not in ("default", "linear")
            and original not in rope
        ):
            # Angles are scaled by this length, which is max_position_embeddings where nothing else is said.
            changed[spelling] = {**rope, original: config.get(original, before)}
    return changed


def export_files(small: Mapping[str, bytes], sequence_length: int) -> dict[str, bytes]:
    """Small files for an export of a model that was trained with this sequence length, in tokens.

    tokenizer_config.json's `model_max_length` is raised to it if it is smaller; everything else stays as it is.
    """
    files = dict(small)
    text = files.get("tokenizer_config.json", b"").decode("utf-8", "replace")
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return files
    stated = content.get("model_max_length") if isinstance(content, dict) else None
    if type(stated) is int and stated < sequence_length:
        content["model_max_length"] = sequence_length
        changed = re.sub(r'("model_max_length"\s*:\s*)\d+', rf"\g<1>{sequence_length}", text)
        if json.loads(changed) != content:  # the name stands elsewhere, too
            changed = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        files["tokenizer_config.json"] = changed.encode()
    return files


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
            header: dict[str, dict[str, Any]] = json.loads(
                file.read(length), object_pairs_hook=unique
            )
        header.pop("__metadata__", None)
        spans = []
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            count = (_WIDTHS | _OTHER_WIDTHS).get(tensor["dtype"])
            if count is None:
                raise CheckpointError(
                    f"{path}: {name} has the unknown dtype {str(tensor['dtype'])[:20]}"
                )
            for extent in tensor["shape"]:
                if type(extent) is not int or not 0 <= extent < 2**63:
                    raise CheckpointError(f"{path}: {name} has an impossible shape")
                count *= extent
            if (
                type(begin) is not int
                or type(end) is not int
                or not 0 <= begin <= end
                or end - begin != count
            ):
                raise CheckpointError(
                    f"{path}: {name} does not lie where its header says; the file is damaged"
                )
            spans.append((begin, end, name))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file, though it is named beside; fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(
                f"{path}: {name} does not follow the tensor before it; the file is damaged"
            )
        at = end
    if at != size - 8 - length:
        raise CheckpointError(
            f"{path}: {size} bytes, but its tensors need {8 + length + at}; the file is cut off or damaged: fetch it again"
        )
    return header


def is_spare(name: str) -> bool:
    """Whether published folders may hold this tensor besides a model's: frequencies, which are computed, and the head
    of a tied model, if it repeats the embedding."""
    return name.endswith("rotary_emb.inv_freq") or name == HEAD


def place(name: str, wanted: Container[str], files: Container[str]) -> str:
    """Under which name a folder holds a weight; `wanted`: all that the model has.

    A shared embedding may be there as the head alone: so safetensors' and accelerate's `save_model` write it.
    """
    alone = name == EMBEDDING and HEAD not in wanted and name not in files and HEAD in files
    return HEAD if alone else name


def check_weights(folder: Path, model: BaseModelConfig) -> list[str]:
    """What is wrong with the weights of a folder, from their headers; at most eleven lines. Of a tied model that has a head
    all the same, head and embedding are compared.

    Raises CheckpointError for files that can not be read at all.
    """
    expected = shapes(model)
    files = weight_files(folder)
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    problems = []
    for weight, shape in expected.items():
        name = place(weight, expected, files)
        if name not in files:
            problems.append(f"{folder}: the weight {name} is missing")
            continue
        tensor = headers[files[name]].get(name)
        if tensor is None:
            problems.append(
                f"{files[name]}: the weight {name} is missing, though the index names it"
            )
        elif tuple(tensor["shape"]) != shape:
            problems.append(
                f"{files[name]}: {name} has the shape {tensor['shape']}, must be {list(shape)}"
            )
        elif tensor["dtype"] not in _WIDTHS:
            problems.append(
                f"{files[name]}: {name} has the dtype {tensor['dtype']}, must be one of {', '.join(_WIDTHS)}"
            )
    problems += [
        f"{path}: the tensor {name} is not part of this Llama"
        for name, path in files.items()
        if name not in expected and not is_spare(name)
    ]
    if not problems and model.tie_word_embeddings and HEAD in files and EMBEDDING in files:
        problems += _other_head(folder, files, headers)
    return (
        problems
        if len(problems) <= 10
        else [*problems[:10], f"{folder}: … and {len(problems) - 10} more"]
    )


def _other_head(
    folder: Path, files: Mapping[str, Path], headers: Mapping[Path, dict[str, dict[str, Any]]]
) -> list[str]:
    """Of a model whose config.json says that the embedding is the head: the head that is there and is another one."""
    one, other = (headers[files[name]].get(name) for name in (HEAD, EMBEDDING))
    if one is None or other is None:
        return [f"{files[HEAD]}: the weight {HEAD} is missing, though the index names it"]
    if one["shape"] != other["shape"]:
        differs = f"has the shape {one['shape']}, {EMBEDDING} {other['shape']}"
    elif one["dtype"] in _WIDTHS and _equal(files[HEAD], one, files[EMBEDDING], other):
        return []
    else:
        differs = f"differs from {EMBEDDING}"
    return [
        f"{files[HEAD]}: {HEAD} {differs}, but {folder / 'config.json'} says tie_word_embeddings: true. To keep this head,"
        " as transformers does, give model.base_model.tie_word_embeddings: no, or false in config.json; to use the"
        f" embedding instead, remove {HEAD} from the weights"
    ]


def _equal(
    file: Path, tensor: Mapping[str, Any], other_file: Path, other: Mapping[str, Any]
) -> bool:
    """Whether two tensors of one shape, of any dtypes, hold the same numbers."""
    count = int(np.prod(tensor["shape"], dtype=np.int64))
    for first in range(0, count, 2**22):
        length = min(2**22, count - first)
        if not np.array_equal(
            _numbers(file, tensor, first, length), _numbers(other_file, other, first, length)
        ):
            return False
    return True


def _numbers(path: Path, tensor: Mapping[str, Any], first: int, count: int) -> np.ndarray[Any, Any]:
    """Some elements of a tensor of a safetensors file, in a dtype that holds them exactly."""
    dtype = tensor["dtype"]
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header + tensor["data_offsets"][0] + first * _WIDTHS[dtype])
            data = np.frombuffer(file.read(count * _WIDTHS[dtype]), kind)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    return (data.astype("<u4") << 16).view("<f4") if dtype == "BF16" else data


def stored_dtype(folder: Path, config: Mapping[str, Any]) -> str:
    """Which of fp32, bf16 and fp16 the weights of a folder have: what all of them have, else what config.json says, else fp32."""
    found = {
        tensor["dtype"]
        for path in sorted(set(weight_files(folder).values()))
        for tensor in read_header(path).values()
    }
    if len(found) == 1 and (
        name := {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp32"}.get(found.pop())
    ):
        return name
    stated = config.get("dtype", config.get("torch_dtype"))
    return next((name for name, spelled in TORCH_DTYPES.items() if spelled == stated), "fp32")
