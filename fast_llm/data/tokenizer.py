"""A model's tokenizer: its files, its BOS and EOS tokens, and a fingerprint that identifies it.

Read with `tokenizers` from tokenizer.json, without transformers or torch. Documents begin with BOS
if the tokenizer adds one, since the model was trained that way: Llama 3's adds BOS; SmolLM2's and
GPT-2's, whose BOS is also their EOS, add nothing. The BOS and EOS tokens are those that the model's
folder names, looked up in this order: tokenizer_config.json, special_tokens_map.json,
generation_config.json, config.json.

Loading a tokenizer of 128,000 tokens takes about a second.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fast_llm.errors import DataError, lfs_problem
from fast_llm.hub import download

MAIN = "tokenizer.json"
FILES = (
    MAIN,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
TEMPLATES = "additional_chat_templates/"  # a folder of jinja files
_IDS = ("generation_config.json", "config.json")
_LARGEST = 2**28  # bytes
_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A tokenizer, its special tokens and its files."""

    tokenizer: Tokenizer
    """Neither truncates nor pads."""
    path: Path
    """Its tokenizer.json."""
    bos: int | None
    eos: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS before each document."""
    vocab_size: int
    """The largest id + 1."""
    fingerprint: str
    files: list[Path]
    """The tokenizer's files, tokenizer.json first."""

    def named_files(self) -> list[tuple[str, Path]]:
        """`files`, each with its relative path in a copy of the folder."""
        return [
            (MAIN if file == self.path else file.relative_to(self.path.parent).as_posix(), file)
            for file in self.files
        ]


def load(path: str) -> Loaded:
    """The tokenizer of a folder, of a tokenizer.json, or of a model on the Hub
    (`organisation/name`, also `…@revision`).

    Raises DataError if it is missing or cannot be read, MissingPackage for the Hub without
    huggingface_hub.
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
    settings = _optional(file.parent / "tokenizer_config.json")
    adds_bos = bos is not None and (
        tokenizer.encode("").ids[:1] == [bos] or settings.get("add_bos_token") is True
    )
    return Loaded(
        tokenizer,
        file,
        bos,
        eos,
        adds_bos,
        max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        _digest(content),
        [
            file,
            *(file.parent / name for name in FILES[1:] if (file.parent / name).is_file()),
            *sorted((file.parent / TEMPLATES).glob("*.jinja")),
        ],
    )


def fingerprint(path: str | Path) -> str:
    """The sha256 of everything that decides a tokenizer's output; `path`: its folder or its
    tokenizer.json.

    Raises DataError as `load` does.
    """
    return _digest(_json(_find(str(path))))


def _digest(content: dict[str, Any]) -> str:
    """Equal for equal tokenizers, whatever the order and spacing in the file and the version of
    `tokenizers`.
    """
    decisive = {
        key: value
        for key, value in content.items()
        if key not in ("truncation", "padding", "version")
    }
    if isinstance(decisive.get("model"), dict):
        # Files from before 2024 spell merges "a b" instead of ["a", "b"], and lack later settings.
        model = {
            key: value
            for key, value in decisive["model"].items()
            if value is not None and value is not False
        }
        if isinstance(model.get("merges"), list):
            model["merges"] = [
                merge.split(" ", 1) if isinstance(merge, str) else merge
                for merge in model["merges"]
            ]
        decisive["model"] = model
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _find(path: str) -> Path:
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        return _in_folder(place, path)
    if not _HUB.fullmatch(path) or path.startswith("."):
        raise DataError(
            f"{path}: no such file or folder, and not a model on the Hugging Face Hub"
            " (organisation/name)"
        )
    patterns = [*FILES, *_IDS, f"{TEMPLATES}*.jinja"]
    return _in_folder(download(path, DataError, allow=patterns), path)


def _in_folder(folder: Path, path: str) -> Path:
    if (folder / MAIN).is_file():
        return folder / MAIN
    if (folder / "tokenizer.model").is_file():
        raise DataError(
            f"{path}: has only tokenizer.model; convert it to {MAIN} once: python -c 'from"
            " transformers import AutoTokenizer;"
            f' AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}")\''
        )
    raise DataError(f"{path}: no {MAIN} in it; give the model's folder")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: larger than {_LARGEST // 2**20} MiB; this is not a tokenizer")
        if not path.is_file():  # reading a pipe would block
            raise DataError(f"{path}: not a file")
        data = path.read_bytes()
        if problem := lfs_problem(path, data):
            raise DataError(problem)
        content = json.loads(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _special(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """The id of BOS or EOS (`name`: bos, eos) that the model's folder names."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _optional(folder / file).get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found: int | None = tokenizer.token_to_id(text)
            if found is not None:
                return found
    for file in _IDS:
        number = _optional(folder / file).get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0 and tokenizer.id_to_token(number) is not None:
            return number
    return None
