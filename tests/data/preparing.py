"""Shared by tests of preparation: configurations, documents of a dataset.json, commands."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_llm.config.prepare import PrepareConfig
from fast_llm.data import tokenizer
from fast_llm.data.origins import rows_path
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
        names = {
            "bin": file.bin,
            "idx": file.idx,
            "rows": rows_path(metadata.parent / entry["prefix"]),
        }
        assert entry["sha256"] == {suffix: file_digest(name) for suffix, name in names.items()}
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
import os, pathlib, sys, threading, time
from fast_llm.cli import main
if __name__ == "__main__":
    if "SPAWN" in os.environ:  # workers are not forked from a process with another thread
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    if "SLOWLY" in os.environ:  # so that it is often killed between two files that belong together
        replace = pathlib.Path.replace
        def slowly(*paths):
            time.sleep(0.015)
            replace(*paths)
            time.sleep(0.015)
        pathlib.Path.replace = slowly
    if "LOCAL_LOCKS" in os.environ:  # as on a node that does not see the locks of others
        import fcntl
        fcntl.lockf = lambda *given: None
    code = main(["prepare", *sys.argv[1:]])
    print("torch" in sys.modules)
    sys.exit(code)
"""


def start(
    folder: Path,
    output: Path,
    source: Path | str,
    model: Path,
    *further: str,
    launcher: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start the command. `launcher`: arguments of Python before the program."""
    (folder / "run.py").write_text(_COMMAND)
    settings = [
        f"output_path={output}",
        f"dataset.path={source}",
        f"tokenizer.path={model}",
        "tokens_per_shard=100000",
    ]
    return subprocess.Popen(
        [sys.executable, *launcher, str(folder / "run.py"), *settings, *further],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def worker_processes(process: subprocess.Popen[str]) -> list[str]:
    """The worker processes that a preparation has started, but not Python's own helper."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = children.read_text().split()
    return [
        each
        for each in found
        if "resource_tracker" not in Path(f"/proc/{each}/cmdline").read_text()
    ]


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
