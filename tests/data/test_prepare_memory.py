"""The memory of a complete preparation has a bound: it depends on the largest document, not on the
corpus.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import synthetic

pytestmark = pytest.mark.slow

# Prints the peak memory of this process and of its workers, each in MiB.
_PROGRAM = """
import sys, threading
import psutil
from fast_llm import cli

peaks, done = {}, threading.Event()
def peak(pid):  # not ru_maxrss, which begins with that of the process that started this one
    (line,) = (line for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 2**10
def watch(parent):
    while not done.wait(0.02):
        for process in parent.children():
            try:
                peaks[process.pid] = peak(process.pid)
            except (OSError, ValueError):
                pass  # it has just ended
from fast_llm.data import workers
workers.can_fork = lambda: True  # the only other thread is the one that watches
threading.Thread(target=watch, args=(psutil.Process(),), daemon=True).start()
assert cli.main(["prepare", *sys.argv[1:]]) == 0
done.set()
print(peak("self"), *peaks.values())
"""
_WORDS = [f"{'abcdefghijklmnopqrstuvwxyz'[n % 26]}{n}" for n in range(2000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.llama(tmp_path_factory.mktemp("llama"), 1000)


def many(path: Path, documents: int) -> Path:
    """A JSON lines file of documents of about 100 bytes."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(draw.choices(_WORDS, k=18))}) + "\n")
    return path


def huge(path: Path, size: int) -> Path:
    """A JSON lines file of one document of `size` bytes and a few small ones."""
    text = " ".join(random.Random(0).choices(_WORDS, k=size // 5))[:size]
    rows = [{"text": text}, *({"text": f"a small document {n}"} for n in range(9))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def peaks(tmp_path: Path, source: Path, model: Path, workers: int) -> list[int]:
    """Mebibytes: of the process, and of each worker."""
    settings = [f"output_path={tmp_path}/{source.stem}-{workers}", f"dataset.path={source}"]
    settings += [f"tokenizer.path={model}", "tokenizer.engine=gigatoken"]
    settings += [f"tokenize_workers={workers}"]
    command = [sys.executable, "-c", _PROGRAM, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_many_small_documents(tmp_path: Path, model: Path, workers: int) -> None:
    """49 MB more take 20 bytes for each document (where it begins, and its row), and what the
    allocator leaves between: 3 to 18 MiB were seen, and 73 where the texts were kept.
    """
    few = peaks(tmp_path, many(tmp_path / "few.jsonl", 50_000), model, workers)
    more = peaks(tmp_path, many(tmp_path / "more.jsonl", 500_000), model, workers)
    assert len(few) == len(more) == (1 if workers == 1 else 3)
    assert max(more) - max(few) < 64 * 450_000 / 2**20, (few, more)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_huge_document(tmp_path: Path, model: Path, workers: int) -> None:
    """The documentation allows 12 times the size of the text in each worker."""
    small = peaks(tmp_path, huge(tmp_path / "small.jsonl", 2**20), model, workers)
    large = peaks(tmp_path, huge(tmp_path / "large.jsonl", 2**25), model, workers)
    assert len(small) == len(large) == (1 if workers == 1 else 3)
    assert max(large) - max(small) < 12 * 31, (small, large)
