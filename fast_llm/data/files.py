"""Which files `dataset.path` and `dataset.data_files` name.

`s3://` and `gs://` name objects of an object store (object_store.py), found by the same rules.

A name that exists is that file or folder, whatever characters are in it; anything else is a
pattern. Files named one by one or by a pattern are all read. Of a folder, only tables are read if
it has some, else all files, and only those of the requested split. Other files of a folder are left
out, counted and named. Nothing is opened: finding costs one walk over the folder.
"""

import difflib
import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fast_llm.config.prepare import SourceConfig
from fast_llm.data.object_store import StoredObject, is_address, list_objects, match_objects
from fast_llm.data.reading import COMPRESSED, size_of
from fast_llm.errors import DataError
from fast_llm.storage import similar

HUB = "hf://datasets/"
_TABLES = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".arrow": "arrow",
}
_ARCHIVES = (".tar", ".zip", ".7z", ".rar", ".tgz", ".tbz2", ".txz")
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
# train, train_0, train-00000-of-00002, train-00000-of-00001-0123456789abcdef
_NUMBERED = re.compile(r"([a-z]+)([-_.]?\d+([-_]of[-_]\d+)?([-_][0-9a-f]{16})?)?")
_SLICE = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclass(frozen=True)
class DatasetFiles:
    """The files or dataset that the configuration names, not yet opened."""

    config: SourceConfig
    kind: str
    """`file`: each file is a document; `json`, `parquet`, `arrow`: tables; `saved`: a folder of
    Dataset.save_to_disk; `hub`."""
    files: dict[str, list[str]]
    """Sorted files of each split; empty for `saved` and `hub`."""
    digest: str | None
    """Of the names and sizes of the files; None for `saved` and `hub`, which must be opened
    first."""
    sizes: dict[str, int]
    """Bytes of each file."""
    left_out: list[tuple[str, str]]
    """Files that are not read, each with the reason (dataset.json lists the first ones)."""


def find(config: SourceConfig) -> DatasetFiles:
    """Find the documents. Raises DataError if the configuration names no files, or files of several
    kinds.
    """
    place = Path(config.path).expanduser()
    if is_address(config.path) and not place.exists():
        return _in_store(config)
    if place.exists() and config.config_name is not None:
        raise DataError(
            f"dataset.config_name: given {config.config_name}, but {config.path} is a local path,"
            " not on the Hub; leave it out"
        )
    if place.is_dir():
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            if config.data_files is not None or config.data_directory is not None:
                raise DataError(
                    f"dataset.data_files: {config.path} is a saved dataset; leave data_files and"
                    " data_directory out"
                )
            return DatasetFiles(config, "saved", {}, None, {}, [])
        return _in_folder(config, place)
    if place.is_file() or any(sign in config.path for sign in "*?["):
        if config.data_files is not None or config.data_directory is not None:
            raise DataError(
                f"dataset.data_files: dataset.path {config.path} names files already; give the"
                " folder there, or leave data_files and data_directory out"
            )
        return _of_files(config, _matches(place), None, [])
    if not config.path.startswith(HUB) and _is_local(config.path, place):
        raise DataError(f"dataset.path: {config.path}: no such file or folder{similar(place)}")
    if "/" not in config.path and (near := similar(place)):
        raise DataError(
            f"dataset.path: {config.path}: no such file or folder{near} For a dataset on the Hub"
            f" give {HUB}{config.path}"
        )
    if not config.path.startswith(HUB) and (meant := _misspelt_folder(place)):
        raise DataError(
            f"dataset.path: {config.path}: no such file or folder; did you mean {meant}? For a"
            f" dataset on the Hub give {HUB}{config.path}"
        )
    return DatasetFiles(config, "hub", {}, None, {}, [])


def _misspelt_folder(place: Path) -> Path | None:
    """What exists if the first folder of `folder/name` is spelled as a similar one that exists."""
    if len(place.parts) != 2:
        return None
    folders = [each.name for each in Path().iterdir() if (each / place.name).exists()]
    near = difflib.get_close_matches(place.parts[0], folders, n=1)
    return Path(near[0]) / place.name if near else None


def _is_local(path: str, place: Path) -> bool:
    """Whether a path that does not exist can only be meant as a local one."""
    return (
        path.startswith((".", "/", "~"))
        or path.endswith("/")
        or path.count("/") > 1
        or _kind(path) != "file"
        or ("/" in path and place.parent.is_dir())
    )


def _matches(path: Path) -> list[str]:
    """The file of this name, or the files that match it as a pattern. Leading folders that exist
    are taken literally.
    """
    if path.is_file():
        return [str(path)]
    base, parts = Path(), list(path.parts)
    while parts and (base / parts[0]).exists():
        base /= parts.pop(0)
    found = glob.glob(os.path.join(*parts), root_dir=base, recursive=True) if parts else []
    return sorted(name for match in found if os.path.isfile(name := str(base / match)))


def _walk(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The files of a folder, sorted; and what is not read, with the reason. Follows links.

    What several paths lead to is read once: by the path without links, else by the first one.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []
    links: list[str] = []  # to files and folders
    read: dict[str, str] = {}  # without links → the path that is read
    _walk_without_links(str(root), str(root), found, links, left_out, read)
    while links:
        path = links.pop(0)
        name, real = os.path.relpath(path, root), os.path.realpath(path)
        if not os.path.exists(path):
            left_out.append((name, "a broken link"))
        elif f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{real}/"):
            pass  # to a folder that contains it: no document is left out
        elif real in read:
            left_out.append((name, f"a link to {os.path.relpath(read[real], root)}"))
        elif os.path.isdir(path):
            _walk_without_links(path, str(root), found, links, left_out, read)
        elif os.path.isfile(path):
            found.append(path)
            read[real] = path
        else:
            left_out.append((name, "not a file"))
    return sorted(found), sorted(left_out)


def _walk_without_links(
    folder: str,
    root: str,
    found: list[str],
    links: list[str],
    left_out: list[tuple[str, str]],
    read: dict[str, str],
) -> None:
    """Collect files and links below a folder. Folders that are in `read` were walked before."""
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in read:
            continue
        read[real] = folder
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            left_out.append((os.path.relpath(folder, root) + "/", reason))
            continue
        for entry in entries:
            name = os.path.relpath(entry.path, root)
            if entry.name[0] == ".":
                left_out.append((name + "/" if entry.is_dir() else name, "hidden"))
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                waiting.append(entry.path)
            elif entry.is_file():
                found.append(entry.path)
                read[os.path.join(real, entry.name)] = entry.path
            else:
                left_out.append((name, "not a file"))


def _in_folder(config: SourceConfig, place: Path) -> DatasetFiles:
    root = place / config.data_directory if config.data_directory else place
    if not root.is_dir():
        raise DataError(f"dataset.data_directory: {root}: no such folder{similar(root)}")
    if config.data_files is not None:
        patterns = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        matches = {pattern: _matches(root / pattern) for pattern in patterns}
        for pattern, found in matches.items():
            if not found:
                raise DataError(
                    f"dataset.path: {config.path} with dataset.data_files {pattern}: no files"
                    f" there{similar(root / pattern)}"
                )
        return _of_files(
            config, sorted({path for found in matches.values() for path in found}), root, []
        )
    return _of_folder(config, *_walk(root), root)


def _in_store(config: SourceConfig) -> DatasetFiles:
    """Find objects by the rules for local files."""
    root = config.path.rstrip("/")
    if config.config_name is not None:
        raise DataError(
            f"dataset.config_name: given {config.config_name}, but {config.path} is in an object"
            " store, not on the Hub; leave it out"
        )
    if config.data_directory is not None:
        root = f"{root}/{config.data_directory.strip('/')}"
    found = list_objects(root)
    if is_pattern := not found and any(sign in root for sign in "*?["):
        found = match_objects(root)
    if is_pattern or found == [root]:
        if config.data_files is not None or config.data_directory is not None:
            raise DataError(
                f"dataset.data_files: dataset.path {config.path} names objects already; give the"
                " prefix there, or leave data_files and data_directory out"
            )
        return _of_files(config, list(found), None, [])
    if config.data_files is not None:
        patterns = [config.data_files] if isinstance(config.data_files, str) else config.data_files
        some: set[str] = set()
        for pattern in patterns:
            if not (matches := match_objects(f"{root}/{pattern}")):
                raise DataError(
                    f"dataset.path: {config.path} with dataset.data_files {pattern}: no files there"
                )
            some.update(matches)
        return _of_files(config, sorted(some), root, [])
    names = {path: path[len(root) + 1 :] for path in found}
    if saved := {"dataset_dict.json", "state.json"} & set(names.values()):
        raise DataError(
            f"dataset.path: {config.path} has {min(saved)}, so it is a saved dataset, which is only"
            " read from a local folder; copy it there"
        )
    hidden = {name for name in names.values() if any(part[:1] == "." for part in name.split("/"))}
    files: list[str] = [path for path in found if names[path] not in hidden]
    return _of_folder(config, files, [(name, "hidden") for name in sorted(hidden)], root)


def _of_folder(
    config: SourceConfig, files: list[str], left_out: list[tuple[str, str]], root: Path | str
) -> DatasetFiles:
    """The files to read of all files of a folder. `left_out`: others that are in it."""
    kinds = {path: _kind(path) for path in files}
    for path in files:
        name = os.path.relpath(path, root)
        if kinds[path] == "archive":
            left_out.append((name, "an archive: unpack it"))
        elif os.path.basename(path) in _METADATA:
            left_out.append((name, "about a dataset"))
        else:
            continue
        del kinds[path]
    if any(kind != "file" for kind in kinds.values()):
        # A folder of tables also has a README, a license and the like.
        left_out += [
            (os.path.relpath(path, root), "no table")
            for path, kind in kinds.items()
            if kind == "file"
        ]
        kinds = {path: kind for path, kind in kinds.items() if kind != "file"}
    return _of_files(config, list(kinds), root, left_out)


def _of_files(
    config: SourceConfig,
    files: list[str],
    root: Path | str | None,
    left_out: list[tuple[str, str]],
) -> DatasetFiles:
    """The files of the requested splits. `root`: the folder below which names say the split of a
    file.
    """
    if not files:
        also = f"; left out: {describe(left_out)}" if left_out else ""
        raise DataError(f"dataset.path: {config.path}: no files there{also}")
    kind = _common_kind(config, files)
    sizes = {path: size_of(path) for path in files}
    if not any(sizes.values()):
        raise DataError(f"dataset.path: {config.path}: all files are empty")
    names = {
        path: os.path.relpath(path, root) if root else os.path.basename(path) for path in files
    }
    if kind != "file":
        left_out = left_out + [(names[path], "empty") for path in files if not sizes[path]]
        files = [path for path in files if sizes[path]]
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(names[path]) + b"\0%d\0" % sizes[path])
        if isinstance(path, StoredObject):
            digest.update(path.version.encode() + b"\0")
    splits = {"train": files}
    if kind != "file" and root is not None and config.data_files is None:
        splits = _by_split({path: names[path] for path in files})
    wanted = [name for name, _, _ in parse_split(config.split)]
    for name in wanted:
        if name not in splits or not name:
            has = ", ".join(split for split in splits if split)
            raise DataError(
                f'dataset.split: Unknown split "{name}": {config.path} has {has}; a split is a'
                " folder, or files named for it: train.jsonl, train-00000-of-00002.parquet"
            )
    for split, some in splits.items():
        if split not in wanted:
            left_out = left_out + [
                (names[path], f"split {split}" if split else "of no split") for path in some
            ]
    return DatasetFiles(config, kind, splits, digest.hexdigest(), sizes, left_out)


def _common_kind(config: SourceConfig, files: list[str]) -> str:
    """The kind of all files. Raises DataError for several kinds, or one that is not read."""
    kinds: dict[str, str] = {}
    for path in files:
        kinds.setdefault(_kind(path), path)
    if len(kinds) > 1:
        examples = ", ".join(
            f"{os.path.basename(path)} ({kind})" for kind, path in sorted(kinds.items())
        )
        raise DataError(
            f"dataset.path: {config.path} has files of several kinds: {examples}; choose some with"
            " dataset.data_files"
        )
    (kind,) = kinds
    if kind == "csv":
        raise DataError(
            f"dataset.path: {files[0]}: csv is not read; convert it to jsonl or parquet"
        )
    if kind == "archive":
        raise DataError(
            f"dataset.path: {files[0]}: archives are not read; unpack it and give the folder"
        )
    if kind == "file" and config.split != "train":
        raise DataError(f"dataset.split: given {config.split}, but files of text are all `train`")
    return kind


def _by_split(names: dict[str, str]) -> dict[str, list[str]]:
    """Files by split. Files whose names say no split are `train` if no file is; else their split is
    "".
    """
    found: dict[str, list[str]] = {}
    for path, name in names.items():
        found.setdefault(_split_of(name), []).append(path)
    if "train" not in found and "" in found:
        found["train"] = found.pop("")
    return found


def _split_of(name: str) -> str:
    """The split that a folder or the file itself is named for; "" for none."""
    *folders, file = Path(name.lower()).parts
    for folder in folders:
        if folder in _SPLIT_OF:
            return _SPLIT_OF[folder]
    stem, suffix = os.path.splitext(file)
    if suffix in COMPRESSED:
        stem = os.path.splitext(stem)[0]
    numbered = _NUMBERED.fullmatch(stem)
    return _SPLIT_OF.get(numbered[1], "") if numbered else ""


def parse_split(text: str) -> list[tuple[str, str | None, str | None]]:
    """Splits and slices of them, written as for `datasets`: train[:10%]+test[5:20]. Raises
    DataError.
    """
    found = []
    for part in text.split("+"):
        match = _SLICE.fullmatch(part.strip())
        if match is None:
            raise DataError(
                f"dataset.split: given {text}, must be a split such as train, or slices of splits:"
                " train[:1000]+test[50%:]"
            )
        found.append((match[1], match[2], match[3]))
    return found


def describe(left_out: list[tuple[str, str]], most: int = 10) -> str:
    """Names of the files that are left out. Those that may be left out by mistake come first."""
    last = ("hidden", "about a dataset", "no table")
    ordered = sorted(left_out, key=lambda each: each[1] in last)
    more = f" and {len(left_out) - most:,} more" if len(left_out) > most else ""
    return ", ".join(f"{name} ({why})" for name, why in ordered[:most]) + more


def _kind(path: str) -> str:
    """The format of a file; `file` for a document of plain text."""
    stem, suffix = os.path.splitext(path.lower())
    packed = suffix in COMPRESSED
    if packed:
        suffix = os.path.splitext(stem)[1]
    if suffix in _ARCHIVES:
        return "archive"
    if suffix in (".csv", ".tsv"):
        return "csv"
    kind = _TABLES.get(suffix, "file")
    return "archive" if packed and kind in ("parquet", "arrow") else kind
