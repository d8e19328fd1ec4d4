"""Fuzzing of the readers of .idx files, manifests and safetensors headers.

Files are changed at random. Those that reach new steps between lines are kept and changed further.
Each file is read, or refused in a line that names it, with at most 8 MiB of memory.
"""

import contextlib
import json
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fast_llm.checkpoint import folder as folders
from fast_llm.checkpoint import huggingface
from fast_llm.data import tokenfile
from fast_llm.errors import UserError
from tests.faults.hostile import resealed, safetensors, tensor
from tests.faults.jobs import command
from tests.training.runs import write_tokens


def targets(folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], Any], str]]:
    """A good file, its reader, and the module whose lines count."""

    def index(data: bytes) -> None:
        (folder / "f.idx").write_bytes(data)
        tokenfile.TokenFile(folder / "f")

    def manifest(data: bytes) -> None:
        (folder / "c" / folders.MANIFEST).write_bytes(data)
        with contextlib.suppress(
            ValueError, TypeError, RecursionError
        ):  # so that code behind the check of the digest is reached
            resealed(folder / "c", dict(json.loads(data)))
        folders.read_manifest(folder / "c")

    def header(data: bytes) -> None:
        (folder / "m.safetensors").write_bytes(data)
        huggingface.read_header(folder / "m.safetensors")

    write_tokens(folder / "f", 3)
    (folder / "c").mkdir()
    content = {
        "format": folders.FORMAT,
        "kind": "checkpoint",
        "step": 1,
        "info": {},
        "files": {"a": {"size": 1, "sha256": "0"}},
    }
    resealed(folder / "c", content)
    good = safetensors(
        {"__metadata__": {"format": "pt"}, "a": tensor(0, 8), "b": tensor(8, 16)}, bytes(16)
    )
    return {
        ".idx": ((folder / "f.idx").read_bytes(), index, str(tokenfile.__file__)),
        "manifest": (
            (folder / "c" / folders.MANIFEST).read_bytes(),
            manifest,
            str(folders.__file__),
        ),
        "safetensors header": (good, header, str(huggingface.__file__)),
    }


def changed(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Make a few random changes."""
    new = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(new) + 1)
        odd = chance.choice((0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(data)))
        size = chance.choice((1, 4, 8))
        piece = chance.choice(
            (
                b"",
                chance.randbytes(size),
                (odd % 256**size).to_bytes(size, "little"),
                b"[" * 500,
                b'"',
                b"-1",
                b"1e999",
            )
        )
        start = chance.randrange(len(other) + 1)
        piece = chance.choice((piece, piece, piece, other[start : start + chance.randrange(1, 40)]))
        new[at : at + chance.choice((0, len(piece), chance.randrange(20)))] = piece
    return bytes(new)


class Reached:
    """Records the pairs of consecutive lines that one call runs in a module."""

    def __init__(self, module: str):
        self.module, self.last = module, 0
        self.steps: set[tuple[int, int]] = set()

    def __call__(self, frame: Any, event: str, _: Any) -> "Reached | None":
        if frame.f_code.co_filename != self.module:
            return None
        self.steps.add((self.last, frame.f_lineno))
        self.last = frame.f_lineno
        return self


def campaign(folder: Path, budget: int, seed: int) -> dict[str, Any]:
    """`budget`: files for each reader."""
    chance = random.Random(seed)
    figures: Counter[str] = Counter()
    folder = folder / "fuzz"
    folder.mkdir()
    for name, (good, reader, module) in targets(folder).items():
        corpus, reached = [good], set[tuple[int, int]]()
        most = 0
        tracemalloc.start()
        for number in range(budget):
            data = (
                good
                if number == 0
                else changed(chance.choice(corpus), chance.choice(corpus), chance)
            )
            now = Reached(module)
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            sys.settrace(now)
            try:
                reader(data)
                figures[f"{name}: read"] += 1
            except UserError as error:
                assert str(folder) in str(error), (name, seed, number, data, error)
                figures[f"{name}: refused"] += 1
            finally:
                sys.settrace(None)
            taken = tracemalloc.get_traced_memory()[1] - held
            most = max(most, taken)
            assert taken < 2**23, (
                f"{taken} bytes of memory: {name}, seed {seed}, number {number}, {data[:200]!r}"
            )
            if now.steps - reached and len(data) < 10_000:
                reached |= now.steps
                corpus.append(data)
        tracemalloc.stop()
        figures[f"{name}: kept for new lines"] = len(corpus)
        figures[f"{name}: most memory, kB"] = most // 1000
    return {**figures, "crashes": 0}


if __name__ == "__main__":
    command(campaign, 400_000)
