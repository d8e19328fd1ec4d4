"""How small records are written and digested: a dataset's, a run's, a checkpoint's."""

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
