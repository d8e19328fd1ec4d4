"""Folders that are whole or absent, and prove it: checkpoints and exports.

A folder is written under a hidden name (`.<name>.partial-…`), flushed, given a manifest with the size and
sha256 of every file and of itself, and renamed. What has a manifest that fits is a checkpoint; names mean
nothing and strangers are left alone. Deleting begins with a rename too, so that no half folder is ever found.

Hashing reads each file once, 1 to 2 GB/s a thread, up to eight files at a time.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_llm.errors import CheckpointError

logger = logging.getLogger("fast_llm")

MANIFEST = "fast_llm_manifest.json"
FORMAT = "fast-llm folder 1"
LARGEST_MANIFEST = 2**26  # bytes; a checkpoint of a thousand processes has a tenth of it
_THREADS = 8
_LATE = 60.0  # seconds until a file server must show what other machines wrote
_LEFTOVER = re.compile(r"\.(.+)\.(partial|deleted)-[0-9a-f]{8}")
_REPLACED = re.compile(r"(.+)\.replaced-[0-9a-f]{8}")


@dataclass(frozen=True)
class Manifest:
    """What a whole folder says of itself."""

    kind: str  # checkpoint or export
    step: int
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name → size, sha256


def begin(final: Path) -> Path:
    """A new folder beside `final`, hidden and with a name that nobody else uses, to be filled and published.

    Raises OSError.
    """
    missing = [folder for folder in final.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)
    partial = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    return partial


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files of a folder, by name; they are flushed to disk first. Raises OSError."""

    def digest(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            return {
                "size": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def publish(
    partial: Path,
    final: Path,
    kind: str,
    step: int,
    info: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Give a written folder its manifest and its name, both for good: when this returns they are on disk.

    `info` is what JSON can hold. A checkpoint or export that had the name is replaced, and is there under
    another name until the new one is; anything else that had it is moved aside and stays.
    Raises OSError, and CheckpointError if a file is not there.
    """
    _wait_for(partial, files)
    content = json.loads(
        json.dumps({"format": FORMAT, "kind": kind, "step": step, "info": info, "files": files})
    )
    content["sha256"] = _digest(content)
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {partial, *(partial / inner for name in files for inner in Path(name).parents)}:
        _flush(folder)
    old = None
    if os.path.lexists(final):
        ours = os.path.isfile(final / MANIFEST) and not final.is_symlink()
        old = final.with_name(
            f"{final.name}.{'replaced' if ours else 'aside'}-{secrets.token_hex(4)}"
        )
        final.rename(old)
        if not ours:
            logger.warning(
                f"{final} was in the way of {kind} {step} and is none; it was moved to {old}."
            )
    partial.rename(final)
    _flush(final.parent)
    if old is not None and ours:
        delete(old)


def _wait_for(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Until all files are seen here; those of other machines may come late through a file server."""
    deadline = time.monotonic() + _LATE
    while True:
        missing = [name for name, entry in files.items() if _size(folder / name) != entry["size"]]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder / missing[0]}: written by another process but not to be seen by the first one;"
                " run.experiment_dir must be on a disk that all machines share"
            )
        time.sleep(0.1)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises CheckpointError if there is none, or a damaged one."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(
                min(os.fstat(file.fileno()).st_size, LARGEST_MANIFEST) + 1
            )  # makes room for all that it is asked for
        if len(data) > LARGEST_MANIFEST:
            raise CheckpointError(
                f"{path}: larger than {LARGEST_MANIFEST} bytes; not a manifest of this project"
            )
        content = json.loads(data)
        claimed = content.pop("sha256")
        if claimed != _digest(content):
            raise CheckpointError(f"{path}: damaged, its digest does not fit its content")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: has the format {str(content['format'])[:60]!r}, which this version does not read ({FORMAT!r})"
            )
        manifest = Manifest(content["kind"], content["step"], content["info"], content["files"])
        _check(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no {MANIFEST}; it is not a complete checkpoint of this project"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """The digest is no secret: what fits it may still have been written by somebody else."""
    if type(manifest.kind) is not str or type(manifest.step) is not int or manifest.step < 0:
        raise ValueError("kind or step are none")
    if type(manifest.info) is not dict or type(manifest.files) is not dict:
        raise ValueError("info or files are none")
    for name, entry in manifest.files.items():
        outside = any(part in ("", ".", "..") for part in name.split("/"))
        if outside or name == MANIFEST or "\\" in name or "\0" in name:
            raise ValueError(f"{name[:80]!r} is not the name of a file in the folder")
        if type(entry["size"]) is not int or type(entry["sha256"]) is not str:
            raise ValueError(f"size or sha256 of {name} are none")


def verify(folder: Path) -> Manifest:
    """Compare every file with its size and digest. Raises CheckpointError naming file and step."""
    manifest = read_manifest(folder)

    def damage(name: str, content: bool) -> str | None:
        expected, path = manifest.files[name], folder / name
        of = f"{manifest.kind} {manifest.step} is damaged"
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{path}: not a file; {of}"
            if status.st_size != expected["size"]:
                return f"{path}: {status.st_size} bytes instead of {expected['size']}; {of}"
            if not content:
                return None
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{path}: its content is not what was saved (sha256 differs); {of}"
        except OSError as error:
            return f"{path}: {error.strerror}; {of}"
        return None

    def first(content: bool) -> str | None:
        with ThreadPoolExecutor(_THREADS) as pool:
            return next(
                filter(None, pool.map(lambda name: damage(name, content), manifest.files)), None
            )

    # Sizes first: most damage shows there, before gigabytes are read.
    if problem := first(False) or first(True):
        raise CheckpointError(problem)
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest and files of the right sizes. Their content is not read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return all(_size(folder / name) == entry["size"] for name, entry in manifest.files.items())


def _manifests(root: Path) -> list[tuple[Path, Manifest | CheckpointError]]:
    """Of what is not hidden and has something called a manifest. Strangers of every kind have none."""
    try:
        # os.path.isfile is false, not an error, for symlink loops and folders that can not be read
        entries = [e for e in root.iterdir() if e.name[:1] != "." and os.path.isfile(e / MANIFEST)]
    except OSError:
        return []
    found: list[tuple[Path, Manifest | CheckpointError]] = []
    for path in sorted(entries):
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError as error:
            found.append((path, error))
    return found


def missing_manifest(root: Path) -> list[Path]:
    """Folders directly under `root` that hold weights and have lost their manifest: no crash leaves such a one."""
    try:
        found = {path.parent for path in root.glob("*/*.safetensors") if path.parent.name[0] != "."}
    except OSError:
        return []
    return sorted(path for path in found if not os.path.isfile(path / MANIFEST))


def find(root: Path, kind: str | None = None) -> list[tuple[int, Path]]:
    """Every checkpoint or export directly under `root`, by step, the oldest first; of all kinds or of one.

    Manifests are read, files are not. Of two with one step the one that is being replaced comes first.
    """
    found = [
        (m.step, path)
        for path, m in _manifests(root)
        if isinstance(m, Manifest) and kind in (None, m.kind)
    ]
    return sorted(
        found, key=lambda item: (item[0], _REPLACED.fullmatch(item[1].name) is None, item[1].name)
    )


def latest(
    root: Path, kind: str = "checkpoint", content: bool = True, quiet: bool = False
) -> Path | None:
    """The newest checkpoint under `root` that is whole; damaged ones are named in the log and passed over.

    `content`: whether digests are compared too, or only sizes; `quiet`: the log has named the damaged ones already.
    """
    level = logging.DEBUG if quiet else logging.WARNING
    for path in missing_manifest(root):
        logger.log(
            level,
            f"Passed over: {path}: holds weights but no {MANIFEST}; it is not a complete {kind}",
        )
    for _, manifest in _manifests(root):
        if isinstance(manifest, CheckpointError):
            logger.log(level, f"Passed over: {manifest}")
    for _, path in reversed(find(root, kind)):
        if not content and is_complete(path):
            return path
        try:
            verify(path)
            return path
        except CheckpointError as error:
            logger.log(level, f"Passed over: {error}")
    return None


def unusable(root: Path) -> list[Path]:
    """What is or was a checkpoint under `root`, where `latest` finds none: all of it is damaged."""
    return missing_manifest(root) + [
        path
        for path, m in _manifests(root)
        if isinstance(m, CheckpointError) or m.kind == "checkpoint"
    ]


def prune(
    root: Path, keep: int | None, is_permanent: Callable[[int], bool], current: int | None = None
) -> None:
    """Delete all but the newest `keep` whole ones of those that are not permanent, and what crashes left behind.

    `current`: the step that was just saved. Those of later steps are left alone and not counted: the run could
    not go on from them, and will replace them.
    """
    clean(root)
    if keep is None:
        return
    kept = 0
    for step, path in reversed(find(root)):
        if is_permanent(step) or (current is not None and step > current) or path.is_symlink():
            continue
        if kept >= max(keep, 1):
            delete(path)
        elif is_complete(path):
            kept += 1


def clean(root: Path) -> None:
    """Finish what a crash broke off under `root`: delete what is partial, and finish or undo replacements.

    Nothing may be written there meanwhile.
    """
    try:
        entries = list(root.iterdir())
    except OSError:
        return
    for entry in entries:
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif (match := _REPLACED.fullmatch(entry.name)) and os.path.isfile(entry / MANIFEST):
            final = root / match[1]
            if is_complete(final):
                delete(entry)
            elif not os.path.lexists(final):
                try:
                    entry.rename(final)
                except OSError as error:
                    logger.warning(
                        f"{entry} could not be named {final.name} again: {error.strerror}"
                    )


def delete(path: Path) -> None:
    """Delete a folder so that no part of it can be taken for a whole; a failure is logged."""
    doomed = path.with_name(f".{path.name}.deleted-{secrets.token_hex(4)}")
    try:
        path.rename(doomed)
        _flush(path.parent)
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
