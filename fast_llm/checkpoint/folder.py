"""Folders that are whole or absent, and prove it: checkpoints and exports.

A folder is written under another name (`.<step>.partial-…`), flushed, given a manifest with the size and sha256
of every file and of itself, and renamed. What has a manifest that fits is a checkpoint; names mean nothing
and strangers are left alone. Deleting begins with a rename too, so that no half folder is ever found.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm.errors import CheckpointError

logger = logging.getLogger("fast_llm")

MANIFEST = "fast_llm_manifest.json"
FORMAT = "fast-llm folder 1"
LARGEST_MANIFEST = 2**28  # bytes


@dataclass(frozen=True)
class Manifest:
    """What a whole folder says of itself."""

    kind: str  # checkpoint or export
    step: int
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name → size, sha256


def partial_name(final: Path) -> Path:
    """A name beside `final` that nobody else uses."""
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, which are flushed to disk first."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            found[name] = {
                "size": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return found


def publish(
    partial: Path, final: Path, kind: str, step: int, info: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a written folder its manifest and its name. A folder that had the name is replaced."""
    content = {"format": FORMAT, "kind": kind, "step": step, "info": dict(info), "files": dict(files)}
    content["sha256"] = _digest(content)
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(partial)
    if final.exists():
        # The old one keeps a manifest under its new name, so that a crash here loses nothing.
        old = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
        final.rename(old)
        partial.rename(final)
        _flush(final.parent)
        delete(old)
    else:
        partial.rename(final)
        _flush(final.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises CheckpointError if there is none, or a damaged one."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path}: too large for a manifest")
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
        if claimed != _digest(content) or content["format"] != FORMAT:
            raise CheckpointError(f"{path}: damaged, its digest does not fit its content")
        manifest = Manifest(content["kind"], content["step"], content["info"], content["files"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {MANIFEST}; it is not a complete checkpoint of this project") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: can not be read: {error}") from error
    for name in manifest.files:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: the file name {name} leaves the folder")
    return manifest


def verify(folder: Path) -> Manifest:
    """Compare every file with its size and digest. Raises CheckpointError naming what is damaged."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                raise CheckpointError(
                    f"{path}: {size} bytes instead of {expected['size']}; {manifest.kind} {manifest.step} is damaged"
                )
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; {manifest.kind} {manifest.step} is damaged") from error
        if found != expected["sha256"]:
            raise CheckpointError(
                f"{path}: its content is not what was saved (sha256 differs); {manifest.kind} {manifest.step} is damaged"
            )
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest and files of the right sizes."""
    try:
        manifest = read_manifest(folder)
        return all((folder / name).stat().st_size == e["size"] for name, e in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def find(root: Path) -> list[tuple[int, Path]]:
    """Every folder with a manifest directly under `root`, by step, the oldest first."""
    found = []
    try:
        entries = list(root.iterdir())
    except OSError:
        return []
    for entry in entries:
        try:
            if entry.name.startswith(".") or not (entry / MANIFEST).is_file():
                continue
            found.append((read_manifest(entry).step, entry))
        except CheckpointError as error:
            logger.warning(f"Passed over: {error}")
        except OSError:
            continue
    return sorted(found)


def latest(root: Path) -> Path | None:
    """The newest folder that is whole; damaged ones are named in the log and passed over."""
    for _, path in reversed(find(root)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            logger.warning(f"Passed over: {error}")
    return None


def prune(root: Path, keep: int | None, is_permanent: Callable[[int], bool]) -> None:
    """Delete all but the newest `keep` of those that are not permanent, and what crashes left behind."""
    for leftover in root.glob(".*.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in root.glob(".*.deleted-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in root.glob("*.replaced-*"):
        if is_complete(replaced.with_name(replaced.name.partition(".replaced-")[0])):
            delete(replaced)
    if keep is None:
        return
    passing = [path for step, path in find(root) if not is_permanent(step)]
    for path in passing[:-keep]:
        delete(path)


def delete(path: Path) -> None:
    """Delete a folder so that no part of it can be taken for a whole."""
    doomed = path.with_name(f".{path.name}.deleted-{secrets.token_hex(4)}")
    try:
        path.rename(doomed)
    except OSError as error:
        logger.warning(f"{path} could not be deleted: {error.strerror}")
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
