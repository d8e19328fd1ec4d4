"""How small records are written and digested; names of similar paths, for messages."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str, partial: Path | None = None) -> None:
    """Write a file that has the old content or the new, also after a power failure.

    `partial`: where it is written first, in the same folder; by default a hidden name of this
    process.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own `sha256`, as JSON with sorted keys."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def similar(place: Path, folders: bool = False) -> str:
    """A hint that names existing files, or `folders`, with similar names; empty without any."""
    folder = place.parent
    while not folder.is_dir() and folder != folder.parent:
        folder, place = folder.parent, folder
    try:
        names = sorted(one.name for one in folder.iterdir() if not folders or one.is_dir())
    except OSError:
        return ""
    near = difflib.get_close_matches(place.name, names, n=3)
    return f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
