"""Exact duplicates among the documents of all units: `dataset.deduplicate`.

Each unit stores a 128-bit digest of the text of each document that it keeps, sorted, 24 bytes a
document on disk. When all units are done, one process merges them and stores for each unit which
of its documents are copies of an earlier one, in the order of the rows. assemble.py leaves them
out. So the first copy stays, whatever process prepared it.

The merge reads the digests once, in slices of 2^24 documents (0.8 GB of memory), and needs a byte
more for each document of the corpus.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_llm.storage import write_atomically

_SLICE = 2**24  # documents compared at a time
_DIGEST = 16  # bytes
DONE = "duplicates.json"


def digest(text: str) -> bytes:
    """What identifies a text."""
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()


def sorted_digests(digests: bytes) -> NDArray[np.uint64]:
    """[3, documents]: both halves of each digest and the document's number, sorted."""
    high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T.astype(np.uint64)
    order = np.lexsort((low, high))
    return np.stack([high[order], low[order], order.astype(np.uint64)])


def find_duplicates(folder: Path, numbers: Sequence[int], tag: str) -> None:
    """Write `<number>.copies.npy` for each unit: the numbers of its documents that are copies."""
    found_before = all((folder / f"{number}.copies.npy").exists() for number in numbers)
    if found_before and (folder / DONE).exists():
        return
    tables = [np.load(folder / f"{number}.digests.npy", mmap_mode="r") for number in numbers]
    total = sum(table.shape[1] for table in tables)
    copies: list[list[NDArray[np.int64]]] = [[] for _ in numbers]
    slices = -(-total // _SLICE)
    edges = [2**64 * number // slices for number in range(slices + 1)] if slices else []
    for first, last in itertools.pairwise(edges):
        _find(tables, first, last, copies)
    for number, some in zip(numbers, copies, strict=True):
        found = np.sort(np.concatenate([np.zeros(0, np.int64), *some]))
        write_array(folder / f"{number}.copies.npy", tag, found)
    partial = folder / f"{DONE}.{tag}.partial"
    write_atomically(folder / DONE, json.dumps({"documents": total}), partial)


def _find(tables: list[Any], first: int, last: int, copies: list[list[NDArray[np.int64]]]) -> None:
    """Find the copies among digests whose first half is in [first, last)."""
    parts, owners = [], []
    for unit, table in enumerate(tables):
        begin = int(np.searchsorted(table[0], np.uint64(first)))
        end = table.shape[1] if last == 2**64 else int(np.searchsorted(table[0], np.uint64(last)))
        parts.append(np.asarray(table[:, begin:end]))
        owners.append(np.full(end - begin, unit, np.int32))
    digests, owner = np.concatenate(parts, axis=1), np.concatenate(owners)
    order = np.lexsort(digests[1::-1])  # stable: equal digests stay in the order of the rows
    high, low = digests[0][order], digests[1][order]
    is_copy = np.append(False, (high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    found = order[is_copy[: len(order)]]
    for unit in np.unique(owner[found]).tolist():
        copies[unit].append(digests[2][found[owner[found] == unit]].astype(np.int64))


def write_array(path: Path, tag: str, array: NDArray[Any]) -> None:
    """Write an array to a file that is complete or absent."""
    partial = path.with_name(f"{path.name}.{tag}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
