"""The search for evaluations' texts beside a run: none waits for another too long, none is twice.

tests/real runs it with lm-eval.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from fast_llm.evaluation.contamination import Ngrams
from fast_llm.training.scoring import Interrupted
from fast_llm.training.task_evaluation import Search, TaskEvaluator
from tests.evaluation.test_contamination import token_file
from tests.helpers import spawn


def waiting(folder: Path, stops: bool) -> tuple[int, bool]:
    """How often this process has reported to the watchdog, and whether it was stopped.

    The search of the first process ends after the third time. `stops`: the second process has got
    a signal.
    """
    rank = int(os.environ["RANK"])
    search = Search("quick", Ngrams({}), folder / "result")
    beats: list[str] = []

    def heartbeat(phase: str, slow: bool = False) -> None:
        assert slow
        beats.append(phase)
        if len(beats) == 3:
            search.close()

    given: Any = SimpleNamespace(
        evaluations={"quick": SimpleNamespace(search=search)},
        scorer=SimpleNamespace(stop=lambda: stops and rank == 1),
        mesh=SimpleNamespace(slow_group=dist.group.WORLD),
        heartbeat=heartbeat,
    )
    if rank == 0:  # ends when its input does
        command = [sys.executable, "-c", "input()"]
        search.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        TaskEvaluator._wait_for_search(given, "quick" if rank == 0 else None)
    except Interrupted:
        return len(beats), True
    finally:
        search.close()
    return len(beats), False


def test_all_processes_wait_and_live(tmp_path: Path) -> None:
    assert spawn(2, waiting, tmp_path, False) == [(3, False), (3, False)]


def test_a_signal_of_any_process_ends_the_wait(tmp_path: Path) -> None:
    assert spawn(2, waiting, tmp_path, True) == [(0, True), (0, True)]


def test_the_same_texts_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two evaluations with the same tasks, such as without and with few-shot examples."""
    document = np.random.default_rng(0).integers(0, 1000, 500)
    file = token_file(tmp_path / "tokens", [document])
    ngrams = Ngrams({"task": [[document[10:50].tolist()]]})
    monkeypatch.setattr("fast_llm.evaluation.texts.ngrams_of", lambda *_: ngrams)
    split = SimpleNamespace(sources=[SimpleNamespace(files=[file])])
    spec: Any = SimpleNamespace(dataset=SimpleNamespace(splits={"training": split}))
    tokenizer: Any = None
    found: list[Search] = []
    for name in ("without", "with"):
        search = Search.start(name, spec, tmp_path, {}, None, tokenizer, found)
        assert search is not None
        found.append(search)
    assert found[0].process is not None and found[0].process is found[1].process
    assert found[0].process.wait(60) == 0
    for search in found:
        assert search.result()["task"].found == 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    later = Search.start("later", spec, tmp_path, {}, None, tokenizer)
    assert later is not None and later.process is None and later.result()["task"].found == 1
