"""A model's tokenizer: its files, its BOS and EOS, and a fingerprint that tells it from others.

Read with `tokenizers` from tokenizer.json; transformers is not needed. Whether documents begin with BOS is
what the tokenizer itself does, hence what the model was trained with: Llama 3 puts BOS in front, SmolLM2 and GPT-2
put nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fast_llm.errors import DataError, MissingPackage

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_LARGEST = 2**28  # bytes


@dataclass(frozen=True)
class Loaded:
    """A tokenizer and what goes with it."""

    tokenizer: Tokenizer
    path: Path  # tokenizer.json
    bos: int | None
    eos: int | None
    adds_bos: bool
    vocab_size: int  # the largest id, and one
    fingerprint: str
    files: list[Path]  # all that belongs to it


def load(path: str) -> Loaded:
    """The tokenizer of a folder, of a tokenizer.json, or of a model on the Hub.

    Raises DataError if there is none or it can not be read.
    """
    file = _find(path)
    content = _json(file)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise DataError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos, eos = (_special(file.parent, tokenizer, name) for name in ("bos", "eos"))
    adds_bos = bos is not None and tokenizer.encode("").ids[:1] == [bos]
    settings = _optional(file.parent / "tokenizer_config.json")
    if bos is not None and settings.get("add_bos_token") is True:
        adds_bos = True
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return Loaded(
        tokenizer,
        file,
        bos,
        eos,
        adds_bos,
        max(vocabulary.values(), default=-1) + 1,
        _fingerprint(content),
        [file.parent / name for name in FILES if (file.parent / name).is_file()] if file.name == FILES[0] else [file],
    )


def _fingerprint(content: dict[str, Any]) -> str:
    """sha256 of what decides the tokens, whatever the order and spacing of the file."""
    decisive = {key: value for key, value in content.items() if key not in ("truncation", "padding", "version")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _find(path: str) -> Path:
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
        if (place / "tokenizer.model").is_file():
            raise DataError(
                f"{path}: has only tokenizer.model; make tokenizer.json of it with"
                f" transformers.AutoTokenizer.from_pretrained({path!r}).save_pretrained({path!r})"
            )
        raise DataError(f"{path}: no tokenizer.json in this folder; give the model's folder")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise DataError(f"{path}: no such file or folder, and not the name of a model on the Hugging Face Hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackage("huggingface_hub", "hf", f"{path} is no folder here; fetching it from the Hub") from error
    name, _, revision = path.partition("@")
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=[*FILES, "config.json", "generation_config.json"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not here, and it could not be fetched from the Hugging Face Hub: {reason}") from error
    if not (Path(folder) / "tokenizer.json").is_file():
        raise DataError(f"{path}: has no tokenizer.json on the Hub")
    return Path(folder) / "tokenizer.json"


def _json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes() if path.stat().st_size <= _LARGEST else b""
        if data.startswith(b"version https://git-lfs"):
            raise DataError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        content = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _special(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """The id of BOS or EOS, from wherever a model folder says it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _optional(folder / file).get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and tokenizer.token_to_id(text) is not None:
            found: int = tokenizer.token_to_id(text)
            return found
    for file in ("generation_config.json", "config.json"):
        number = _optional(folder / file).get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and tokenizer.id_to_token(number) is not None:
            return number
    return None
