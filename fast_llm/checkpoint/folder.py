"""Atomic folders with a manifest: checkpoints and exports.

A folder is written under a hidden name (`.<name>.partial-…`), flushed, given a manifest with the
size and sha256 of every file and of the manifest itself, and renamed. A folder is a checkpoint if
it has a valid manifest, whatever its name; other files and folders are left alone. Deletion also
starts with a rename, so that a partial folder is never found.

Hashing reads each file once, 1 to 2 GB/s per thread, up to eight files at a time.
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
from fast_llm.storage import content_digest

logger = logging.getLogger("fast_llm")

MANIFEST = "fast_llm_manifest.json"
FORMAT = "fast-llm folder 1"
LARGEST_MANIFEST = 2**26  # bytes; ten times that of a checkpoint of a thousand processes
THREADS = 8  # that read and flush files
_SHOWN = 20  # folders in a message
_LEFTOVER = re.compile(r"\.(.+)\.(partial|deleted)-[0-9a-f]{8}")
_REPLACED = re.compile(r"(.+)\.replaced-[0-9a-f]{8}")


@dataclass(frozen=True)
class Manifest:
    """The content of a complete folder."""

    kind: str  # checkpoint or export
    step: int
    info: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name → size, sha256


def begin(final: Path) -> Path:
    """Make a hidden folder with a unique name next to `final`, to be filled and published.

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
    """Flush files of a folder to disk; their sizes and sha256, by name. Raises OSError."""

    def digest(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            return {
                "size": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def publish(
    partial: Path,
    final: Path,
    kind: str,
    step: int,
    info: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    visible_within: float = 60.0,
) -> None:
    """Write the manifest of a `partial` folder and rename it to `final`. Both are then on disk.

    `info` must be JSON. A checkpoint or export at `final` is replaced, and kept under another name
    until the new one is there. Anything else at `final` is moved to another name and kept.
    `visible_within`: seconds for a file server to show what other machines wrote. Raises OSError,
    and CheckpointError if a file is missing.
    """
    _wait_for(partial, files, visible_within)
    content = json.loads(
        json.dumps({"format": FORMAT, "kind": kind, "step": step, "info": info, "files": files})
    )
    content["sha256"] = content_digest(content)
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
                f"{final} exists but is not a checkpoint or export; it was moved to {old}, for"
                f" {kind} {step}."
            )
    partial.rename(final)
    _flush(final.parent)
    if old is not None and ours:
        delete(old)


def _wait_for(folder: Path, files: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
    """Wait until all files are visible here. A file server may show other machines' files late."""
    deadline = time.monotonic() + seconds
    while True:
        missing = [name for name, entry in files.items() if _size(folder / name) != entry["size"]]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder / missing[0]}: written by another process but not visible to the first"
                " one; run.experiment_dir must be on a disk that all machines share"
            )
        time.sleep(0.1)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises CheckpointError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            # read() allocates what it is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_MANIFEST) + 1)
        if len(data) > LARGEST_MANIFEST:
            raise CheckpointError(
                f"{path}: larger than {LARGEST_MANIFEST} bytes; not a manifest of this project"
            )
        content = json.loads(data)
        claimed = content.pop("sha256")
        if claimed != content_digest(content):
            raise CheckpointError(f"{path}: damaged: its digest differs from that of its content")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: has the format {str(content['format'])[:60]!r}, which this version"
                f" does not read; it reads {FORMAT!r}"
            )
        manifest = Manifest(content["kind"], content["step"], content["info"], content["files"])
        _check(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}; it is not a complete checkpoint of this project"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """Check types and names: a file with a valid digest may still come from another program."""
    if type(manifest.kind) is not str or type(manifest.step) is not int or manifest.step < 0:
        raise ValueError("kind is not a text, or step not a number of 0 or more")
    if type(manifest.info) is not dict or type(manifest.files) is not dict:
        raise ValueError("info or files is not an object")
    for name, entry in manifest.files.items():
        outside = any(part in ("", ".", "..") for part in name.split("/"))
        if outside or name == MANIFEST or "\\" in name or "\0" in name:
            raise ValueError(f"{name[:80]!r} is not the name of a file in the folder")
        if type(entry["size"]) is not int or type(entry["sha256"]) is not str:
            raise ValueError(f"size or sha256 of {name} has the wrong type")


def verify(folder: Path) -> Manifest:
    """Compare every file with its size and digest. Raises CheckpointError for the first damage."""
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
                    return (
                        f"{path}: its content has changed since it was saved (sha256 differs); {of}"
                    )
        except OSError as error:
            return f"{path}: {error.strerror}; {of}"
        return None

    def first(content: bool) -> str | None:
        with ThreadPoolExecutor(THREADS) as pool:
            return next(
                filter(None, pool.map(lambda name: damage(name, content), manifest.files)), None
            )

    # Sizes first: they show most damage, without reading gigabytes.
    if problem := first(False) or first(True):
        raise CheckpointError(problem)
    return manifest


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a training checkpoint; exports have a manifest, too, and a config.json.

    Raises OSError or ValueError for a path that cannot be looked at.
    """
    return (folder / MANIFEST).exists() and not (folder / "config.json").exists()


def is_complete(folder: Path) -> bool:
    """Whether a folder has a valid manifest and files of the right sizes. Reads no contents."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return all(_size(folder / name) == entry["size"] for name, entry in manifest.files.items())


def _manifests(root: Path) -> list[tuple[Path, Manifest | CheckpointError]]:
    """The manifest, or its error, of each folder in `root` that is not hidden and has one."""
    try:
        # isfile is false, and raises nothing, for symlink loops and folders without permission.
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
    """Folders directly under `root` that hold weights but no manifest. Crashes leave none."""
    try:
        found = {path.parent for path in root.glob("*/*.safetensors") if path.parent.name[0] != "."}
    except OSError:
        return []
    return sorted(path for path in found if not os.path.isfile(path / MANIFEST))


def find(root: Path, kind: str | None = None) -> list[tuple[int, Path]]:
    """Step and path of the checkpoints and exports directly under `root`, by step, ascending.

    `kind`: only "checkpoint" or "export". Manifests are read, files are not. Of two folders with
    one step, the one being replaced comes first.
    """
    found = [
        (m.step, path)
        for path, m in _manifests(root)
        if isinstance(m, Manifest) and kind in (None, m.kind)
    ]
    return sorted(
        found, key=lambda item: (item[0], _REPLACED.fullmatch(item[1].name) is None, item[1].name)
    )


def describe_found(folder: Path) -> str:
    """The checkpoints or exports in an experiment folder or directly in a folder, as a part of a
    sentence; empty without any.
    """
    for root in (folder / "checkpoint", folder):
        if found := [path.name for _, path in find(root)]:
            shown = ", ".join(found[-_SHOWN:])
            return f"{root / found[-1]}" if len(found) == 1 else f"{root}/STEP, with STEP {shown}"
    return ""


def latest(
    root: Path, kind: str = "checkpoint", content: bool = True, quiet: bool = False
) -> Path | None:
    """The newest undamaged checkpoint under `root`. Damaged ones are skipped, with a warning.

    `content`: compare digests, not sizes alone. `quiet`: log at debug level, because the damaged
    ones have been logged before.
    """
    level = logging.DEBUG if quiet else logging.WARNING
    for path in missing_manifest(root):
        logger.log(
            level,
            f"Skipped: {path}: holds weights but no {MANIFEST}; it is not a complete {kind}",
        )
    for _, manifest in _manifests(root):
        if isinstance(manifest, CheckpointError):
            logger.log(level, f"Skipped: {manifest}")
    for _, path in reversed(find(root, kind)):
        if not content and is_complete(path):
            return path
        try:
            verify(path)
            return path
        except CheckpointError as error:
            logger.log(level, f"Skipped: {error}")
    return None


def unusable(root: Path) -> list[Path]:
    """All damaged checkpoints under `root`, to be called where `latest` found no good one."""
    return missing_manifest(root) + [
        path
        for path, m in _manifests(root)
        if isinstance(m, CheckpointError) or m.kind == "checkpoint"
    ]


def prune(
    root: Path, keep: int | None, is_permanent: Callable[[int], bool], current: int | None = None
) -> None:
    """Delete all but the newest `keep` complete folders that are not permanent; clean up crashes.

    `current`: the step that was just saved. Later steps are neither deleted nor counted: they come
    from an earlier attempt, and the run will replace them.
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
    """Clean up after a crash: delete partial folders, and complete or undo replacements.

    No other process may write to `root` at the same time.
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
                        f"{entry} could not be renamed to {final.name}: {error.strerror}"
                    )


def delete(path: Path) -> None:
    """Rename a folder to a hidden name, then delete it. A failure is logged."""
    doomed = path.with_name(f".{path.name}.deleted-{secrets.token_hex(4)}")
    try:
        path.rename(doomed)
        _flush(path.parent)
    except OSError as error:
        logger.warning(f"{path} could not be deleted: {error.strerror}")
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
