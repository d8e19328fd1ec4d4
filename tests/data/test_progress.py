"""The progress line of a preparation."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_llm.config.prepare import SourceConfig, WorldConfig
from fast_llm.data import progress, ranks
from fast_llm.data.claims import Claims
from fast_llm.data.documents import Corpus, open_documents
from fast_llm.data.files import find
from fast_llm.data.prepare import prepare
from fast_llm.data.units import Unit, UnitSummary, UnitTokenizer, divide
from tests.data.preparing import configure


def corpus(path: Path) -> Corpus:
    return open_documents(find(SourceConfig(path=str(path))), 1)


def lines(path: Path, sizes: list[int]) -> None:
    path.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in sizes))


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    code = """
import os, sys
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
from pathlib import Path
from fast_llm.data.progress import Progress
from tests.data.test_progress import corpus
progress = Progress(corpus(Path(sys.argv[1])), [(0, 1)])
progress._write("half done\\n")
progress._write("done\\n")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    assert subprocess.run(command, check=False).returncode == 0


def test_progress(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, size in (("a", 9), ("b", 89), ("c", 399)):  # with one more for each row
        (tmp_path / f"{name}.txt").write_text("x" * size)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = progress.Progress(corpus(tmp_path), [(0, 3)])
    now[0] += 4
    shown.advance(0, 1, 90, 50_000)
    assert capsys.readouterr().err == ""
    now[0] += 4
    shown.advance(1, 2, 90, 50_000)  # two files of three, and a fifth of the bytes
    assert (
        capsys.readouterr().err
        == "20.0 %, 180 documents, 100,000 tokens, 12,500 tokens/s, 0:00:32 left\n"
    )
    with caplog.at_level(logging.INFO):
        shown.finish()
    assert "Tokenized 180 documents: 100,000 tokens in 8.0 s, 12,500 tokens/s." in caplog.text
    shown.terminal = True
    monkeypatch.setenv("COLUMNS", "40")
    now[0] += 1
    shown.advance(2, 3, 90, 50_000)
    err = capsys.readouterr().err
    assert err.startswith("\r\x1b[K100.0 %") and len(err) == 4 + 39


def test_files_of_tables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(tmp_path / "a.jsonl", [1000] * 100)
    lines(tmp_path / "b.jsonl", [1000] * 300)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = progress.Progress(corpus(tmp_path), [(0, 400)])
    now[0] += 10
    shown.advance(0, 250, 250, 1000)  # over the border of the files
    line = capsys.readouterr().err
    assert line.startswith("62.5 %, ") and "; b.jsonl 50 %, 1 of 2 files\n" in line
    # A preparation that resumes counts only what was left; units come in any order.
    shown = progress.Progress(corpus(tmp_path), [(50, 100), (300, 400)])
    now[0] += 10
    shown.advance(300, 350, 50, 1000)
    line = capsys.readouterr().err
    assert line.startswith("33.3 %, ") and "; b.jsonl 50 %, 0 of 2 files\n" in line


def test_bytes_follow_the_blocks_of_a_file(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [100] * 30_000 + [100_000] * 60)
    size = progress.TextSize(corpus(tmp_path / "a.jsonl"))
    share = size.between(0, 30_000) / size.between(0, 30_060)
    # 3.4 of 9.4 MB, known to a block of a megabyte; it is 0.998 of the rows.
    assert share == pytest.approx(3.4 / 9.4, abs=1 / 9.4 + 0.01)
    assert [part for part, _ in size.by_part(5, 30_001)] == [0]


def test_one_rank_shows_the_progress_of_all(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another one shows it when the first has ended. Each logs what it did itself."""
    lines(tmp_path / "a.jsonl", [1000] * 5000)
    monkeypatch.setattr(progress.Progress, "due", True)
    caplog.set_level(logging.INFO)
    held = {ranks._PROGRESS: True}  # by another process
    take, tokenize = Claims.take, UnitTokenizer.__call__
    monkeypatch.setattr(
        Claims, "take", lambda claims, number: not held.get(number) and take(claims, number)
    )

    def slowly(worker: UnitTokenizer, unit: Unit) -> UnitSummary:
        if unit.number == 4:  # the third one of this rank
            held.clear()
            # As another rank would: this one must not do it again.
            for other in (1, 2):
                tokenize(worker, units[other])
        return tokenize(worker, unit)

    config = configure(tmp_path / "out", tmp_path / "a.jsonl", model)
    config = config.model_copy(
        update={"distributed": WorldConfig(world_size=4, rank=3), "tokens_per_shard": 10**9}
    )
    units = divide(corpus(tmp_path / "a.jsonl"))
    assert len(units) == 5
    monkeypatch.setattr(UnitTokenizer, "__call__", slowly)
    prepare(config)
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith("100.0 %, 5,000 documents, ")
    assert len(shown) == 3, shown  # units 1 and 2, of the other rank, and 4
    done_here = sum(unit.last - unit.first for unit in units if unit.number not in (1, 2))
    assert f"Tokenized {done_here:,} documents: " in caplog.text
