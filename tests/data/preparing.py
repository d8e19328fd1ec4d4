"""Shared by tests of preparation: configurations, documents of a dataset.json, commands."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import tokenizer
from fast_llm.data.tokenfile import TokenFile, file_digest
from tests.data import synthetic

TEXTS = [synthetic.text(seed, 40) for seed in range(30)]


def configure(output: Path, path: Path | str, model: Path, **changes: Any) -> PrepareConfig:
    """A configuration; `dataset__field="x"` sets dataset.field."""
    values: dict[str, Any] = {
        "output_path": str(output),
        "tokens_per_shard": 100_000,
        "dataset": {"path": str(path)},
        "tokenizer": {"path": str(model)},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return PrepareConfig.model_validate(values)


def content(metadata: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(metadata.read_text())
    return result


def read(metadata: Path) -> list[list[int]]:
    """The documents of a dataset.json."""
    found = []
    for entry in content(metadata)["datasets"]:
        file = TokenFile(metadata.parent / entry["prefix"])
        assert (file.documents, file.tokens) == (entry["num_documents"], entry["num_tokens"])
        assert str(file.dtype) == entry["dtype"]
        assert entry["sha256"] == {"bin": file_digest(file.bin), "idx": file_digest(file.idx)}
        ends = np.cumsum(file.lengths)
        found += [
            file.tokens_at(int(end - n), int(end)).tolist()
            for n, end in zip(file.lengths, ends, strict=True)
        ]
    return found


def tokens(
    model: Path, texts: list[str], front: tuple[int, ...] = (0,), back: tuple[int, ...] = (1,)
) -> list[list[int]]:
    plain = tokenizer.load(str(model)).tokenizer
    plain.encode_special_tokens = True
    return [[*front, *plain.encode(text, add_special_tokens=False).ids, *back] for text in texts]


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the lock, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def jsonl(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)
    ).encode()


_COMMAND = """
import os, pathlib, sys, time
from fast_llm.cli import main
if __name__ == "__main__":
    if "SLOWLY" in os.environ:  # so that it is often killed between two files that belong together
        replace = pathlib.Path.replace
        def slowly(*paths):
            time.sleep(0.015)
            replace(*paths)
            time.sleep(0.015)
        pathlib.Path.replace = slowly
    code = main(["prepare", *sys.argv[1:]])
    print("torch" in sys.modules)
    sys.exit(code)
"""


def start(
    folder: Path, output: Path, source: Path, model: Path, *further: str
) -> subprocess.Popen[str]:
    (folder / "run.py").write_text(_COMMAND)
    settings = [
        f"output_path={output}",
        f"dataset.path={source}",
        f"tokenizer.path={model}",
        "tokens_per_shard=100000",
    ]
    return subprocess.Popen(
        [sys.executable, str(folder / "run.py"), *settings, *further],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _of_session(session: int) -> list[str]:
    """Processes of a session that are left."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def all_gone(session: int) -> None:
    """Also what ends a moment after the main process."""
    deadline = time.monotonic() + 20
    while _of_session(session):
        assert time.monotonic() < deadline
        time.sleep(0.01)
