"""dataset.json: which token files a dataset has, with their sizes, weights and digests; and the
tokenizer they were made with.

    {"format": "fast_llm dataset 1",
     "split": "hash-1",                              which documents are trained on (split.py)
     "datasets": [{"prefix": "data/shard_0_0",       relative to the folder of this file
                   "num_documents": …, "num_tokens": …, "num_bytes": …, "weight": …,
                   "dtype": "uint16",
                   "sha256": {"bin": "…", "idx": "…", "rows": "…"}}, …],
                                                     with masks (masks.py) also
                                                     "num_masked_tokens" and the digest "masks"
     "tokenizer": {"fingerprint": "…", "vocab_size": …, "bos": …, "eos": …,
                   "writes_bos": …, "writes_eos": …, "path": …},
     "max_token_id": …, "num_documents": …, "num_tokens": …,
     "num_bytes": …,                                 of text, without BOS and EOS
     "skipped_documents": …, "skipped": {reason: count}, "skipped_examples": [[where, reason], …],
     "bad_lines": [where, …],                        the first lines that were not JSON, if any
     "source": {…},                                  what was prepared; "files_sha256": of the
                                                     lines of files.jsonl.gz (origins.py)
     "sha256": "…"}                                  of all of the above

Only `datasets` with a `prefix` each is required; what else is given is checked. Reading takes
milliseconds; verifying reads all token files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.data.datatrove import SUFFIX, open_token_file
from fast_llm.data.masks import masks_path
from fast_llm.data.origins import files_problem, rows_path
from fast_llm.data.tokenfile import file_digest
from fast_llm.errors import DataError, lfs_problem
from fast_llm.storage import content_digest

FORMAT = "fast_llm dataset 1"
_LARGEST = 2**30  # bytes


def read_metadata(path: Path) -> dict[str, Any]:
    """The content of a dataset.json. Raises DataError for a file that is missing, damaged or not a
    dataset.json.
    """
    data = _read_file(path)
    if problem := lfs_problem(path, data):
        raise DataError(problem)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a dataset.json: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a dataset.json: it has no list `datasets`")
    if content.get("sha256", content_digest(content)) != content_digest(content):
        raise DataError(
            f"{path}: its sha256 does not match its content: it is damaged, or was edited; if it"
            " was edited, delete its line `sha256`"
        )
    _check_entries(path, content.get("datasets"))
    tokenizer = content.get("tokenizer", {})
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("fingerprint", ""), str):
        raise DataError(
            f"{path}: `tokenizer` must be an object with a fingerprint; given {str(tokenizer)[:80]}"
        )
    return content


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: larger than 1 GiB; this is not a dataset.json")
        if path.is_dir():
            raise DataError(f"{path}: a folder; give the dataset.json{_suggestion(path)}")
        if not path.is_file():  # reading a pipe would block
            raise DataError(f"{path}: not a file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; `fast-llm prepare` writes it next to its output_path"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _suggestion(folder: Path) -> str:
    """Where the dataset.json of a folder is: in it, or next to it, where `prepare` writes it."""
    inside = folder / "dataset.json"
    if inside.is_file():
        return f" in it, {inside}"
    sibling = folder.resolve().with_name(folder.resolve().name + ".json")
    if sibling.is_file():
        return f" next to it, {folder.parent / sibling.name if folder.name else sibling}"
    if found := next(folder.glob(f"*{SUFFIX}"), None):
        listed = f'{{"datasets": [{{"prefix": "{found.name}"}}, …]}}'
        return f" that lists its files, {listed}, or one file, {found}"
    return " that `fast-llm prepare` wrote, not a folder"


def _check_entries(path: Path, entries: Any) -> None:
    """Raises DataError unless `datasets` lists token files, each once, with numbers that make
    sense.
    """
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a dataset.json: it has no list `datasets`")
    seen = set()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("prefix"), str):
            raise DataError(
                f"{path}: `datasets` must list objects with a prefix; given {str(entry)[:80]}"
            )
        for key in ("weight", "num_tokens", "num_documents"):
            value = entry.get(key, 0)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < 2**63:
                raise DataError(
                    f"{path}: {key} of {entry['prefix']}: given {str(value)[:80]}, must be a number"
                    " of 0 or more"
                )
        if not isinstance(entry.get("sha256", {}), dict):
            raise DataError(f"{path}: sha256 of {entry['prefix']}: must have bin and idx")
        if entry["prefix"] in seen:
            raise DataError(f"{path}: lists {entry['prefix']} twice; add up the weights")
        seen.add(entry["prefix"])


def resolve_prefix(path: Path, prefix: str) -> Path:
    """A prefix in the dataset.json at `path`. Raises DataError if it leads out of that folder."""
    parts = Path(prefix).parts
    impossible = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in prefix)  # in a file's name
    if not parts or Path(prefix).is_absolute() or ".." in parts or impossible:
        raise DataError(
            f"{path}: the prefix {prefix!r} must name files inside the folder of the file"
        )
    return path.parent / prefix


def verify(path: Path) -> int:
    """Compare all token files of a dataset.json, and the records of their documents' origins, with
    their digests. Returns how many bytes were read.

    Raises DataError naming every file that is damaged or missing.
    """
    read, wrong = 0, []
    content = read_metadata(path)
    for entry in content["datasets"]:
        prefix = resolve_prefix(path, entry["prefix"])
        try:
            file = open_token_file(prefix)
        except DataError as error:
            wrong.append(str(error))
            continue
        for suffix, name in (
            ("bin", file.bin),
            ("idx", file.idx),
            ("rows", rows_path(prefix)),
            ("masks", masks_path(prefix)),
        ):
            expected = entry.get("sha256", {}).get(suffix)
            if expected is None:
                continue
            if not name.exists():
                lost = "masked token" if suffix == "masks" else "document's origin"
                wrong.append(f"{name}: no such file, so that no {lost} is known")
                continue
            read += name.stat().st_size
            if file_digest(name) != expected:
                wrong.append(f"{name}: its content is not what was prepared (sha256 differs)")
    source = content.get("source")
    digest = source.get("files_sha256") if isinstance(source, dict) else None
    if isinstance(digest, str) and (problem := files_problem(prefix.parent, digest)):
        wrong.append(problem)
    if wrong:
        raise DataError("\n".join(wrong))
    return read


@dataclass(frozen=True)
class TextSize:
    """The text of a token file."""

    bytes: int  # without BOS and EOS
    begins_with_bos: bool  # each document
    added: int  # tokens of each document that are BOS or EOS


def text_sizes(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, TextSize]:
    """The text of each token file, by prefix, whose dataset.json says its size.

    `metadata`: path of each dataset → its dataset.json.
    """
    found = {}
    for path, content in metadata.items():
        tokenizer = content.get("tokenizer", {})
        bos, eos = bool(tokenizer.get("writes_bos")), bool(tokenizer.get("writes_eos"))
        for entry in content.get("datasets", []):
            if isinstance(entry.get("num_bytes"), int):
                prefix = str(Path(path).parent / entry["prefix"])
                found[prefix] = TextSize(entry["num_bytes"], bos, bos + eos)
    return found


def size_of(contents: Sequence[Mapping[str, Any]]) -> int:
    """Bytes of the tokens that these dataset.json files list."""
    return sum(
        entry.get("num_tokens", 0) * np.dtype(entry.get("dtype", "int64")).itemsize
        for content in contents
        for entry in content.get("datasets", [])
    )
