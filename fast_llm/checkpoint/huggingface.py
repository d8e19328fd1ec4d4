"""Model folders in Hugging Face format: download, small files, and headers of the weights. No
torch.

Only the headers of weights are read here, with every length checked, so that errors are reported
before torch is loaded. `models/` interprets config.json.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.checkpoint.folder import MANIFEST, describe_found
from fast_llm.config.model import BaseModelConfig
from fast_llm.dtypes import BY_NAME, BY_SAFETENSORS
from fast_llm.errors import CheckpointError, lfs_problem
from fast_llm.hub import download
from fast_llm.models import Family, StoredPart, family_of
from fast_llm.storage import similar

logger = logging.getLogger("fast_llm")

# Files that exports do not copy: weights in any format, state of trainers, archives, unfinished
# files.
# fmt: off
_LARGE_FILES = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5",
    "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.npz", "*.npy", "*.pkl", "*.pickle",
    "*.tflite", "*.mlmodel", "*.distcp", "*.zip", "*.tar", "*.gz", "*.tgz", "*.bz2", "*.xz",
    "*.7z", "*.zst", "*.parquet", "*.arrow", "*.partial", "*.incomplete", "*.lock",
)
# fmt: on
LARGEST_SMALL = 2**26  # bytes of a small file
LARGEST_TOKENIZER = 2**28  # bytes of tokenizer.json and the like
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt"),
    "added_tokens.json",
)
LARGEST_TOTAL = 2**29  # bytes of all small files, which every process holds
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
LARGEST_JSON = 2**26  # bytes
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
    """The folder of a model: `path`, or a download of organisation/name[@revision] from the Hub.

    Without `weights` only small files are downloaded, including those in sub-folders.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and (known := describe_found(folder)):
            raise CheckpointError(f"{path}: a folder of checkpoints, not a model; give {known}")
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: a file; give the folder with config.json and the weights")
    name = path.partition("@")[0]
    if known := describe_found(folder.parent):
        raise CheckpointError(f"{path}: no such folder; there are {known}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        if hint := similar(folder, folders=True):
            raise CheckpointError(f"{path}: no such folder{hint}")
        raise CheckpointError(
            f"{path}: no such folder, and not the name of a model on the Hugging Face Hub"
            " (organisation/name); fetch it with `git lfs install` and"
            " `git clone https://huggingface.co/<name>`"
        )
    # Weights in sub-folders are ignored: some repositories hold a second copy there.
    ignored = [".*", "*/.*", *(f"*/{pattern}" for pattern in _LARGE_FILES)]
    ignored += [pattern for pattern in _LARGE_FILES if pattern != "*.safetensors" or not weights]
    return download(path, CheckpointError, ignore=ignored)


def small_files(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder that exports copy, by path
    (`additional_chat_templates/tools.jinja`).

    All files but weights and their index, hidden files, other models in sub-folders, and files
    above `LARGEST_SMALL`. Other files that are left out are logged.
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
    """Whether a link leads out of the model: exports could then publish private files of the user.

    Links within the folder are allowed, and links into the folder of the linked config.json or
    tokenizer.json: another model, or the Hub's cache, where every file is a link to a blob.
    """
    real = os.path.realpath(path)
    allowed = [os.path.realpath(folder)]
    for name in ("config.json", "tokenizer.json"):
        parent, target = os.path.split(os.path.realpath(folder / name))
        if target == name or os.path.basename(parent) == "blobs":
            allowed.append(parent)
    return not any(os.path.commonpath((real, root)) == root for root in allowed)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing, too large or
    malformed.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            # read() allocates what it is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_JSON) + 1)
        if problem := lfs_problem(path, data):
            raise CheckpointError(problem)
        if len(data) > LARGEST_JSON:
            raise CheckpointError(f"{path}: larger than {LARGEST_JSON >> 20} MiB; not of a model")
        content = json.loads(data)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file; {path.parent} is not a complete model folder"
            f"{_other_format(path.parent)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _other_format(folder: Path) -> str:
    """What a folder without config.json or weights holds instead, in brackets."""
    if any((folder / name).exists() for name in ("params.json", "consolidated.00.pth")):
        return " (it has Meta's own format; take the folder in Hugging Face format)"
    if (folder / "adapter_config.json").exists():
        return (
            " (it holds an adapter; merge it into its model with peft: merge_and_unload() and"
            " save_pretrained(…))"
        )
    if any(folder.glob("*.gguf")):
        return " (it holds GGUF weights, which are quantized; take the folder with safetensors)"
    return ""


def export_files(small: Mapping[str, bytes], sequence_length: int) -> dict[str, bytes]:
    """The small files for an export of a model trained with `sequence_length` tokens.

    `model_max_length` of tokenizer_config.json is raised to that if it is smaller. All else is
    unchanged.
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
        if json.loads(changed) != content:  # the name occurs elsewhere, too
            changed = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        files["tokenizer_config.json"] = changed.encode()
    return files


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor, from the header of the only file or from the index.

    Raises CheckpointError.
    """
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
                    f"{index}: the file name {name[:80]!r} is not that of a safetensors file in"
                    " this folder"
                )
        return {tensor: folder / name for tensor, name in listed.items()}
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder}: holds pytorch_model.bin, a pickle that could run code when read; convert it"
            " to safetensors (AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) where you"
            " trust it)"
        )
    raise CheckpointError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json"
        f"{_other_format(folder)}; fetch the weights, or set pretrained.model_weights: no to start"
        " from random ones"
    )


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and offsets of each tensor of a safetensors file, by name.

    Every number is checked. Raises CheckpointError unless the tensors fill the file exactly.
    """
    try:
        header, start, size = _parse_header(path)
        header.pop("__metadata__", None)
        spans = [(*_span(path, name, tensor), name) for name, tensor in header.items()]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file, but the index names it; download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(
                f"{path}: {name} does not follow the tensor before it; the file is damaged"
            )
        at = end
    if at != size - start:
        raise CheckpointError(
            f"{path}: {size} bytes, but its tensors need {start + at}; the file is truncated or"
            " damaged: download it again"
        )
    return header


def _parse_header(path: Path) -> tuple[dict[str, dict[str, Any]], int, int]:
    """The JSON header of a safetensors file, where its tensors start, and the file's size."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if problem := lfs_problem(path, head):
            raise CheckpointError(problem)
        length = int.from_bytes(head, "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: not a complete safetensors file: {size} bytes, of which the header would"
                f" be {length}"
            )
        header = json.loads(file.read(length), object_pairs_hook=unique)
    return header, 8 + length, size


def _span(path: Path, name: str, tensor: Mapping[str, Any]) -> tuple[int, int]:
    """Where a tensor begins and ends among the tensors of its file, in bytes."""
    begin, end = tensor["data_offsets"]
    dtype = tensor["dtype"]
    known = BY_SAFETENSORS.get(dtype)
    count = known.bytes if known else _OTHER_WIDTHS.get(dtype)
    if count is None:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {str(dtype)[:20]}")
    for extent in tensor["shape"]:
        if type(extent) is not int or not 0 <= extent < 2**63:
            raise CheckpointError(f"{path}: {name} has an impossible shape")
        count *= extent
    if type(begin) is not int or type(end) is not int:
        count = -1
    if count < 0 or not 0 <= begin <= end or end - begin != count:
        raise CheckpointError(
            f"{path}: the offsets of {name} do not fit its shape; the file is damaged"
        )
    return begin, end


def check_weights(folder: Path, model: BaseModelConfig) -> list[str]:
    """The problems of the weights in a folder, found in their headers; at most eleven.

    If a tied model has a head, its numbers are compared with the embedding.
    Raises CheckpointError for files that cannot be read.
    """
    family = family_of(model)
    expected = stored_shapes(family, family.shapes(model))
    further = {constant for name in family.shapes(model) for constant in family.constants(name)}
    files = weight_files(folder)
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    problems = []
    for weight, shape in expected.items():
        name = family.stored_name(weight, expected, files)
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
        elif tensor["dtype"] not in BY_SAFETENSORS:
            problems.append(
                f"{files[name]}: {name} has the dtype {tensor['dtype']}, must be one of"
                f" {', '.join(BY_SAFETENSORS)}"
            )
    problems += [
        f"{path}: the tensor {name} is not part of this {family.title}"
        for name, path in files.items()
        if name not in expected and name not in further and not family.is_optional_tensor(name)
    ]
    both = family.head in files and family.embedding in files
    if not problems and model.tie_word_embeddings and both:
        problems += _other_head(folder, family, files, headers)
    return (
        problems
        if len(problems) <= 10
        else [*problems[:10], f"{folder}: … and {len(problems) - 10} more"]
    )


def stored_shapes(
    family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors in files, which may hold parameters in parts or together."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = family.stored_parts(name, shapes) or [StoredPart(name, shape)]
        found |= {part.name: part.shape for part in parts}
    return found


def _other_head(
    folder: Path,
    family: Family,
    files: Mapping[str, Path],
    headers: Mapping[Path, dict[str, dict[str, Any]]],
) -> list[str]:
    """The problem if a model with tied embeddings has a head that differs from its embedding."""
    head, embedding = family.head, family.embedding
    one, other = (headers[files[name]].get(name) for name in (head, embedding))
    if one is None or other is None:
        return [f"{files[head]}: the weight {head} is missing, though the index names it"]
    if one["shape"] != other["shape"]:
        differs = f"has the shape {one['shape']}, {embedding} {other['shape']}"
    elif one["dtype"] in BY_SAFETENSORS and _equal(files[head], one, files[embedding], other):
        return []
    else:
        differs = f"differs from {embedding}"
    return [
        f"{files[head]}: {head} {differs}, but {folder / 'config.json'} says tie_word_embeddings:"
        " true. To keep this head, as transformers does, give model.base_model.tie_word_embeddings:"
        f" no, or false in config.json; to use the embedding instead, remove {head} from the"
        " weights"
    ]


def _equal(
    file: Path, tensor: Mapping[str, Any], other_file: Path, other: Mapping[str, Any]
) -> bool:
    """Whether two tensors with the same shape hold the same numbers; dtypes may differ."""
    count = int(np.prod(tensor["shape"], dtype=np.int64))
    for first in range(0, count, 2**22):
        length = min(2**22, count - first)
        if not np.array_equal(
            _numbers(file, tensor, first, length), _numbers(other_file, other, first, length)
        ):
            return False
    return True


def _numbers(path: Path, tensor: Mapping[str, Any], first: int, count: int) -> np.ndarray[Any, Any]:
    """`count` elements of a tensor in a safetensors file, in a dtype that represents them
    exactly.
    """
    dtype = tensor["dtype"]
    width = BY_SAFETENSORS[dtype].bytes
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            file.seek(8 + header + tensor["data_offsets"][0] + first * width)
            data = np.frombuffer(file.read(count * width), kind)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return (data.astype("<u4") << 16).view("<f4") if dtype == "BF16" else data


def stored_dtype(folder: Path, config: Mapping[str, Any]) -> str:
    """The dtype of the weights in a folder: fp32, bf16 or fp16.

    It is that of all weights if they have one, otherwise that of config.json, otherwise fp32.
    """
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
    dtypes = ("fp32", "bf16", "fp16")
    return next((name for name in dtypes if BY_NAME[name].torch == stated), "fp32")
