"""The progress line of a preparation."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_llm.data import progress


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    code = """
import os, sys
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
from fast_llm.data.progress import Progress
progress = Progress(10)
progress._write("half done\\n")
progress._write("done\\n")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = progress.Progress(1000)
    now[0] += 4
    shown.advance(100, 90, 50_000)
    assert capsys.readouterr().err == ""
    now[0] += 4
    shown.advance(100, 90, 50_000)
    assert (
        capsys.readouterr().err
        == "20.0 %, 180 documents, 100,000 tokens, 12,500 tokens/s, 0:00:32 left\n"
    )
    with caplog.at_level(logging.INFO):
        shown.finish()
    assert "Tokenized 180 documents: 100,000 tokens in 8.0 s, 12,500 tokens/s." in caplog.text
    shown.terminal = True
    now[0] += 1
    shown.advance(700, 90, 50_000)
    assert capsys.readouterr().err.startswith("\r\x1b[K90.0 %")
