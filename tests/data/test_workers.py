"""Any number of worker processes writes the same bytes; none survives a kill."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_llm.data import workers
from fast_llm.data.prepare import prepare
from fast_llm.data.tokenfile import TokenFile
from tests.data import synthetic
from tests.data.preparing import (
    all_gone,
    configure,
    content,
    everything,
    jsonl,
    read,
    start,
    tokens,
    worker_processes,
)


def test_number_of_workers_changes_nothing(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for count in (1, 3):
        output = tmp_path / str(count)
        metadata = prepare(configure(output / "data", large, model, tokenize_workers=count))
        results.append(everything(output))
    described = content(metadata)
    assert len(described["datasets"]) > 5
    # A token file ends with the document that fills it.
    for entry in described["datasets"][:-1]:
        lengths = TokenFile(metadata.parent / entry["prefix"]).lengths
        assert entry["num_tokens"] - int(lengths[-1]) < 100_000 <= entry["num_tokens"]
    assert sum(entry["weight"] for entry in described["datasets"]) == pytest.approx(1, abs=1e-12)
    assert described["skipped"] == {"empty": 2, "not_utf8": 1}
    assert described["skipped_examples"][1] == [f"{large}/0200.py", "not_utf8"]
    assert results[0] == results[1]
    # Nor does how much a worker is given at a time.
    monkeypatch.setattr(workers, "RANGE_BYTES", 5_000)
    prepare(configure(tmp_path / "4" / "data", large, model, tokenize_workers=2))
    assert everything(tmp_path / "4") == results[0]
    texts = [
        text
        for path in sorted(large.iterdir())
        if (text := path.read_text(errors="ignore")) and "UTF" not in text
    ]
    assert read(metadata) == tokens(model, texts)


def test_killed_again_and_again(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOWLY", "1")
    prepare(configure(tmp_path / "whole" / "data", large, model))
    output = tmp_path / "killed" / "data"
    draw = random.Random(0)
    kills = 0
    for attempt in range(30):
        before = len(list(output.glob("shard_*.json")))
        process = start(tmp_path, output, large, model, f"tokenize_workers={1 + attempt % 2}")
        # Two of three times it gets somewhere first.
        while (
            process.poll() is None
            and attempt % 3
            and len(list(output.glob("shard_*.json"))) <= before
        ):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1 if attempt % 3 else 0.8))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)  # not its workers: they must notice
        process.wait()
        all_gone(process.pid)
        process.communicate()
        kills += 1
    assert process.returncode == 0, process.communicate()
    assert kills >= 5
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_interrupted(
    tmp_path: Path, large: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOWLY", "1")
    process = start(tmp_path, tmp_path / "data", large, model, "tokenize_workers=2")
    while not (tmp_path / "data" / "shard_0_0.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the workers too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("fast-llm prepare: stopped by SIGINT; the same command resumes it\n")
    assert "Traceback" not in stderr
    assert not list((tmp_path / "data").glob("*.partial"))


@pytest.mark.parametrize("way", ["forked", "spawned"])
def test_worker_that_is_killed(
    tmp_path: Path, large: Path, model: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAWN" if way == "spawned" else "SLOWLY", "1")
    process = start(tmp_path, tmp_path / "data", large, model, "tokenize_workers=2")
    worker, words, loaded = "", "", ""
    # Before it executes its program, a spawned process is a copy of its parent.
    while "tokenizers" not in loaded or ("spawn_main" in words) != (way == "spawned"):
        assert process.poll() is None, process.communicate()
        for worker in worker_processes(process)[:1]:
            words = Path(f"/proc/{worker}/cmdline").read_text()
            loaded = Path(f"/proc/{worker}/maps").read_text()
    assert "libtorch" not in loaded
    os.kill(int(worker), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert (
        "a worker process died, most likely because memory ran out; lower tokenize_workers (now 2)"
        in stderr
    )


def test_worker_that_is_killed_in_the_midst_of_an_answer(
    tmp_path: Path, large: Path, model: Path
) -> None:
    for number in range(4):  # enough to do
        shutil.copytree(large, tmp_path / "source" / str(number))
    process = start(tmp_path, tmp_path / "data", tmp_path / "source", model, "tokenize_workers=2")

    def computed() -> dict[str, int]:
        """Ticks that each worker has computed."""
        found = {}
        for worker in worker_processes(process):
            fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
            found[worker] = sum(map(int, fields[11:13]))
        return found

    while not (tmp_path / "data" / "shard_0_0.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    # An answer is longer than what a pipe holds, so both stop in the middle of one.
    before: dict[str, int] = {}
    while (now := computed()) != before:
        before = now
        time.sleep(0.5)
    assert len(now) == 2
    os.kill(int(min(now)), signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2, stderr
    assert (
        "a worker process died, most likely because memory ran out; lower tokenize_workers (now 2)"
        in stderr
    )
    all_gone(process.pid)


_WITH_TROUBLE = """
import multiprocessing, os, resource, signal, sys, threading, time
from multiprocessing import util
from fast_llm import cli
from fast_llm.data import shards, workers

workers.RANGE_BYTES = 40_000

def signal_while_starting():
    # To another thread, which Python's handlers never run in.
    other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
    other.start()
    begin = util.spawnv_passfds
    def begun(path, words, files):
        process = begin(path, words, files)
        if "spawn_main" in str(words):
            signal.pthread_kill(other.ident, signal.SIGTERM)
            time.sleep(0.1)
        return process
    util.spawnv_passfds = begun

def killed_at_birth():
    def begun(self):
        raise BrokenPipeError
    multiprocessing.context.ForkProcess.start = begun

def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

def killed_as_they_leave():
    fill = shards.write_range
    def filled(*given):
        skipped = fill(*given)
        for worker in multiprocessing.active_children()[:2]:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        return skipped
    shards.write_range = filled

class Broken(workers.RangeTokenizer):
    def __init__(self, *parts):
        raise OSError(5, "the table is gone")

def endless(worker, task):
    open(f"{__file__}.{os.getpid()}", "w").close()
    time.sleep(200)

if sys.argv[-1].startswith("endless"):
    workers.RangeTokenizer.tokenize = endless
if __name__ == "__main__":
    if sys.argv[-1] in ("unmade", "endless, spawned"):  # not forked, with another thread
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    if sys.argv[-1] in globals() and sys.argv[-1] != "endless":
        globals()[sys.argv[-1]]()
    sys.exit(cli.main(sys.argv[1:-1]))
elif sys.argv[-1] == "unmade":
    workers.RangeTokenizer = Broken
"""


def _troubled(
    folder: Path, source: Path, model: Path, trouble: str, workers: int
) -> subprocess.Popen[str]:
    script = folder / "command.py"
    script.write_text(_WITH_TROUBLE)
    settings = [f"output_path={folder}/data", f"dataset.path={source}", f"tokenizer.path={model}"]
    return subprocess.Popen(
        [sys.executable, str(script), "prepare", *settings, f"tokenize_workers={workers}", trouble],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("trouble", "code", "said"),
    [
        (
            "signal_while_starting",
            143,
            "stopped by SIGTERM; the same command resumes it",
        ),
        ("killed_at_birth", 2, "a worker process died"),
        ("killed_as_they_leave", 0, "data.json: "),
        (
            "few_files",
            2,
            r"tokenize_workers: only \d+ of 30 worker processes could be started: .*open"
            r" files.*lower",
        ),
        ("unmade", 1, "the table is gone"),
    ],
)
def test_trouble_with_workers(
    tmp_path: Path, large: Path, model: Path, trouble: str, code: int, said: str
) -> None:
    process = _troubled(tmp_path, large, model, trouble, 30 if trouble == "few_files" else 3)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert re.search(said, stderr), stderr
    assert "Traceback" not in stderr and "leaked" not in stderr
    all_gone(process.pid)


@pytest.mark.parametrize("trouble", ["endless", "endless, spawned"])
def test_workers_of_a_parent_that_is_killed_finish_nothing(
    tmp_path: Path, large: Path, model: Path, trouble: str
) -> None:
    """A range may take minutes, and gigabytes."""
    process = _troubled(tmp_path, large, model, trouble, 3)
    while len(list(tmp_path.glob("command.py.*"))) < 3:  # all have begun
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    all_gone(process.pid)
    process.communicate()


def test_table_with_workers_and_without_torch(tmp_path: Path, model: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([synthetic.text(seed, 3000) for seed in range(100)]))
    process = start(
        tmp_path, tmp_path / "1" / "data", tmp_path / "a.jsonl", model, "tokenize_workers=2"
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stdout == "False\n"
    assert "Tokenized 100 documents" in stderr and "tokens/s" in stderr
    assert "data.json: 100 documents" in stderr
    prepare(configure(tmp_path / "2" / "data", tmp_path / "a.jsonl", model))
    assert everything(tmp_path / "1") == everything(tmp_path / "2")
